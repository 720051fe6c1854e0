"""Dynamic-LLaVA: two learned predictors decide (Sec. 3.2, 3.3; Eq. 5, 6, 11).

A third, off by default, decides on the tokens of questions (A.3.3, Table 9; github.com/Osilly/dynamic_llava at
e1469bc): the output predictor's net, a keep rate of 0.7, questions under 25 tokens left alone in training, the sign of
the margin at inference, where a question's last token stays. Deviations from that code: a question is told by where it
stands, behind an image or an answer, so role words are part of it, and its last token is theirs; that token stays in
training too, and the keep rate is that of the others; every turn on a live cache has its question decided on, where the
first alone has; batches have any size, and rows without an image keep all.
"""

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
    PromptTokens,
    Record,
    check_rate_or_none,
    keep_all_image,
)
from dynamic_llava.methods.eviction import check_count
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
    """Eq. 11 (top-k) or Eq. 5 (every margin above `image_threshold`)."""
    image_threshold: float = 0.0
    """With image_selection threshold an image token stays where keep logit - drop logit exceeds this; 0 is Eq. 5."""
    output_threshold: float = 0.0
    """An output token stays where keep logit - drop logit exceeds this; 0 is Eq. 5."""
    output_selection: Literal["threshold", "topk", "spread"] = "threshold"
    """By that threshold (the paper), or exactly `output_keep_rate` of each answer: its highest margins (topk: of whole
    answers, so not while decoding), or evenly spaced whatever the predictor says, which is asked all the same (spread:
    for times and bytes at a stated rate)."""
    output_keep_rate: float | None = None
    """The share that topk and spread keep of an answer; None with threshold, which has no rate."""
    output_window: int = 0
    """w: a dropped output token is still seen in the next w steps; 0 is the paper."""
    output_sinks: int = 0
    """s: the first s tokens of each answer are kept, whatever `output_selection` says; 0 is the paper."""

    prompt_threshold: float | None = None
    """A question's token stays where the third predictor's keep logit - drop logit exceeds this, when both contexts are
    sparsified; None: prompt tokens stay. 0 by default in a checkpoint with that predictor."""

    def __post_init__(self) -> None:
        check_sparsity_mode(self.sparsity)
        check_keep_rate("image_keep_rate", self.image_keep_rate)
        check_rate_or_none("output_keep_rate", self.output_keep_rate)
        check_count("output_window", self.output_window, "number of steps")
        check_count("output_sinks", self.output_sinks, "number of tokens")
        if (self.output_selection == "threshold") != (self.output_keep_rate is None):
            raise ValueError(
                f"output_selection={self.output_selection!r} with output_keep_rate={self.output_keep_rate}: topk and "
                "spread need a rate, and threshold has none"
            )

    @property
    def parts(self) -> tuple[str, ...]:  # type: ignore[override]
        """The two predictors, and that of prompt tokens where it decides."""
        return (
            "image_predictor",
            "output_predictor",
            *(() if self.prompt_threshold is None else ("prompt_predictor",)),
        )

    def build(self, width: int, settings: SparsityConfig) -> nn.Module:
        """The two predictors, or three."""
        sizes = {"heads": settings.predictor_heads, "mlp": settings.predictor_mlp, "blocks": settings.predictor_blocks}
        image = ImagePredictor(width, settings.predictor_width, **sizes)
        built = {"image_predictor": image, "output_predictor": OutputPredictor(width, settings.predictor_width)}
        if settings.prompt_keep_rate is not None:
            built["prompt_predictor"] = OutputPredictor(width, settings.predictor_width)
        return nn.ModuleDict(built)

    def costs(self, width: int, settings: SparsityConfig) -> dict[str, PartCosts]:
        """Those of the predictors."""
        return predictor_costs(width, settings)

    @property
    def used_parts(self) -> tuple[str, ...]:
        """The predictors of the contexts that are sparsified."""
        used = (self.sparsifies_image, self.sparsifies_output, self.sparsifies_prompt)
        return tuple(part for part, uses in zip(self.parts, used, strict=False) if uses)

    def knobs(self, budget: BudgetKind) -> tuple[str, ...]:
        """r_I, where it decides."""
        return ("image_keep_rate",) if self.sparsifies_image and self.image_selection == "topk" else ()

    def keep_rates(self, settings: SparsityConfig) -> dict[str, float]:
        """r_I, r_OT and that of questions, where their context is sparsified."""
        rates = {"image_keep_rate": self.image_keep_rate} if self.sparsifies_image else {}
        rates |= {"output_keep_rate": settings.output_keep_rate} if self.sparsifies_output else {}
        if self.sparsifies_prompt and settings.prompt_keep_rate is not None:
            rates["prompt_keep_rate"] = settings.prompt_keep_rate
        return rates

    @classmethod
    def settings_from(cls, config: SparsityConfig) -> dict[str, Any]:
        """Return what a checkpoint's settings say: all but which context is sparsified."""
        return {
            "layer": config.sparse_layer,
            "image_keep_rate": config.image_keep_rate,
            "image_selection": config.image_selection,
            "output_threshold": config.output_threshold,
            "prompt_threshold": None if config.prompt_keep_rate is None else 0.0,
            "output_window": config.output_window,
            "output_sinks": config.output_sinks,
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
        """One cut, at `layer`; output and prompt tokens are decided on where they are sparsified."""
        return (Cut(self.layer, output=self.sparsifies_output, prompt=self.sparsifies_prompt),)

    @property
    def sparsifies_image(self) -> bool:
        """Whether image tokens may be dropped."""
        return self.sparsity in ("both", "image")

    @property
    def sparsifies_output(self) -> bool:
        """Whether output tokens may be dropped."""
        return self.sparsity in ("both", "output")

    @property
    def sparsifies_prompt(self) -> bool:
        """Whether tokens of questions may be dropped."""
        return self.sparsity == "both" and self.prompt_threshold is not None

    @property
    def drop_delay(self) -> int:
        """w, where output tokens are dropped."""
        return self.output_window if self.sparsifies_output else 0

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool from the image predictor."""
        if not self.sparsifies_image:
            return keep_all_image(images)
        margin_In = keep_margin(learned.image_predictor(images.hidden, images.valid))
        if self.image_selection == "threshold":
            return threshold_keep(margin_In, self.image_threshold)
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
        """(T,) bool from the output predictor, True at sinks."""
        if not self.sparsifies_output:
            return super().keep_output(outputs, learned)
        keep_T = self._decided(outputs, learned)
        return keep_T | (outputs.place < self.output_sinks) if self.output_sinks else keep_T

    def _decided(self, outputs: OutputTokens, learned: Any) -> Tensor:
        margin_T = keep_margin(learned.output_predictor(outputs.hidden))
        if self.output_selection == "threshold":
            return threshold_keep(margin_T, self.output_threshold)
        assert self.output_keep_rate is not None
        if self.output_selection == "topk":
            return top_k_by_answer(margin_T, outputs.rank, self.output_keep_rate)
        stated_T = torch.where(evenly_spaced(outputs.rank, self.output_keep_rate), math.inf, -math.inf)
        return margin_T + stated_T > 0  # not stated_T alone: the predictor's work must not be optimised away

    def sample_output(self, outputs: OutputTokens, learned: Any, draw: Draw) -> Tensor:
        """(T,) float: the configured relaxation at r_OT, answer by answer; 1 at sinks."""
        if not self.sparsifies_output:
            return super().keep_output(outputs, learned)
        logits_T2 = learned.output_predictor(outputs.hidden)
        noise_T2 = gumbel_noise(fold_key(outputs.key, -1), outputs.rank[:, None])[:, 0]
        keep_T = _relaxed(logits_T2, noise_T2, draw, draw.settings.output_keep_rate)
        return keep_T.masked_fill(outputs.place < self.output_sinks, 1.0) if self.output_sinks else keep_T

    def keep_prompt(self, prompts: PromptTokens, learned: Any) -> Tensor:
        """(T,) bool from the prompt predictor."""
        if not self.sparsifies_prompt:
            return super().keep_prompt(prompts, learned)
        assert self.prompt_threshold is not None
        return threshold_keep(keep_margin(learned.prompt_predictor(prompts.hidden)), self.prompt_threshold)

    def sample_prompt(self, prompts: PromptTokens, learned: Any, draw: Draw) -> Tensor:
        """(T,) float: the configured relaxation at `prompt_keep_rate`, question by question."""
        if not self.sparsifies_prompt:
            return super().keep_prompt(prompts, learned)
        assert draw.settings.prompt_keep_rate is not None
        logits_T2 = learned.prompt_predictor(prompts.hidden)
        noise_T2 = gumbel_noise(fold_key(prompts.key, -2), prompts.rank[:, None])[:, 0]
        return _relaxed(logits_T2, noise_T2, draw, draw.settings.prompt_keep_rate)

    def loss_samples(self, layout: TokenLayout, decided: Tensor, settings: SparsityConfig) -> dict[str, Tensor]:
        """The keep-rate terms of Eq. 10: means over all samples, or over those that a term applies to."""
        applies = {"image_keep_loss": layout.is_image, "output_keep_loss": decided & layout.output}
        if self.sparsifies_prompt:
            applies["prompt_keep_loss"] = decided & layout.prompt
        if settings.keep_rate_reduction == "batch":
            return dict.fromkeys(applies, torch.ones_like(decided[:, 0]))
        return {name: where_BN.any(1) for name, where_BN in applies.items()}

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
        terms = {"image_keep_loss": image, "output_keep_loss": output}
        if self.sparsifies_prompt:
            assert settings.prompt_keep_rate is not None
            where, rate, many = record.sparsified_prompt, settings.prompt_keep_rate, counts["prompt_keep_loss"]
            terms["prompt_keep_loss"] = keep_rate_loss(mask, where, rate, distance=distance, denominator=many)
        return terms

    def loss_weight(self, settings: SparsityConfig) -> float:
        """Lambda of Eq. 10."""
        return settings.keep_rate_weight


def _relaxed(logits_T2: Tensor, noise_T2: Tensor, draw: Draw, rate: float) -> Tensor:
    """(T,) float: the configured relaxation of tokens, answer by answer or question by question."""
    assert draw.answer is not None and draw.place is not None
    place = draw.answer, draw.place
    sets, longest = (int(index_T.max()) + 1 for index_T in place)

    def by_set(values_T: Tensor) -> Tensor:
        """Gather (T, ...) into (J, N, ...), one row per answer or question, filled up with zeros."""
        return values_T.new_zeros(sets, longest, *values_T.shape[1:]).index_put(place, values_T)

    valid_JN = by_set(torch.ones_like(logits_T2[..., 0], dtype=torch.bool))
    relax = RELAXATIONS[draw.settings.relaxation]
    return relax(by_set(logits_T2), by_set(noise_T2), draw.tau, rate, valid_JN)[place]
