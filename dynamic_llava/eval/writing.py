"""Writing what evaluation leaves: text and JSON that every reader takes, markdown, and workbooks for servers.

A file is written whole or not at all. Standard library only, but for openpyxl, which is imported when a workbook is
written.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynamic_llava.files import replace_file, writing

MISSING = "-"
"""Text of a table's cell that has no value."""

LONGEST_CELL = 32_767
"""Characters that a cell of a workbook holds."""

_NOT_XML = re.compile("[^\t\n -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 forbids; a carriage return would come back as a line feed."""


def write_text(path: Path, text: str) -> Path:
    """Write a text file, whole or not at all, and return its path; its folder is made. WriteError names the path."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text)
    return path


def write_json(path: Path, content: Any, indent: int | None = None) -> Path:
    """Write a JSON file, on one line unless `indent` is given, and return its path."""
    return write_text(path, json.dumps(decodable(content), indent=indent))


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a file of JSON objects, one a line, and return its path."""
    return write_text(path, "".join(json.dumps(decodable(row)) + "\n" for row in rows))


def decodable(content: Any) -> Any:
    """Return texts, lists and objects with U+FFFD for each half of an escaped pair, which other JSON readers refuse."""
    if isinstance(content, str):
        return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(content, Mapping):
        return {name: decodable(value) for name, value in content.items()}
    return [decodable(one) for one in content] if isinstance(content, list | tuple) else content


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Aligned markdown table: the first line is the head, the first column flush left, the others flush right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def join(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        padded[0] = cells[0].ljust(widths[0])
        return "| " + " | ".join(padded) + " |"

    marks = [":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])]
    return "\n".join([join(lines[0]), "|" + "|".join(marks) + "|", *(join(line) for line in lines[1:])])


def code(value: object) -> str:
    """Return any text as a markdown code span of one line, in which nothing is a link, HTML or an end of the span."""
    text = " ".join("".join(one if one.isprintable() else " " for one in decodable(str(value))).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}" if text else ""


def write_workbook(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Write an xlsx file of one sheet with a head line, read it back, and return its path.

    Text stays text, also "=1+1". Line ends become line feeds, half of an escaped pair U+FFFD, and characters that no
    workbook can hold are left out. ValueError for a text that is longer than a cell, when the file does not hold
    what it was given, and when openpyxl is not installed.
    """
    try:
        import openpyxl
    except ImportError:
        raise ValueError(f"{path} needs the package openpyxl; pip install dynamic-llava[eval]") from None
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "Sheet1"
    lines = [[_cell(value, path, number) for value in row] for number, row in enumerate([columns, *rows], 1)]
    for number, row in enumerate(lines, 1):
        for place, value in enumerate(row, 1):
            if value is None:
                continue
            cell = sheet.cell(number, place, value)
            cell.data_type = "s" if isinstance(value, str) else cell.data_type
    partial = path.with_name(f"{path.name}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        book.save(partial)
        os.replace(partial, path)
    _check(path, lines)
    return path


def _cell(value: Any, path: Path, number: int) -> Any:
    """Return what a cell can hold of a value; None for an empty text, which no workbook keeps."""
    if not isinstance(value, str):
        return value
    text = _NOT_XML.sub("", decodable(value).replace("\r\n", "\n").replace("\r", "\n"))
    if len(text) > LONGEST_CELL:
        raise ValueError(
            f"{path}: row {number} has a text of {len(text):,} characters, but a cell of a workbook holds "
            f"{LONGEST_CELL:,}; shorten the answer"
        )
    return text or None


def _check(path: Path, lines: Sequence[Sequence[Any]]) -> None:
    import openpyxl

    book = openpyxl.load_workbook(path, read_only=True)
    try:
        found = [list(row) for row in book.active.iter_rows(values_only=True, max_col=len(lines[0]))]
    finally:
        book.close()
    found += [[None] * len(lines[0])] * (len(lines) - len(found))  # empty rows at the end are not stored
    for number, (row, back) in enumerate(zip(lines, found, strict=True), 1):
        if list(row) != back:
            raise ValueError(f"{path}: row {number} was written as {row} and is read back as {back}")
