"""The file of a benchmark's results: one line of JSON each, on the disk before the next thing is measured.

Standard library only: results are kept and read where torch cannot be imported, and whatever happens to a process.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dynamic_llava.files import writing
from dynamic_llava.profile.report import Report

RESULTS = "results.jsonl"
"""Name of the file in a benchmark's folder."""


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """Add a line and wait until it is on the disk; a line that a killed process left torn is ended first.

    Raises WriteError when it cannot be written, and TypeError for an entry that JSON cannot hold.
    """
    line = json.dumps(entry).encode() + b"\n"
    with writing(path), path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a file of results, without torn lines. FileNotFoundError where there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the folder that a benchmark wrote its {RESULTS} into")
    entries = []
    for line in path.read_bytes().split(b"\n"):
        try:
            entry = json.loads(line)
        except ValueError:  # torn, or empty
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


class Results:
    """What one part of a benchmark has to say, line by line."""

    def __init__(self, path: Path, part: str) -> None:
        self.path, self.part = path, part

    def add(self, **entry: Any) -> None:
        """Add one line of this part."""
        append(self.path, {"part": self.part, **entry})

    def values(self, **numbers: float) -> None:
        """Add numbers that goals are set for, by their keys."""
        self.add(values=numbers)

    def table(self, report: Report, rows: Iterable[Mapping[str, Any]] | None = None) -> list[Mapping[str, Any]]:
        """Add a report's head and then its rows, or those of `rows` as they come; returns the rows."""
        columns = [[column.key, column.title, column.form, column.scale] for column in report.columns]
        self.add(report=report.name, title=report.title, columns=columns, notes=list(report.notes))
        return self.rows(report.title, report.rows if rows is None else rows)

    def rows(self, title: str, rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Add rows to the table of this title as they come; returns them."""
        added = []
        for row in rows:
            self.add(title=title, row=row)
            added.append(row)
        return added
