"""Muon for matrices, AdamW for the rest, behind one small interface.

Muon is what makes the tower learn shapes at this size: with AdamW alone their accuracy stays between .3 and .6.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class MuonAdamW:
    """torch.optim.Muon on `matrices` (2-D only), torch.optim.AdamW on `others`; one gradient clip over both."""

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        *,
        muon_lr: float,
        adam_lr: float,
        weight_decay: float = 0.02,
        clip: float = 1.0,
    ) -> None:
        """Raises ValueError where `matrices` holds a tensor that is not 2-D."""
        self._matrices, self._others, self._clip = list(matrices), list(others), clip
        bad = [tuple(p.shape) for p in self._matrices if p.dim() != 2]
        if bad:
            raise ValueError(f"Muon takes matrices only, got shapes {bad}; pass these parameters in `others`")
        self._rates = (muon_lr, adam_lr)
        self._optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(self._matrices, lr=muon_lr, weight_decay=weight_decay),
            torch.optim.AdamW(self._others, lr=adam_lr, weight_decay=weight_decay, betas=(0.9, 0.98)),
        )

    def step(self, loss: torch.Tensor, rate_factor: float) -> None:
        """Backward, clip and one update with both learning rates times `rate_factor`."""
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_factor
        loss.backward()
        nn.utils.clip_grad_norm_(self._matrices + self._others, self._clip)
        for optimizer in self._optimizers:
            optimizer.step()

    def state_dict(self) -> list[dict[str, Any]]:
        """States of Muon and AdamW, in this order."""
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restores what `state_dict` returned."""
        for optimizer, state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def cosine_factor(step: int, total: int, warmup: int, floor: float = 0.03) -> float:
    """Linear warm-up times a half cosine from 1 to `floor`."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / total))
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * cosine)


def trapezoid_factor(step: int, total: int, warmup: int, decay: int, floor: float = 0.02) -> float:
    """Linear warm-up, a constant stretch, and a linear descent to `floor` over the last `decay` steps."""
    left = (total - step) / max(1, decay)
    return min(1.0, (step + 1) / warmup) * max(floor, min(1.0, left))
