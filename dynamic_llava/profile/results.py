"""A result as a table for people and as lines of JSON, and the file of a benchmark's results.

The file is one line of JSON each, on the disk before the next thing is measured. Standard library only until a device
is asked for its name: results are kept and read, and the summary is written, where torch cannot be imported and
whatever happens to a process.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamic_llava.files import writing

if TYPE_CHECKING:
    import torch


Rows = Iterator[dict[str, Any]]
"""Rows of times, each as soon as it is measured."""


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    key: str
    """The row's entry that it shows; a row without it leaves the cell empty."""
    title: str
    """Heading, unit included."""
    form: str = ""
    """Format specification of numbers, e.g. ".2f"."""
    scale: float = 1.0
    """Factor from the entry's unit to the heading's."""

    def text(self, row: Mapping[str, Any]) -> str:
        """Return the cell of a row."""
        value = row.get(self.key)
        if value is None:
            return ""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return str(value)
        return format(value * self.scale if self.scale != 1.0 else value, self.form)


@dataclass(frozen=True)
class Report:
    """Rows of one kind, and what has to be said about them."""

    name: str
    """The command that made it; every JSON line says it."""
    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    """Entries in base units: bytes, seconds, FLOPs."""
    notes: Sequence[str] = field(default_factory=tuple)

    def table(self) -> str:
        """Return title, aligned table and notes as text."""
        cells = [[column.title for column in self.columns]]
        cells += [[column.text(row) for column in self.columns] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        sides = [">" if self._is_number(column) else "<" for column in self.columns]
        lines = [self.title, ""]
        for line in cells:
            padded = (f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def markdown(self) -> str:
        """Return the same as Markdown, without the title."""

        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        head = line(column.title for column in self.columns)
        rule = line("---:" if self._is_number(column) else "---" for column in self.columns)
        body = [line(column.text(row) for column in self.columns) for row in self.rows]
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([head, rule, *body, *(["", *notes] if notes else [])])

    def _is_number(self, column: Column) -> bool:
        """Whether a column's entries are numbers, some of which may be missing or replaced by words."""
        entries = [row.get(column.key) for row in self.rows]
        return any(isinstance(entry, (int, float)) and not isinstance(entry, bool) for entry in entries)

    def lines(self, about: Mapping[str, Any]) -> list[str]:
        """Return one line of JSON per row, with `about` (device, versions, commit) in each."""
        return [json.dumps({"report": self.name, **row, **about}) for row in self.rows]


def measured_on(device: "torch.device | None") -> dict[str, Any]:
    """Return device, versions, commit and date for JSON lines; device None for what is only calculated."""
    from dynamic_llava.provenance import environment

    return {"device": "none (calculated)" if device is None else device_name(device), **environment(), "date": today()}


def today() -> str:
    """Return the date of a measurement."""
    return date.today().isoformat()


def device_name(device: "torch.device") -> str:
    """Return what a device calls itself; a CPU's model is not asked for."""
    import torch

    return "cpu" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)


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
    """Writes the results of one part of a benchmark, line by line."""

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
