"""Reading what benchmarks come in, and writing what servers want: errors name the file and the place in it."""

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynamic_llava.eval.answers import shown


def inside(folder: Path, name: str) -> Path:
    """Return the path of `name` in `folder`. ValueError when it is absolute or leaves it, by `..` or a link."""
    home = Path(folder).resolve()
    path = (home / name).resolve()
    if Path(name).is_absolute() or not path.is_relative_to(home):
        raise ValueError(f"image path {name!r} leaves the image folder {home}; give a path inside it")
    return path


def read_text(path: Path) -> str:
    """Return what a text file holds. FileNotFoundError when it is missing, ValueError when it is no UTF-8."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error})") from None


def read_json(path: Path) -> Any:
    """Return what a JSON file holds. FileNotFoundError when it is missing, ValueError when it is no JSON."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON ({error}); is it cut off?") from None


def write_json(path: Path, content: Any, indent: int | None = None) -> Path:
    """Write a JSON file, on one line unless `indent` is given, and return its path."""
    return _write(path, json.dumps(content, indent=indent))


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a file of JSON objects, one a line, and return its path."""
    return _write(path, "".join(json.dumps(row) + "\n" for row in rows))


def fields_of(record: Any, names: Sequence[str], place: str) -> dict[str, Any]:
    """Return `record` when it is an object with these fields; ValueError names `place` and what is missing."""
    if not isinstance(record, dict):
        raise ValueError(f"{place} holds a {type(record).__name__}; a JSON object is due there")
    if missing := [name for name in names if name not in record]:
        raise ValueError(f"{place} has no {', '.join(map(repr, missing))}; it has {', '.join(map(repr, record))}")
    return record


def unknown_answers(task: str, answers: Iterable[Any], known: Iterable[Any]) -> str:
    """Say which answered questions (their keys) the task does not have; "" when it has all of them."""
    known = set(known)
    unknown = [name for name in answers if name not in known]
    return f"{task} has no question for answers {shown(unknown)}; are they of another split or task?" if unknown else ""


def missing_answers(answers: Container[Any], known: Iterable[Any]) -> list[Any]:
    """Return the questions (their keys) that have no answer, in the questions' order."""
    return [name for name in known if name not in answers]


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
    return path
