"""The report of the tiny world's main job, or of one of its seeds, from its folder."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynamic_llava.eval.compare.report import quality_charts
from dynamic_llava.train.report import targets_of, training_charts
from dynamic_llava.viz.page import folded, from_markdown
from dynamic_llava.viz.run_report import RunReport

RESULTS, TABLE, METRICS, SETTINGS, COMPARED = (
    "results.json", "table.md", "metrics.jsonl", "config.yaml", "compare/compare.json"
)  # fmt: skip
TITLES = {"both": "Dynamic I|T", "image": "Dynamic I", "control": "dense control", "untrained": "untrained base"}
"""Trainings by their folders -> what they are called; both_35 is that of r_OT 0.35."""


def job_report(folder: Path) -> RunReport:
    """Return the report of a job's folder, or of a seed's in it."""
    report = RunReport(folder, "The tiny world")
    found = report.object(RESULTS)
    seeds = [one for one in found.get("seeds", [found]) if isinstance(one, Mapping) and "seed" in one]
    first = seeds[0] if seeds else {}
    own = f"seed{first['seed']}/" if "seeds" in found and seeds else ""
    config = report.yaml(SETTINGS)
    short, *tables = re.split(r"\n(?=## )", report.text(TABLE))
    if not short.startswith("## In short"):  # written by an earlier version
        short, tables = "", [short, *tables]
    report.about = _about(seeds)
    report.add("In short", TABLE, lambda: from_markdown(short.removeprefix("## In short")))
    report.add(f"Trainings{_of(seeds)}", METRICS, lambda: _charts(report.lines(METRICS), first.get("seed"), config))
    joined = COMPARED if not own or (folder / COMPARED).is_file() else f"{own}{COMPARED}"
    compared = report.object(joined)
    report.add("Rivals: quality against cost", joined, lambda: quality_charts(compared))
    report.add_pictures(f"Pictures{_of(seeds)}", f"{own}pictures/*.png", without=["training_curves"])
    report.add_pictures("Budgets", "budgets.png")
    report.add("Tables", TABLE, lambda: from_markdown("\n".join(tables)))
    report.add("Budgets in numbers", "budgets.md", lambda: folded("table", from_markdown(report.text("budgets.md"))))
    report.add_settings(SETTINGS)
    report.add_environment(RESULTS, first.get("environment"))
    return report


def _about(seeds: Sequence[Mapping[str, Any]]) -> str:
    if not seeds:
        return ""
    names = ", ".join(str(one["seed"]) for one in seeds)
    seconds = [one["seconds"] for one in seeds if isinstance(one.get("seconds"), (int, float))]
    took = f"; {sum(seconds) / len(seconds):.0f} s per seed" if seconds else ""
    return f"{'seeds' if len(seeds) > 1 else 'seed'} {names}{took}"


def _of(seeds: Sequence[Mapping[str, Any]]) -> str:
    """Say whose trainings and pictures are shown where there are several seeds."""
    return f" of seed {seeds[0]['seed']}" if len(seeds) > 1 else ""


def _charts(lines: Sequence[Mapping[str, Any]], seed: Any, config: Mapping[str, Any]) -> list[str]:
    """Return the curves of a seed's trainings, all of which stand in one log."""
    histories: dict[str, list[Mapping[str, Any]]] = {}
    targets: dict[str, dict[str, float]] = {}
    for line in lines:
        if line.get("seed", seed) == seed:
            key = str(line["training"])
            title = _title(key)
            histories.setdefault(title, []).append(line)
            targets[title] = targets_of(config) | _own_rate(key)
    return training_charts(histories, targets)


def _title(key: str) -> str:
    if key in TITLES:
        return TITLES[key]
    rate = _own_rate(key).get("output_keep_rate")
    return key if rate is None else f"{TITLES['both']}, r_OT {rate:g}"


def _own_rate(key: str) -> dict[str, float]:
    """Return the target that a training has of its own."""
    found = re.fullmatch(r"both_(\d+(?:\.\d+)?)", key)
    return {"output_keep_rate": float(found[1]) / 100} if found else {}
