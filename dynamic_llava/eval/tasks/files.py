"""Image paths inside their folder; answers without questions, and questions without answers."""

from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from dynamic_llava.eval.reading import brief, shown


def inside(folder: Path, name: str) -> Path:
    """Return the path of `name` in `folder`. ValueError when it is absolute or leaves it, by `..` or a link."""
    home = Path(folder).resolve()
    try:
        path = (home / name).resolve()
    except (ValueError, OSError, RuntimeError) as error:  # a null byte, a name too long, a circle of links
        raise ValueError(f"image path {brief(name)} in {home} is no path of a file ({error})") from None
    if Path(name).is_absolute() or not path.is_relative_to(home):
        raise ValueError(f"image path {brief(name)} leaves the image folder {home}; give a path inside it")
    return path


def unknown_answers(task: str, answers: Iterable[Any], known: Iterable[Any]) -> str:
    """Say which answered questions (their keys) the task does not have; "" when it has all of them."""
    known = set(known)
    unknown = [name for name in answers if name not in known]
    return f"{task} has no question for answers {shown(unknown)}; are they of another split or task?" if unknown else ""


def missing_answers(answers: Container[Any], known: Iterable[Any]) -> list[Any]:
    """Return the questions (their keys) that have no answer, in the questions' order."""
    return [name for name in known if name not in answers]
