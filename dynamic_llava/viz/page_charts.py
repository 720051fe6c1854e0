"""Charts as SVG inside a page, so that their colours follow the reader's: curves, and quality against cost."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynamic_llava.viz import style
from dynamic_llava.viz.page import escaped

Points = Sequence[tuple[float, float]]

MOST_POINTS = 400
"""Points of a curve; of more, the lowest and the highest of each stretch are drawn."""
_WIDTH, _HEIGHT = 420, 260
_RIGHT, _TOP, _BOTTOM = 14, 12, 44
_CHARACTER = 7.5
"""Width of a digit on an axis."""
_DASHED = "6 4"
_MARKS = {
    "o": "M{w},{y} a5,5 0 1,0 10,0 a5,5 0 1,0 -10,0 Z",
    "s": "M{w},{n} h10 v10 h-10 Z",
    "^": "M{w},{s} h10 L{x},{n} Z",
    "v": "M{w},{n} h10 L{x},{s} Z",
    "D": "M{w},{y} L{x},{n} L{e},{y} L{x},{s} Z",
    "P": "M{w},{y} m0,-2 h3 v-3 h4 v3 h3 v4 h-3 v3 h-4 v-3 h-3 Z",
}
"""Outline of each of style.MARKS around (x, y); n, s, w and e are 5 pixels away."""


@dataclass(frozen=True)
class ChartLine:
    """One curve."""

    name: str
    points: Points
    """Finite, in the order in which they are joined."""
    color: str
    dashes: str = "none"
    """As stroke-dasharray has it."""
    note: str = ""
    """What the key says behind the name."""


def lines_by_meaning(curves: Mapping[str, Points], *, dashed: Iterable[str] = ()) -> list[ChartLine]:
    """Return curves in the colours of what their names mean (`style.looks`); the `dashed` ones are so."""
    kept = {name: points for name, points in curves.items() if points}
    return [
        ChartLine(name, kept[name], look.color, _DASHED if name in dashed else _dashes(look))
        for name, look in style.looks(kept).items()
    ]


def target_line(name: str, points: Points, color: str) -> ChartLine:
    """Return what a curve of that colour is meant to reach."""
    return ChartLine(name, points, color, _DASHED)


def line_chart(lines: Sequence[ChartLine], about: str, across: str, *, top: float | None = None) -> list[str]:
    """Return a chart of curves from 0 up, with its key; nothing without a curve.

    `about` says in words what it shows, for who cannot see it; `across` names the horizontal axis; `top`: the end of
    the other one where it is not that of the data.
    """
    drawn = [line for line in lines if line.points]
    if not drawn:
        return []
    xs, ys = ([point[axis] for line in drawn for point in line.points] for axis in (0, 1))
    frame = _Frame((min(xs), max(xs)), (min(0.0, *ys), max(ys) if top is None else top))
    out = [_opening(about), *frame.grid(across)]
    keys = []
    for line in drawn:
        points = " ".join(frame.at(x, y) for x, y in _thinned(line.points))
        stroke = f'style="stroke:{line.color}" stroke-dasharray="{line.dashes}"'
        out.append(f'<polyline class="line" points="{points}" {stroke}/>')
        swatch = f'<line class="line" x2="24" y1="4" y2="4" {stroke}/>'
        keys.append((f'<svg class="key" viewBox="0 0 24 8" aria-hidden="true">{swatch}</svg>', line.name, line.note))
    return [*out, "</svg>", _keys(keys)]


def scatter_chart(panel: Mapping[str, Any], names: Mapping[str, style.Look]) -> list[str]:
    """Return a panel of quality against cost (`curves.draw_quality_against_cost`), the better always higher.

    `names`: how each point is drawn. The key names the points and their numbers, so that nothing is told by colour
    alone.
    """
    points, turned = panel["points"], bool(panel["lower_is_better"])
    spreads = [_spread(point) for point in points]
    costs = [float(point["cost"]) for point in points]
    frame = _Frame((min(costs), max(costs)), _padded(min(one[0] for one in spreads), max(one[1] for one in spreads)),
                   turned=turned, pad=0.06)  # fmt: skip
    about = f"{panel['title']}: {panel['quality']}, against {panel['cost']}, of {len(points)} methods"
    out = [_opening(about), *frame.grid(panel["cost"])]
    front = sorted((point["cost"], point["quality"]) for point in points if point["front"])
    steps = [pair for i, (x, y) in enumerate(front) for pair in ([(x, front[i - 1][1])] if i else []) + [(x, y)]]
    if steps:
        out.append(f'<polyline class="front" points="{" ".join(frame.at(x, y) for x, y in steps)}"/>')
    keys = []
    for point, (low, high) in zip(points, spreads, strict=True):
        look, (x, y) = names[point["name"]], frame.place(point["cost"], point["quality"])
        ink = f'style="fill:{look.color};stroke:{look.color}"'
        if high > low:
            ends = [frame.place(point["cost"], end)[1] for end in (low, high)]
            out.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}" {ink}/>')
        said = f"{point['quality']:.4g} at {point['cost']:.4g}"
        title = f"<title>{escaped(point['name'])}: {said}</title>"
        out.append(f'<path class="mark" d="{_mark(look.mark, x, y)}" {ink}>{title}</path>')
        swatch = f'<path class="mark" d="{_mark(look.mark, 7, 7)}" {ink}/>'
        keys.append(
            (f'<svg class="key dot" viewBox="0 0 14 14" aria-hidden="true">{swatch}</svg>', point["name"], said)
        )
    return [*out, "</svg>", _keys(keys)]


class _Frame:
    """Two axes: where a value lies in the drawing, and their lines and numbers."""

    def __init__(
        self, across: tuple[float, float], up: tuple[float, float], *, turned: bool = False, pad: float = 0.0
    ) -> None:
        (low, high), (left, right) = _padded(*up), _padded(*across)
        aside = pad * (right - left)
        self.low, self.high, self.left, self.right = low, high, left - aside, right + aside
        self.turned = turned
        self.rows, self.columns = ticks(low, high), ticks(left, right)
        self.margin = 14 + _CHARACTER * max(len(_number(value)) for value in self.rows)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return where a value lies, in pixels."""
        along = (x - self.left) / (self.right - self.left)
        above = (y - self.low) / (self.high - self.low)
        above = 1 - above if self.turned else above
        wide, tall = _WIDTH - self.margin - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        return self.margin + along * wide, _HEIGHT - _BOTTOM - above * tall

    def at(self, x: float, y: float) -> str:
        """Return that place as a point of a polyline."""
        return "{:.1f},{:.1f}".format(*self.place(x, y))

    def grid(self, across: str) -> list[str]:
        """Return the lines, the numbers and the name of the horizontal axis."""
        out = []
        for value in self.rows:
            y = self.place(self.left, value)[1]
            out.append(f'<line class="grid" x1="{self.margin:.1f}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            out.append(f'<text x="{self.margin - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
        for value in self.columns:
            x = self.place(value, self.low)[0]
            half = _CHARACTER * len(_number(value)) / 2
            x = min(x, _WIDTH - 2 - half)  # a number at the end stays in the drawing
            out.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">{_number(value)}</text>')
        middle = (_WIDTH + self.margin) / 2
        name = f'<text x="{middle:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">{escaped(across)}</text>'
        return [*out, name]


def ticks(low: float, high: float) -> list[float]:
    """Return the round numbers from `low` to `high`, three to six of them."""
    rough = (high - low) / 5
    power = math.floor(math.log10(rough))
    step = next(one * 10.0**power for one in (1, 2, 5, 10) if one * 10.0**power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, 1 - math.floor(math.log10(step)))
    return [round(place * step, digits) for place in range(first, last + 1)]


def finite_points(records: Iterable[Mapping[str, Any]], key: str, scale: float = 1.0) -> list[tuple[float, float]]:
    """Return (step, value) of the records that hold both as finite numbers."""
    found = [(record.get("step"), record.get(key)) for record in records]
    return [(float(step), scale * float(value)) for step, value in found if _is_number(step) and _is_number(value)]


def _is_number(value: Any) -> bool:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    return usable and abs(value) < 1e30  # also not for NaN


def _padded(low: float, high: float) -> tuple[float, float]:
    """Return two ends that differ."""
    if high - low > 1e-9 * max(abs(low), abs(high), 1e-20):
        return low, high
    aside = 0.5 * abs(low) or 0.5
    return low - aside, high + aside


def _spread(point: Mapping[str, Any]) -> tuple[float, float]:
    """Return the ends of a point's interval, which is one of its difference."""
    quality = float(point["quality"])
    if point["interval"] is None or point["difference"] is None:
        return quality, quality
    low, high = point["interval"]
    return min(quality, quality - point["difference"] + low), max(quality, quality - point["difference"] + high)


def _thinned(points: Points) -> Points:
    if len(points) <= MOST_POINTS:
        return points
    stretch = math.ceil(2 * len(points) / MOST_POINTS)
    out = [points[0]]
    for start in range(0, len(points), stretch):
        part = range(start, min(start + stretch, len(points)))
        ends = {min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
        out += [points[i] for i in sorted(ends)]
    return [*out, points[-1]]


def _number(value: float) -> str:
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _mark(mark: str, x: float, y: float) -> str:
    places = {"x": x, "y": y, "n": y - 5, "s": y + 5, "w": x - 5, "e": x + 5}
    return _MARKS[mark].format(**{name: f"{value:.1f}" for name, value in places.items()})


def _dashes(look: style.Look) -> str:
    return "none" if isinstance(look.dashes, str) else " ".join(f"{2 * one:g}" for one in look.dashes[1])  # type: ignore[index]


def _opening(about: str) -> str:
    text = escaped(about)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{text}"><title>{text}</title>'


def _keys(keys: Iterable[tuple[str, str, str]]) -> str:
    listed = [f"<li>{swatch} {escaped(name)}{escaped(f': {note}') if note else ''}</li>" for swatch, name, note in keys]
    return f'<ul class="keys">{"".join(listed)}</ul>'
