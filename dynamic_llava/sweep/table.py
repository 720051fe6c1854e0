"""The table of a sweep: ours beside the paper's numbers and the difference; what is missing is shown as missing."""

import json
from datetime import date
from pathlib import Path
from typing import Any

from dynamic_llava.eval.writing import MISSING, markdown
from dynamic_llava.files import replace_file, writing
from dynamic_llava.provenance import environment
from dynamic_llava.sweep.config import TINY, SweepColumn
from dynamic_llava.sweep.plan import EvaluationStep, PlannedRow, SweepPlan

SERVER_SCORES = "server.json"
"""In an evaluation's folder, written by hand: {"score": 77.6}, what the benchmark's server or judge answered."""


def results(plan: SweepPlan) -> dict[str, Any]:
    """Return the table as plain data: per row and column our number, the paper's, the difference; None is missing."""
    rows = [_row(plan, planned) for planned in plan.rows]
    cells = [cell for row in rows for cell in row["cells"].values()]
    return {
        "name": plan.sweep.name,
        "title": plan.sweep.title,
        "rows": rows,
        "cells": len(cells),
        "missing": sum(cell["ours"] is None for cell in cells),
        "seeds": sorted({planned.training.config.train.seed for planned in plan.rows if planned.training is not None}),
        "date": date.today().isoformat(),
        "environment": environment(),
    }


def write_table(plan: SweepPlan, made_by: str) -> Path:
    """Write results.json and table.md into the sweep's folder; returns the table's path."""
    folder, found = plan.sweep.folder, results(plan)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "results.json", json.dumps(found | {"made_by": made_by}, indent=1) + "\n")
    replace_file(folder / "table.md", page(plan, found, made_by))
    return folder / "table.md"


def page(plan: SweepPlan, found: dict[str, Any], made_by: str) -> str:
    """Return the table as a page: title, table, how to read it, and what the numbers were made with."""
    sweep, machine = plan.sweep, found["environment"]
    compared = any(row.row.paper for row in plan.rows)
    legend = f'"{MISSING}" is not measured yet: {found["missing"]} of {found["cells"]} cells.'
    if compared:
        legend = f"Ours, and in brackets the paper's number and the difference. {legend}"
    seeds = ", ".join(map(str, found["seeds"])) or "none (nothing was trained)"
    made = (
        f"Made by `{made_by}` on {found['date']}; training seed {seeds}; torch {machine['torch']}, transformers "
        f"{machine['transformers']}, Python {machine['python']}, {machine['machine']}, {machine['cores']} cores, "
        f"commit {machine['commit']}."
    )
    parts = [f"# {sweep.title or sweep.name}", table(plan, found), legend, *([sweep.note] if sweep.note else []), made]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def table(plan: SweepPlan, found: dict[str, Any], *, escape: bool = True) -> str:
    """Return the table alone, in markdown; `escape=False` leaves the bar of "I|T" as it is, for a terminal."""
    columns = plan.sweep.columns
    lines = [["row", *(column.header for column in columns)]]
    for row in found["rows"]:
        title = row["title"].replace("|", r"\|") if escape else row["title"]
        lines.append([title, *(_text(row["cells"][column.header], column) for column in columns)])
    return markdown(lines)


def _row(plan: SweepPlan, planned: PlannedRow) -> dict[str, Any]:
    by_task = {evaluation.task: evaluation for evaluation in planned.evaluations}
    cells = {}
    for column in plan.sweep.columns:
        ours, paper = _ours(by_task[column.task], column), planned.row.paper.get(column.header)
        difference = None if ours is None or paper is None else ours - paper
        cells[column.header] = {"ours": ours, "paper": paper, "difference": difference}
    model = planned.evaluations[0].model
    return {"title": planned.row.title, "model": model, "cells": cells}


def _ours(evaluation: EvaluationStep, column: SweepColumn) -> float | None:
    """Our number as printed, from a finished evaluation's summary or the server's answer; None where there is none.

    Raises ValueError when the summary has a score but not the column's metric.
    """
    if not evaluation.is_done():
        return None
    summary = json.loads(evaluation.summary.read_text(encoding="utf-8"))
    value = _tiny(summary, column) if column.task == TINY else _benchmark(summary["tasks"][column.task], column)
    if value is None and not column.metric:
        value = _from_server(evaluation)
    return None if value is None else value * column.scale


def _tiny(summary: dict[str, Any], column: SweepColumn) -> float | None:
    value: float | None = summary["metrics"].get(column.metric)
    return value


def _benchmark(found: dict[str, Any], column: SweepColumn) -> float | None:
    """A benchmark's metric or cost; None where a server or judge scores it."""
    if found["value"] is None:
        return None
    known = {**found["efficiency"], **found["metrics"]}
    name = column.metric or found["metric"]
    if name not in known:
        raise ValueError(f"column {column.header!r}: {column.task} has no metric {name!r}; it has {', '.join(known)}")
    value: float | None = known[name]["value"]
    return value


def _from_server(evaluation: EvaluationStep) -> float | None:
    path = evaluation.folder / SERVER_SCORES
    if not path.is_file():
        return None
    try:
        return float(json.loads(path.read_text(encoding="utf-8-sig"))["score"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        raise ValueError(f'{path} must hold {{"score": NUMBER}}, what the server or judge answered') from None


def _text(cell: dict[str, float | None], column: SweepColumn) -> str:
    ours, paper, difference = cell["ours"], cell["paper"], cell["difference"]
    text = MISSING if ours is None else f"{ours:.{column.digits}f}"
    if paper is None:
        return text
    change = "" if difference is None else f", {difference:+.{column.digits}f}"
    return f"{text} ({paper:.{column.digits}f}{change})"
