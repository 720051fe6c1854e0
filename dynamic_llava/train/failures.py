"""What becomes of a run that fails in the middle: its state is written first, if it is sound, then one line says all.

Sound is the state between two optimizer steps, and within one until the optimizer has begun to change the weights. A
checkpoint of several processes needs all of them; they hear of one another's failures where batches are fetched.
"""

import logging
import traceback
from pathlib import Path
from typing import Any

from accelerate import DistributedType
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynamic_llava.config import DataConfig
from dynamic_llava.data import Unread
from dynamic_llava.data.prepare import write_broken
from dynamic_llava.files import WriteError, brief
from dynamic_llava.train.checkpoints import is_complete
from dynamic_llava.train.distributed import anywhere
from dynamic_llava.train.stopping import NotFinite, SaveError, Stopped, TrainingFailed

log = logging.getLogger(__name__)

TRACEBACK = "traceback.txt"
"""In the run's folder: where an unexpected exception came from."""
LONGEST = 600
"""Characters of an exception's own text in the line that is printed."""


class DataError(ValueError):
    """A batch that could not be fetched; every process of the run raises it at the same step."""


class Soundness(TrainerCallback):
    """Knows whether the weights are being changed: by the optimizer, or somewhere inside a DeepSpeed engine's step."""

    def __init__(self, *, in_engine: bool) -> None:
        self.in_engine = in_engine
        self.updating: int | None = None
        """Step whose update has begun; it has ended when the trainer's step has moved on."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the step of an engine, which updates within the last backward pass."""
        if self.in_engine:
            self.updating = state.global_step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the step."""
        self.updating = state.global_step


def train(trainer: Any, start: Path | None) -> Any:
    """Train a DynamicLlavaTrainer from the checkpoint `start`; whatever goes wrong, write a checkpoint first.

    Returns what its `train` does. Raises DataError for data that could not be read, ValueError, WriteError or
    TrainingFailed (a RuntimeError) for everything else, in one line that says where the run goes on; SaveError,
    NotFinite and Stopped pass as they are.
    """
    soundness = Soundness(in_engine=trainer.accelerator.distributed_type == DistributedType.DEEPSPEED)
    trainer.add_callback(soundness)
    try:
        return trainer.train(resume_from_checkpoint=None if start is None else str(start))
    except (SaveError, NotFinite, Stopped):
        raise
    except Exception as error:
        kept = _keep(trainer, soundness, shared=isinstance(error, DataError))
        if isinstance(error, DataError):
            raise DataError(f"{error}; {kept}") from None
        where = f"training failed at step {trainer.state.global_step + 1}"
        text = f"{where}: {_one_line(error)}; {kept}; where it came from: {_write_traceback(trainer, error)}"
        kind = next((known for known in (WriteError, ValueError) if isinstance(error, known)), TrainingFailed)
        raise kind(text) from error


def agree_on_failure(failure: Exception | None) -> None:
    """Raise in every process what happened in any of them while a batch was fetched; all of them call it.

    An unexpected exception of this process alone is raised as it is.
    """
    if not anywhere(failure is not None):
        return
    told = gather_object([None if failure is None else _one_line(failure)])
    if failure is not None and not isinstance(failure, DataError) and len(told) == 1:
        raise failure
    raise DataError("; ".join(text for text in told if text is not None)) from None


def handle_unread(unread: list[Unread], config: DataConfig, listed: Path) -> DataError | None:
    """Return the error for samples whose image could not be decoded; with data.broken: skip list them instead.

    `unread` holds at least one, `listed` is the file of the run that lists them.
    """
    if config.broken == "refuse":
        first = unread[0]
        more = f" (and {len(unread) - 1} more of this step)" if len(unread) > 1 else ""
        return DataError(
            f"{config.json}, index {first.index}, id {brief(first.id)}: {first.why}{more}; mend the image, or leave "
            "such samples out by --data.broken skip, and add --train.accept-changed-inputs, as a file has changed"
        )
    for sample in write_broken(listed, [one._asdict() for one in unread]):
        place = f"{config.json}, index {sample['index']}, id {brief(sample['id'])}"
        log.warning("%s: %s; it is left out and listed in %s", place, sample["why"], listed)
    return None


def _keep(trainer: Any, soundness: Soundness, *, shared: bool) -> str:
    """Write a checkpoint of the current step unless there is one or it cannot be; say what the run can go on from."""
    step, folder = trainer.state.global_step, trainer.checkpoints.folder
    reason = _unsound(trainer, soundness, shared)
    if reason is None and step and not is_complete(folder / f"checkpoint-{step}"):
        try:
            trainer.save_checkpoint()
        except Exception as error:  # the first failure is the one to tell; this one is told with it
            reason = f"no checkpoint of step {step} could be written ({_one_line(error)})"
    newest = trainer.checkpoints.newest()
    if newest is None:
        return f"{reason or 'no step had been taken'}, so the same command begins anew"
    goes_on = f"the same command goes on from {newest}"
    return goes_on if reason is None else f"{reason}; {goes_on}"


def _unsound(trainer: Any, soundness: Soundness, shared: bool) -> str | None:
    """Return why the current state must not be written; None when it is that of the last whole step."""
    step = trainer.state.global_step
    if trainer.accelerator.num_processes > 1 and not shared:
        return "one process alone cannot write a checkpoint of several"
    if soundness.updating == step:
        return f"step {step + 1} may have changed a part of the weights, so nothing was written"
    return None


def _write_traceback(trainer: Any, error: Exception) -> str:
    rank = trainer.args.process_index
    file = trainer.checkpoints.folder / (TRACEBACK if not rank else f"traceback-{rank}.txt")
    try:
        file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError as unwritten:
        return f"nowhere, as {file} could not be written ({unwritten.strerror})"
    return str(file)


def _one_line(error: Exception) -> str:
    """Return what an exception says in one line; of one that a worker process has sent, its last line."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1]
    elif not isinstance(error, (ValueError, OSError)):
        text = f"{type(error).__name__}: {text}"
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
