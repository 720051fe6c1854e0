"""The page of a look: what each method keeps of images and answers, in one file (viz/page.py)."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
from PIL import Image

from dynamic_llava.chat.terminal import Piece
from dynamic_llava.look.looking import Looked, PatchGrid, Sight
from dynamic_llava.viz.cache_growth import DENSE_CALCULATED
from dynamic_llava.viz.page import document, escaped, figure, section, table
from dynamic_llava.viz.page_charts import line_chart, lines_by_meaning
from dynamic_llava.viz.patches import PatchView, drawn, fade_dropped, heat_map

PICTURE_SIDE = 560
"""Pixels of the longest side of a picture."""


def page_of(found: Looked, lines: Mapping[str, Sequence[float]]) -> str:
    """Return the page. lines: lengths of caches by name, as `draw_cache_growth` takes them."""
    first = found.sights[0].turns[0].question
    body = [
        "<h1>What was kept</h1>",
        f'<p class="quiet">{escaped(found.model)} on {escaped(found.device)}</p>',
        *chain.from_iterable(_image(found, place) for place in range(len(found.images))),
        *chain.from_iterable(_turn(found, place) for place in range(len(found.sights[0].turns))),
        *_growth(lines),
        *_table(found.sights),
        *_about(found),
    ]
    return document(f"What was kept: {first}", body)


def share_titles(sight: Sight) -> list[tuple[str, list[list[float]]]]:
    """Return the heat maps that a method has, title and values per image and token.

    The keep probability where it decides by one; the share of layers that see a patch where it decides more than once.
    """
    if sight.chance is not None:
        return [("keep probability", sight.chance)]
    if len({value for image in sight.seen for value in image}) > 2:
        return [("share of layers that see it", sight.seen)]
    return []


def patch_caption(kept: Sequence[int], view: PatchView, drawn_as: tuple[int, int]) -> str:
    """Say how many patches are kept, and how many of them cannot be seen in a drawing of that width and height."""
    hidden = len(view.hidden(*drawn_as) & set(kept))
    return f"{len(kept)} of {view.count} kept" + (f", {hidden} of them in the padding" if hidden else "")


def _image(found: Looked, place: int) -> list[str]:
    name, image = found.images[place]
    title = f"Image {place + 1}: {name}" if len(found.images) > 1 else name
    out = [f"<section><h2>{escaped(title)}</h2>", '<div class="row">']
    pixels = drawn(image, PICTURE_SIDE)
    out.append(_figure(pixels, f"The image {name}", f"the image, {image.width} x {image.height} pixels"))
    for sight in found.sights if found.grid is not None else ():
        out += _patches(
            sight, place, name, pixels, PatchView(image.size, (found.grid.rows, found.grid.columns)), found.grid
        )
    if found.grid is None:
        counts = ", ".join(
            f"{escaped(one.label)} {len(one.kept[place])} of {one.image_tokens[place]}" for one in found.sights
        )
        out.append(f"<p>Here are image tokens of no place, so none is drawn. Tokens kept: {counts}.</p>")
    return [*out, "</div></section>"]


def _patches(sight: Sight, place: int, name: str, pixels: np.ndarray, view: PatchView, grid: PatchGrid) -> list[str]:
    kept = grid.patches(sight.kept[place])
    said = patch_caption(kept, view, (pixels.shape[1], pixels.shape[0]))
    shown = fade_dropped(pixels, kept, view.grid, view.size)
    rest = ", the other patches faded" if len(kept) < view.count else ""
    out = [_figure(shown, f"{name} by {sight.label}: {said}{rest}", f"{sight.label}: {said}")]
    for title, heat in share_titles(sight):
        values = heat[place][grid.first :]
        low, high = f"{min(values):.2f}", f"{max(values):.2f}"
        alt = f"{name} by {sight.label}, {title}: a colour on each patch, from {low} to {high}"
        painted = heat_map(pixels, values, view.grid, view.size)
        scale = '<span class="scale" aria-hidden="true"></span> 0 to 1'
        out.append(_figure(painted, alt, f"{sight.label}, {title}: {low} to {high}", scale))
    return out


def _figure(pixels: np.ndarray, alt: str, caption: str, more: str = "") -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return figure(file.getvalue(), alt, caption, more)


def _turn(found: Looked, place: int) -> list[str]:
    out = [f"<section><h2>{escaped(found.sights[0].turns[place].question)}</h2>", '<div class="row">']
    for sight in found.sights:
        turn = sight.turns[place]
        out.append(f"<article><h3>{escaped(sight.label)}</h3>")
        out.append(f'<p class="answer">{_greyed(turn.pieces)}</p>')
        out.append(f'<p class="quiet">{escaped(turn.counts)}</p></article>')
    return [*out, "</div></section>"]


def _greyed(pieces: Sequence[Piece]) -> str:
    return "".join(
        f'<span class="dropped">{escaped(piece.text)}</span>' if piece.dropped else escaped(piece.text)
        for piece in pieces
    )


def _growth(lines: Mapping[str, Sequence[float]]) -> list[str]:
    ends = ", ".join(f"{name} {values[-1]:,.0f}" for name, values in lines.items())
    about = f"Tokens in the cache of the last layers over generated tokens; at the end: {ends}"
    curves = {name: [(step, value) for step, value in enumerate(values, 1)] for name, values in lines.items()}
    drawn_lines = [
        replace(line, note=f"{lines[line.name][-1]:,.0f} tokens at the end")
        for line in lines_by_meaning(curves, dashed=[DENSE_CALCULATED])
    ]
    return section("The cache as the answer grows", line_chart(drawn_lines, about, "generated tokens"))


def _table(sights: Sequence[Sight]) -> list[str]:
    heads = ("method", "image tokens kept", "answer tokens kept", "cache, tokens", "cache, of dense bytes")
    rows = []
    for sight in sights:
        kept, fed = (
            sum(map(count, sight.turns)) for count in (lambda turn: sum(turn.kept), lambda turn: len(turn.kept))
        )
        cells = [
            f"{sum(map(len, sight.kept))} of {sum(sight.image_tokens)}",
            f"{kept} of {fed}",
            f"{sight.use.sparse_tokens} of {sight.use.dense_tokens}",
            f"{100 * sight.use.bytes / sight.use.dense_bytes:.0f} %",
        ]
        rows.append([sight.label, *cells])
    return section("In numbers", [table(heads, rows)])


def _about(found: Looked) -> list[str]:
    lines = [
        'Dark words stay in the cache of the last layers; <span class="dropped">grey words</span> were dropped after '
        "their own step. Nothing decides about an answer's last token.",
        "Faded patches are seen by no layer from the last cut on. An image is padded to a square before it is cut into "
        "patches; the padding is not drawn, and nothing of an image is cut off.",
        "The cache is counted behind a method's last cut; the dense one holds every token.",
    ]
    if any(sight.evicts for sight in found.sights):
        lines.append(
            "A method that evicts drops tokens from each head's cache on the way: pictures and words show what its "
            "layers were given, the chart the mean over layers and heads."
        )
    methods = [f"<li><b>{escaped(sight.label)}</b>: {escaped(sight.described)}</li>" for sight in found.sights]
    return [
        "<section><h2>How to read this</h2>",
        *(f"<p>{line}</p>" for line in lines),
        f'<ul class="quiet">{"".join(methods)}</ul></section>',
    ]
