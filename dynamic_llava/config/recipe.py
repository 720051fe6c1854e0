"""Subsections of `train` that the paper does not have: what a model that stays as it is learns to be sparse by."""

from dataclasses import dataclass
from typing import Literal

from dynamic_llava.config.checks import check_finite, one_of


@dataclass(frozen=True)
class DistillConfig:
    """Subsection `train.distill`: the sparse pass is drawn to what the same weights predict without sparsity."""

    weight: float = 1.0
    """What the distillation loss is multiplied by before it joins the language model's loss."""
    temperature: float = 1.0
    """Both distributions are softened by it, and the loss is multiplied by its square."""

    def __post_init__(self) -> None:
        check_finite("train.distill.", self)
        if not self.weight > 0:
            raise ValueError(f"train.distill.weight={self.weight} must be positive; leave train.distill out for none")
        if not self.temperature > 0:
            raise ValueError(f"train.distill.temperature={self.temperature} must be positive; 1 softens nothing")


@dataclass(frozen=True)
class KeepRateSchedule:
    """Subsection `train.keep_rate_schedule`: the keep rates that training aims at fall from 1 to their targets."""

    shape: Literal["linear", "cosine"] = "linear"
    """How they fall: evenly, or slowly at either end."""
    share: float = 0.5
    """Share of the steps over which they fall; afterwards they are the targets."""

    def __post_init__(self) -> None:
        check_finite("train.keep_rate_schedule.", self)
        one_of("train.keep_rate_schedule.shape", self.shape, ("linear", "cosine"))
        if not 0 < self.share <= 1:
            raise ValueError(
                f"train.keep_rate_schedule.share={self.share} is a share of the steps; give a number in (0, 1], or "
                "leave train.keep_rate_schedule out to aim at the targets from the first step on"
            )
