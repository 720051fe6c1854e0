"""What one pass of the language model is asked to do, and the stages that its layers fall into."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import get_args

from torch import Tensor

from dynamic_llava.config import SparsityConfig
from dynamic_llava.engine.tower import EncodedImages
from dynamic_llava.layout import TokenLayout
from dynamic_llava.methods import (
    CLIP_EVIDENCE,
    QUESTION_EVIDENCE,
    TOWER_EVIDENCE,
    Cut,
    Evidence,
    Method,
    QuestionTokens,
)


@dataclass(frozen=True)
class Plan:
    """Everything a pass needs to know besides the hidden states; made once per call, changed by none."""

    method: Method
    cuts: tuple[Cut, ...]
    """Where the method decides, in ascending order of layers."""
    layout: TokenLayout
    sample_key: Tensor
    """(B,) int64: noise key of each sample."""
    has_images: bool = False
    """Whether the chunk has a token of an image; known on the host."""
    tower: EncodedImages | None = None
    """What the vision tower says of the chunk's images, where the first cut reads it."""
    project: Callable[[Tensor], Tensor] | None = None
    """The projector, (1, n, F) -> (1, n, D), where the first cut is before it."""
    question: QuestionTokens | None = None
    """What CLIP's text tower says of the question of each image, where the first cut sees it."""
    masked: bool = False
    """Keep the full length and mask (training, teacher forcing) instead of removing tokens."""
    answers_only: bool = False
    """Mask as inference decides; hidden states are wanted at prompt and answer tokens only."""
    tau: float = 1.0
    """Temperature of the relaxation."""
    settings: SparsityConfig = field(default_factory=SparsityConfig)
    """The checkpoint's settings, with what the call has overridden."""
    keep_mask: Tensor | None = None
    """(B, N): decisions given by the caller, which hold from the first cut on; the method is asked nothing."""
    asked: Tensor | None = None
    """(B, N) bool: where a token may be one of a question; None: anywhere behind an image."""
    loss_scale: float = 1.0
    """What the caller multiplies the loss by before the backward pass."""
    compile: bool = False
    """Run a single-token step as one compiled graph."""

    def sees(self, cut: Cut | None) -> frozenset[Evidence]:
        """Return what the method is shown at a cut beside hidden states; nothing where decisions are given."""
        return frozenset() if cut is None or self.keep_mask is not None else cut.sees

    @property
    def output_layer(self) -> int | None:
        """The layer from which on a new token may be dropped; None where every token stays."""
        if self.keep_mask is not None:
            return self.cuts[0].layer if self.cuts else None
        return next((cut.layer for cut in self.cuts if cut.output), None)

    @property
    def window(self) -> int:
        """Output tokens that every token sees of those before it, whatever has been decided about them."""
        return self.method.drop_delay

    @property
    def reads_question(self) -> bool:
        """Whether the method is asked, and decides by something of the question."""
        return any(self.sees(cut) & QUESTION_EVIDENCE for cut in self.cuts)


@dataclass(frozen=True)
class Stage:
    """Layers in a row that see the same tokens."""

    number: int
    """Its place among the stages, and that of its layers among the groups of a cache."""
    first: int
    """Its first layer."""
    end: int
    """The layer behind its last."""
    cut: Cut | None
    """The decision on what enters its first layer; None in the stage before a method's first cut."""
    next_cut: Cut | None
    """The decision on what its last layer gives."""


def stages_of(cuts: Sequence[Cut], layers: int) -> tuple[Stage, ...]:
    """Return the stages of a language model of so many layers; with no cut they are one."""
    at = {cut.layer: cut for cut in cuts}
    edges = [0, *(layer for layer in at if layer), layers]
    return tuple(
        Stage(number, first, end, at.get(first), at.get(end)) for number, (first, end) in enumerate(pairwise(edges))
    )


def cuts_of(method: Method, layers: int) -> tuple[Cut, ...]:
    """Return the cuts of a method in a language model of so many layers.

    Raises ValueError for a cut outside of it, two at one layer or in another order, two that decide on output or on
    prompt tokens, one within images beside something else, and one that asks for what cannot be seen at its layer.
    """
    cuts = method.cuts(layers)
    for cut in cuts:
        if not isinstance(cut, Cut) or type(cut.layer) is not int or not set(cut.sees) <= set(get_args(Evidence)):
            raise ValueError(
                f"method {method.name!r} has a cut {cut!r}; let `cuts` return Cut objects, their layer an int, their "
                f"sees a frozenset of names among {', '.join(get_args(Evidence))}"
            )
    places = [cut.layer for cut in cuts]
    if any(not 0 <= layer < layers for layer in places) or places != sorted(set(places)):
        raise ValueError(
            f"method {method.name!r} decides at the layers {places}, and this language model has {layers}; let it "
            f"decide at layers from 0 (before the language model) to {layers - 1}, each once, in ascending order"
        )
    if sum(cut.output for cut in cuts) > 1:
        raise ValueError(
            f"method {method.name!r} decides on output tokens at {sum(cut.output for cut in cuts)} cuts; a token is "
            "admitted to the cache once: let one cut say `output`"
        )
    if sum(cut.prompt for cut in cuts) > 1:
        raise ValueError(
            f"method {method.name!r} decides on questions at {sum(cut.prompt for cut in cuts)} cuts; let one cut say "
            "`prompt`"
        )
    if any(cut.within_image for cut in cuts) and (len(cuts) > 1 or method.evicts or method.drop_delay):
        beside = "evicts" if method.evicts else "a window" if method.drop_delay else "other cuts"
        raise ValueError(
            f"method {method.name!r} has a cut that says `within_image`, behind which dropped tokens are computed on, "
            f"and {beside}; let it be the one thing that the method does"
        )
    for cut in cuts:
        _check_evidence(method, cut)
    return cuts


def tower_cut(method: Method, layers: int) -> Cut | None:
    """Return the cut of a method that is shown something of the vision tower, if it has one."""
    return next((cut for cut in cuts_of(method, layers) if cut.reads_tower), None)


def _check_evidence(method: Method, cut: Cut) -> None:
    """Raise ValueError for evidence that cannot be had at the cut's layer, or not by a method that learns."""
    if cut.layer == 0 and (asked := cut.sees - TOWER_EVIDENCE - CLIP_EVIDENCE):
        raise ValueError(
            f"method {method.name!r} asks for {', '.join(sorted(asked))} at layer 0, and no layer has attended "
            "before it; let its first cut be at layer 1 or later, or see nothing but the evidence of vision tower and "
            f"CLIP: {', '.join(sorted(TOWER_EVIDENCE | CLIP_EVIDENCE))}"
        )
    if cut.layer > 0 and "clip_text" in cut.sees:
        raise ValueError(
            f"method {method.name!r} asks for clip_text at layer {cut.layer}; what CLIP says of the question is shown "
            "at layer 0, before the language model: let it decide there"
        )
    if "clip_text" in cut.sees and "clip_tokens" not in cut.sees:
        raise ValueError(
            f"method {method.name!r} asks for clip_text without clip_tokens, and nothing else lies in the space of "
            "CLIP's texts; let its cut see both"
        )
    if cut.sees & CLIP_EVIDENCE and not cut.text_tower:
        raise ValueError(
            f"method {method.name!r} asks for {', '.join(sorted(cut.sees & CLIP_EVIDENCE))}, and its cut says no "
            "text_tower; let the cut name the folder of a whole CLIP checkpoint: Cut(0, ..., text_tower=folder)"
        )
    if cut.layer > 0 and cut.reads_tower:
        raise ValueError(
            f"method {method.name!r} asks for {cut.asked_of_tower} at layer {cut.layer}; the vision tower is seen at "
            "layer 0, before the language model: let it decide there"
        )
    if cut.picture_side is not None and (cut.sees or cut.before_projector):
        raise ValueError(
            f"method {method.name!r} asks for {cut.asked_of_tower}: the tower's patches are then not the image's; let "
            "a cut with a smaller picture see nothing, and stand behind the projector"
        )
    if cut.reads_tower and type(method).build is not Method.build:
        raise ValueError(
            f"method {method.name!r} learns, and asks for {cut.asked_of_tower}: a learned method is built for hidden "
            "states of the language model and cannot see the vision tower yet; let it decide by projected features, "
            "Cut(0), or learn nothing"
        )
