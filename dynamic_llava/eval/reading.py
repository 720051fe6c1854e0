"""Reading what benchmarks and answers come in: every file is decoded, taken apart and typed here.

What is wrong with a file is a ValueError that names the file, the place in it, what stands there and what is due; a
missing one is a FileNotFoundError. Text is UTF-8, with a byte-order mark or without. Standard library only.
"""

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dynamic_llava.files import brief

SHOWN = 5
"""Number of ids that an error message or a warning shows; it counts the others."""
LONGEST_CELL = 2**31 - 1
"""Characters of a table's cell; images are longer than csv's own limit."""


@dataclass(frozen=True)
class Kind:
    """What a field may hold."""

    due: str
    """In words, for error messages."""
    fits: Callable[[Any], bool]
    required: bool = True
    """Whether the field must be there and hold something else than null."""


def _is_text(value: Any) -> bool:
    """Half of an escaped pair (a lone surrogate) is no text: neither a tokenizer nor a file takes it."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_path(value: Any) -> bool:
    """A link may still lead out of the folder; that is seen when the image is opened."""
    if not _is_text(value) or not value or "\0" in value:
        return False
    path = PurePosixPath(value)
    return not path.is_absolute() and ".." not in path.parts


TEXT = Kind("text", _is_text)
PATH = Kind("a path inside the image folder", _is_path)
NO_PATH = Kind(
    "a path inside the image folder, or nothing", lambda value: value in (None, "") or _is_path(value), False
)
WHOLE = Kind("a whole number", _is_whole)
NUMBER = Kind("a number", _is_number)
NAME = Kind("a whole number or text", lambda value: _is_whole(value) or _is_text(value))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
LIST = Kind("a list that is not empty", lambda value: isinstance(value, list) and bool(value))
OBJECT = Kind("an object that is not empty", lambda value: isinstance(value, dict) and bool(value))
TEXTS = Kind("a list of texts, not empty", lambda value: LIST.fits(value) and all(map(_is_text, value)))
NUMBERS = Kind("a list of numbers, not empty", lambda value: LIST.fits(value) and all(map(_is_number, value)))


def optional(kind: Kind) -> Kind:
    """Return the kind of a field that may be missing or null."""
    return Kind(f"{kind.due}, or nothing", lambda value: value is None or kind.fits(value), required=False)


Fields = Mapping[str, Kind]
"""Name of a field -> what it holds."""


def fields_of(record: Any, fields: Fields, place: str) -> dict[str, Any]:
    """Return `record` when it is an object with these fields; ValueError names `place`, the field, what it is and has.

    Further fields are left as they are.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{place} holds a {type(record).__name__}; a JSON object is due there")
    if missing := [name for name, kind in fields.items() if kind.required and name not in record]:
        there = (shown(record) if len(record) > SHOWN else ", ".join(map(brief, record))) or "nothing"
        raise ValueError(f"{place} has no {', '.join(map(brief, missing))}; it has {there}")
    for name, kind in fields.items():
        if name in record:
            typed(record[name], kind, f"{place}: {name!r}")
    return record


def typed(value: Any, kind: Kind, place: str) -> Any:
    """Return a value of this kind; ValueError names `place`, the value and what is due."""
    if not kind.fits(value):
        raise ValueError(f"{place} is {brief(value)}; {kind.due} is due there")
    return value


def shown(ids: Iterable[object]) -> str:
    """Name the first few of many ids and count them all: "3 (1, 2, 3)", "1000 (1, 2, 3, 4, 5, ...)"."""
    ids = list(ids)
    more = ", ..." if len(ids) > SHOWN else ""
    return f"{len(ids)} ({', '.join(map(brief, ids[:SHOWN]))}{more})"


def read_text(path: Path) -> str:
    """Return what a text file holds. FileNotFoundError when it is missing, ValueError when it is no UTF-8."""
    _must_be_there(path)
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None


def read_json(path: Path) -> Any:
    """Return what a JSON file holds. FileNotFoundError when it is missing, ValueError when it is no JSON."""
    return parse_json(read_text(path), str(path))


def read_list(path: Path) -> list[Any]:
    """Return the list that a JSON file holds. ValueError also for another value, and for an empty list."""
    return typed(read_json(path), LIST, str(path))  # type: ignore[no-any-return]


def read_json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of a file of JSON objects, one a line; empty lines are passed over.

    Raises FileNotFoundError when there is no such file, ValueError that names file and line for anything else.
    """
    _must_be_there(path)
    number = 0
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, fields_of(parse_json(line, f"{path}:{number}"), {}, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: after line {number} come bytes that are no UTF-8 ({error.reason})") from None


def parse_json(text: str | bytes, place: str) -> Any:
    """Return the JSON value that a text is; ValueError names `place`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, thousands of brackets
        raise ValueError(f"{place} is no valid JSON ({error}); is it cut off there?") from None


def read_table(path: Path, columns: Iterable[str], delimiter: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place, row by column) of a table with a head line, which has at least these columns.

    ValueError names file and line for a missing column, a row of another length, what is no UTF-8 and no table, and a
    table without rows.
    """
    _must_be_there(path)
    number, limit = 0, csv.field_size_limit(LONGEST_CELL)  # the limit is the process's; it is put back
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            head = dict.fromkeys(reader.fieldnames or ())
            fields_of(head, dict.fromkeys(columns, _COLUMN), f"{path}: the head line")
            for row in reader:
                number, place = number + 1, f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"{place}: the row has more or fewer cells than the head line; is it cut off?")
                yield place, row
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 ({error.reason}), after row {number}; save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}: after row {number} comes no row of a table ({error})") from None
    finally:
        csv.field_size_limit(limit)
    if not number:
        raise ValueError(f"{path} holds no rows")


_COLUMN = Kind("a column", lambda value: True)


def _must_be_there(path: str | Path) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
