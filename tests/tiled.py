"""Tiny random LLaVA-NeXTs, their batches of images of any size, and transformers' own class of the same weights."""

from functools import lru_cache

import torch
from transformers import LlavaNextForConditionalGeneration

from dynamic_llava.projectors import Tiling
from tests.builders import (
    BOS,
    IMAGE_SIZE,
    IMAGE_TOKEN,
    PAD,
    PATCH,
    build_model,
    dense_twin,
    words,
)

PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
"""LLaVA-NeXT's own resolutions in tiles of 56 pixels."""
TILING = Tiling(IMAGE_SIZE, PATCH, tuple(map(tuple, PINPOINTS)))
SIZES = {"square": (56, 56), "wide": (30, 110), "tall": (200, 61), "small": (9, 13), "narrow": (300, 40)}
"""Heights and widths of images: of two, three and five tiles, padded above, beside and not at all."""
ROWS = (("wide",), ("square", "tall"), (), ("small", "narrow", "wide"))
"""Images of each row of a batch; neighbours where a row has several."""


@lru_cache(maxsize=8)
def next_model(attention="sdpa", family="llama", **settings):
    """Return a random LLaVA-NeXT that several tests share; nothing may write to it."""
    return build_model(attention=attention, family=family, image_grid_pinpoints=PINPOINTS, **settings)


def next_twin(model):
    """Return transformers' own LLaVA-NeXT with the very same weights and attention implementation."""
    return dense_twin(model, LlavaNextForConditionalGeneration, image_grid_pinpoints=PINPOINTS)


def tiles_of(names, seed=0):
    """Return the random tiles of each image, (tiles, 3, S, S); an image of a name has the same in every batch."""
    made = []
    for name in names:
        generator = torch.Generator().manual_seed(seed + list(SIZES).index(name))
        made.append(torch.randn(TILING.tiles(SIZES[name]), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator))
    return made


def pixels_of(names, filled=True, seed=0):
    """Return what a call is given for images: filled up to the most tiles, or one image's tiles behind the other's."""
    if not names:
        return {}
    tiles = tiles_of(names, seed)
    pixels = torch.nn.utils.rnn.pad_sequence(tiles, batch_first=True) if filled else torch.cat(tiles)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([SIZES[name] for name in names])}


def batch_of(rows=ROWS, side="left", answer=6, filled=True, seed=3):
    """Return ids, masks and images of rows that begin with a word and end in a question and an answer."""
    generator, made = torch.Generator().manual_seed(seed), []
    for row in rows:
        length = sum(TILING.tokens(SIZES[name]) for name in row)
        text = words(3 + answer, generator)
        ids = torch.cat([torch.tensor([BOS]), text[:1], torch.full((length,), IMAGE_TOKEN), text[1:]])
        made.append((ids, torch.ones_like(ids), torch.arange(len(ids)) >= len(ids) - answer))
    width = max(len(ids) for ids, _, _ in made)

    def pad(values, filler):
        missing = width - len(values)
        return torch.nn.functional.pad(values, (missing, 0) if side == "left" else (0, missing), value=filler)

    columns = [torch.stack([pad(row[place], filler) for row in made]) for place, filler in enumerate((PAD, 0, False))]
    batch = dict(zip(("input_ids", "attention_mask", "output_mask"), columns, strict=True))
    return batch | pixels_of([name for row in rows for name in row], filled)


def row_alone(batch, number, rows=ROWS):
    """Return one row of a batch without padding, with its own images."""
    real = batch["attention_mask"][number].bool()
    masks = {name: batch[name][number : number + 1, real] for name in ("input_ids", "attention_mask", "output_mask")}
    return masks | pixels_of(rows[number])


def newlines_of(names):
    """(T,) bool: which of the tokens of these images are newlines."""
    return torch.tensor([mark for name in names for mark in TILING.newlines(SIZES[name])], dtype=torch.bool)
