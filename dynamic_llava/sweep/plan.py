"""From a sweep's file to the steps of each row: a step is a training or one evaluation, with its command and its files.

Runs that several rows or sweeps name are the same steps. All state is in files: a training is done when its run folder
holds a model of these settings, however it was started; an evaluation when its folder holds a summary and a stamp with
the fingerprint of this model and these settings.
"""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dynamic_llava.cli import load_config
from dynamic_llava.cli.commands import method_words
from dynamic_llava.config import SparsityConfig, checkpoint_source
from dynamic_llava.config.run import RunConfig
from dynamic_llava.eval.tasks import get_task
from dynamic_llava.files import file_digest, replace_file
from dynamic_llava.methods import print_method, read_method
from dynamic_llava.sweep.config import TINY, SweepConfig, SweepRow
from dynamic_llava.tiny.world.dataset import build_world
from dynamic_llava.train.config import compared_settings, file_inputs
from dynamic_llava.train.finished import is_finished, trained_otherwise

log = logging.getLogger(__name__)

TRAIN = (sys.executable, "-m", "dynamic_llava.train.launch")

EVALUATE = (sys.executable, "-m", "dynamic_llava.eval")

MEASURE_TINY = (sys.executable, "-m", "dynamic_llava.tiny", "measure")
"""How a user starts each; the launcher of trainings takes every visible GPU, and so does `_on_every_gpu`."""

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


def _free(folder: Path) -> Path:
    """Return the folder's name, with a number behind it where the name is taken."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}.{number}")
    return free


SweepStep = TrainingStep | EvaluationStep


@dataclass(frozen=True)
class PlannedRow:
    """A row with its steps, in the order in which they are done."""

    row: SweepRow
    training: TrainingStep | None
    evaluations: tuple[EvaluationStep, ...]

    @property
    def steps(self) -> tuple[SweepStep, ...]:
        """The training, if there is one, and the evaluations."""
        return (*(() if self.training is None else (self.training,)), *self.evaluations)


@dataclass(frozen=True)
class SweepPlan:
    """A sweep and its rows."""

    sweep: SweepConfig
    rows: tuple[PlannedRow, ...]


def make_plan(sweep: SweepConfig, path: Path, overrides: Sequence[str] = ()) -> SweepPlan:
    """Return the steps of a sweep whose file is `path`; `overrides` are added to the command of every training.

    Builds the tiny world if the sweep needs it and it is not there. Raises ValueError or FileNotFoundError for a run's
    file that does not load, for rows that give one run two settings, and for two models in one folder.
    """
    world = None
    if sweep.tiny is not None:
        size = sweep.tiny
        world = build_world(train=size.train_images, test=size.test_images, seed=size.data_seed)
    if overrides and not any(row.config for row in sweep.rows):
        raise ValueError(f"{overrides[0]} is for trainings, and no row of the sweep is one; every row names a model")
    rows = tuple(_planned(sweep, row, path, overrides, world) for row in sweep.rows)
    _check_runs(rows)
    return SweepPlan(sweep, rows)


def _planned(sweep: SweepConfig, row: SweepRow, path: Path, overrides: Sequence[str], world: Path | None) -> PlannedRow:
    if row.model:
        switches = {"sparsity": "none" if row.sparsity == "trained" else row.sparsity}
        deciding = _deciding(row, SparsityConfig(), switches)
        model = checkpoint_source(row.model)
        return PlannedRow(row, None, _evaluations(sweep, model, sweep.model_folder(row.model), deciding, world))
    data = () if world is None else ("--data.json", str(world / "train.json"), "--data.image-folder", str(world))
    file = os.path.normpath(path.parent / row.config)
    about = (f"row {row.title!r}", "Train one row of a sweep.")
    own = load_config(RunConfig, (file, *row.overrides, *overrides), *about)
    if world is not None and (own.data.json or own.data.image_folder):
        named = own.data.json or own.data.image_folder
        raise ValueError(
            f"row {row.title!r} names data of its own ({named}), and the sweep's `tiny` section trains every row on "
            "the tiny world; leave one of them out"
        )
    arguments = (file, *data, *row.overrides, *overrides)
    config = load_config(RunConfig, arguments, *about)
    training = TrainingStep(config, (*TRAIN, *arguments))
    trained = config.train.switches if row.sparsity == "trained" else {"sparsity": row.sparsity}
    deciding = _deciding(row, config.sparsity, trained)
    evaluations = _evaluations(sweep, str(training.model), training.folder, deciding, world, config.model.projector)
    return PlannedRow(row, training, evaluations)


def _deciding(row: SweepRow, settings: SparsityConfig, switches: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides in a row's evaluations: `sparsity`, or `method` with all of its settings.

    ValueError that names the row for a method that is not known or has no such settings.
    """
    said = row.method if row.method is not None else switches.get("method")
    if said is None:
        return {"sparsity": switches["sparsity"]}
    try:
        return {"method": print_method(read_method(said, settings))}
    except ValueError as error:
        raise ValueError(f"row {row.title!r}: {error}") from None


def _evaluations(
    sweep: SweepConfig,
    model: str,
    folder: Path,
    deciding: Mapping[str, Any],
    world: Path | None,
    projector: str | None = None,
) -> tuple[EvaluationStep, ...]:
    found = []
    for task in sweep.tasks:
        method = deciding.get("method")
        words = ("--sparsity", deciding["sparsity"]) if method is None else tuple(method_words(method))
        words += ("--projector", projector) if projector is not None and ":" in projector else ()
        place = folder / "eval" / (_short_name(method) if method else deciding["sparsity"]) / task.replace(":", "-")
        options = ("--model", model, *words, "--output-folder", str(place))
        settings, data = {"task": task, **deciding}, ()
        if task == TINY:
            assert sweep.tiny is not None
            asked = ("--questions", str(sweep.tiny.questions), "--descriptions", str(sweep.tiny.descriptions))
            command = (*MEASURE_TINY, *options, "--world", str(world), *asked)
            settings |= asdict(sweep.tiny)
        else:
            where = ("--tasks", task, "--data-root", sweep.data_root, "--batch-size", str(sweep.batch_size))
            command = (*_on_every_gpu(EVALUATE), *options, *where)
            data = tuple(Path(sweep.data_root) / file.path for file in get_task(task).needed_files())
        found.append(EvaluationStep(task, model, place, command, settings, data))
    return tuple(found)


def _short_name(method: Mapping[str, Any]) -> str:
    """Return a folder's name for a printed method: its name, with a digest of its settings."""
    digest = hashlib.sha256(json.dumps(method, sort_keys=True).encode()).hexdigest()[:8]
    return f"{method['name'].replace(':', '-')}-{digest}"


def _on_every_gpu(program: tuple[str, ...]) -> tuple[str, ...]:
    """A program with one process per visible GPU, or PROCESSES of them, as scripts/eval.sh starts it."""
    processes = int(os.environ.get("PROCESSES") or max(1, torch.accelerator.device_count()))
    if processes == 1:
        return program
    python, _, module = program
    launcher = (python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    return (*launcher, "-m", "--", module)


def _check_runs(rows: Sequence[PlannedRow]) -> None:
    """One folder, one model: rows may share a run, not its folder alone."""
    seen: dict[Path, tuple[str, object]] = {}
    for planned in rows:
        title, training = planned.row.title, planned.training
        model = planned.row.model if training is None else compared_settings(training.config, 1)
        folder = planned.evaluations[0].folder.parents[2]
        other, first = seen.setdefault(folder, (title, model))
        if first != model:
            raise ValueError(
                f"rows {other!r} and {title!r} both keep their files in {folder} but are different models; give one of "
                "the runs another name"
            )
