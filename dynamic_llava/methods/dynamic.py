"""Dynamic-LLaVA: two learned predictors decide (Sec. 3.2, 3.3; Eq. 5, 6, 11)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dynamic_llava.config import SparsityConfig, SparsityMode, check_keep_rate, check_sparsity_mode
from dynamic_llava.costs import PartCosts, predictor_costs
from dynamic_llava.layout import TokenLayout
from dynamic_llava.methods.base import (
    BudgetKind,
    Cut,
    Draw,
    ImageTokens,
    OneCut,
    OutputTokens,
    Record,
    check_rate_or_none,
    keep_all_image,
)
from dynamic_llava.sparsity.decisions import evenly_spaced, threshold_keep, top_k_by_answer, top_k_keep
from dynamic_llava.sparsity.noise import fold_key, gumbel_noise
from dynamic_llava.sparsity.predictors import ImagePredictor, OutputPredictor, keep_margin
from dynamic_llava.sparsity.training import RELAXATIONS, keep_rate_loss


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
    output_selection: Literal["threshold", "topk", "spread"] = "threshold"
    """By that threshold (the paper), or exactly `output_keep_rate` of each answer: its highest margins (topk: of whole
    answers, so not while decoding), or evenly spaced whatever the predictor says, which is asked all the same (spread:
    for times and bytes at a stated rate)."""
    output_keep_rate: float | None = None
    """The share that topk and spread keep of an answer; None with threshold, which has no rate."""

    def __post_init__(self) -> None:
        check_sparsity_mode(self.sparsity)
        check_keep_rate("image_keep_rate", self.image_keep_rate)
        check_rate_or_none("output_keep_rate", self.output_keep_rate)
        if (self.output_selection == "threshold") != (self.output_keep_rate is None):
            raise ValueError(
                f"output_selection={self.output_selection!r} with output_keep_rate={self.output_keep_rate}: topk and "
                "spread need a rate, and threshold has none"
            )

    parts: ClassVar[tuple[str, ...]] = ("image_predictor", "output_predictor")

    def build(self, width: int, settings: SparsityConfig) -> nn.Module:
        """The two predictors."""
        sizes = {"heads": settings.predictor_heads, "mlp": settings.predictor_mlp, "blocks": settings.predictor_blocks}
        image = ImagePredictor(width, settings.predictor_width, **sizes)
        return nn.ModuleDict(
            {"image_predictor": image, "output_predictor": OutputPredictor(width, settings.predictor_width)}
        )

    def costs(self, width: int, settings: SparsityConfig) -> dict[str, PartCosts]:
        """Those of the two predictors."""
        return predictor_costs(width, settings)

    @property
    def used_parts(self) -> tuple[str, ...]:
        """The predictors of the contexts that are sparsified."""
        used = (self.sparsifies_image, self.sparsifies_output)
        return tuple(part for part, uses in zip(self.parts, used, strict=True) if uses)

    def knobs(self, budget: BudgetKind) -> tuple[str, ...]:
        """r_I, where it decides."""
        return ("image_keep_rate",) if self.sparsifies_image and self.image_selection == "topk" else ()

    def keep_rates(self, settings: SparsityConfig) -> dict[str, float]:
        """r_I and r_OT, where their context is sparsified."""
        rates = {"image_keep_rate": self.image_keep_rate} if self.sparsifies_image else {}
        return rates | ({"output_keep_rate": settings.output_keep_rate} if self.sparsifies_output else {})

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
        margin_In = keep_margin(learned.image_predictor(images.hidden, images.valid))
        if self.image_selection == "threshold":
            return threshold_keep(margin_In)
        return top_k_keep(margin_In, rate=self.image_keep_rate, valid=images.valid)

    def sample(self, cut: Cut, images: ImageTokens, learned: Any, draw: Draw) -> Tensor:
        """(I, n) float: the configured relaxation at r_I, image by image (Sec. 3.3.3: Gumbel, straight-through)."""
        if not self.sparsifies_image:
            return keep_all_image(images)
        logits_In2 = learned.image_predictor(images.hidden, images.valid)
        noise_In2 = gumbel_noise(images.key, torch.arange(logits_In2.shape[1], device=logits_In2.device))
        relax = RELAXATIONS[draw.settings.relaxation]
        return relax(logits_In2, noise_In2, draw.tau, self.image_keep_rate, images.valid)

    def keep_output(self, outputs: OutputTokens, learned: Any) -> Tensor:
        """(T,) bool from the output predictor."""
        if not self.sparsifies_output:
            return super().keep_output(outputs, learned)
        margin_T = keep_margin(learned.output_predictor(outputs.hidden))
        if self.output_selection == "threshold":
            return threshold_keep(margin_T, self.output_threshold)
        assert self.output_keep_rate is not None
        if self.output_selection == "topk":
            return top_k_by_answer(margin_T, outputs.rank, self.output_keep_rate)
        stated_T = torch.where(evenly_spaced(outputs.rank, self.output_keep_rate), math.inf, -math.inf)
        return margin_T + stated_T > 0  # not stated_T alone: the predictor's work must not be optimised away

    def sample_output(self, outputs: OutputTokens, learned: Any, draw: Draw) -> Tensor:
        """(T,) float: the configured relaxation at r_OT, answer by answer."""
        if not self.sparsifies_output:
            return super().keep_output(outputs, learned)
        assert draw.answer is not None and draw.place is not None
        logits_T2 = learned.output_predictor(outputs.hidden)
        noise_T2 = gumbel_noise(fold_key(outputs.key, -1), outputs.rank[:, None])[:, 0]
        place = draw.answer, draw.place
        answers, longest = (int(index_T.max()) + 1 for index_T in place)

        def by_answer(values_T: Tensor) -> Tensor:
            """Gather (T, ...) into (A, N, ...), one row per answer, filled up with zeros."""
            return values_T.new_zeros(answers, longest, *values_T.shape[1:]).index_put(place, values_T)

        valid_AN = by_answer(torch.ones_like(logits_T2[..., 0], dtype=torch.bool))
        relax, rate = RELAXATIONS[draw.settings.relaxation], draw.settings.output_keep_rate
        return relax(by_answer(logits_T2), by_answer(noise_T2), draw.tau, rate, valid_AN)[place]

    def loss_samples(self, layout: TokenLayout, decided: Tensor, settings: SparsityConfig) -> dict[str, Tensor]:
        """The two keep-rate terms of Eq. 10: means over all samples, or over those that a term applies to."""
        if settings.keep_rate_reduction == "batch":
            every_B = torch.ones_like(decided[:, 0])
            return {"image_keep_loss": every_B, "output_keep_loss": every_B}
        return {"image_keep_loss": layout.is_image.any(1), "output_keep_loss": decided.any(1)}

    def losses(self, record: Record, counts: Mapping[str, Tensor], settings: SparsityConfig) -> dict[str, Tensor]:
        """The keep-rate regulariser (Eq. 10), unweighted; a context that is not sparsified costs 0."""
        mask = record.keep_mask.float()
        nothing = torch.zeros((), device=mask.device)
        image, output = nothing, nothing
        distance = settings.keep_rate_distance
        if self.sparsifies_image:
            where, many = record.layout.is_image, counts["image_keep_loss"]
            image = keep_rate_loss(mask, where, self.image_keep_rate, distance=distance, denominator=many)
        if self.sparsifies_output:
            where, rate, many = record.sparsified_output, settings.output_keep_rate, counts["output_keep_loss"]
            output = keep_rate_loss(mask, where, rate, distance=distance, denominator=many)
        return {"image_keep_loss": image, "output_keep_loss": output}

    def loss_weight(self, settings: SparsityConfig) -> float:
        """Lambda of Eq. 10."""
        return settings.keep_rate_weight
