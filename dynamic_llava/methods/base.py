"""What a sparsification method is: two decisions on the hidden states that enter one decoder layer.

The engine (model/decoder.py) owns padding, positions, masks, packing and the cache; a method only answers which tokens
stay. `keep_image` decides on image tokens, `keep_output` on output tokens, one token at a time or many at once.
Shape suffixes: I images, n tokens of one image, T output tokens of the batch, D hidden size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageTokens:
    """What `keep_image` sees: every image of the batch, one entry per image, independent of its row mates."""

    hidden: Tensor
    """(I, n, D): hidden states that enter the sparse layer."""
    key: Tensor
    """(I,) int64: noise key of the image's sample and place."""
    attention: Tensor | None
    """(I, n) head-mean attention, in the layer before, of the last token before the row's first answer; given if the
    method `needs_attention`."""


@dataclass(frozen=True)
class OutputTokens:
    """What `keep_output` sees: the output tokens of the batch, flattened; each is judged alone."""

    hidden: Tensor
    """(T, D): hidden states that enter the sparse layer."""
    rank: Tensor
    """(T,) int64: index of the token among its row's output tokens."""
    key: Tensor
    """(T,) int64: noise key of the token's sample."""


@dataclass(frozen=True)
class Predictors:
    """The two learned scorers, as functions from hidden states (..., D) to logits (..., 2): drop, keep."""

    image: Callable[[Tensor], Tensor]
    output: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods: a frozen bag of settings, no state. Registered under `name` in methods.METHODS."""

    name: ClassVar[str]
    needs_attention: ClassVar[bool] = False
    """Whether `keep_image` wants one row of attention, recomputed from the layer before the sparse one."""
    training_free: ClassVar[bool] = False
    """Whether nothing of the method is learned. In training mode it then decides as at inference: the model is tuned
    under its fixed rule. The class that defines the hooks declares it; inherited, it says nothing about new hooks."""

    layer: int = 2
    """The sparse layer: this one and all later ones see only kept tokens."""

    @property
    def is_dense(self) -> bool:
        """Whether nothing is ever dropped, so that the plain decoder may run."""
        return False

    @abstractmethod
    def keep_image(self, images: ImageTokens, predictors: Predictors) -> Tensor:
        """(I, n) bool, True where an image token stays."""

    @abstractmethod
    def keep_output(self, outputs: OutputTokens, predictors: Predictors) -> Tensor:
        """(T,) bool, True where an output token stays (its keys and values are admitted)."""


def check_rate_or_none(name: str, value: float | None) -> None:
    """Raise ValueError unless `value` is None (keep all) or a number in [0, 1]; 0 drops everything."""
    if value is not None and (isinstance(value, bool) or not 0 <= value <= 1):
        raise ValueError(f"{name}={value!r} is not a keep rate; give a number in [0, 1], or None to keep every token")


def keep_all_image(images: ImageTokens) -> Tensor:
    """(I, n) bool, all True."""
    return torch.ones(images.hidden.shape[:2], dtype=torch.bool, device=images.hidden.device)


def keep_all_output(outputs: OutputTokens) -> Tensor:
    """(T,) bool, all True."""
    return torch.ones_like(outputs.rank, dtype=torch.bool)
