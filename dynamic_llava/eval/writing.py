"""Writing what a run leaves behind: a file appears whole or not at all, and what cannot be written says where.

Standard library only.
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXIT_NOT_WRITTEN = 74
"""Exit code of a command that could not write its files (a full disk, a read-only folder)."""
MISTAKES = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
"""What the name of a path is to blame for, not the disk."""


class WriteError(Exception):
    """A file could not be written; what was written before lies whole."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into a WriteError that names `path`; ValueError where the path itself is wrong."""
    try:
        yield
    except OSError as error:
        if error.errno in MISTAKES:
            raise ValueError(f"{path} cannot be written: {error.strerror}; give another path") from None
        raise WriteError(
            f"{path} cannot be written: {error.strerror or error}; make room or give another folder, then run the same "
            "command again: nothing that is written is computed twice"
        ) from error


def write_whole(path: Path, content: str) -> Path:
    """Write a text file, whole or not at all, and return its path; its folder is made."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w", encoding="utf-8", newline="\n") as file:
                file.write(content)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
    return path


def write_json(path: Path, content: Any, indent: int | None = None) -> Path:
    """Write a JSON file, on one line unless `indent` is given, and return its path."""
    return write_whole(path, json.dumps(decodable(content), indent=indent))


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a file of JSON objects, one a line, and return its path."""
    return write_whole(path, "".join(json.dumps(decodable(row)) + "\n" for row in rows))


def decodable(content: Any) -> Any:
    """Return texts, lists and objects with U+FFFD for each half of an escaped pair, which other JSON readers refuse."""
    if isinstance(content, str):
        return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(content, Mapping):
        return {name: decodable(value) for name, value in content.items()}
    return [decodable(one) for one in content] if isinstance(content, list | tuple) else content
