"""The rows of the tiny world's table: which model, which selection, which path, and what each row is there to show.

All rows go through the same functions; a row is data. Selections that no registered method offers alone (one method's
image decision with another's output decision) are composed here, from the same hooks.
Shape suffixes: T output tokens of a batch, A answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dynamic_llava.config import SparsityConfig
from dynamic_llava.methods import Dynamic, FastV, Random, Structure
from dynamic_llava.methods.base import Choice, Cut, Evidence, ImageTokens, Method, OneCut, OutputTokens
from dynamic_llava.sparsity.predictors import keep_margin

ModelKey = Literal["base", "control", "image", "both"]
"""The dense base, the dense control (same extra steps), Dynamic I and Dynamic I|T."""

UNCACHED, CACHED_SUBSET = "uncached", "dynamic_subset"
"""Keys of the row that decodes without a cache and of the cached row on the same subset."""
DENSE: Mapping[str, Any] = {"sparsity": "none"}
REFERENCE = "dynamic"
"""Key of the row whose realised output keep rate the equal-keep rows are given."""


@dataclass(frozen=True)
class Mixed(OneCut):
    """Image tokens by one method, output tokens by another (not registered: a tool of these rows)."""

    name: ClassVar[str] = "mixed"

    image_by: Method = field(default_factory=Dynamic)
    """Decides on image tokens."""
    output_by: Method = field(default_factory=Dynamic)
    """Decides on output tokens."""

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, at `layer`, which sees what that of `image_by` sees."""
        sees = frozenset[Evidence]().union(*(cut.sees for cut in self.image_by.cuts(layers)))
        return (Cut(self.layer, sees, output=True),)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor | Choice:
        """Return the decision of `image_by`, (I, n) bool."""
        return self.image_by.keep_image(cut, images, learned)

    def keep_output(self, outputs: OutputTokens, learned: Any) -> Tensor:
        """Return the decision of `output_by`, one bool per output token."""
        return self.output_by.keep_output(outputs, learned)


@dataclass(frozen=True)
class TopKOutput(Dynamic):
    """The learned margins, but each answer keeps its `output_keep_rate` highest: every row at exactly the same rate.

    Ranks over a whole answer, so it exists for teacher-forced passes only (a decoding step sees one token).
    """

    name: ClassVar[str] = "top_k_output"

    output_keep_rate: float = 0.5
    """Share of each answer's tokens that stays, rounded down."""

    def keep_output(self, outputs: OutputTokens, learned: Any) -> Tensor:
        """Return (T,) bool, ties to the earlier token; ValueError where `outputs` are no whole answers."""
        starts_T = outputs.rank == 0
        if not bool(starts_T[0]) or bool(starts_T.all()):
            raise ValueError("top-k ranks over whole answers; while decoding, select by threshold instead")
        margin_T = keep_margin(learned.output_predictor(outputs.hidden))
        answer_T = starts_T.cumsum(0) - 1
        by_margin_T = margin_T.argsort(descending=True, stable=True)
        order_T = by_margin_T[answer_T[by_margin_T].argsort(stable=True)]  # by answer, within it by margin
        first_A = starts_T.nonzero().flatten()
        place_T = torch.empty_like(order_T)
        place_T[order_T] = torch.arange(order_T.shape[0], device=order_T.device)
        count_A = (answer_T.bincount() * self.output_keep_rate).floor()
        return place_T - first_A[answer_T] < count_A[answer_T]


@dataclass(frozen=True)
class Row:
    """One row: a trained model, the switches of its calls, and which measurements apply."""

    key: str
    title: str
    model: ModelKey
    switches: Mapping[str, Any]
    """Keyword arguments of forward() and generate()."""
    note: str = ""
    """What the row is there to show."""
    use_cache: bool = True
    generates: bool = True
    """False: only perplexity is measured (a selection that needs the whole answer)."""
    subset: bool = False
    """Measure on the smaller subset of the row without a cache."""
    answers_of: str | None = None
    """Key of a row that differs in output tokens only: a one-word answer is complete before any can be dropped."""

    @property
    def learned(self) -> bool:
        """Whether the image predictor runs in this row."""
        method = self.switches.get("method")
        return isinstance(method, Mixed | Dynamic) or self.switches.get("sparsity") in ("both", "image")


def first_rows(settings: SparsityConfig, *, dynamic_image: bool = True, uncached: bool = True) -> list[Row]:
    """Rows that need no other row's result; `settings` are those of the sparse checkpoints."""
    layer, rate = settings.sparse_layer, settings.image_keep_rate
    rows = [
        Row("base", "dense base", "base", DENSE, "the model that every training starts from"),
        Row("control", "dense control", "control", DENSE, "the base trained on, dense, for the same steps"),
        Row("dynamic_image", "Dynamic I", "image", {"sparsity": "image"}, "image tokens sparsified"),
        Row(REFERENCE, "Dynamic I|T", "both", {"sparsity": "both"}, "image and output tokens sparsified, cached"),
        Row(
            UNCACHED, "Dynamic I|T, no cache", "both", {"sparsity": "both"}, use_cache=False, subset=True,
            note="decoded without a cache on a subset; must equal the cached model on that subset",
        ),
        Row(
            "fastv", "control + FastV-like", "control", {"method": FastV(layer=layer, image_keep_rate=rate)},
            "image tokens by attention, same average number per layer as Dynamic I, training-free",
        ),
        Row(
            "random_image", "control + random image", "control",
            {"method": Random(layer=layer, image_keep_rate=rate, output_keep_rate=None)},
            "image tokens at random, same number, training-free",
        ),
        Row(
            "no_image", f"control, no image after layer {layer}", "control",
            {"method": Random(layer=layer, image_keep_rate=0, output_keep_rate=None)},
            "proof that dropping matters: what the later layers know without any image token",
        ),
    ]  # fmt: skip
    return [row for row in rows if (dynamic_image or row.model != "image") and (uncached or row.key != UNCACHED)]


def equal_keep_rows(settings: SparsityConfig, output_rate: float) -> list[Row]:
    """Rows that drop output tokens at the rate that the learned selection realised under teacher forcing."""
    layer = settings.sparse_layer
    learned = Dynamic.from_config(settings, "both")
    rate = round(output_rate, 4)
    random = Random(layer=layer, image_keep_rate=None, output_keep_rate=rate)
    alternate = Structure(layer=layer, image_keep_rate=None, output_keep_rate=rate)
    share = f"{100 * rate:.1f} % of the output tokens, the learned model's realised rate"
    return [
        Row(
            "random_output", "control + random output", "control", {"method": random},
            f"{share}; training-free", answers_of="control",
        ),
        Row(
            "alternate_output", "control + alternate output", "control", {"method": alternate},
            f"{share}, evenly spaced; training-free", answers_of="control",
        ),
        Row(
            "inside_random", "Dynamic I|T, random output", "both",
            {"method": Mixed(layer=layer, image_by=learned, output_by=random)},
            f"{share}, at random inside the trained model; image tokens learned", answers_of=REFERENCE,
        ),
        Row(
            "inside_alternate", "Dynamic I|T, alternate output", "both",
            {"method": Mixed(layer=layer, image_by=learned, output_by=alternate)},
            f"{share}, evenly spaced inside the trained model; image tokens learned", answers_of=REFERENCE,
        ),
        Row(
            "inside_topk", "Dynamic I|T, top-k output", "both",
            {"method": _top_k(settings, rate)}, generates=False,
            note=f"{share}, the highest learned margins of each answer (whole answers, so perplexity only)",
        ),
    ]  # fmt: skip


def _top_k(settings: SparsityConfig, rate: float) -> TopKOutput:
    return TopKOutput(
        layer=settings.sparse_layer,
        sparsity="both",
        image_keep_rate=settings.image_keep_rate,
        image_selection=settings.image_selection,
        output_keep_rate=rate,
    )
