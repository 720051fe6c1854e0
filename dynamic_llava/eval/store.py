"""The answers of a run on disk: written as they come, resumed after any interruption, one file in question order.

Beside `<name>.jsonl`, which is there once every question has an answer, lie `<name>.run.json`, what the answers depend
on, and while the run goes `<name>.part<rank>.jsonl`, what each process has answered so far. All answer files are
LLaVA's JSON lines; the place of a question among all of them stands in an answer's metadata. No torch here.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from dynamic_llava.eval.answers import Answer, append_answers, parse_answer, write_answers
from dynamic_llava.eval.reading import WHOLE, brief, fields_of, parse_json, read_json, shown
from dynamic_llava.files import writing

PLACE = "place"
"""Field of an answer's metadata: the number of its question, from 0, in the order in which the task gives them."""
RECORD = ".run.json"
"""How the names of files end that say what a task's answers depend on."""
LONGEST_SHOWN = 120
"""How many characters of a setting an error shows."""
SHOWN_DIFFERENCES = 8
"""How many changed settings an error names; it counts the others."""


class AnswerStore:
    """The answers to one task's questions, `count` of them, in `folder`; `settings` is what they depend on.

    `settings` is JSON-able. A folder that holds answers made with other settings is refused: ValueError names the
    settings that differ with both values, or says that the answers are not of a run at all. ValueError as well for a
    broken line (not the last one, which a killed process may have cut off) and for a file that another process writes.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any], count: int, rank: int = 0) -> None:
        self.path = folder / f"{name}.jsonl"
        """The whole answer file."""
        self.count = count
        self._folder, self._name = folder, name
        self._record = folder / f"{name}{RECORD}"
        self._part = folder / f"{name}.part{rank}.jsonl"
        self._settings = json.loads(json.dumps(settings, sort_keys=True, default=str))
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._check_settings()
            self._file = _open_part(self._part)
        self.done = self._read()
        """Place -> answer of every question answered so far, by any process."""

    def answer_id(self, place: int) -> str:
        """Return the id of an answer: settings and place make it, so that the same run writes the same file."""
        text = json.dumps([self._settings, place], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:22]

    def append(self, answers: Sequence[Answer]) -> None:
        """Write answers, whose metadata says their place, and flush them; WriteError where the disk refuses."""
        with writing(self._part):
            append_answers(self._file, answers)

    def close(self) -> None:
        """Close the file of this process; what it holds stays."""
        with writing(self._part):
            self._file.close()

    def merge(self) -> Path:
        """Write all answers in question order into one file, remove the parts, and return the file's path.

        For one process, when all have closed their files. The file appears whole or not at all. Raises ValueError that
        names the questions, by place, that have no answer.
        """
        found = self._read()
        if missing := [place for place in range(self.count) if place not in found]:
            raise ValueError(f"{self._name}: questions without an answer, by place: {shown(missing)}")
        write_answers(self.path, [found[place] for place in range(self.count)])
        killed = [path for path in self._folder.glob(f"{self._name}.run.*") if path.suffix[1:].isdigit()]
        for part in (*self._parts(), *killed):
            part.unlink()
        return self.path

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob(f"{self._name}.part*.jsonl"))

    def _check_settings(self) -> None:
        answers = [path for path in (self.path, *self._parts()) if path.is_file() and path.stat().st_size]
        if not self._record.is_file():
            if answers:
                raise ValueError(
                    f"{answers[0]} is there without {self._record.name}, which says what made it; "
                    "choose another output folder, or move it away"
                )
            # Every process writes the same; the name is its own until the file is whole.
            partial = self._record.with_suffix(f".{os.getpid()}")
            try:
                partial.write_text(json.dumps(self._settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")
                os.replace(partial, self._record)
            finally:
                with suppress(OSError):
                    partial.unlink(missing_ok=True)
            return
        before = fields_of(read_json(self._record), {}, str(self._record))
        if before != self._settings:
            raise ValueError(
                f"{self._folder} holds answers of another run: {differences(before, self._settings)}; "
                f"choose another output folder, or remove {self._record.name} and its answers"
            )

    def _read(self) -> dict[int, Answer]:
        """Return place -> answer from the whole file and all parts; where two have one, it is the same."""
        found: dict[int, Answer] = {}
        for path in (self.path, *self._parts()):
            for answer in _whole_lines(path):
                place = answer.metadata.get(PLACE)
                if not WHOLE.fits(place) or not 0 <= place < self.count:
                    raise ValueError(
                        f"{path}:{answer.line} has place {brief(place)} in its metadata; there are "
                        f"{self.count} questions"
                    )
                found.setdefault(place, answer)
        return found


def identity_of(settings: Mapping[str, Any]) -> str:
    """Return a digest of settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say which settings differ, nested ones by dotted names: "model.dtype was float32 and is bfloat16, ..."."""
    old, new = _flat(before), _flat(now)
    absent = "absent"
    changed = [
        f"{name} was {_short(old.get(name, absent))} and is {_short(new.get(name, absent))}"
        for name in sorted(old | new)
        if old.get(name, absent) != new.get(name, absent)
    ]
    more = len(changed) - SHOWN_DIFFERENCES
    return ", ".join(changed[:SHOWN_DIFFERENCES]) + (f", and {more} more" if more > 0 else "")


def _short(value: Any) -> str:
    text = str(value).encode(errors="backslashreplace").decode()  # half a character cannot be printed
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _flat(settings: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(settings, Mapping) or not settings:
        return {name: settings}
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{name}.{key}" if name else str(key))
    return flat


def _open_part(path: Path) -> TextIO:
    """Open a part for appending, behind its last whole line; ValueError when another process has it open."""
    file = path.open("a", encoding="utf-8", newline="\n")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"another process is writing {path}; wait for it, or choose another output folder") from None
    file.truncate(path.read_bytes().rfind(b"\n") + 1)
    return file


def _whole_lines(path: Path) -> Iterator[Answer]:
    """Yield the answers of a file's lines; the last one is left out where it has no end: it was cut off."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            place = f"{path}:{number}"
            yield parse_answer(fields_of(parse_json(line, place), {}, place), place, number)
