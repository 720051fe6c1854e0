"""`python -m dynamic_llava.eval compare-seeds`: comparisons of several training seeds, joined into one table.

The folders hold the same comparison of checkpoints that differ in their seed. Differences to dense are taken within a
seed, so that the interval is that of paired differences; scores and costs are means, times quartiles of the seeds'
medians.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePath
from typing import Any

from dynamic_llava.eval.compare.bootstrap import LEVEL
from dynamic_llava.eval.compare.report import comparison_report
from dynamic_llava.eval.compare.split import GROUPS, joined
from dynamic_llava.eval.compare.table import COSTS, fronts, page, panels_of, table_of_cells
from dynamic_llava.eval.metrics.seeds import mean_and_interval
from dynamic_llava.eval.reading import LIST, OBJECT, fields_of, read_json
from dynamic_llava.eval.writing import write_json, write_text
from dynamic_llava.viz.curves import draw_quality_against_cost

FIELDS = {"models": LIST, "methods": LIST, "tasks": OBJECT, "settings": OBJECT, "environment": OBJECT}
ALIKE = ("limit", "max_new_tokens", "dtype", "source", "round_separator")
"""Settings that all comparisons must share."""


@dataclass(frozen=True)
class Seeds:
    """Comparisons of several seeds, each as its compare.json holds it."""

    folders: tuple[Path, ...]
    found: tuple[Mapping[str, Any], ...]

    @classmethod
    def read(cls, folders: Sequence[Path]) -> "Seeds":
        """Read the comparisons of these folders. ValueError unless they are at least two of the same questions."""
        if len(set(folders)) < 2 or len(set(folders)) < len(folders):
            raise ValueError("seeds are joined from two folders or more, each named once")
        found = tuple(fields_of(read_json(one / "compare.json"), FIELDS, str(one / "compare.json")) for one in folders)
        alike = [_alike(one) for one in found]
        for folder, own in zip(folders, alike, strict=True):
            if others := [what for what, value in own.items() if value != alike[0][what]]:
                raise ValueError(
                    f"{folder} holds another comparison than {folders[0]}: {', '.join(others)} differ; join folders of "
                    "the same command on other checkpoints"
                )
        return cls(tuple(folders), found)

    def joined(self) -> dict[str, Any]:
        """Return the means over the seeds in the form of a compare.json."""
        first = self.found[0]
        models = [_common([one["models"][place] for one in self.found]) for place in range(len(first["models"]))]
        named = dict(zip(first["models"], models, strict=True))
        tasks = {label: self._task(label, named) for label in first["tasks"]}
        methods = [
            own[0] | {"model": named[own[0]["model"]], "set": _each(own, "set"), "described": _each(own, "described")}
            for own in zip(*(one["methods"] for one in self.found), strict=True)
        ]
        return {
            "models": models,
            "methods": methods,
            "left_out": first["left_out"],
            "equal": first["equal"],
            "bootstrap": None,
            "seeds": [str(folder) for folder in self.folders],
            "settings": first["settings"],
            "tasks": tasks,
            "environment": first["environment"],
        }

    def _task(self, label: str, models: Mapping[str, str]) -> dict[str, Any]:
        tasks = [one["tasks"][label] for one in self.found]
        shown = tasks[0]["shown"]
        rows = [_row(own, shown, models) for own in zip(*(task["rows"] for task in tasks), strict=True)]
        on = fronts(rows, shown[0])
        for place, row in enumerate(rows):
            row["front"] = [cost for cost in COSTS if place in on[cost]]
        split = joined([task.get("split") for task in tasks])
        return {"title": tasks[0]["title"], "shown": shown, "rows": rows, "warnings": [], "split": split}


def join_seeds(folders: Sequence[Path], output: Path) -> Path:
    """Write the joined comparison as compare.json, .md, .csv, .png and .svg, and its report; return the path of .md."""
    found = Seeds.read(folders).joined()
    write_json(output / "compare.json", found, indent=1)
    write_text(output / "compare.csv", table_of_cells(found))
    if panels := panels_of(found):
        draw_quality_against_cost(output / "compare.png", panels, title=found["equal"] or "")
    written = write_text(output / "compare.md", page(found))
    comparison_report(output).write()
    return written


def _alike(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the comparisons of all seeds must share, by what it is."""
    places = {model: place for place, model in enumerate(found["models"])}
    return {
        "methods": [(places[one["model"]], one["method"]) for one in found["methods"]],
        "the equal budget": found["equal"],
        "benchmarks": list(found["tasks"]),
        "rows": [[(places[row["model"]], row["method"]) for row in task["rows"]] for task in found["tasks"].values()],
        "settings": {name: found["settings"].get(name) for name in ALIKE},
    }


def _row(own: Sequence[Mapping[str, Any]], shown: Sequence[str], models: Mapping[str, str]) -> dict[str, Any]:
    """Join one method's rows; a metric or cost that a seed lacks is left out, and the row says why it failed there."""
    errors = {row["error"]: None for row in own if row["error"]}
    metrics = {name: _metric([row["metrics"][name] for row in own]) for name in shown if _in_all(own, "metrics", name)}
    return {
        "model": models[own[0]["model"]],
        "reference": own[0]["reference"],
        "method": own[0]["method"],
        "metrics": metrics,
        "counts": own[0]["counts"],
        "costs": _over(own, "costs", statistics.fmean),
        "times": _times(own),
        "groups": {one: sum(row["groups"][one] for row in own) for one in GROUPS if _all_have(own, one)},
        "answers": None,
        "error": "; ".join(errors) or None,
        "warnings": [],
    }


def _metric(own: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    differences = [one["difference"] for one in own]
    known = all(one is not None for one in differences)
    mean, half = mean_and_interval(differences, LEVEL) if known else (None, None)
    return {
        "value": statistics.fmean(one["value"] for one in own),
        "unit": own[0]["unit"],
        "lower_is_better": own[0]["lower_is_better"],
        "difference": mean,
        "low": None if mean is None or half is None else mean - half,
        "high": None if mean is None or half is None else mean + half,
    }


def _times(own: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    medians = _over(own, "times", lambda values: list(values))
    found: dict[str, float] = {}
    for name in ("prefill_ms", "decode_ms"):
        if name in medians:
            low, middle, high = statistics.quantiles(medians[name], n=4, method="inclusive")
            found |= {name: middle, f"{name}_low": low, f"{name}_high": high}
    return found


def _over(own: Sequence[Mapping[str, Any]], what: str, join: Callable[[list[float]], Any]) -> dict[str, Any]:
    return {name: join([row[what][name] for row in own]) for name in own[0][what] if _in_all(own, what, name)}


def _all_have(own: Sequence[Mapping[str, Any]], group: str) -> bool:
    return all(group in row.get("groups", ()) for row in own)  # earlier versions wrote none


def _in_all(own: Sequence[Mapping[str, Any]], what: str, name: str) -> bool:
    return all(name in row[what] for row in own)


def _each(own: Sequence[Mapping[str, Any]], what: str) -> str | None:
    """Return what is said of each seed, once where all say the same."""
    return "; ".join(dict.fromkeys(one[what] for one in own if one[what])) or None


def _common(paths: Sequence[str]) -> str:
    """Return a path with a star where the seeds' differ, runs/seed*/model; all of them where they are not alike."""
    parts = [PurePath(path).parts for path in paths]
    if len(set(map(len, parts))) > 1:
        return ", ".join(paths)
    return str(PurePath(*(_starred(own) for own in zip(*parts, strict=True))))


def _starred(names: Sequence[str]) -> str:
    """Return what the names begin with, and a star where they go on differently."""
    same = [letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))]
    return names[0] if len(set(names)) == 1 else f"{''.join(same)}*"
