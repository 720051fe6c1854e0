"""The page of a look: one file of HTML that asks nothing of any network and runs no script.

Every text comes in by `_text`, which escapes it; pictures are in the file. Colours follow the reader's dark or light
setting, and everything fits into 400 pixels.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from itertools import chain

import numpy as np
from PIL import Image

from dynamic_llava.chat.terminal import Piece
from dynamic_llava.look.looking import Looked, PatchGrid, Sight
from dynamic_llava.viz import style
from dynamic_llava.viz.cache_growth import DENSE_CALCULATED
from dynamic_llava.viz.patches import PatchView, drawn, fade_dropped, heat_map

PICTURE_SIDE = 560
"""Pixels of the longest side of a picture."""
_CHART = (420, 260)
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 40


def page_of(found: Looked, lines: Mapping[str, Sequence[float]]) -> str:
    """Return the page. lines: lengths of caches by name, as `draw_cache_growth` takes them."""
    first = found.sights[0].turns[0].question
    css = resources.files("dynamic_llava.look").joinpath("page.css").read_text(encoding="utf-8")
    body = [
        "<h1>What was kept</h1>",
        f'<p class="quiet">{_text(found.model)} on {_text(found.device)}</p>',
        *chain.from_iterable(_image(found, place) for place in range(len(found.images))),
        *chain.from_iterable(_turn(found, place) for place in range(len(found.sights[0].turns))),
        *_growth(lines),
        *_table(found.sights),
        *_about(found),
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            # The page asks for nothing, and this holds even if a text were not escaped.
            """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; """
            """style-src 'unsafe-inline'">""",
            f"<title>What was kept: {_text(first)}</title>",
            f"<style>\n{css}</style></head><body><main>",
            *body,
            "</main></body></html>\n",
        ]
    )


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


def _text(text: object) -> str:
    return escape(str(text), quote=True)


def _image(found: Looked, place: int) -> list[str]:
    name, image = found.images[place]
    title = f"Image {place + 1}: {name}" if len(found.images) > 1 else name
    out = [f"<section><h2>{_text(title)}</h2>", '<div class="row">']
    pixels = drawn(image, PICTURE_SIDE)
    out.append(_figure(pixels, f"The image {name}", f"the image, {image.width} x {image.height} pixels"))
    for sight in found.sights if found.grid is not None else ():
        out += _patches(
            sight, place, name, pixels, PatchView(image.size, (found.grid.rows, found.grid.columns)), found.grid
        )
    if found.grid is None:
        counts = ", ".join(
            f"{_text(one.label)} {len(one.kept[place])} of {one.image_tokens[place]}" for one in found.sights
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
    data = base64.b64encode(file.getvalue()).decode("ascii")
    height, width = pixels.shape[:2]
    picture = f'<img alt="{_text(alt)}" width="{width}" height="{height}" src="data:image/png;base64,{data}">'
    return f"<figure>{picture}<figcaption>{_text(caption)} {more}</figcaption></figure>"


def _turn(found: Looked, place: int) -> list[str]:
    out = [f"<section><h2>{_text(found.sights[0].turns[place].question)}</h2>", '<div class="row">']
    for sight in found.sights:
        turn = sight.turns[place]
        out.append(f"<article><h3>{_text(sight.label)}</h3>")
        out.append(f'<p class="answer">{_greyed(turn.pieces)}</p>')
        out.append(f'<p class="quiet">{_text(turn.counts)}</p></article>')
    return [*out, "</div></section>"]


def _greyed(pieces: Sequence[Piece]) -> str:
    return "".join(
        f'<span class="dropped">{_text(piece.text)}</span>' if piece.dropped else _text(piece.text) for piece in pieces
    )


def _growth(lines: Mapping[str, Sequence[float]]) -> list[str]:
    """Draw the chart as SVG in the page, so that its colours follow the reader's."""
    width, height = _CHART
    longest, most = max(map(len, lines.values())), max(map(max, lines.values()))
    across, up = (width - _LEFT - _RIGHT) / max(longest - 1, 1), (height - _TOP - _BOTTOM) / most
    ends = ", ".join(f"{name} {values[-1]:,.0f}" for name, values in lines.items())
    about = f"Tokens in the cache of the last layers over generated tokens; at the end: {ends}"
    out = [
        "<section><h2>The cache as the answer grows</h2>",
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_text(about)}"><title>{_text(about)}</title>',
    ]
    step = next(one * 10**power for power in range(9) for one in (1, 2, 5) if one * 10**power * 5 >= most)
    for value in range(0, int(most) + 1, step):
        y = height - _BOTTOM - value * up
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:,}</text>')
    for x, number, anchor in ((_LEFT, 1, "start"), (width - _RIGHT, longest, "end")):
        out.append(f'<text x="{x}" y="{height - _BOTTOM + 16}" text-anchor="{anchor}">{number}</text>')
    middle = (width + _LEFT) / 2
    out.append(f'<text x="{middle:.0f}" y="{height - 6}" text-anchor="middle">generated tokens</text>')
    keys = []
    for name, look in style.looks(lines).items():
        points = " ".join(
            f"{_LEFT + step * across:.1f},{height - _BOTTOM - value * up:.1f}" for step, value in enumerate(lines[name])
        )
        dashes = "6 4" if name == DENSE_CALCULATED else _dashes(look)
        stroke = f'style="stroke:{look.color}" stroke-dasharray="{dashes}"'
        out.append(f'<polyline class="line" points="{points}" {stroke}/>')
        swatch = f'<line class="line" x2="24" y1="4" y2="4" {stroke}/>'
        swatch = f'<svg class="key" viewBox="0 0 24 8" aria-hidden="true">{swatch}</svg>'
        keys.append(f"<li>{swatch} {_text(name)}: {lines[name][-1]:,.0f} tokens at the end</li>")
    return [*out, "</svg>", f'<ul class="keys">{"".join(keys)}</ul></section>']


def _dashes(look: style.Look) -> str:
    return "none" if isinstance(look.dashes, str) else " ".join(f"{2 * one:g}" for one in look.dashes[1])  # type: ignore[index]


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
        rows.append(
            f'<tr><th scope="row">{_text(sight.label)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        )
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return [f'<section><h2>In numbers</h2><div class="wide">{table}</div></section>']


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
    methods = [f"<li><b>{_text(sight.label)}</b>: {_text(sight.described)}</li>" for sight in found.sights]
    return [
        "<section><h2>How to read this</h2>",
        *(f"<p>{line}</p>" for line in lines),
        f'<ul class="quiet">{"".join(methods)}</ul></section>',
    ]
