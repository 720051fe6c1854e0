"""The grounding auxiliary: two heads of one layer are asked to look at the patches of the object that is named next.

Crutch, disclosed: no real LLaVA has such a loss. Its weight falls linearly to zero well before the end of the training.
The weights are recomputed from q and k of that one layer, so that every layer keeps its fast attention.

Legend: B rows, N tokens, H grounded heads, E head size, R referring tokens.
"""

import math
from typing import Any

import torch
from torch import nn

from dynamic_llava.tiny.base.sequences import SequenceBatch
from dynamic_llava.tiny.world.scenes import TOKENS_PER_IMAGE

_FLOOR = 1e-4


class AttentionTap:
    """While entered, remembers the inputs of one Llama attention module during the last forward pass."""

    def __init__(self, attention: nn.Module, heads: int) -> None:
        """Taps the first `heads` heads of `attention` (a LlamaAttention)."""
        self._attention, self._heads = attention, heads
        self._inputs: dict[str, Any] = {}
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def __enter__(self) -> "AttentionTap":
        """Starts to remember."""

        def remember(_: nn.Module, __: tuple, kwargs: dict[str, Any]) -> None:
            self._inputs = {"hidden": kwargs["hidden_states"], "rotation": kwargs["position_embeddings"]}

        self._handle = self._attention.register_forward_pre_hook(remember, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        """Removes the hook and forgets the inputs."""
        if self._handle is not None:
            self._handle.remove()
        self._inputs = {}

    def weights(self, visible: torch.Tensor) -> torch.Tensor:
        """Softmax attention of the first heads, (B, H, N, N); `visible` is (B, 1, N, N) bool."""
        hidden, (cos, sin) = self._inputs["hidden"], self._inputs["rotation"]
        size = self._attention.head_dim
        query, key = (
            _rotate(nn.functional.linear(hidden, projection.weight[: self._heads * size]), cos, sin, size)
            for projection in (self._attention.q_proj, self._attention.k_proj)
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(size)
        return scores.masked_fill(~visible, -math.inf).softmax(-1)


def grounding_loss(weights_BHNN: torch.Tensor, batch: SequenceBatch, image_start: int) -> torch.Tensor:
    """Mean of -log(attention mass on the patches of what the next token names), over referring tokens and heads."""
    image = weights_BHNN[..., image_start : image_start + TOKENS_PER_IMAGE]
    looked_RHP = image[batch.refer_row, :, batch.refer_at]
    mass_RH = (looked_RHP * batch.refer_patches[:, None]).sum(-1)
    return -(mass_RH + _FLOOR).log().mean()


def _rotate(x_BND: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, size: int) -> torch.Tensor:
    """Splits into heads and applies the rotary position: (B, H, N, E)."""
    x = x_BND.unflatten(-1, (-1, size)).transpose(1, 2)
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
