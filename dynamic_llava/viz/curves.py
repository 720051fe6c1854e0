"""Curves: keep rates and loss over a training, accuracy over the image budget, and what a generation costs as it grows.

Keep rates are drawn against their targets; costs (Fig. 1) are the FLOPs of a step without cache and memory with cache.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from dynamic_llava.viz import style

_KEEP_CURVES = (
    ("image_keep_rate", "image tokens", style.ACCENT),
    ("output_keep_rate", "output tokens", style.SECOND),
    ("prompt_keep_rate", "prompt tokens", style.THIRD),
)

_PANELS = (
    ("flops", 1e-12, "One step without cache", "TFLOP"),
    ("memory", 2**-30, "Memory with cache", "GiB"),
)


def draw_training_curves(
    path: Path,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    targets: Mapping[str, float],
    *,
    loss_key: str = "lm_loss",
    title: str = "",
) -> Path:
    """Draw a PNG with one panel of keep rates per sparse run and one panel of every run's loss.

    `runs` maps a run's title to its logged records, each a dict with "step" and any of image_keep_rate,
    output_keep_rate, prompt_keep_rate and `loss_key`; `targets` maps keep rates to their targets. Runs that log no keep
    rate appear in the loss panel only. Returns the path; ValueError without any record.
    """
    if not any(runs.values()):
        raise ValueError("no training records were given; give the lines of at least one metrics.jsonl")
    sparse = [name for name, log in runs.items() if any(_curve(log, key)[0] for key, _, _ in _KEEP_CURVES)]
    figure = style.new_figure(4.6 * (len(sparse) + 1), 3.5)
    axes = figure.subplots(1, len(sparse) + 1, squeeze=False)[0]
    for axis, name in zip(axes, sparse, strict=False):
        _draw_keep_rates(axis, runs[name], targets, f"keep rates, {name}")
    last = axes[-1]
    style.tidy_axes(last, "language-model loss", "step", "")
    for (name, log), color in zip(runs.items(), style.SERIES * 4, strict=False):
        steps, values = _curve(log, loss_key)
        if steps:
            last.plot(steps, values, color=color, linewidth=1.6, label=name)
    last.set_ylim(bottom=0)
    last.legend(frameon=False, fontsize=9, labelcolor=style.INK)
    if title:
        figure.suptitle(title, fontsize=12, color=style.INK, fontweight="bold", x=0.01, ha="left")
    return style.save(figure, path)


def draw_budget_curves(path: Path, lines: Mapping[str, Mapping[float, float]], trained_rate: float) -> Path:
    """Draw a PNG of accuracy (fractions) over the image keep rate, one curve per line; returns the path.

    `trained_rate` is marked: the keep rate that the learned selection was trained at. ValueError without any line.
    """
    if not lines:
        raise ValueError("no lines were given; give at least one mapping of keep rate to accuracy")
    figure = style.new_figure(6.4, 3.9)
    axes = figure.subplots()
    style.tidy_axes(
        axes, "Short answers over the image budget", "image tokens kept from the sparse layer on, %", "accuracy, %"
    )
    for (name, points), color in zip(
        lines.items(), (style.QUIET, style.ACCENT, style.SECOND, style.THIRD, style.INK), strict=False
    ):
        rates = sorted(points)
        values = [100 * points[rate] for rate in rates]
        axes.plot(
            [100 * rate for rate in rates], values, color=color, linewidth=1.8, marker="o", markersize=4, label=name
        )
    axes.axvline(100 * trained_rate, color=style.GRID, linewidth=6, zorder=0, label="trained rate")
    axes.set_ylim(top=101)
    axes.legend(frameon=False, fontsize=9, labelcolor=style.INK, loc="lower right")
    return style.save(figure, path)


def draw_cost_curves(
    path: Path, rows: Sequence[Mapping[str, Any]], *, device_gib: float | None = None, title: str = ""
) -> Path:
    """Draw a PNG with two panels, one curve per method; returns the path.

    `rows` have method, outputs, flops and memory (bytes), as profile/tables.py gives them. `device_gib` marks the
    memory of a device. ValueError without any row.
    """
    if not rows:
        raise ValueError("no rows were given; give those of the curve report")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = style.new_figure(9.6, 3.9)
    for axes, (key, scale, heading, unit) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        style.tidy_axes(axes, heading, "generated tokens", unit)
        for method, color in zip(methods, (style.QUIET, style.SECOND, style.ACCENT, style.THIRD), strict=False):
            points = sorted((row["outputs"], row[key] * scale) for row in rows if row["method"] == method)
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.8, label=method)
        if key == "memory" and device_gib is not None:
            axes.axhline(device_gib, color=style.GRID, linewidth=4, zorder=0, label=f"the device: {device_gib:.1f} GiB")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=9, labelcolor=style.INK)
    if title:
        figure.suptitle(title, fontsize=12, color=style.INK, fontweight="bold", x=0.01, ha="left")
    return style.save(figure, path)


def _draw_keep_rates(axes: Axes, log: Sequence[Mapping[str, Any]], targets: Mapping[str, float], title: str) -> None:
    style.tidy_axes(axes, title, "step", "kept, %")
    for key, label, color in _KEEP_CURVES:
        steps, values = _curve(log, key)
        if not steps:
            continue
        axes.plot(steps, [100 * value for value in values], color=color, linewidth=1.6, label=label)
        if key in targets:
            goal = f"target {100 * targets[key]:.0f} %"
            axes.axhline(100 * targets[key], color=color, linewidth=1, linestyle=(0, (4, 3)), label=goal)
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, fontsize=9, labelcolor=style.INK, ncols=2, loc="upper right")


def _curve(log: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the records that hold `key` as a number (NaN and missing values are left out)."""
    points = [(record["step"], record[key]) for record in log if isinstance(record.get(key), int | float)]
    points = [(step, value) for step, value in points if value == value]
    return [step for step, _ in points], [value for _, value in points]


def draw_quality_against_cost(path: Path, panels: Sequence[Mapping[str, Any]], *, title: str = "") -> tuple[Path, Path]:
    """Draw quality against cost, a PNG and an SVG of the same name, one panel for each benchmark and cost.

    A panel has title, cost and quality (what its axes say), lower_is_better, and points: name, cost, quality, interval
    (of the difference to the reference, or None), difference, front (whether it is on the Pareto front, which is
    drawn). The better is always higher. Returns both paths; ValueError without any panel.
    """
    if not panels:
        raise ValueError("no panels were given; give one for each benchmark and cost")
    columns = max(1, len({panel["title"] for panel in panels}))
    rows = -(-len(panels) // columns)
    figure = style.new_figure(4.4 * columns + 2.6, 3.5 * rows)
    names = list(dict.fromkeys(point["name"] for panel in panels for point in panel["points"]))
    looks = {name: (style.SERIES[i % 4], _MARKS[i // 4 % len(_MARKS)]) for i, name in enumerate(names)}
    shown: dict[str, Any] = {}
    for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
        shown = _draw_panel(axes, panel, looks) | shown
    listed = [name for name in (*names, _FRONT) if name in shown]
    handles = [shown[name] for name in listed]
    figure.legend(handles, listed, loc="outside right upper", frameon=False, fontsize=8, labelcolor=style.INK)
    heading = title or "Quality against cost"
    figure.suptitle(heading, fontsize=12, color=style.INK, fontweight="bold", x=0.01, ha="left")
    return style.save(figure, path), style.save(figure, path.with_suffix(".svg"))


_MARKS = ("o", "s", "^", "D", "v", "P")
_FRONT = "Pareto front"


def _draw_panel(axes: Axes, panel: Mapping[str, Any], looks: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Draw one panel; return what the legend shows by name."""
    style.tidy_axes(axes, panel["title"], panel["cost"], panel["quality"])
    front = sorted((point["cost"], point["quality"]) for point in panel["points"] if point["front"])
    shown: dict[str, Any] = {}
    if front:
        line = axes.plot(*zip(*front, strict=True), color=style.FADED, linewidth=3, zorder=1, drawstyle="steps-post")
        shown[_FRONT] = line[0]
    for point in panel["points"]:
        color, mark = looks[point["name"]]
        spread = None
        if point["interval"] is not None:
            low, high = point["interval"]
            spread = [[max(0.0, point["difference"] - low)], [max(0.0, high - point["difference"])]]
        shown[point["name"]] = axes.errorbar(
            point["cost"], point["quality"], yerr=spread, color=color, marker=mark, markersize=6, elinewidth=1,
            capsize=2, linestyle="none", zorder=2,
        )  # fmt: skip
    if panel["lower_is_better"]:
        axes.invert_yaxis()
    axes.margins(0.08)
    axes.locator_params(axis="x", nbins=5)
    return shown
