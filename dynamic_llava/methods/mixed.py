"""Image tokens by one method, output tokens by another: what each of two decisions is worth beside the same other one.

{name: mixed, image_by: dynamic, output_by: {name: random, image_keep_rate: null, output_keep_rate: 0.5}}

What layers have stored may be evicted by a third. The paper's FastV+H2O drops image tokens by FastV in the prefill, and
evicts half of the answer's tokens:

{name: mixed, image_by: {name: fastv, layer: 3, image_keep_rate: 0.25},
 evict_by: {name: h2o, shares_of: outputs, heavy_rate: 0.25, recent_rate: 0.25}}
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from dynamic_llava.methods.base import BudgetKind, Choice, Cut, ImageTokens, Method, OneCut, OutputTokens, PromptTokens
from dynamic_llava.methods.evidence import SlotEvidence, Slots


@dataclass(frozen=True)
class Mixed(Method):
    """Each kind of token is decided on by a method of its own, at the same layer, with the weights of the checkpoint.

    What `image_by` would do with output tokens, and `output_by` with image tokens and questions, is not asked.
    """

    name: ClassVar[str] = "mixed"

    image_by: OneCut | None = None
    """Decides on image tokens, and on the tokens of questions where it does so by itself; None keeps all."""
    output_by: OneCut | None = None
    """Decides on output tokens; None keeps all."""
    evict_by: Method | None = None
    """Evicts stored tokens; None evicts none. What it would do at cuts is not asked."""

    def __post_init__(self) -> None:
        layers = {one.layer for one in self._deciding}
        if len(layers) > 1:
            raise ValueError(
                f"image_by decides at layer {self.image_by.layer} and output_by at layer {self.output_by.layer}; "  # type: ignore[union-attr]
                "give both the same `layer`"
            )

        if evicting := [one.name for one in self._deciding if one.evicts]:
            raise ValueError(
                f"{' and '.join(map(repr, evicting))} evicts stored tokens, which would not be asked here; give such a "
                "method as evict_by, or use it alone"
            )
        if self.evict_by is not None and not self.evict_by.evicts:
            raise ValueError(f"evict_by={self.evict_by.name!r} evicts nothing; give a method that does, such as h2o")
        if self.evict_by is not None and self.drop_delay:
            raise ValueError(
                f"output_by drops output tokens {self.drop_delay} steps late, and evict_by={self.evict_by.name!r} "
                "evicts what is stored at once; give output_by an output_window of 0, or leave out evict_by"
            )

    @property
    def _deciding(self) -> tuple[OneCut, ...]:
        return tuple(one for one in (self.image_by, self.output_by) if one is not None)

    @property
    def _all(self) -> tuple[Method, ...]:
        return (*self._deciding, *(() if self.evict_by is None else (self.evict_by,)))

    @property
    def is_dense(self) -> bool:
        """True where no method drops anything."""
        return all(one.is_dense for one in self._all)

    @property
    def training_free(self) -> bool:  # type: ignore[override]
        """Whether no method learns anything."""
        return all(one.training_free for one in self._all)

    @property
    def used_parts(self) -> tuple[str, ...]:
        """What any method decides by."""
        return tuple(dict.fromkeys(part for one in self._all for part in one.used_parts))

    @property
    def drop_delay(self) -> int:
        """That of `output_by`."""
        return 0 if self.output_by is None else self.output_by.drop_delay

    @property
    def evicts(self) -> bool:
        """Whether there is a method that does."""
        return self.evict_by is not None

    @property
    def evicts_from(self) -> int:
        """That of `evict_by`."""
        return 0 if self.evict_by is None else self.evict_by.evicts_from

    @property
    def evict_sees(self) -> frozenset[SlotEvidence]:  # type: ignore[override]
        """What `evict_by` is shown."""
        return frozenset() if self.evict_by is None else self.evict_by.evict_sees

    @property
    def latest_queries(self) -> int:
        """Those of `evict_by`."""
        return 1 if self.evict_by is None else self.evict_by.latest_queries

    def knobs(self, budget: BudgetKind) -> tuple[str, ...]:
        """Those of `image_by`; for stored bytes those of `evict_by`, where it has some."""
        parts: dict[str, Method | None] = {"image_by": self.image_by}
        if budget == "kv-bytes":
            parts = {"evict_by": self.evict_by, **parts}
        named = [[f"{part}.{name}" for name in one.knobs(budget)] for part, one in parts.items() if one is not None]
        return tuple(next(filter(None, named), ()))

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, which sees what that of `image_by` sees."""
        if not self._deciding:
            return ()
        cut = Cut(self._deciding[0].layer) if self.image_by is None else self.image_by.cuts(layers)[0]
        return (replace(cut, output=self.output_by is not None),)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor | Choice:
        """(I, n) bool: the decision of `image_by`."""
        if self.image_by is None:
            return super().keep_image(cut, images, learned)
        return self.image_by.keep_image(cut, images, learned)

    def keep_output(self, outputs: OutputTokens, learned: Any) -> Tensor:
        """(T,) bool: the decision of `output_by`."""
        if self.output_by is None:
            return super().keep_output(outputs, learned)
        return self.output_by.keep_output(outputs, learned)

    def keep_prompt(self, prompts: PromptTokens, learned: Any) -> Tensor:
        """(T,) bool: the decision of `image_by`."""
        if self.image_by is None:
            return super().keep_prompt(prompts, learned)
        return self.image_by.keep_prompt(prompts, learned)

    def evict(self, layer: int, slots: Slots) -> Tensor | None:
        """(B, K, W) bool: the decision of `evict_by`."""
        return None if self.evict_by is None else self.evict_by.evict(layer, slots)
