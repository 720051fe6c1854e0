"""What lies in an evaluation's output folder: whose it is, and tables of everything in it. No torch here.

All answers of a folder are those of one model and one method. A command adds its tasks to what earlier ones found.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynamic_llava.eval.reading import TEXT, Kind, fields_of, optional, read_json
from dynamic_llava.eval.store import RECORD, differences, identity_of
from dynamic_llava.eval.summary import Summary, named, page
from dynamic_llava.eval.tasks import TASKS
from dynamic_llava.eval.writing import write_text
from dynamic_llava.files import Lock

SUMMARY, TABLE, ANSWERS = "summary.json", "table.md", "answers"
_SHARED = ("model", "sparsity", "method")
"""Settings that all answers of a folder have in common."""
_ANY = Kind("an object", lambda value: isinstance(value, dict))
_SUMMARY = {
    "model": TEXT,
    "sparsity": optional(TEXT),
    "method": optional(TEXT),
    "identity": optional(TEXT),
    "tasks": _ANY,
    "settings": _ANY,
}


def check_folder(folder: Path, settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the folder's summary, None where it has none; nothing is written.

    ValueError when it holds answers or a summary of another model or method than `settings` says (None: no model was
    loaded), with what differs, or files that are broken.
    """
    for record in sorted((folder / ANSWERS).glob(f"*{RECORD}")) if settings is not None else ():
        before = fields_of(read_json(record), {}, str(record))
        shared = [{name: of[name] for name in _SHARED if name in of} for of in (before, _plain(settings))]
        if shared[0] != shared[1]:
            raise ValueError(
                f"{folder} holds answers of another run ({record.name}): {differences(*shared)}; nothing was written: "
                "choose another output folder, or move this one away"
            )
    summary = _read(folder)
    if summary is None or settings is None:
        return summary
    if summary.get("identity") and summary["identity"] != identity_of(settings):
        raise ValueError(
            f"{folder / SUMMARY} is that of {summary['model']}, {named(summary)}, and this model, its settings or "
            "its method are others; nothing was written: choose another output folder, or move this one away"
        )
    return summary


def write_tables(summary: Summary, folder: Path) -> tuple[Path, Path]:
    """Put the rows of a summary into summary.json and table.md of a folder, each whole or not at all; return the paths.

    Rows of earlier commands stay. Of a task that failed now and had a result before, the result stays, with a warning.
    Answers whose task has no row, because a command was killed, have one that says so.
    """
    lock = Lock(folder / ".tables.lock", f"writing the tables of {folder}").take(wait=True)
    try:
        whole = _merged(_read(folder), summary.to_json(), folder)
        paths = folder / SUMMARY, folder / TABLE
        write_text(paths[0], json.dumps(whole, indent=1) + "\n")
        write_text(paths[1], page(whole))
    finally:
        lock.release()
    return paths


def _merged(before: Mapping[str, Any] | None, now: dict[str, Any], folder: Path) -> dict[str, Any]:
    tasks = {} if before is None else dict(before["tasks"])
    for label, row in now["tasks"].items():
        old = tasks.get(label)
        if row["error"] and row["answers"] is None and old is not None and old.get("answers"):
            warning = f"a later command failed, and this is what an earlier one found: {row['error']}"
            row = old | {"warnings": [*(one for one in old["warnings"] if one != warning), warning]}
        tasks[label] = row
    for record in sorted((folder / ANSWERS).glob(f"*{RECORD}")):
        label = str(read_json(record).get("task", {}).get("name"))
        path = record.with_name(record.name.removesuffix(RECORD) + ".jsonl")
        if label not in tasks and path.is_file():
            tasks[label] = _unscored(label, path)
    return now | {"tasks": {label: _UNKNOWN | row for label, row in tasks.items()}}


_UNKNOWN: dict[str, Any] = {
    "title": "", "metric": "", "value": None, "unit": None, "metrics": {}, "shown": [], "counts": {}, "paper": {},
    "paper_note": "", "difference": None, "differences": {}, "efficiency": {}, "warnings": [], "answers": None,
    "error": None, "settings": {},
}  # fmt: skip
"""What a row holds of which nothing is known; summaries of earlier versions have fewer fields."""


def _unscored(label: str, path: Path) -> dict[str, Any]:
    task = TASKS.get(label.partition(":")[0])
    text = "answered by an earlier command that ended before its score; name the task again, nothing is computed twice"
    metric = "" if task is None else task.table_metric
    title = label if task is None else task.title
    return {"title": title, "metric": metric, "shown": [metric], "answers": str(path), "warnings": [text]}


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / SUMMARY
    if not path.is_file():
        return None
    summary = fields_of(read_json(path), _SUMMARY, str(path))
    for label, row in summary["tasks"].items():
        fields_of(row, {}, f"{path}: tasks, {label}")
        task = TASKS.get(label.partition(":")[0])
        row.setdefault("title", label if task is None else task.title)
        row.setdefault("shown", [row["metric"]] if row.get("metric") else [])
        row.setdefault("differences", {})
    return summary


def _plain(settings: Any) -> Any:
    """Return settings as JSON gives them back."""
    return json.loads(json.dumps(settings, sort_keys=True, default=str))
