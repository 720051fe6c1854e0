"""The steps of a sweep, a training or one evaluation each: its command, where its files lie, and whether it is done.

All state is in files. A training is done when its run folder holds a model of these settings, however it was started;
an evaluation when its folder holds a summary and a stamp with the fingerprint of this model and these settings.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamic_llava.config.run import RunConfig
from dynamic_llava.files import file_digest, replace_file
from dynamic_llava.train.config import file_inputs
from dynamic_llava.train.finished import is_finished, trained_otherwise

log = logging.getLogger(__name__)

SUMMARY = "summary.json"
STAMP = "sweep.json"
"""Beside a summary: which model and settings the files of the folder belong to, and whether they are complete."""


@dataclass(frozen=True)
class TrainingStep:
    """The run behind a row."""

    config: RunConfig
    command: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Return the run's folder."""
        return self.config.folder

    @property
    def model(self) -> Path:
        """Return where the trained model is, or will be."""
        return self.folder / "model"

    def __str__(self) -> str:
        return f"train {self.folder}"

    def is_done(self) -> bool:
        """Whether the model is there; ValueError when one of other settings is, which is not overwritten."""
        if not is_finished(self.folder):
            return False
        try:
            inputs = file_inputs(self.config, self.config.model.source)
        except OSError:  # trained elsewhere, or its data are gone: then their names alone are compared
            inputs = {}
        if differing := trained_otherwise(self.config, inputs):
            raise ValueError(
                f"{self.model} was trained with other settings or inputs: {'; '.join(differing)}. "
                f"Move {self.folder} away to train anew, or give the run another name"
            )
        return True

    def begin(self) -> None:
        """Make the run's folder; the training itself resumes or refuses what is in it."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def finish(self) -> None:
        """Do nothing: the model is the mark of a finished training."""


@dataclass(frozen=True)
class EvaluationStep:
    """One benchmark on a row's model."""

    task: str
    model: str
    """Folder or hub name."""
    folder: Path
    command: tuple[str, ...]
    settings: Mapping[str, Any]
    """What the result depends on besides the model and the data."""
    data: tuple[Path, ...] = ()
    """Files that hold the benchmark's questions and references."""

    @property
    def summary(self) -> Path:
        """Return where the result is, or will be."""
        return self.folder / SUMMARY

    def __str__(self) -> str:
        return f"evaluate {self.task}"

    def fingerprint(self) -> str:
        """Return a digest of the model's weights and configuration by content, or of its hub name, and the settings."""
        files = sorted({*Path(self.model).glob("*.safetensors"), *Path(self.model).glob("config.json")})
        facts = [(file.name, file_digest(file)) for file in files]
        text = json.dumps([facts or self.model, self.settings], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def is_done(self) -> bool:
        """Whether the summary is there, complete, and of this model, these settings and these data."""
        stamp = self._stamp()
        return stamp is not None and bool(stamp["complete"]) and self._fits(stamp) and self.summary.is_file()

    def begin(self) -> None:
        """Stamp the folder as begun; files of an earlier model, other settings or data are moved aside first."""
        stamp, now = self._stamp(), self.fingerprint()
        if stamp is not None and not self._fits(stamp):
            aside = _free(self.folder.with_name(f"{self.folder.name}.{stamp['fingerprint']}"))
            log.warning("%s belongs to another model, other settings or data; it is moved to %s", self.folder, aside)
            self.folder.rename(aside)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_stamp(now, complete=False)

    def finish(self) -> None:
        """Stamp the folder as complete; ValueError when the command left no summary."""
        if not self.summary.is_file():
            raise ValueError(f"the command ended well but left no {self.summary}")
        self._write_stamp(self.fingerprint(), complete=True)

    def _fits(self, stamp: Mapping[str, Any]) -> bool:
        """Whether a stamp is of this model, these settings and these data; data that are gone count as unchanged."""
        then, now = stamp.get("data", {}), self._digests()
        return stamp["fingerprint"] == self.fingerprint() and all(
            then.get(name, now[name]) == now[name] for name in now
        )

    def _digests(self) -> dict[str, str]:
        return {str(file): file_digest(file) for file in self.data if file.is_file()}

    def _stamp(self) -> dict[str, Any] | None:
        try:
            stamp: dict[str, Any] = json.loads((self.folder / STAMP).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return stamp

    def _write_stamp(self, fingerprint: str, *, complete: bool) -> None:
        stamp = {"fingerprint": fingerprint, "data": self._digests(), "complete": complete}
        replace_file(self.folder / STAMP, json.dumps(stamp) + "\n")


Step = TrainingStep | EvaluationStep


def _free(folder: Path) -> Path:
    """Return the folder's name, with a number behind it where the name is taken."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}.{number}")
    return free
