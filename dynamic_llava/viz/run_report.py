"""The report of a run: a page made of the files in its folder alone, so that it can be made again at any time.

What a folder lacks is left out of its page; a file that is broken or half written is named in it, and the rest is
shown. The same files make the same page, byte for byte: no clock is read, and no path outside the folder.
"""

import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from dynamic_llava.files import brief_text, replace_file
from dynamic_llava.viz.page import document, escaped, facts, figure, folded, from_markdown, paragraph, section

REPORT = "report.html"
"""Name of the page in a run's folder."""
ALT_TEXTS = {
    "kept_patches": "scenes, and beside each the patches faded that a method drops, method by method",
    "greyed_answers": "generated answers with the words greyed that were dropped from the cache",
    "keep_rate_by_word": "bars: how often words stay in the cache, by class of word",
    "budgets": "curves: accuracy of short answers over the share of image tokens that is kept",
    "compare": "points: quality against cost of each method",
}
"""What the pictures that a run draws show, by the names of their files."""
MOST_VALUES = 1_000_000
"""Values that a file may hold; anchors of YAML can make endless ones of a few lines."""
_UNREADABLE = (OSError, ValueError, RecursionError, yaml.YAMLError)
_OTHER_SHAPE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What a file that holds something else than a run writes makes of a section."""


class RunReport:
    """A page that grows section by section.

    what: the kind of run, for the title. In `problems` is what could not be read, one line each.
    """

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self.what = folder, what
        self.name = folder.resolve().name
        self.problems: list[str] = []
        self.about = ""
        """What the run is, in a line below the title."""
        self._body: list[str] = []

    def text(self, name: str) -> str:
        """Return what a text file of the folder holds; empty where there is none or it cannot be read."""
        return self._read(name, lambda path: path.read_text(encoding="utf-8-sig"), "")

    def object(self, name: str) -> dict[str, Any]:
        """Return the object of a JSON file; empty where there is none or it cannot be read."""
        found = self._read(name, lambda path: json.loads(path.read_text(encoding="utf-8-sig")), {})
        return self._settings(name, found)

    def yaml(self, name: str) -> dict[str, Any]:
        """Return the settings of a YAML file; empty where there is none or it cannot be read."""
        found = self._read(name, lambda path: yaml.safe_load(path.read_text(encoding="utf-8-sig")), {})
        return self._settings(name, found)

    def lines(self, name: str, most: int | None = None) -> list[dict[str, Any]]:
        """Return the objects of a file of JSON lines, the first `most`; what is no object is named and left out."""
        path = self.folder / name
        if not path.exists():
            return []
        found = []
        try:
            with path.open(encoding="utf-8-sig", errors="strict") as file:
                for number, line in enumerate(islice(file, most), 1):
                    found += self._object(line, f"{name}, line {number}")
        except _UNREADABLE as error:
            self._tell(name, error)
        return found

    def add(self, title: str, source: str, build: Callable[[], Iterable[str]]) -> None:
        """Add a section that `build` makes of what the file `source` holds; none where it makes nothing.

        A file that holds something else than a run writes there is named, and its section left out.
        """
        try:
            self._body += section(title, build())
        except _OTHER_SHAPE as error:
            said = brief_text(f"{type(error).__name__}: {error}")
            self._note(f"{source} holds something else than a run writes there ({said}): no {title!r}")

    def add_markdown(self, title: str, name: str) -> None:
        """Add a page of tables that the run has written."""
        self.add(title, name, lambda: from_markdown(self.text(name)))

    def add_pictures(self, title: str, pattern: str, *, without: Iterable[str] = ()) -> None:
        """Add the PNG files that fit a pattern, in the order of their names, those of the stems `without` left out."""
        shown: list[str] = []
        for path in sorted(self.folder.glob(pattern)):
            name = path.relative_to(self.folder).as_posix()
            if path.stem not in without:
                said = path.stem.replace("_", " ")
                alt = f"{said}; {ALT_TEXTS.get(path.stem, 'a picture that the run has drawn')}"
                shown += self._read(name, lambda path, alt=alt, said=said: [figure(path.read_bytes(), alt, said)], [])
        self.add(title, pattern, lambda: shown)

    def add_settings(self, name: str) -> None:
        """Add all settings of a YAML file, folded."""
        found = self.yaml(name)
        self.add("Settings", name, lambda: folded(f"all settings ({name})", facts(flat_facts(found))))

    def add_environment(self, source: str, found: Any) -> None:
        """Add what a result was made with: versions, machine, commit, command."""
        self.add("Made with", source, lambda: facts(flat_facts(found or {}, empty=False)))

    def page(self) -> str:
        """Return the page."""
        title = f"{self.what}: {self.name}"
        head = [f"<h1>{escaped(title)}</h1>", *([paragraph(self.about, "quiet")] if self.about else [])]
        return document(title, [*head, *self._told(), *self._body])

    def write(self) -> Path:
        """Write the page into the folder, whole or not at all; WriteError where it cannot be. Returns its path."""
        path = self.folder / REPORT
        replace_file(path, self.page())
        return path

    def _note(self, problem: str) -> None:
        """Take a problem down, as text that neither a page nor a terminal is steered by."""
        text = "".join(one if one.isprintable() else " " for one in brief_text(problem))
        if text not in self.problems:
            self.problems.append(text)

    def _told(self) -> list[str]:
        if not self.problems:
            return []
        listed = "".join(f"<li>{escaped(problem)}</li>" for problem in self.problems)
        return [f'<div class="problems" role="note"><p>Not everything could be read:</p><ul>{listed}</ul></div>']

    def _read(self, name: str, read: Callable[[Path], Any], otherwise: Any) -> Any:
        path = self.folder / name
        if not path.exists():
            return otherwise
        try:
            return read(path)
        except _UNREADABLE as error:
            self._tell(name, error)
            return otherwise

    def _settings(self, name: str, found: Any) -> dict[str, Any]:
        if isinstance(found, dict) and _is_small(found):
            return found
        self._note(f"{name} holds {'too much' if isinstance(found, dict) else 'no object'}: left out")
        return {}

    def _object(self, line: str, place: str) -> list[dict[str, Any]]:
        if not line.strip():
            return []
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            half = "" if line.endswith("\n") else "; it has no end, so it may still be written"
            self._note(f"{place} is no JSON ({error}){half}: left out")
            return []
        if not isinstance(found, dict):
            self._note(f"{place} holds no object: left out")
            return []
        return [found]

    def _tell(self, name: str, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        self._note(f"{name} could not be read ({brief_text(reason)}): left out")


def flat_facts(found: Mapping[str, Any], *, empty: bool = True) -> list[tuple[str, str]]:
    """Return nested settings as (dotted name, text), as YAML writes them; those without a value unless not `empty`."""
    rows: list[tuple[str, str]] = []
    for name, value in found.items():
        if isinstance(value, Mapping) and value:
            rows += [(f"{name}.{inner}", text) for inner, text in flat_facts(value, empty=empty)]
        elif empty or value is not None:
            rows.append((str(name), said(value)))
    return rows


def _is_small(value: Any) -> bool:
    """Whether nested settings hold at most MOST_VALUES values."""
    left, count = [value], 0
    while left and count <= MOST_VALUES:
        one = left.pop()
        count += 1
        left += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
    return not left


def said(value: Any) -> str:
    """Return a value as settings write it: true, null, a, b; a command as it is typed."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        texts = all(isinstance(one, str) for one in value)
        return shlex.join(value) if texts and len(value) > 1 else ", ".join(map(said, value))
    return str(value)
