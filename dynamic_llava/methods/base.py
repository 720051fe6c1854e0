"""What a sparsification method is: decisions on tokens, taken where hidden states enter a layer.

A method says at which layers it decides (its cuts) and answers there which tokens stay. The engine (`model/`) owns
padding, positions, masks, packing and the cache. `keep_image` decides on image tokens, `keep_output` on output tokens,
one at a time or many at once, `keep_prompt` on those of questions. `learned` is the method's own weights: for
Dynamic-LLaVA, a module with the children `image_predictor` and `output_predictor`, functions from hidden states
(..., D) to logits (..., 2): drop, keep.
A method may also evict: `evict` is asked after each layer's attention which of the tokens that its key heads hold stay.
Shape suffixes: I images, n image tokens of the longest, T output tokens of the batch, D hidden size, F feature size;
B rows, N tokens, K key heads, W slots of a cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from dynamic_llava.config import SparsityConfig
from dynamic_llava.costs import DecoderShape, PartCosts, VisionShape
from dynamic_llava.layout import TokenLayout
from dynamic_llava.methods.evidence import (
    QUESTION_EVIDENCE,
    TOWER_EVIDENCE,
    Evidence,
    QuestionTokens,
    SlotEvidence,
    Slots,
)

BudgetKind = Literal["image-tokens", "kv-bytes"]
"""What several methods can be given equally much of. image-tokens: those that the last layer sees of each image;
kv-bytes: what the keys and values of a prompt fill when its prefill ends."""


@dataclass(frozen=True)
class Cut:
    """A place where a method decides: that layer and all later ones see only what it keeps."""

    layer: int
    """Decoder layer whose input is decided on; 0 is before the language model."""
    sees: frozenset[Evidence] = frozenset()
    """What `keep_image` is shown here in `ImageTokens.seen`; computed only where it is asked for."""
    output: bool = False
    """Whether output tokens are decided on here, by `keep_output`; at one cut of a method at most."""
    prompt: bool = False
    """Whether tokens of questions are decided on here, by `keep_prompt`; at one cut of a method at most."""
    within_image: bool = False
    """Whether what is dropped of an image is computed in every layer all the same, read by later tokens of that image
    and by no others, and stored nowhere; of a method's only cut."""
    before_projector: bool = False
    """At layer 0 alone: whether the vision tower's features are decided on, and merged, instead of projected ones."""
    tower_layer: int | None = None
    """Where the tower's attention and keys are read, as `vision_feature_layer` counts; None: where features are."""
    early_depth: float | None = None
    """Where early_received and early_class_row are read, as a share of the tower's depth: 0.375 is layer 9 of 24."""
    text_tower: str | None = None
    """Where clip_tokens and clip_text are read: the folder or hub name of a whole CLIP checkpoint."""
    picture_side: float | None = None
    """At layer 0 alone, seeing nothing: the tower is given a picture downsampled to this share of its side in patches;
    its tokens come at the `middles` of that coarser grid (grid.py), and what comes at other places means nothing."""

    @property
    def asked_of_tower(self) -> str:
        """What is asked for of the vision tower, in words; empty where nothing is."""
        asked: list[str] = sorted(self.sees & TOWER_EVIDENCE)
        asked += ["features before the projector"] if self.before_projector else []
        return ", ".join(asked + (["a smaller picture"] if self.picture_side is not None else []))

    @property
    def reads_tower(self) -> bool:
        """Whether anything of the vision tower is shown here, or asked of it."""
        return bool(self.asked_of_tower)

    @property
    def reads_question(self) -> bool:
        """Whether something is shown here that only a question behind the images can give."""
        return bool(self.sees & QUESTION_EVIDENCE)


@dataclass(frozen=True)
class ImageTokens:
    """What `keep_image` is shown: every image of the batch, one entry per image, independent of its row mates."""

    hidden: Tensor
    """(I, n, D): hidden states that enter the cut's layer; before the projector (I, n, F), the tower's features."""
    valid: Tensor
    """(I, n) bool: tokens of the image that are left; False at the filler behind an image shorter than the longest."""
    key: Tensor
    """(I,) int64: noise key of the image's sample and place."""
    seen: Mapping[Evidence, Tensor] = field(default_factory=dict)
    """What the cut `sees`."""
    tokens: Tensor = None  # type: ignore[assignment]
    """(I,) int64: tokens that each image had before the first cut; by default those of `valid`."""
    question: QuestionTokens | None = None
    """The text that each image is asked about, where the cut sees something of it."""

    def __post_init__(self) -> None:
        if self.tokens is None:
            object.__setattr__(self, "tokens", self.valid.sum(1))


@dataclass(frozen=True)
class OutputTokens:
    """What `keep_output` is shown: the output tokens of the batch, flattened; each is judged alone."""

    hidden: Tensor
    """(T, D): hidden states that enter the cut's layer."""
    rank: Tensor
    """(T,) int64: index of the token among its row's output tokens."""
    key: Tensor
    """(T,) int64: noise key of the token's sample."""
    place: Tensor = None  # type: ignore[assignment]
    """(T,) int64: index of the token in its answer; by default `rank`, as if the row had one answer."""

    def __post_init__(self) -> None:
        if self.place is None:
            object.__setattr__(self, "place", self.rank)


@dataclass(frozen=True)
class PromptTokens:
    """What `keep_prompt` is shown: the tokens of the batch's questions, flattened; each is judged alone.

    A question is what stands between a row's first image, or an answer, and the next answer or the end of the call. Its
    last token, from which the answer is predicted, is not among them: it always stays.
    """

    hidden: Tensor
    """(T, D): hidden states that enter the cut's layer."""
    rank: Tensor
    """(T,) int64: index of the token among those of its row in this call."""
    key: Tensor
    """(T,) int64: noise key of the token's sample."""


@dataclass(frozen=True)
class Choice:
    """What becomes of image tokens where some are merged; a plain keep mask is a choice without heirs."""

    keep: Tensor
    """(I, n) bool: tokens that stay."""
    into: Tensor | None = None
    """(I, n) int64: for each dropped token the index, in its image, of the kept token that takes it over."""
    weight: Tensor | None = None
    """(I, n) float: share of each token in what its heir becomes."""
    shares: Tensor | None = None
    """(I, n, n) float, instead of both, where a token goes to several: share of each token (last) in each kept one."""


@dataclass(frozen=True)
class Draw:
    """What training tells a method that samples its decisions, beside the tokens and their noise keys."""

    tau: float
    """Temperature of the relaxation."""
    settings: SparsityConfig
    """The checkpoint's settings, with what the call has overridden."""
    answer: Tensor | None = None
    """(T,) int64, with output or prompt tokens: which answer or question of the batch each belongs to."""
    place: Tensor | None = None
    """(T,) int64, with output or prompt tokens: index of each in it."""


class Record(Protocol):
    """What `losses` reads of a pass; the model's SparsityRecord."""

    layout: TokenLayout
    keep_mask: Tensor
    """(B, N) float: the decisions with their gradient; 1 where nothing decides, 0 at padding."""
    sparsified_output: Tensor
    """(B, N) bool: output tokens that were decided on."""
    sparsified_prompt: Tensor
    """(B, N) bool: prompt tokens that were decided on."""


@dataclass(frozen=True)
class Method:
    """Base of all methods: a frozen bag of settings, no state. Registered under `name` in methods.METHODS."""

    name: ClassVar[str]
    training_free: ClassVar[bool] = False
    """Whether training mode decides as inference does, by 0 or 1: nothing of the method is learned, the model is tuned
    under its fixed rule. The class that defines the hooks declares it; inherited, it says nothing about new hooks. A
    method that learns defines `sample` beside `keep_image`, and so on (HOOKS in engine/decide.py)."""
    evict_sees: ClassVar[frozenset[SlotEvidence]] = frozenset()
    """What `evict` is shown in `Slots.seen`; computed only where it is asked for."""

    @classmethod
    def settings_from(cls, config: SparsityConfig) -> dict[str, Any]:
        """Return what a checkpoint's settings say of this method's own; they hold where a user says nothing else."""
        return {}

    @property
    def is_dense(self) -> bool:
        """Whether nothing is ever dropped, so that the plain decoder may run."""
        return False

    parts: ClassVar[tuple[str, ...]] = ("method",)
    """Names of a learned method's weights in the language model: of what `build` returns, or of its children."""

    def build(self, width: int, settings: SparsityConfig) -> nn.Module | None:
        """Return the method's own weights, new ones, for hidden states of `width`; default: None, nothing is learned.

        The hooks are given it as `learned`. New weights are drawn as transformers draws them (Linear, norms, Embedding
        and convolutions by the model's `initializer_range`); other parameters keep the values they have here.
        """
        return None

    def costs(self, width: int, settings: SparsityConfig) -> dict[str, PartCosts]:
        """Return what each of the `parts` costs for hidden states of `width`; default: reckoned from the modules.

        The default takes every matrix to be multiplied once with each token that a hook of the method judges, and its
        input and output to be kept for the backward pass; a part that does more (attention) says so itself.
        """
        with torch.device("meta"):
            built = self.build(width, settings)
        if built is None:
            return {}
        modules = {name: built if len(self.parts) == 1 else built.get_submodule(name) for name in self.parts}
        images = type(self).keep_image is not Method.keep_image
        outputs = type(self).keep_output is not Method.keep_output
        return {name: PartCosts.reckoned(one, images=images, outputs=outputs) for name, one in modules.items()}

    @property
    def added_tokens(self) -> int:
        """How many learned tokens stand behind those of each image, as its last, on a checkpoint of this method.

        What `build` returns gives them: called with their number a, (a, D).
        """
        return 0

    @property
    def used_parts(self) -> tuple[str, ...]:
        """The names of `parts` that decide something with these settings, and learn in training."""
        return () if type(self).build is Method.build else self.parts

    def knobs(self, budget: BudgetKind) -> tuple[str, ...]:
        """Return the settings, int or float, that more or less of a budget is kept by: the larger, the more.

        One that also names a rule in words, which fits the budget to the image, may be given a float all the same.
        Several are turned together, in the proportion that they have; one of an inner method has a dotted name. None
        where the method has no such setting. Default: `image_keep_rate`, and for the bytes of a method that evicts
        `keep_rate`, where they are numbers.
        """
        wanted = "keep_rate" if self.evicts and budget == "kv-bytes" else "image_keep_rate"
        held = {one.name: getattr(self, one.name) for one in fields(self) if one.init}
        return (wanted,) if isinstance(held.get(wanted), float | int) else ()

    def keep_rates(self, settings: SparsityConfig) -> dict[str, float]:
        """Return the keep rates that training aims at: of image_keep_rate, output_keep_rate, prompt_keep_rate."""
        return {}

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """Return where the method decides in a language model of so many layers, in ascending order; default: never."""
        return ()

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor | Choice:
        """(I, n) bool, True where an image token stays; what it says at filler is not read; default: all stay."""
        return keep_all_image(images)

    def keep_output(self, outputs: OutputTokens, learned: Any) -> Tensor:
        """(T,) bool, True where an output token stays: its keys and values are admitted; default: all stay."""
        return torch.ones_like(outputs.rank, dtype=torch.bool)

    def keep_prompt(self, prompts: PromptTokens, learned: Any) -> Tensor:
        """(T,) bool, True where a question's token stays, asked at the cut that says `prompt`; default: all stay."""
        return torch.ones_like(prompts.rank, dtype=torch.bool)

    @property
    def drop_delay(self) -> int:
        """How many more output tokens of its row see an output token that `keep_output` has dropped."""
        return 0

    @property
    def evicts(self) -> bool:
        """Whether stored tokens are evicted; caches then have lengths of their own in each layer and key head."""
        return type(self).evict is not Method.evict

    @property
    def evicts_from(self) -> int:
        """The first layer that evicts, of a method that says so by a setting `layer`."""
        return getattr(self, "layer", 0)

    @property
    def latest_queries(self) -> int:
        """How many of a pass's last tokens count for the evidence `latest`."""
        return 1

    def evict(self, layer: int, slots: Slots) -> Tensor | None:
        """(B, K, W) bool, True where a stored token stays; None, the default: all stay. Unfilled slots are not read.

        Asked in each layer, after a prefill, after each later chunk, and after each decoded token, the new token among
        the stored ones if it was admitted. Rows and key heads must not influence one another.
        """
        return None

    def evidence_flops(
        self, tokens: Sequence[int], shape: DecoderShape, *, causal: bool = False, step: bool = False, question: int = 0
    ) -> int:
        """Return the FLOPs of the attention that the method is shown in a prefill in which layers see `tokens`.

        It is recomputed from queries and keys: of one query before a cut that sees `question_row`, of `question` many
        before one that sees `question_rows`, in each layer of all queries for `mass` and of the last `latest_queries`
        for `latest`, with their sum. causal=True counts visible pairs only; step=True is one new token of a row whose
        layers hold `tokens`.
        """
        cuts = () if step else self.cuts(len(tokens))
        asked = {"question_row": 1, "question_rows": question}
        rows = [tokens[cut.layer - 1] * asked[name] for cut in cuts for name in sorted(cut.sees & asked.keys())]
        received = 0
        for kind in sorted(self.evict_sees & {"mass", "latest"}):
            for n in (one + 1 if step else one for one in tokens):
                last = 1 if step else n if kind == "mass" else min(self.latest_queries, n)
                pairs = last * n - (last * (last - 1) // 2 if causal else 0)
                received += pairs * (shape.query_width + (shape.kv_heads if last > 1 else 0))
        return 2 * (sum(rows) * shape.query_width + received)

    def tower_flops(self, layers: int, vision: VisionShape) -> int:
        """Return the FLOPs of the attention that the method is shown of the vision tower, for one image.

        One row is recomputed for each of `class_row`, `early_class_row` and `joint_class_row`, all rows for `received`
        and `early_received`; keys and features are at hand. They join the tower's own, as what is merged before the
        projector joins the projector's: every patch is projected once, and what has taken in others once more.
        """
        tokens, seen = vision.patches + 1, [cut.sees for cut in self.cuts(layers)]
        rows = sum(len(sees & {"class_row", "early_class_row", "joint_class_row"}) for sees in seen)
        rows += tokens * sum(len(sees & {"received", "early_received"}) for sees in seen)
        return 2 * rows * tokens * vision.hidden

    def sample(self, cut: Cut, images: ImageTokens, learned: Any, draw: Draw) -> Tensor | Choice:
        """(I, n) float, 0 or 1, with a gradient to the method's weights: `keep_image` in training; default: the same.

        It is asked in every training pass, about a part of the text where there is no image, so that in each process
        of a run all weights take part; such an answer counts for nothing.
        """
        return self.keep_image(cut, images, learned)

    def sample_output(self, outputs: OutputTokens, learned: Any, draw: Draw) -> Tensor:
        """(T,) float, 0 or 1, with a gradient: `keep_output` in training, about whole answers; default: the same.

        Answers below `output_min_length` are asked about and kept whatever is said. As `sample`, it is always asked.
        """
        return self.keep_output(outputs, learned)

    def sample_prompt(self, prompts: PromptTokens, learned: Any, draw: Draw) -> Tensor:
        """(T,) float, 0 or 1, with a gradient: `keep_prompt` in training, about whole questions; default: the same.

        Questions below `prompt_min_length` are asked about and kept whatever is said. As `sample`, it is always asked.
        """
        return self.keep_prompt(prompts, learned)

    def loss_samples(self, layout: TokenLayout, decided: Tensor, settings: SparsityConfig) -> dict[str, Tensor]:
        """Return the method's own losses by name, with (B,) bool: the samples that each is a mean over.

        `decided` (B, N) bool are the output and prompt tokens that training decides on. Known before a pass, so that a
        loss is divided by its samples in the global batch: all processes and accumulation steps.
        """
        return {}

    def losses(self, record: Record, counts: Mapping[str, Tensor], settings: SparsityConfig) -> dict[str, Tensor]:
        """Return, under the names of `loss_samples`, () float each: the batch's sum divided by `counts` of the name."""
        return {}

    def loss_weight(self, settings: SparsityConfig) -> float:
        """Return what the sum of `losses` is multiplied by before it joins the language model's loss."""
        return 1.0


@dataclass(frozen=True)
class OneCut(Method):
    """A method that decides once, at one layer; on output tokens too if it defines `keep_output`."""

    sees: ClassVar[frozenset[Evidence]] = frozenset()
    """What its cut sees."""

    layer: int = 2
    """The sparse layer: this one and all later ones see only kept tokens."""

    @classmethod
    def settings_from(cls, config: SparsityConfig) -> dict[str, Any]:
        """Return the checkpoint's sparse layer, unless the class has a default layer of its own."""
        inherited = cls.__dataclass_fields__["layer"] is OneCut.__dataclass_fields__["layer"]
        return {"layer": config.sparse_layer} if inherited else {}

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, at `layer`."""
        return (Cut(self.layer, self.sees, output=type(self).keep_output is not Method.keep_output),)


def check_rate_or_none(name: str, value: float | None) -> None:
    """Raise ValueError unless `value` is None (keep all) or a number in [0, 1]; 0 drops everything."""
    if value is not None and (isinstance(value, bool) or not 0 <= value <= 1):
        raise ValueError(f"{name}={value!r} is not a keep rate; give a number in [0, 1], or None to keep every token")


def keep_all_image(images: ImageTokens) -> Tensor:
    """(I, n) bool, all True."""
    return torch.ones_like(images.valid)
