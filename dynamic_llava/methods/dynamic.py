"""Dynamic-LLaVA: two learned predictors decide (Sec. 3.2, 3.3; Eq. 5, 6, 11)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from dynamic_llava.config import SparsityConfig, SparsityMode, check_keep_rate, check_sparsity_mode
from dynamic_llava.methods.base import Cut, ImageTokens, OneCut, OutputTokens, keep_all_image
from dynamic_llava.sparsity.decisions import threshold_keep, top_k_keep
from dynamic_llava.sparsity.predictors import keep_margin


@dataclass(frozen=True)
class Dynamic(OneCut):
    """Image tokens: the floor(r_I * n) highest keep margins of each image. Output tokens: margin above a threshold."""

    name: ClassVar[str] = "dynamic"

    sparsity: SparsityMode = "both"
    """Which context is sparsified: both, image, output or none."""
    image_keep_rate: float = 0.2
    """r_I of Eq. 11."""
    image_selection: Literal["topk", "threshold"] = "topk"
    """Eq. 11 (top-k) or Eq. 5 (every positive margin)."""
    output_threshold: float = 0.0
    """An output token stays where keep logit - drop logit exceeds this; 0 is Eq. 5."""

    def __post_init__(self) -> None:
        check_sparsity_mode(self.sparsity)
        check_keep_rate("image_keep_rate", self.image_keep_rate)

    @classmethod
    def settings_from(cls, config: SparsityConfig) -> dict[str, Any]:
        """Return what a checkpoint's settings say: all but which context is sparsified."""
        return {
            "layer": config.sparse_layer,
            "image_keep_rate": config.image_keep_rate,
            "image_selection": config.image_selection,
            "output_threshold": config.output_threshold,
        }

    @classmethod
    def from_config(cls, config: SparsityConfig, sparsity: SparsityMode = "both") -> "Dynamic":
        """Return the method as a checkpoint's settings describe it."""
        return cls(**cls.settings_from(config), sparsity=sparsity)

    @property
    def is_dense(self) -> bool:
        """True when neither context is sparsified."""
        return self.sparsity == "none"

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, at `layer`; output tokens are decided on where they are sparsified."""
        return (Cut(self.layer, output=self.sparsifies_output),)

    @property
    def sparsifies_image(self) -> bool:
        """Whether image tokens may be dropped."""
        return self.sparsity in ("both", "image")

    @property
    def sparsifies_output(self) -> bool:
        """Whether output tokens may be dropped."""
        return self.sparsity in ("both", "output")

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool from the image predictor."""
        if not self.sparsifies_image:
            return keep_all_image(images)
        margin_In = keep_margin(learned.image_predictor(images.hidden))
        if self.image_selection == "threshold":
            return threshold_keep(margin_In)
        return top_k_keep(margin_In, rate=self.image_keep_rate, valid=images.valid)

    def keep_output(self, outputs: OutputTokens, learned: Any) -> Tensor:
        """(T,) bool from the output predictor."""
        if not self.sparsifies_output:
            return super().keep_output(outputs, learned)
        return threshold_keep(keep_margin(learned.output_predictor(outputs.hidden)), self.output_threshold)
