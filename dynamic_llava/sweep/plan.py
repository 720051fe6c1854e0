"""From a sweep's file to the steps of each row. Runs that several rows or sweeps name are the same steps."""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dynamic_llava.cli import load_config
from dynamic_llava.config import checkpoint_source
from dynamic_llava.config.run import RunConfig
from dynamic_llava.eval.tasks import get_task
from dynamic_llava.sweep.config import TINY, SweepConfig, SweepRow
from dynamic_llava.sweep.steps import EvaluationStep, Step, TrainingStep
from dynamic_llava.tiny.world.dataset import build_world
from dynamic_llava.train.config import compared_settings

TRAIN = (sys.executable, "-m", "dynamic_llava.train.launch")
EVALUATE = (sys.executable, "-m", "dynamic_llava.eval")
MEASURE_TINY = (sys.executable, "-m", "dynamic_llava.tiny", "measure")
"""How a user starts each; the launcher of trainings takes every visible GPU, and so does `_on_every_gpu`."""


@dataclass(frozen=True)
class PlannedRow:
    """A row with its steps, in the order in which they are done."""

    row: SweepRow
    training: TrainingStep | None
    evaluations: tuple[EvaluationStep, ...]

    @property
    def steps(self) -> tuple[Step, ...]:
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
        mode = "none" if row.sparsity == "trained" else row.sparsity
        model = checkpoint_source(row.model)
        return PlannedRow(row, None, _evaluations(sweep, model, sweep.model_folder(row.model), mode, world))
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
    mode = config.train.sparsity_mode if row.sparsity == "trained" else row.sparsity
    return PlannedRow(row, training, _evaluations(sweep, str(training.model), training.folder, mode, world))


def _evaluations(
    sweep: SweepConfig, model: str, folder: Path, sparsity: str, world: Path | None
) -> tuple[EvaluationStep, ...]:
    found = []
    for task in sweep.tasks:
        place = folder / "eval" / sparsity / task.replace(":", "-")
        options = ("--model", model, "--sparsity", sparsity, "--output-folder", str(place))
        settings, data = {"task": task, "sparsity": sparsity}, ()
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
