"""NaN and infinity: training ends at the first one, on all processes together, and no checkpoint holds any.

A loss is looked at before its backward pass, the gradient's norm before the optimizer uses the gradient, weights before
they are written.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynamic_llava.train.checkpoints import Checkpoints
from dynamic_llava.train.distributed import anywhere
from dynamic_llava.train.stopping import NotFinite

ADVICE = (
    "try a smaller train.learning_rate and train.predictor_learning_rate (with warm-up, and train.max_grad_norm: 1) "
    "under another name, or with --train.no-resume"
)


def check_finite(what: str, values: Tensor | Iterable[Tensor], step: int) -> None:
    """Raise NotFinite in every process when `values` are not finite in any of them; all of them call it.

    `what` begins the message, `step` is the optimizer step that is being taken or was taken last.
    """
    values = [values] if isinstance(values, Tensor) else list(values)
    if anywhere(not _all_finite(values)):
        raise NotFinite(f"step {step}: {what} is NaN or infinite, so training ends here; {ADVICE}")


def trained_weights(model: nn.Module) -> list[Tensor]:
    """Return the trained weights that this process holds, () to any shape; under ZeRO-3 its part of each."""
    return [_held(parameter) for parameter in model.parameters() if parameter.requires_grad]


class Proving(TrainerCallback):
    """Counts a checkpoint as healthy, and lets it replace older ones, when the step after it was healthy.

    Weights can be finite and already useless: only the next loss shows it.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.written: int | None = None
        """Step of a checkpoint that no step has followed yet."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the step."""
        self.written = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let go of older checkpoints."""
        if self.written is not None:
            self.checkpoints.trim()
            self.written = None


def _all_finite(values: list[Tensor]) -> bool:
    """Whether every value is finite; one read on the host for each device."""
    found: dict[Any, Tensor] = {}
    for value in values:
        # The largest magnitude of what holds NaN is NaN; unlike isfinite, it takes no memory of the tensor's size.
        finite = value.detach().aminmax() if value.numel() else None
        if finite is not None:
            both = torch.stack(finite).isfinite().all()
            found[value.device] = both if value.device not in found else found[value.device] & both
    return all(bool(finite) for finite in found.values())


def _held(parameter: nn.Parameter) -> Tensor:
    part: Tensor | None = getattr(parameter, "ds_tensor", None)
    return parameter.data if part is None else part.data
