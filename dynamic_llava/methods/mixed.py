"""Image tokens by one method, output tokens by another: what each of two decisions is worth beside the same other one.

{name: mixed, image_by: dynamic, output_by: {name: random, image_keep_rate: null, output_keep_rate: 0.5}}
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from dynamic_llava.methods.base import BudgetKind, Choice, Cut, ImageTokens, Method, OneCut, OutputTokens


@dataclass(frozen=True)
class Mixed(Method):
    """Each kind of token is decided on by a method of its own, at the same layer, with the weights of the checkpoint.

    What `image_by` would do with output tokens, and `output_by` with image tokens, is not asked.
    """

    name: ClassVar[str] = "mixed"

    image_by: OneCut | None = None
    """Decides on image tokens; None keeps all."""
    output_by: OneCut | None = None
    """Decides on output tokens; None keeps all."""

    def __post_init__(self) -> None:
        layers = {one.layer for one in self._deciding}
        if len(layers) > 1:
            raise ValueError(
                f"image_by decides at layer {self.image_by.layer} and output_by at layer {self.output_by.layer}; "  # type: ignore[union-attr]
                "give both the same `layer`"
            )

        if evicting := [one.name for one in self._deciding if one.evicts]:
            raise ValueError(
                f"{' and '.join(map(repr, evicting))} evicts stored tokens, which would not be asked here; use such a "
                "method alone"
            )

    @property
    def _deciding(self) -> tuple[OneCut, ...]:
        return tuple(one for one in (self.image_by, self.output_by) if one is not None)

    @property
    def is_dense(self) -> bool:
        """True where neither method drops anything."""
        return all(one.is_dense for one in self._deciding)

    @property
    def training_free(self) -> bool:  # type: ignore[override]
        """Whether neither method learns anything."""
        return all(one.training_free for one in self._deciding)

    @property
    def used_parts(self) -> tuple[str, ...]:
        """What either method decides by."""
        return tuple(dict.fromkeys(part for one in self._deciding for part in one.used_parts))

    def knobs(self, budget: BudgetKind) -> tuple[str, ...]:
        """Those of `image_by`."""
        inner = () if self.image_by is None else self.image_by.knobs(budget)
        return tuple(f"image_by.{name}" for name in inner)

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
