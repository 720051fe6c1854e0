"""Writing what a run and a server's file hold: whole or not at all, JSON that every reader takes. No torch here."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dynamic_llava.files import replace_file, writing


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
