"""Workbooks for servers that take no other file; openpyxl is imported when one is written."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def write_workbook(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Write an xlsx file of one sheet with a head line; return its path.

    Text stays text, also "=1+1"; characters that no workbook can hold (control characters) are left out. ValueError
    when openpyxl is not installed.
    """
    try:
        import openpyxl
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError:
        raise ValueError(f"{path} needs the package openpyxl; pip install dynamic-llava[eval]") from None
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "Sheet1"
    for number, row in enumerate([columns, *rows], 1):
        for place, value in enumerate(row, 1):
            if value is None:
                continue
            text = isinstance(value, str)
            cell = sheet.cell(number, place, ILLEGAL_CHARACTERS_RE.sub("", value) if text else value)
            cell.data_type = "s" if text else cell.data_type
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)
    return path
