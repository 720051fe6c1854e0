"""Subsections of `train` that the paper does not have: how a model learns to be sparse, and to keep an asked rate."""

from dataclasses import dataclass
from typing import Literal

from dynamic_llava.config.checks import at_least, check_finite, one_of


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


@dataclass(frozen=True)
class CalibrateConfig:
    """Subsection `train.calibrate`: data by which the trained model is calibrated (docs/method.md, section 4)."""

    json: str = ""
    """LLaVA-format JSON file of samples that are held back: none of them is trained on."""
    image_folder: str | None = None
    """Folder that its image paths are relative to; None: data.image_folder."""
    samples: int = 500
    """First samples of the file."""

    def __post_init__(self) -> None:
        if not self.json:
            raise ValueError(
                "train.calibrate.json is not set; name a file of samples that are not trained on, or leave "
                "train.calibrate out"
            )
        at_least("train.calibrate.samples", self.samples, 2, "one sample tells nothing about others")
