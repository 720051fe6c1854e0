"""What happens beside a run's steps: metrics.jsonl, progress, Weights & Biases, a keep-rate warning, when to save."""

import json
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynamic_llava.config import TrainConfig
from dynamic_llava.config.run import target_of
from dynamic_llava.files import replace_file, writing
from dynamic_llava.train.distributed import anywhere
from dynamic_llava.train.stopping import StopRequest

log = logging.getLogger(__name__)


class MetricsFile(TrainerCallback):
    """Writes every line of the log to a file, one JSON object per line, on the main process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start an empty file; a resumed run keeps the lines up to its checkpoint, whatever was written after it."""
        if not state.is_world_process_zero:
            return
        lines = self.path.read_text(encoding="utf-8").splitlines() if state.global_step and self.path.is_file() else []
        replace_file(self.path, "".join(f"{line}\n" for line in lines if _is_step_before(line, state.global_step)))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a line; what is not finite becomes null, as JSON has no word for it."""
        if state.is_world_process_zero and logs:
            values = {name: value if math.isfinite(value) else None for name, value in logs.items()}
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **values}) + "\n")


class Progress(TrainerCallback):
    """A progress bar on a terminal; elsewhere a line of text now and then, so that log files stay readable."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, name: str, stream: TextIO | None = None) -> None:
        self.name = name
        self.stream = stream if stream is not None else sys.stderr
        self.bar: tqdm[Any] | None = None
        self.started = self.last_line = 0.0
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self.started = self.last_line = time.perf_counter()
        self.first_step = state.global_step
        if state.is_world_process_zero and self.stream.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, file=self.stream)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest values."""
        if not state.is_world_process_zero or not logs or "lm_loss" not in logs:
            return
        if self.bar is not None:
            self.bar.set_postfix_str(_summary(logs))
            return
        now = time.perf_counter()
        if now - self.last_line < self.SECONDS_BETWEEN_LINES and state.global_step < state.max_steps:
            return
        self.last_line = now
        done = max(state.global_step - self.first_step, 1)
        left = (now - self.started) / done * (state.max_steps - state.global_step)
        place = f"{self.name}: step {state.global_step}/{state.max_steps}"
        print(f"{place}, {_summary(logs)}, {left:.0f} s left", file=self.stream, flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class KeepRateWarning(TrainerCallback):
    """Warns when a keep rate's mean over a window is too far from its target (Eq. 10 no longer holds it).

    The first window is left out: new predictors keep about half of everything and need it to settle. A target that a
    schedule moves is read from the line it was logged with.
    """

    def __init__(self, config: TrainConfig, targets: Mapping[str, float]) -> None:
        self.config = config
        self.targets = dict(targets)
        self.windows: dict[str, deque[tuple[float, float]]] = {
            name: deque(maxlen=max(1, math.ceil(config.keep_rate_window / config.log_every))) for name in self.targets
        }

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Compare each keep rate's mean over its window with the target; start a new window after a warning."""
        for name, window in self.windows.items():
            if not logs or name not in logs:
                continue
            if state.global_step > self.config.keep_rate_window:
                window.append((logs[name], logs.get(target_of(name), self.targets[name])))
            if len(window) < (window.maxlen or 1):
                continue
            mean, target = (sum(column) / len(window) for column in zip(*window, strict=True))
            if abs(mean - target) > self.config.keep_rate_tolerance:
                window.clear()
                if state.is_world_process_zero:
                    log.warning(
                        "step %d: %s was %.2f over the last %d steps, its target is %.2f; if it stays there, set "
                        "sparsity.mask_grad_clip or train.clip_predictors_separately, or raise keep_rate_weight",
                        state.global_step,
                        name,
                        mean,
                        self.config.keep_rate_window,
                        target,
                    )


class SeparateClipping(TrainerCallback):
    """Clips before each optimizer step; `clip` is `DynamicLlavaTrainer.clip_separately`."""

    def __init__(self, clip: Any) -> None:
        self.clip = clip

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clip the gradients, which all batches of the step have been added to."""
        self.clip()


class Beginning(TrainerCallback):
    """Calls `begin` once the model is wrapped and a resumed state is in place, before the first step."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self.begin = begin

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call `begin`."""
        self.begin()


class Saving(TrainerCallback):
    """Decides at the end of every step, for all processes together, whether a checkpoint is due or the run stops.

    The last step needs neither: the model itself is written after it. A line is logged with every checkpoint, so that
    a resumed run's means begin where the uninterrupted run's do; and at the last step, wherever log_every falls.
    """

    def __init__(self, every: int | None, request: StopRequest) -> None:
        self.every = every
        self.request = request
        self.stops = False
        """Whether the run ends here because it was told to."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a line, a checkpoint, and the end of training."""
        if state.global_step >= state.max_steps:
            control.should_log = True
            return
        self.stops = anywhere(self.request.asked())
        if self.stops:
            control.should_training_stop = True
        if self.stops or (self.every is not None and state.global_step % self.every == 0):
            control.should_log = control.should_save = True


class WandbLog(TrainerCallback):
    """Sends every line of the log to Weights & Biases, from the main process; offline where no API key is set."""

    PROJECT = "dynamic-llava"

    def __init__(self, name: str, config: dict[str, Any], folder: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"train.report_to is 'wandb' but it cannot be imported ({error}); pip install wandb, or set it to none"
            ) from error
        self.wandb = wandb
        self.settings = {"name": name, "config": config, "dir": str(folder)}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start a run of the project; WANDB_PROJECT and WANDB_MODE are obeyed."""
        if not state.is_world_process_zero:
            return
        mode = None
        if "WANDB_MODE" not in os.environ and not self.wandb.login(prompt=False, verify=False):
            mode = "offline"
            log.info("Weights & Biases: no API key is set, so the run is written to %s", self.settings["dir"])
        project = os.environ.get("WANDB_PROJECT", self.PROJECT)
        self.wandb.init(project=project, mode=mode, **self.settings)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Send a line under the names it has in metrics.jsonl."""
        if state.is_world_process_zero and logs:
            self.wandb.log(logs, step=state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finish the run, so that a later one of this process starts its own."""
        if state.is_world_process_zero:
            self.wandb.finish()


def _is_step_before(line: str, step: int) -> bool:
    """Whether a line of metrics.jsonl is whole, belongs to a step, and to one up to `step`."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError:
        return False  # the process ended while it was written
    return "lm_loss" in values and values["step"] <= step


def _summary(logs: dict[str, float]) -> str:
    shown = [f"loss {logs['lm_loss']:.3f}"]
    for name in ("image_keep_rate", "output_keep_rate", "prompt_keep_rate"):
        if name in logs:
            shown.append(f"{name.split('_')[0]} kept {logs[name]:.2f}")
    return ", ".join([*shown, f"{logs['tokens_per_second']:,.0f} tokens/s"])
