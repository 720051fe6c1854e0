"""LLaVA-1.5 as it is: every token stays."""

from dataclasses import dataclass
from typing import ClassVar

from dynamic_llava.methods.base import OneCut


@dataclass(frozen=True)
class Dense(OneCut):
    """Keep everything; the decoder then runs exactly as transformers' own. `layer` is where a given keep mask acts."""

    name: ClassVar[str] = "dense"
    training_free: ClassVar[bool] = True

    @property
    def is_dense(self) -> bool:
        """Always True."""
        return True
