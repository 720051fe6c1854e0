"""What a run shows and writes while it trains: metrics.jsonl, a progress bar, a warning about keep rates."""

import json
import logging
import math
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynamic_llava.config import SparsityConfig, TrainConfig

log = logging.getLogger(__name__)


class MetricsFile(TrainerCallback):
    """Writes every line of the log to a file, one JSON object per line, on the main process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start an empty file, unless the run is resumed."""
        if state.is_world_process_zero and state.global_step == 0:
            self.path.write_text("", encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a line."""
        if state.is_world_process_zero and logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class Progress(TrainerCallback):
    """A progress bar on a terminal; elsewhere a line of text now and then, so that log files stay readable."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, name: str, stream: TextIO | None = None) -> None:
        self.name = name
        self.stream = stream if stream is not None else sys.stderr
        self.bar: tqdm[Any] | None = None
        self.started = self.last_line = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self.started = self.last_line = time.perf_counter()
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
        left = (now - self.started) / max(state.global_step, 1) * (state.max_steps - state.global_step)
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

    The first window is left out: new predictors keep about half of everything and need it to settle.
    """

    def __init__(self, config: TrainConfig, sparsity: SparsityConfig) -> None:
        self.config = config
        self.targets = {"image_keep_rate": sparsity.image_keep_rate, "output_keep_rate": sparsity.output_keep_rate}
        self.windows: dict[str, deque[float]] = {
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
        """Compare, and start a new window after a warning."""
        trained = {"image_keep_rate": ("both", "image"), "output_keep_rate": ("both", "output")}
        for name, window in self.windows.items():
            if self.config.sparsity_mode not in trained[name] or not logs or name not in logs:
                continue
            if state.global_step > self.config.keep_rate_window:
                window.append(logs[name])
            mean = sum(window) / max(len(window), 1)
            if len(window) == window.maxlen and abs(mean - self.targets[name]) > self.config.keep_rate_tolerance:
                window.clear()
                if state.is_world_process_zero:
                    log.warning(
                        "step %d: %s was %.2f over the last %d steps, its target is %.2f; if it stays there, set "
                        "sparsity.mask_grad_clip or train.clip_predictors_separately, or raise keep_rate_weight",
                        state.global_step,
                        name,
                        mean,
                        self.config.keep_rate_window,
                        self.targets[name],
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


def _summary(logs: dict[str, float]) -> str:
    shown = [f"loss {logs['lm_loss']:.3f}"]
    for name, label in (("image_keep_rate", "image kept"), ("output_keep_rate", "output kept")):
        if name in logs:
            shown.append(f"{label} {logs[name]:.2f}")
    return ", ".join([*shown, f"{logs['tokens_per_second']:,.0f} tokens/s"])
