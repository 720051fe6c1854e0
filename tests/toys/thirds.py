"""A toy of the kind decode bit: every third output token is dropped; image tokens all stay."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dynamic_llava.methods import OneCut, OutputTokens


@dataclass(frozen=True)
class Thirds(OneCut):
    """Drop the output tokens number 2, 5, 8, ... of a row."""

    name: ClassVar[str] = "thirds"
    training_free: ClassVar[bool] = True

    def keep_output(self, outputs: OutputTokens, learned: Any) -> Tensor:
        """(T,) bool from the token's rank."""
        return outputs.rank % 3 != 2
