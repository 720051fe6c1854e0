"""Tiny random CLIP folders, as wide as a model's vision tower, and the words of models that have no tokenizer."""

import tempfile
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from dynamic_llava.model import text_tower

PUBLISHED = "openai/clip-vit-large-patch14-336"
SHARED, READS = 12, 16
"""Size of the shared space; tokens that the text tower reads at most."""


@lru_cache(maxsize=16)
def tiny_clip(width):
    """Return the folder of a CLIP whose vision tower is so wide; it goes with the process."""
    kept = tempfile.TemporaryDirectory(prefix="clip_")
    _FOLDERS.append(kept)
    return write_clip(kept.name, width)


_FOLDERS = []


@contextmanager
def published_is_tiny():
    """Open a tiny CLIP where a method names the published one, and let models without a tokenizer speak in words.

    So the methods that read CLIP's text tower run at their default settings wherever a method is drawn.
    """
    opened, tokenizer = text_tower.open_clip, text_tower.open_tokenizer

    def open_clip(source, *fit):
        return opened(str(tiny_clip(fit[0])) if source == PUBLISHED else source, *fit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_tower, "open_clip", open_clip)
        patch.setattr(text_tower, "open_tokenizer", lambda source: tokenizer_or_words(source, tokenizer))
        yield


def write_clip(folder, width, seed=0):
    """Write a random CLIP and its tokenizer, which spells texts byte by byte; returns the folder."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    sizes = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    start, end = len(words) - 2, len(words) - 1
    text = {"hidden_size": 16, "vocab_size": len(words), "max_position_embeddings": READS, **sizes}
    config = CLIPConfig(
        text_config={**text, "bos_token_id": start, "eos_token_id": end, "pad_token_id": end},
        vision_config={"hidden_size": width, "image_size": 4, "patch_size": 2, **sizes},
        projection_dim=SHARED,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.4) if parameter.dim() > 1 else parameter.add_(0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


class Words:
    """A tokenizer for models without one: each id is a word."""

    def decode(self, ids, skip_special_tokens):
        """Return "w5 w7" for [5, 7]."""
        assert skip_special_tokens
        return " ".join(f"w{one}" for one in ids)


def tokenizer_or_words(source, opened):
    """Return what `opened` finds in a folder or hub name, and words where it holds no tokenizer."""
    has_one = source and (Path(source) / "tokenizer_config.json").is_file()
    return opened(source) if has_one else Words()
