"""Checkpoints of a run: complete or not there. A marker is written last; only what carries it is ever resumed from.

    <run folder>/checkpoint-<step>/complete.json   step, processes, ZeRO stage, settings, inputs; every file, its size
    <run folder>/model/                            the finished model; it appears under its name only when whole

Beside safetensors, a checkpoint holds what transformers and DeepSpeed write with torch.save: optimizer, scheduler and
random states. transformers reads its own with weights_only; DeepSpeed unpickles, so its files are looked through first.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dynamic_llava.files import give_usual_modes, replace_file, writing
from dynamic_llava.train.config import COMPARED_BY_CONTENT, changed_inputs, changes
from dynamic_llava.train.config import compared_settings as compared_settings
from dynamic_llava.train.distributed import on_main, wait_for_all
from dynamic_llava.train.stopping import SaveError

log = logging.getLogger(__name__)

MARKER = "complete.json"
PICKLED_BY_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
"""What its files may name beside what torch itself allows in a file of weights."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run's folder. Every rank calls its methods together; files are touched by the first."""

    folder: Path
    settings: dict[str, Any]
    """`compared_settings` of the run."""
    processes: int
    zero_stage: int = 0
    """0 without DeepSpeed."""
    keep: int = 2
    inputs: dict[str, str] = field(default_factory=dict)
    """`run_inputs` of the run: what its files hold."""
    accept_changed_inputs: bool = False

    def resume_point(self, *, resume: bool) -> Path | None:
        """Return the newest complete checkpoint, and remove incomplete ones; all of them unless `resume`.

        Raises ValueError when that checkpoint belongs to other settings or inputs or cannot be read by this many
        processes.
        """
        return on_main(lambda: self._resume_point(resume))

    def write(self, step: int, save: Callable[[], None], least_bytes: int) -> None:
        """Let `save` write checkpoint-<step>, mark it complete, then remove all but the newest `keep` complete ones.

        The one before it stays in any case until `trim`: what is newest has not yet shown that it is healthy.
        `least_bytes` is what it will take at least. Raises SaveError when the disk is too full or writing fails.
        """
        target = self.folder / f"checkpoint-{step}"
        on_main(partial(_written, target, partial(self._make_room, target, least_bytes)))
        with saving(target, least_bytes):
            save()
        wait_for_all()
        on_main(lambda: self._mark(target, step))

    def trim(self) -> None:
        """Remove all but the newest `keep` complete checkpoints."""
        on_main(lambda: self._remove_older(self.keep))

    def after_illness(self, step: int) -> str:
        """Return what is left to go on from, in words, when the loss of the step after `step` was not finite.

        A checkpoint of `step` itself is put aside, where there is an older one: its weights gave that loss.
        """
        return on_main(lambda: self._after_illness(step))

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint as this process sees it; None without one."""
        complete = self._complete_ones()
        return complete[-1] if complete else None

    def _resume_point(self, resume: bool) -> Path | None:
        found = _numbered(self.folder)
        complete = [checkpoint for checkpoint in found if is_complete(checkpoint)]
        chosen = complete[-1] if complete and resume else None
        if chosen is not None:
            self._check(chosen)
        for checkpoint in found:
            if not resume:
                log.warning("train.resume is false or train.overwrite true: %s is removed", checkpoint)
                shutil.rmtree(checkpoint)
            elif checkpoint not in complete:
                log.warning("%s is incomplete (the run ended while it was written) and is removed", checkpoint)
                shutil.rmtree(checkpoint)
        if chosen is not None:
            log.info("resuming from %s", chosen)
        return chosen

    def _check(self, checkpoint: Path) -> None:
        check_pickles(checkpoint)
        facts = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        if facts["zero_stage"] != self.zero_stage:
            raise ValueError(
                f"{checkpoint} was written {_strategy(facts['zero_stage'])} and this run trains "
                f"{_strategy(self.zero_stage)}; their optimizer states differ: go on with the train.deepspeed it had"
            )
        if self.zero_stage and facts["processes"] != self.processes:
            raise ValueError(
                f"{checkpoint} holds the optimizer in {facts['processes']} parts, one per process, and this run has "
                f"{self.processes} processes; ZeRO can go on with the same number only"
            )
        recorded = facts.get("inputs")  # files were compared by their names alone until contents were recorded
        by_content: Set[str] = set() if recorded is None else COMPARED_BY_CONTENT
        if found := changes(facts["settings"], self.settings, leave_out=by_content):
            raise ValueError(
                f"{checkpoint} belongs to other settings: {'; '.join(found)}. Restore them to go on, choose another "
                "name or output_folder, or start over with train.resume: false (--train.no-resume), which removes it"
            )
        if recorded is not None:
            self._check_inputs(checkpoint, recorded)

    def _check_inputs(self, checkpoint: Path, recorded: dict[str, str]) -> None:
        found = "; ".join(changed_inputs(recorded, self.inputs))
        if found and self.accept_changed_inputs:
            log.warning("going on from %s with other inputs, as asked: %s", checkpoint, found)
        elif found:
            order = "the samples and their order are the same"
            if recorded.get("samples") != self.inputs.get("samples"):
                order = "other samples come in another order, so that some are seen twice and others never"
            raise ValueError(
                f"the inputs of this run have changed since {checkpoint}: {found}. Restore them to go on exactly; or "
                f"go on all the same with train.accept_changed_inputs: true (--train.accept-changed-inputs): {order}; "
                "or start over under another name, or with train.resume: false (--train.no-resume), which removes the "
                "checkpoint"
            )

    def _make_room(self, target: Path, least_bytes: int) -> None:
        if target.exists():
            shutil.rmtree(target)
        complete = self._complete_ones()
        needed = size_of(complete[-1]) if complete else least_bytes
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise SaveError(_full(target, needed, free))

    def _mark(self, target: Path, step: int) -> None:
        (target / "training_args.bin").unlink(missing_ok=True)  # a pickle; config.yaml says the same
        files = {str(path.relative_to(target)): path.stat().st_size for path in _files(target)}
        facts = {
            "step": step,
            "processes": self.processes,
            "zero_stage": self.zero_stage,
            "settings": self.settings,
            "inputs": self.inputs,
            "files": files,
        }
        with saving(target, 0):
            give_usual_modes(target)
            replace_file(target / MARKER, json.dumps(facts, indent=1) + "\n")
        self._remove_older(max(self.keep, 2))

    def _remove_older(self, keep: int) -> None:
        for old in self._complete_ones()[:-keep]:
            (old / MARKER).unlink()  # first, so that a half-removed one does not count
            shutil.rmtree(old)

    def _after_illness(self, step: int) -> str:
        complete, note = self._complete_ones(), ""
        if len(complete) > 1 and complete[-1].name == f"checkpoint-{step}":
            ill = complete.pop()
            aside = ill.with_name(f"unhealthy-{step}")
            shutil.rmtree(aside, ignore_errors=True)
            ill.rename(aside)
            note = f" ({ill.name} gave that loss and is put aside as {aside.name})"
        return f"the last healthy checkpoint is {complete[-1]}{note}" if complete else "no checkpoint had been written"

    def _complete_ones(self) -> list[Path]:
        return [checkpoint for checkpoint in _numbered(self.folder) if is_complete(checkpoint)]


def is_complete(checkpoint: Path) -> bool:
    """Whether the marker is there and every file it names has the size it had then."""
    try:
        facts = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # no JSON, or no UTF-8
        return False
    sizes = {name: checkpoint / name for name in facts["files"]}
    return all(path.is_file() and path.stat().st_size == facts["files"][name] for name, path in sizes.items())


def check_pickles(checkpoint: Path) -> None:
    """Raise ValueError when a file that DeepSpeed would unpickle names anything but its own four types."""
    for file in sorted(checkpoint.glob("global_step*/*.pt")):
        foreign = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - PICKLED_BY_DEEPSPEED
        if foreign:
            names = ", ".join(sorted(foreign))
            raise ValueError(f"{file} would run {names} when loaded; DeepSpeed did not write it so")


def size_of(checkpoint: Path) -> int:
    """Return the bytes of all files of a checkpoint."""
    return sum(path.stat().st_size for path in _files(checkpoint))


def least_bytes(model: torch.nn.Module, *, optimizer: bool) -> int:
    """Return the bytes that saving the model takes at least: its weights, and AdamW's two moments of what is trained.

    Of a model with adapters only what is trained is counted.
    """
    adapters, total = hasattr(model, "peft_config"), 0
    for parameter in model.parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO-3 only a part of it is here
        if parameter.requires_grad or not adapters:
            total += count * parameter.element_size()
        if parameter.requires_grad and optimizer:
            total += 2 * 4 * count
    return total


@contextmanager
def saving(target: Path, least_bytes: int) -> Iterator[None]:
    """Turn whatever goes wrong while files are written below `target` into a SaveError that says what to do.

    safetensors and torch.save report a full disk each by an exception of its own, neither of them an OSError.
    """
    try:
        yield
    except SaveError:
        raise
    except Exception as error:
        free = shutil.disk_usage(target.parent).free
        raise SaveError(f"{_full(target, least_bytes, free)} ({type(error).__name__}: {error})") from error


@contextmanager
def published(folder: Path, least_bytes: int) -> Iterator[Path]:
    """Give a folder to write into; on leaving, its subfolders move into `folder` and replace those of the same name.

    Every rank enters it. Until then `folder` is as before, whatever happens.
    """
    unfinished = folder / "unfinished"
    on_main(partial(_written, unfinished, partial(_fresh, unfinished, least_bytes)))
    with saving(unfinished, least_bytes):
        yield unfinished
    wait_for_all()
    on_main(partial(_written, folder, partial(_publish, unfinished, folder)))


def _written(path: Path, step: Callable[[], None]) -> None:
    with writing(path):
        step()


def _fresh(folder: Path, least_bytes: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    if free < least_bytes:
        raise SaveError(_full(folder, least_bytes, free))


def _publish(unfinished: Path, folder: Path) -> None:
    give_usual_modes(unfinished)
    for part in sorted(unfinished.iterdir()):
        target, old = folder / part.name, folder / f"{part.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        part.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    unfinished.rmdir()


def _full(target: Path, needed: int, free: int) -> str:
    amount = f"it takes at least {needed:,} bytes and {free:,} are free there" if needed else f"{free:,} bytes are free"
    return (
        f"{target} could not be written: {amount}. Complete checkpoints are untouched; make room and run the same "
        "command again to go on"
    )


def _numbered(folder: Path) -> list[Path]:
    """Folders checkpoint-<step>, by step."""
    named = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    found = [path for path in named if path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARKER)


def _strategy(zero_stage: int) -> str:
    return f"with ZeRO-{zero_stage}" if zero_stage else "without DeepSpeed"
