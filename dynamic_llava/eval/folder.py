"""What lies in an evaluation's output folder: its answers, whose they are, and tables of them. No torch here.

All answers of a folder are those of one model and one method. A command adds its tasks to what earlier ones found.
Answers are written as they come, and a run goes on after any interruption: beside `answers/<name>.jsonl`, which is
there once every question has an answer, in question order, lie `<name>.run.json`, what the answers depend on, and while
the run goes `<name>.part<rank>.jsonl`, what each process has answered so far. All answer files are LLaVA's JSON lines;
the place of a question among all of them stands in an answer's metadata.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from dynamic_llava.eval.answers import AnswerLine, append_answers, parse_answer, write_answers
from dynamic_llava.eval.reading import TEXT, WHOLE, Kind, brief, fields_of, optional, parse_json, read_json, shown
from dynamic_llava.eval.summary import Summary, named, page
from dynamic_llava.eval.tasks import TASKS
from dynamic_llava.eval.writing import write_text
from dynamic_llava.files import Lock, writing

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

PLACE = "place"
"""Field of an answer's metadata: the number of its question, from 0, in the order in which the task gives them."""

RECORD = ".run.json"
"""End of the names of files that say on which settings a task's answers depend."""

LONGEST_SHOWN = 120
"""Most characters of a setting that an error shows."""

SHOWN_DIFFERENCES = 8
"""Most changed settings that an error names; it counts the others."""


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
"""Fields of a row of which nothing is known; summaries of earlier versions lack some."""


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


class AnswerStore:
    """The answers to one task's questions, `count` of them, in `folder`; `settings` is what they depend on.

    `settings` is JSON-able. A folder that holds answers made with other settings is refused: ValueError names the
    settings that differ with both values, or says that the answers are not of a run at all. ValueError as well for a
    broken line (not the last one, which a killed process may have cut off) and for a file that another process writes.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any], count: int, rank: int = 0) -> None:
        self.path = folder / f"{name}.jsonl"
        """The whole answer file."""
        self.count = count
        self._folder, self._name = folder, name
        self._record = folder / f"{name}{RECORD}"
        self._part = folder / f"{name}.part{rank}.jsonl"
        self._settings = json.loads(json.dumps(settings, sort_keys=True, default=str))
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._check_settings()
            self._file = _open_part(self._part)
        self.done = self._read()
        """Place -> answer of every question answered so far, by any process."""

    def answer_id(self, place: int) -> str:
        """Return the id of an answer: settings and place make it, so that the same run writes the same file."""
        text = json.dumps([self._settings, place], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:22]

    def append(self, answers: Sequence[AnswerLine]) -> None:
        """Write answers, whose metadata says their place, and flush them; WriteError where the disk refuses."""
        with writing(self._part):
            append_answers(self._file, answers)

    def close(self) -> None:
        """Close the file of this process; what it holds stays."""
        with writing(self._part):
            self._file.close()

    def merge(self) -> Path:
        """Write all answers in question order into one file, remove the parts, and return the file's path.

        For one process, when all have closed their files. The file appears whole or not at all. Raises ValueError that
        names the questions, by place, that have no answer.
        """
        found = self._read()
        if missing := [place for place in range(self.count) if place not in found]:
            raise ValueError(f"{self._name}: questions without an answer, by place: {shown(missing)}")
        write_answers(self.path, [found[place] for place in range(self.count)])
        killed = [path for path in self._folder.glob(f"{self._name}.run.*") if path.suffix[1:].isdigit()]
        for part in (*self._parts(), *killed):
            part.unlink()
        return self.path

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob(f"{self._name}.part*.jsonl"))

    def _check_settings(self) -> None:
        answers = [path for path in (self.path, *self._parts()) if path.is_file() and path.stat().st_size]
        if not self._record.is_file():
            if answers:
                raise ValueError(
                    f"{answers[0]} is there without {self._record.name}, which says what made it; "
                    "choose another output folder, or move it away"
                )
            # Every process writes the same; the name is its own until the file is whole.
            partial = self._record.with_suffix(f".{os.getpid()}")
            try:
                partial.write_text(json.dumps(self._settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")
                os.replace(partial, self._record)
            finally:
                with suppress(OSError):
                    partial.unlink(missing_ok=True)
            return
        before = fields_of(read_json(self._record), {}, str(self._record))
        if before != self._settings:
            raise ValueError(
                f"{self._folder} holds answers of another run: {differences(before, self._settings)}; "
                f"choose another output folder, or remove {self._record.name} and its answers"
            )

    def _read(self) -> dict[int, AnswerLine]:
        """Return place -> answer from the whole file and all parts; where two have one, it is the same."""
        found: dict[int, AnswerLine] = {}
        for path in (self.path, *self._parts()):
            for answer in _whole_lines(path):
                place = answer.metadata.get(PLACE)
                if not WHOLE.fits(place) or not 0 <= place < self.count:
                    raise ValueError(
                        f"{path}:{answer.line} has place {brief(place)} in its metadata; there are "
                        f"{self.count} questions"
                    )
                found.setdefault(place, answer)
        return found


def identity_of(settings: Mapping[str, Any]) -> str:
    """Return a digest of settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say which settings differ, nested ones by dotted names: "model.dtype was float32 and is bfloat16, ..."."""
    old, new = _flat(before), _flat(now)
    absent = "absent"
    changed = [
        f"{name} was {_short(old.get(name, absent))} and is {_short(new.get(name, absent))}"
        for name in sorted(old | new)
        if old.get(name, absent) != new.get(name, absent)
    ]
    more = len(changed) - SHOWN_DIFFERENCES
    return ", ".join(changed[:SHOWN_DIFFERENCES]) + (f", and {more} more" if more > 0 else "")


def _short(value: Any) -> str:
    text = str(value).encode(errors="backslashreplace").decode()  # half a character cannot be printed
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _flat(settings: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(settings, Mapping) or not settings:
        return {name: settings}
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{name}.{key}" if name else str(key))
    return flat


def _open_part(path: Path) -> TextIO:
    """Open a part for appending, behind its last whole line; ValueError when another process has it open."""
    file = path.open("a", encoding="utf-8", newline="\n")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"another process is writing {path}; wait for it, or choose another output folder") from None
    file.truncate(path.read_bytes().rfind(b"\n") + 1)
    return file


def _whole_lines(path: Path) -> Iterator[AnswerLine]:
    """Yield the answers of a file's lines; the last one is left out where it has no end: it was cut off."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            place = f"{path}:{number}"
            yield parse_answer(fields_of(parse_json(line, place), {}, place), place, number)
