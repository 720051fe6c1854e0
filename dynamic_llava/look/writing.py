"""What a look leaves behind: the page, the pictures as PNG, SVG and PDF, and the numbers."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dynamic_llava.files import replace_file, writing
from dynamic_llava.look.looking import SCENE, Looked, PatchGrid, Sight
from dynamic_llava.look.page import page_of, patch_caption, share_titles
from dynamic_llava.provenance import environment
from dynamic_llava.viz.cache_growth import DENSE_CALCULATED, draw_cache_growth
from dynamic_llava.viz.greyed_answers import GreyedAnswer, draw_greyed_answers
from dynamic_llava.viz.kept_patches import PatchChoice, draw_kept_patches
from dynamic_llava.viz.patches import PatchView, drawn_size

PAGE = "index.html"
NUMBERS = "look.json"
_ALSO = (".svg", ".pdf")


def write_all(found: Looked, folder: Path) -> Path:
    """Write page, pictures and numbers into a folder, which is made; returns the page. WriteError where it cannot."""
    with writing(folder), warnings.catch_warnings():
        # Letters that the pictures' typeface lacks are boxes there, and right in the page, which uses the reader's.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        folder.mkdir(parents=True, exist_ok=True)
        for name, image in found.images:
            if name == SCENE:
                image.save(folder / SCENE)
        if found.grid is not None:
            _draw_kept(found, found.grid, folder / "kept.png")
        answers = [
            GreyedAnswer(None, (), turn.question, *_words(turn.pieces), title=sight.label, share=turn.counts)
            for turns in zip(*(sight.turns for sight in found.sights), strict=True)
            for sight, turn in zip(found.sights, turns, strict=True)
        ]
        draw_greyed_answers(folder / "answers.png", answers, (1, 1), title="What stays of the answers", also=_ALSO)
        title = "Tokens in the cache of the last layers"
        draw_cache_growth(folder / "cache.png", cache_lines(found.sights), title=title, unit="tokens", also=_ALSO)
        replace_file(folder / NUMBERS, json.dumps(_numbers(found), indent=1) + "\n")
        replace_file(folder / PAGE, page_of(found, cache_lines(found.sights)))
    return folder / PAGE


def cache_lines(sights: Sequence[Sight]) -> dict[str, list[int]]:
    """Return the lengths of the caches by method, and that of a dense one where no method that ran is dense."""
    lines = {sight.label: sight.sparse_lengths for sight in sights}
    if all(sight.sparse_lengths != sight.dense_lengths for sight in sights):
        lines = {DENSE_CALCULATED: max((sight.dense_lengths for sight in sights), key=len)} | lines
    return lines


def _draw_kept(found: Looked, grid: PatchGrid, path: Path) -> None:
    cells = grid.rows, grid.columns
    views = [PatchView(image.size, cells) for _, image in found.images]
    choices = []
    for sight in found.sights:
        patches = [grid.patches(kept) for kept in sight.kept]
        captions = [patch_caption(kept, view, drawn_size(view.size)) for kept, view in zip(patches, views, strict=True)]
        choices.append(PatchChoice(sight.label, patches, captions=captions))
        for title, heat in share_titles(sight):
            shares, blank = [each[grid.first :] for each in heat], [""] * len(patches)
            choices.append(PatchChoice(title, patches, shares, blank))
    images = [image for _, image in found.images]
    draw_kept_patches(path, images, choices, cells, title="What the last layers see", beside=True, also=_ALSO)


def _words(pieces: Sequence[Any]) -> tuple[list[str], list[bool]]:
    return [piece.text for piece in pieces], [not piece.dropped for piece in pieces]


def _numbers(found: Looked) -> dict[str, Any]:
    images = [{"name": name, "width": image.width, "height": image.height} for name, image in found.images]
    sights = []
    for sight in found.sights:
        values = asdict(sight)
        for turn, one in zip(values["turns"], sight.turns, strict=True):
            turn["pieces"] = [{"text": piece.text, "dropped": piece.dropped} for piece in one.pieces]
        sights.append(values)
    return {
        "model": found.model,
        "device": found.device,
        "images": images,
        "grid": None if found.grid is None else asdict(found.grid),
        "methods": sights,
        "environment": environment(),
    }
