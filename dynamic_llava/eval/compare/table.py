"""What a comparison found, as compare.json holds it, and what follows: page, cells, fronts, panels of the picture.

Text that a user, a model or a data file wrote stands in code spans on the page.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from dynamic_llava.eval.compare.bootstrap import LEVEL
from dynamic_llava.eval.compare.split import GROUPS, said_of, share
from dynamic_llava.eval.summary import MEBI, TERA
from dynamic_llava.eval.writing import MISSING, code, markdown

COSTS: Mapping[str, tuple[str, Mapping[str, float]]] = {
    "prefill_flop_exact": (
        "prefill",
        {"TFLOP (calculated)": TERA, "GFLOP (calculated)": 1e9, "MFLOP (calculated)": 1e6},
    ),
    "kv_bytes": ("keys and values", {"GiB": 2**30, "MiB": MEBI, "KiB": 2**10}),
}
"""Costs that quality is drawn against: what they are of, and units, largest first, with what they are."""
LOWER_IS_BETTER = ("perplexity",)
"""Units of metrics that are better when they are lower."""
HEAD = (
    "benchmark", "method", "metric", "value", "to dense", "tokens/layer", "TFLOP", "KV MiB", "prefill ms", "decode ms",
    "front",
)  # fmt: skip
SPLIT_HEAD = ("A, %", "B, %")
"""Two more columns where a downsampling method is compared."""
BOOTSTRAP = (
    "To dense: difference to the reference, and in brackets the {level:.0f} % interval of a paired bootstrap over "
    "{resamples:,} draws of the same units (seed {seed}; percentiles). An interval around 0 says that the difference "
    "could be chance of the questions."
)
SEEDS = (
    "Means over {seeds} seeds. To dense: the mean difference to the reference of the same seed, and in brackets its "
    "{level:.0f} % interval (Student's t). An interval around 0 says that the difference could be chance of the seeds."
)
LEGEND = (
    "Tokens/layer: image tokens that a layer sees, mean over layers. TFLOP: a prefill by real module shapes, with what "
    "the method judges by. KV MiB: keys and values when an answer ends. Times: medians and quartiles on a batch of up "
    "to {batch} questions, the methods of one model in turn, of a prefill (images included) and of a decoding step. "
    "Front: nothing else here is at least as good and as cheap, and better in one of the two: F by prefill FLOP, K by "
    "bytes."
)


SPLIT = (
    "A and B: of the questions that a smaller picture does not solve, and of those that it does, the share that a "
    "method answers right."
)


def fronts(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, list[int]]:
    """Return for each cost the places of the rows on the Pareto front of a metric against it.

    A row is on it unless another is at least as good and as cheap, and better in one of the two.
    """
    found: dict[str, list[int]] = {}
    for cost in COSTS:
        points = {
            place: (row["costs"][cost], -_worth(row["metrics"][metric]))
            for place, row in enumerate(rows)
            if metric in row["metrics"] and cost in row["costs"]
        }
        found[cost] = [
            place
            for place, (its, bad) in points.items()
            if not any(c <= its and b <= bad and (c, b) != (its, bad) for c, b in points.values())
        ]
    return found


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Return for each model the parts of its path that the others do not share at its beginning and end."""
    parts = [list(PurePath(model).parts) for model in models]
    while len(models) > 1 and all(len(one) > 1 for one in parts) and len({one[0] for one in parts}) == 1:
        parts = [one[1:] for one in parts]
    while len(models) > 1 and all(len(one) > 1 for one in parts) and len({one[-1] for one in parts}) == 1:
        parts = [one[:-1] for one in parts]
    return {model: "/".join(one) for model, one in zip(models, parts, strict=True)}


def _worth(metric: Mapping[str, Any]) -> float:
    """The value, turned so that more is better."""
    value: float = metric["value"]
    return -value if metric["unit"] in LOWER_IS_BETTER else value


def page(found: Mapping[str, Any]) -> str:
    """Return compare.md of a compare.json."""
    short = short_names(found["models"])
    names = ", ".join(code(model) for model in found["models"])
    lines = [f"# Methods compared on {names}", ""]
    if found["equal"]:
        lines += [f"Equal budget: every method but the dense one is given {code(found['equal'])}.", ""]
    lines += [main_table(found), ""]
    settings = found["settings"]
    batch = settings["speed_batch"] or settings["batch_size"]
    is_split = _is_split(found)
    legend = f"{_interval_legend(found)} {LEGEND.format(batch=batch)}{f' {SPLIT}' if is_split else ''}"
    lines += [legend, "", "![quality against cost](compare.png)", ""]
    lines += [f"- {_named(one, short)}: {code(one['described'])}{_set(one)}" for one in found["methods"]]
    lines += [f"- left out: {code(one)}" for one in found["left_out"]]
    for label, task in found["tasks"].items():
        lines += [f"- **{label}**{whose}: {code(text)}" for whose, text in _remarks(task, short)]
    lines += ["", _listed(settings), "", _listed(found["environment"])]
    return "\n".join(lines) + "\n"


def main_table(found: Mapping[str, Any]) -> str:
    """Return the table of the page, as markdown."""
    short, is_split = short_names(found["models"]), _is_split(found)
    head = (*HEAD[:-1], *(SPLIT_HEAD if is_split else ()), HEAD[-1])
    table = [head, *(line for task in found["tasks"].values() for line in _task_lines(task, short, is_split))]
    return markdown([[cell.replace("|", r"\|") for cell in line] for line in table])


def panels_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the panels of the picture: each task's main metric against each cost."""
    panels = []
    short = short_names(found["models"])
    for cost, (axis, units) in COSTS.items():
        rows = [row for task in found["tasks"].values() for row in task["rows"]]
        largest = max((row["costs"].get(cost, 0) for row in rows), default=0)
        measure, scale = next((one for one in units.items() if largest >= one[1]), list(units.items())[-1])
        for task in found["tasks"].values():
            points = [_point(row, task["shown"][0], cost, scale, short) for row in task["rows"]]
            unit = next((row["metrics"][task["shown"][0]]["unit"] for row in task["rows"] if row["metrics"]), "")
            panels.append({
                "title": task["title"], "cost": f"{axis}, {measure}", "quality": f"{task['shown'][0]}, {unit}",
                "lower_is_better": unit in LOWER_IS_BETTER, "points": [one for one in points if one is not None],
            })  # fmt: skip
    return [panel for panel in panels if panel["points"]]


def _point(
    row: Mapping[str, Any], metric: str, cost: str, scale: float, short: Mapping[str, str]
) -> dict[str, Any] | None:
    if metric not in row["metrics"] or cost not in row["costs"]:
        return None
    found = row["metrics"][metric]
    return {
        "name": f"{row['method']} on {short[row['model']]}" if len(short) > 1 else row["method"],
        "cost": row["costs"][cost] / scale,
        "quality": found["value"],
        "interval": None if found["low"] is None else (found["low"], found["high"]),
        "difference": found["difference"],
        "front": cost in row["front"],
    }


def _is_split(found: Mapping[str, Any]) -> bool:
    return any(task.get("split") for task in found["tasks"].values())


def _interval_legend(found: Mapping[str, Any]) -> str:
    boot = found["bootstrap"]
    if boot is None:
        return SEEDS.format(seeds=len(found["seeds"]), level=100 * LEVEL)
    return BOOTSTRAP.format(level=100 * boot["level"], resamples=boot["resamples"], seed=boot["seed"])


def table_of_cells(found: Mapping[str, Any]) -> str:
    """Return compare.csv: one line for each model, method, task and metric, every number as it is."""
    names = ("model", "method", "task", "metric", "unit", "value", "difference", "low", "high")
    costs = list(dict.fromkeys(name for _, row, _, _ in _metrics(found) for name in row["costs"]))
    times = list(dict.fromkeys(name for _, row, _, _ in _metrics(found) for name in row["times"]))
    splits = {label: task["split"] for label, task in found["tasks"].items() if task.get("split")}
    groups = [f"group_{group}{what}" for group in GROUPS for what in ("_right", "")] if splits else []
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, *costs, *times, *groups])
    for label, row, name, metric in _metrics(found):
        cells = [row["model"], row["method"], label, name, *(metric[key] for key in names[4:])]
        numbers = [row["costs"].get(cost) for cost in costs] + [row["times"].get(time) for time in times]
        for group in GROUPS if splits else ():
            numbers += [row.get("groups", {}).get(group), splits.get(label, {}).get(group)]
        writer.writerow(["" if cell is None else cell for cell in (*cells, *numbers)])
    return text.getvalue()


def _metrics(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], str, Mapping[str, Any]]]:
    return [
        (label, row, name, metric)
        for label, task in found["tasks"].items()
        for row in task["rows"]
        for name, metric in row["metrics"].items()
        if name in task["shown"]
    ]


def _task_lines(task: Mapping[str, Any], short: Mapping[str, str], is_split: bool) -> list[list[str]]:
    """Return a line for each method, and one more for each further metric of the task."""
    lines = []
    split = task.get("split")
    for row in task["rows"]:
        for name in task["shown"]:
            first, metric = name == task["shown"][0], row["metrics"].get(name)
            unit = "" if metric is None else f", {metric['unit']}"
            lines.append([
                task["title"] if first else "",
                _named(row, short) if first else "",
                name + unit,
                MISSING if metric is None else _number(metric["value"], metric["unit"]),
                _difference(metric, row["reference"]),
                *(_costs(row) if first else [""] * 5),
                *((_share(row, split, group) if first else "" for group in GROUPS) if is_split else ()),
                _front(row) if first else "",
            ])  # fmt: skip
    return lines


def _named(row: Mapping[str, Any], short: Mapping[str, str]) -> str:
    name = code(row["method"])
    return f"{name} on {code(short[row['model']])}" if len(short) > 1 else name


def _set(method: Mapping[str, Any]) -> str:
    return f", set by the budget: {code(method['set'])}" if method["set"] else ""


def _remarks(task: Mapping[str, Any], short: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return what a reader must know about a task, each remark once, with the methods that it is about unless all."""
    about: dict[str, list[str]] = {}
    for row in task["rows"]:
        for text in ([f"failed: {row['error']}"] if row["error"] else []) + list(row["warnings"]):
            about.setdefault(text, []).append(_named(row, short))
    said = [("" if len(names) == len(task["rows"]) else f", {', '.join(names)}", text) for text, names in about.items()]
    split = [said_of(task["split"])] if task.get("split") else []
    return [*(("", text) for text in [*task["warnings"], *split]), *said]


def _difference(metric: Mapping[str, Any] | None, reference: bool) -> str:
    if metric is None or metric["difference"] is None:
        return MISSING
    if reference:
        return "reference"
    unit = metric["unit"]
    text = _signed(metric["difference"], unit)
    return (
        text if metric["low"] is None else f"{text} [{_signed(metric['low'], unit)}, {_signed(metric['high'], unit)}]"
    )


def _costs(row: Mapping[str, Any]) -> list[str]:
    columns = (("image_tokens_per_layer", 1, 4), ("prefill_flop_exact", TERA, 3), ("kv_bytes", MEBI, 4))
    cells = [
        f"{row['costs'][name] / scale:.{digits}g}" if name in row["costs"] else MISSING
        for name, scale, digits in columns
    ]
    times = row["times"]
    for name in ("prefill_ms", "decode_ms"):
        quartiles = [times.get(one) for one in (name, f"{name}_low", f"{name}_high")]
        cells.append(MISSING if None in quartiles else "{:.4g} ({:.4g} to {:.4g})".format(*quartiles))
    return cells


def _share(row: Mapping[str, Any], split: Mapping[str, Any] | None, group: str) -> str:
    found = None if split is None else share(row, split, group)
    return MISSING if found is None else f"{found:.1f}"


def _front(row: Mapping[str, Any]) -> str:
    marks = [mark for mark, cost in zip("FK", COSTS, strict=True) if cost in row["front"]]
    return " ".join(marks)


def _digits(unit: str) -> int:
    return {"fraction": 4, "perplexity": 3}.get(unit, 1)


def _number(value: float, unit: str) -> str:
    return f"{value:.{_digits(unit)}f}"


def _signed(value: float, unit: str) -> str:
    text = f"{value:+.{_digits(unit)}f}"
    return text.replace("-", "+", 1) if float(text) == 0 else text


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {code(value)}" for name, value in values.items() if value is not None)
