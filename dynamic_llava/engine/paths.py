"""One loop over the stages of a pass, and what the passes do differently in it.

A method's cuts part the layers into stages; at a cut it decides, and the layers from there on see what it keeps:

masked  every token passes every layer; MaskedSoftmax hides dropped ones (training, teacher forcing), or training sets
        them to zero vectors (the ablation of Table 7)
score   as masked, with inference's decisions; dropped image tokens, which nobody sees, are removed
drop    only kept tokens go on (prefill, which opens a cache, and decoding without one)
turn    a chunk of several tokens on a live cache (a later user turn)

A dense pass is the parent's own, and a single token on a live cache is `step.py`. All give the same logits.
Shape suffixes: B rows, N tokens, C computed tokens, W slots, D hidden size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from dynamic_llava.engine.attention import cache_mask, check_attention, check_masks
from dynamic_llava.engine.cache import CACHE, AdmissionCache
from dynamic_llava.engine.decide import Flight, Past, asked_prompts, check_question, decide, sample, samples
from dynamic_llava.engine.evict import Chunk, Eviction, Opening
from dynamic_llava.engine.learned import learned_of
from dynamic_llava.engine.plan import Plan, Stage, stages_of
from dynamic_llava.engine.question import QuestionReading, relevance
from dynamic_llava.layout import Packing
from dynamic_llava.methods import QUESTION_EVIDENCE, Cut, Evidence
from dynamic_llava.sparsity.decisions import entering_mask
from dynamic_llava.sparsity.window import ALWAYS, NEVER, Band, WindowSlots


class Path(ABC):
    """One pass over a chunk of tokens: what it does at a cut, and what the layers of a stage are given."""

    def __init__(self, decoder: Any, plan: Plan, attention_mask: Tensor | None, position_ids: Tensor) -> None:
        self.decoder, self.plan = decoder, plan
        self.attention_mask, self.position_ids = attention_mask, position_ids
        self.within_image = any(cut.within_image for cut in plan.cuts)
        """Whether what the one cut drops of an image is computed on, and read by later tokens of that image."""
        self.band: Band | None = None
        """Which tokens of the chunk see which whatever is decided; None where decisions hold at once."""
        if plan.window and bool(plan.layout.output.any()):
            self.band = Band.of(plan.layout, plan.window, self.past.outputs)

    @property
    def past(self) -> Past:
        """What each row has seen before the chunk."""
        return Past()

    def check(self) -> None:
        """Raise ValueError for a method that this pass cannot serve, before any layer has run."""
        if self.within_image:
            check_masks(self.decoder.config._attn_implementation, self.plan.method.name)
        if self.plan.reads_question:
            check_question(self.plan.method, self.plan.layout.late_images())

    def sees(self, cut: Cut | None) -> frozenset[Evidence]:
        """Return the evidence that is gathered for a cut."""
        return self.plan.sees(cut)

    def decide(self, cut: Cut, flight: Flight, seen: dict[Evidence, Tensor]) -> Flight:
        """Return the flight with what the method keeps of it; nothing is removed yet."""
        kept_BC, hidden_BCD = decide(self.plan, cut, learned_of(self.decoder), flight, seen, self.past)
        return replace(flight, kept=kept_BC, hidden=hidden_BCD)

    @abstractmethod
    def enter(self, flight: Flight) -> Flight:
        """Return the tokens that the stage behind a cut computes."""

    @abstractmethod
    def attend(self, stage: Stage, flight: Flight) -> tuple[Tensor | None, dict[str, Any]]:
        """Return the mask of a stage's layers, and their other arguments."""

    def shown(self, stage: Stage, hidden_BCD: Tensor) -> Tensor:
        """Return the hidden states as a layer of the stage is given them."""
        return hidden_BCD

    def leave(self, stage: Stage, flight: Flight) -> None:  # noqa: B027  # most passes have nothing to note
        """Take note of a stage that has run."""

    def causal_mask(self, flight: Flight) -> Tensor | None:
        """The mask of layers that see every token of the chunk."""
        return create_causal_mask(self.decoder.config, flight.hidden, self.attention_mask, None, self.position_ids)  # type: ignore[no-any-return]

    def evicting(self, kind: Callable[..., Eviction], flight: Flight, cache: AdmissionCache | None) -> dict[str, Any]:
        """Return the arguments of a stage's layers where the method evicts from them."""
        if cache is None or not self.plan.method.evicts:
            return {}
        implementation = self.decoder.config._attn_implementation
        stage = kind(self.plan.method, cache, flight.layout, flight.kept, implementation)
        return {CACHE: stage, "evicting": stage}

    def visible(self, flight: Flight) -> Tensor:
        """(B, C, C) bool: each token sees the kept ones before it, those of its window, and itself.

        And, where the cut is within images, those of its image before it.
        """
        seen_BCC = torch.eye(flight.kept.shape[1], dtype=torch.bool, device=flight.kept.device) | flight.kept[:, None]
        if self.within_image:
            seen_BCC = seen_BCC | flight.layout.same_image()
        band = self.band_in(flight)
        return (seen_BCC if band is None else seen_BCC | band.pairs()).tril()

    def band_in(self, flight: Flight) -> Band | None:
        """Return the band of the tokens in the flight, whose filler has none."""
        return None if self.band is None else self.band.take(flight.column).real(flight.layout.output)

    def cache_mask(self, visible_BCW: Tensor, flight: Flight) -> Tensor:
        """(B, C, W) bool as the mask that attention takes."""
        return cache_mask(visible_BCW, self.decoder.config._attn_implementation, flight.hidden.dtype)


def run_stages(path: Path, flight: Flight, kwargs: dict[str, Any]) -> tuple[Flight, Tensor]:
    """Run all layers on a chunk; `kwargs` are arguments of layers.

    Returns the tokens that the last layer computed, and `until`, (B, N) int64: the first layer that no longer sees a
    token, the number of layers where all see it, 0 at padding.
    """
    path.check()
    plan, layers = path.plan, len(path.decoder.layers)
    until_BN = torch.where(plan.layout.valid, layers, 0)
    seen: dict[Evidence, Tensor] = {}
    looked = any("relevance" in path.sees(cut) for cut in plan.cuts)
    relevance_BN = relevance(flight.hidden, flight.asking(plan.layout)) if looked else None
    for stage in stages_of(plan.cuts, layers):
        if stage.cut is not None:
            if relevance_BN is not None:
                seen["relevance"] = relevance_BN.gather(1, flight.column)
            decided = path.decide(stage.cut, flight, seen)
            gone_BC = flight.kept & ~decided.kept
            last_BC = torch.where(gone_BC, stage.first, until_BN.gather(1, flight.column))
            until_BN = until_BN.scatter(1, flight.column, last_BC)
            flight = path.enter(decided)
        flight, seen = _run_layers(path, stage, flight, kwargs)
        path.leave(stage, flight)
    return flight, until_BN


def _run_layers(
    path: Path, stage: Stage, flight: Flight, kwargs: dict[str, Any]
) -> tuple[Flight, dict[Evidence, Tensor]]:
    """Run the layers of a stage; also return (B, C) of each evidence that the next cut sees."""
    mask, arguments = path.attend(stage, flight)
    asked = path.sees(stage.next_cut) & QUESTION_EVIDENCE
    question = QuestionReading(asked, flight.asking(path.plan.layout), flight.rotation) if asked else None
    hidden_BCD = flight.hidden
    for index in range(stage.first, stage.end):
        if question is not None and index == stage.end - 1:
            arguments = {**arguments, "question": question}
        # No position_ids here: with gaps in them, attention back ends would take one row for several packed sequences.
        hidden_BCD = path.decoder.layers[index](
            path.shown(stage, hidden_BCD), mask, position_embeddings=flight.rotation, **arguments, **kwargs
        )
    seen: dict[Evidence, Tensor] = {} if question is None else question.seen
    if "normed" in asked:
        with torch.no_grad():
            seen["normed"] = path.decoder.norm(hidden_BCD)
    return replace(flight, hidden=hidden_BCD), seen


class MaskedPath(Path):
    """Every token passes every layer, and from a cut on dropped tokens are hidden from all others."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.keep = self.plan.layout.valid
        """(B, N): M, as it has been decided so far; bool, or float with a gradient."""
        self.decided = self.plan.layout.output
        """(B, N) bool: output and prompt tokens that a decision was made for."""
        if any(cut.prompt for cut in self.plan.cuts) and self.plan.keep_mask is None:
            self.decided = self.decided | asked_prompts(self.plan, Past())
        self.entering: list[Tensor] = []
        """(B, N) float of each cut so far: M as it enters the attention behind it."""
        self._zeroes = self.decoder.training and self.decoder.settings.dropped_tokens == "zero_vectors"

    def check(self) -> None:
        """Raise ValueError, also, where what is to be zero vectors is still read: in a window, within an image."""
        super().check()
        if self._zeroes and self.within_image:
            raise ValueError(
                f"method {self.plan.method.name!r} lets tokens of an image read what it drops of the image, and "
                "sparsity.dropped_tokens='zero_vectors' would blank that; set it to 'masked_softmax'"
            )
        if self._zeroes and self.band is not None:
            raise ValueError(
                f"method {self.plan.method.name!r} drops output tokens {self.plan.window} steps late, and "
                "dropped_tokens='zero_vectors' makes them zero for all; give an output_window of 0, or 'masked_softmax'"
            )

    def decide(self, cut: Cut, flight: Flight, seen: dict[Evidence, Tensor]) -> Flight:
        """Decide as inference does, or let the method sample in training; decisions may be given with a gradient."""
        plan = self.plan
        if plan.keep_mask is not None:
            keep_BN = torch.where(flight.kept, plan.keep_mask, 0).to(plan.keep_mask.dtype)
            hidden_BND = flight.hidden
        elif self.decoder.training and samples(plan.method):
            keep_BN, hidden_BND, decided_BN = sample(plan, cut, learned_of(self.decoder), flight, seen)
            self.decided = decided_BN if cut.output or cut.prompt or len(plan.cuts) == 1 else self.decided
        else:
            keep_BN, hidden_BND = decide(plan, cut, learned_of(self.decoder), flight, seen, Past())
        self.keep = self.keep * keep_BN if self.entering and plan.keep_mask is None else keep_BN
        self.entering.append(entering_mask(self.keep, self.decoder.settings.mask_grad_clip, plan.loss_scale))
        return replace(flight, kept=flight.kept & (keep_BN != 0), hidden=hidden_BND)

    def enter(self, flight: Flight) -> Flight:
        """All tokens."""
        return flight

    def attend(self, stage: Stage, flight: Flight) -> tuple[Tensor | None, dict[str, Any]]:
        """Causal before the first cut and with zero vectors; behind it MaskedSoftmax with the keep mask (Eq. 7), or,
        behind a cut within images, a mask of what each token sees, through which no gradient reaches decisions.
        """
        if stage.cut is None or self._zeroes:
            return self.causal_mask(flight), {}
        if self.within_image:
            return self.cache_mask(self.visible(flight), flight), {}
        padding_mask = None if self.attention_mask is None else self.plan.layout.valid
        arguments = {"padding_mask": padding_mask, "masked_softmax": self.decoder.settings.masked_softmax}
        return self.entering[-1], arguments if self.band is None else {**arguments, "band": self.band}

    def shown(self, stage: Stage, hidden_BCD: Tensor) -> Tensor:
        """With "zero_vectors", a dropped token as a zero vector on entering each layer.

        Our reading of Table 7's "w/o MaskedSoftmax", in training alone: inference and scoring drop and hide as ever.
        A zero vector has zero key, query and value: as a key it still takes its share exp(0) of every later token's
        softmax, as a query it averages the values of its past. What the layer so writes into its residual stream is
        zeroed again before the next one, because the decision holds for all later layers: zeroed once, the token would
        be back, for all to see, one layer on. What the last layer writes stays: the loss of a dropped output token
        counts and is finite, but the token predicts its successor without knowing itself, which is what the paper holds
        against this way of training (Sec. 3.3.3).
        M has the gradient of the products, <d loss / d (M h), h> summed over the layers; at a dropped token it passes
        RMSNorm at zero, where the slope is 1 / sqrt(eps) whatever the size of h.
        """
        if stage.cut is None or not self._zeroes:
            return hidden_BCD
        return hidden_BCD * self.entering[-1][..., None].to(hidden_BCD.dtype)


class Dropping(Path):
    """Behind a cut only what is still needed is computed, packed to the left."""

    every_step: ClassVar[bool] = False
    """Whether every token that a step would have computed is computed too, not the newest alone."""

    def enter(self, flight: Flight) -> Flight:
        """Return the kept tokens, and dropped ones whose own hidden states are wanted although no other sees them.

        With a window all output tokens are computed: what a token sees of them has itself seen others. Behind a cut
        within images all tokens are.
        """
        if self.within_image:
            return flight
        computed_BC = flight.layout.computed(flight.kept, every_step=self.every_step)
        return flight.packed(Packing.of(computed_BC if self.band is None else computed_BC | flight.layout.output))


class DropPath(Dropping):
    """A whole sequence, with a cache that it opens or without one."""

    def __init__(self, *given: Any, cache: AdmissionCache | None) -> None:
        super().__init__(*given)
        self.cache = cache

    def check(self) -> None:
        """Raise ValueError, also, where a window needs a mask that the attention implementation does not take."""
        if self.band is not None:
            check_attention(self.decoder.config._attn_implementation)
        super().check()

    def attend(self, stage: Stage, flight: Flight) -> tuple[Tensor | None, dict[str, Any]]:
        """Open the cache; return the mask.

        It is causal where no token in the flight was dropped: filler lies behind every kept token, so it need not be
        hidden. Behind a cut within images all tokens attend, and the kept ones are stored.
        """
        whole = stage.cut is None
        if self.cache is not None:
            stored_BC = flight.kept if self.within_image else flight.layout.valid
            packs = self.within_image or (whole and self.attention_mask is not None)
            packing = Packing.of(stored_BC) if packs else None
            self.cache.groups[stage.number].open(stored_BC.sum(1), stored_BC.shape[1], packing)
        if whole:
            mask = self.causal_mask(flight)
        elif self.band is None and not self.within_image:
            mask = create_causal_mask(self.decoder.config, flight.hidden, None, None)
        else:
            mask = self.cache_mask(self.visible(flight), flight)
        return mask, {CACHE: self.cache} | self.evicting(Opening, flight, self.cache)

    def leave(self, stage: Stage, flight: Flight) -> None:
        """Take out of the cache again what was dropped, the newest token, or, with a window, what it has left behind.

        They had to be computed all the same.
        """
        if self.cache is None or stage.cut is None or self.within_image:
            return
        slots, band = self.cache.groups[stage.number], self.band_in(flight)
        if band is None or not isinstance(slots, WindowSlots):
            slots.retract_last(flight.layout.valid.sum(1) > flight.kept.sum(1))
            return
        until_BC = torch.where(flight.kept, ALWAYS, band.until).masked_fill(~flight.layout.valid, NEVER)
        self.cache.move(stage.number, *slots.settle(until_BC, self.plan.layout.output.sum(1)))


class ScorePath(Dropping):
    """A whole sequence as decoding would have seen it: every token of an answer is computed."""

    every_step = True

    def check(self) -> None:
        """Raise ValueError, also, where the attention implementation takes no mask of its own for each row."""
        check_attention(self.decoder.config._attn_implementation)
        super().check()

    def attend(self, stage: Stage, flight: Flight) -> tuple[Tensor | None, dict[str, Any]]:
        """Return the mask: behind a cut a token sees the kept ones before it, and itself."""
        if stage.cut is None:
            return self.causal_mask(flight), {}
        return self.cache_mask(self.visible(flight), flight), {}


class TurnPath(Dropping):
    """A chunk of several tokens on a live cache."""

    every_step = True

    def __init__(self, *given: Any, cache: AdmissionCache) -> None:
        self.cache = cache
        super().__init__(*given)
        self.admits: list[Tensor] = []
        """Of each stage so far (B, C) bool: the tokens that stay in the cache."""

    def check(self) -> None:
        """Raise ValueError for new images where the method decides by a question: its attention has gone by."""
        if self.plan.reads_question:
            check_question(self.plan.method, self.plan.layout.is_image)

    def sees(self, cut: Cut | None) -> frozenset[Evidence]:
        """Return no evidence: `check` has refused images that a method would decide on by it."""
        return frozenset()

    @property
    def past(self) -> Past:
        """The images and output tokens that the cache has seen: decisions count on from them."""
        return self.cache.past

    def attend(self, stage: Stage, flight: Flight) -> tuple[Tensor | None, dict[str, Any]]:
        """Return the mask: a token sees the slots that were filled, the kept tokens before it, and itself.

        Behind a cut within images one of an image also sees that image's before it.
        """
        self.admits.append(flight.kept)
        slots, placed = self.cache.groups[stage.number], (flight.layout.valid, flight.kept)
        if isinstance(slots, WindowSlots):
            visible_BCW = slots.place_chunk(*placed, self.band_in(flight))
        else:
            visible_BCW = slots.place_chunk(*placed, flight.layout.same_image() if self.within_image else None)
        arguments = {CACHE: self.cache} | self.evicting(Chunk, flight, self.cache)
        return self.cache_mask(visible_BCW, flight), arguments
