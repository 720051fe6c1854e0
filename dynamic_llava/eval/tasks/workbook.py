"""Workbooks for servers that take no other file; openpyxl is imported when one is written."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dynamic_llava.eval.writing import decodable
from dynamic_llava.files import writing

LONGEST_CELL = 32_767
"""Characters that a cell of a workbook holds."""
_NOT_XML = re.compile("[^\t\n -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 forbids; a carriage return would come back as a line feed."""


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
