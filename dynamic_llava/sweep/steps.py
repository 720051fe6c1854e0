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

from dynamic_llava.cli import read_yaml
from dynamic_llava.files import replace_file
from dynamic_llava.train.checkpoints import compared_settings
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.run import MODEL_SETTINGS

log = logging.getLogger(__name__)

SUMMARY = "summary.json"
STAMP = "sweep.json"
"""Beside a summary: which model and settings the files of the folder belong to, and whether they are complete."""


@dataclass(frozen=True)
class Training:
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
        if not (self.model / "config.json").is_file():
            return False
        if not (self.model / MODEL_SETTINGS).is_file():
            raise ValueError(
                f"{self.model} has no {MODEL_SETTINGS} that says how it was trained; move {self.folder} away"
            )
        then = compared_settings(read_yaml(RunConfig, self.model / MODEL_SETTINGS), 1)
        now = compared_settings(self.config, 1)
        differing = [name for name in sorted(now | then) if now.get(name) != then.get(name)]
        if differing:
            changes = "; ".join(f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in differing)
            raise ValueError(
                f"{self.model} was trained with other settings: {changes}. Move {self.folder} away to train anew, or "
                "give the run another name"
            )
        return True

    def begin(self) -> None:
        """Make the run's folder; the training itself resumes or refuses what is in it."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def finish(self) -> None:
        """Do nothing: the model is the mark of a finished training."""


@dataclass(frozen=True)
class Evaluation:
    """One benchmark on a row's model."""

    task: str
    model: str
    """Folder or hub name."""
    folder: Path
    command: tuple[str, ...]
    settings: Mapping[str, Any]
    """What the result depends on besides the model."""

    @property
    def summary(self) -> Path:
        """Return where the result is, or will be."""
        return self.folder / SUMMARY

    def __str__(self) -> str:
        return f"evaluate {self.task}"

    def fingerprint(self) -> str:
        """Return a digest of the model's files (names, sizes, times) or hub name, and the settings."""
        files = sorted(Path(self.model).glob("*.safetensors"))
        facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        text = json.dumps([facts or self.model, self.settings], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def is_done(self) -> bool:
        """Whether the summary is there, complete, and of this model and these settings."""
        stamp = self._stamp()
        return stamp == {"fingerprint": self.fingerprint(), "complete": True} and self.summary.is_file()

    def begin(self) -> None:
        """Stamp the folder as begun; files of an earlier model or other settings are moved aside first."""
        stamp, now = self._stamp(), self.fingerprint()
        if stamp is not None and stamp["fingerprint"] != now:
            aside = self.folder.with_name(f"{self.folder.name}.{stamp['fingerprint']}")
            log.warning("%s belongs to another model or other settings and is moved to %s", self.folder, aside)
            self.folder.rename(aside)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_stamp(now, complete=False)

    def finish(self) -> None:
        """Stamp the folder as complete; ValueError when the command left no summary."""
        if not self.summary.is_file():
            raise ValueError(f"the command ended well but left no {self.summary}")
        self._write_stamp(self.fingerprint(), complete=True)

    def _stamp(self) -> dict[str, Any] | None:
        try:
            stamp: dict[str, Any] = json.loads((self.folder / STAMP).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return stamp

    def _write_stamp(self, fingerprint: str, *, complete: bool) -> None:
        replace_file(self.folder / STAMP, json.dumps({"fingerprint": fingerprint, "complete": complete}) + "\n")


Step = Training | Evaluation
