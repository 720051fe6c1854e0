"""The keep-rate regulariser (Eq. 10). Shape suffixes: B samples, N tokens."""

from typing import Literal

import torch
from torch import Tensor


def keep_rate_loss(
    keep_mask_BN: Tensor,
    where_BN: Tensor,
    target: float,
    applies_B: Tensor | None = None,
    *,
    reduction: Literal["batch", "applicable"] = "batch",
    distance: Literal["squared", "absolute"] = "squared",
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Penalise the distance between each sample's realised keep rate and the target; returns a scalar.

    keep_mask_BN (B, N) float with the straight-through gradient; where_BN (B, N) bool: the tokens that are counted (a
    sample's image tokens, or its output tokens); applies_B (B,) bool: samples that the term applies to, None for all.
    A sample without counted tokens contributes 0. `batch` divides the sum by B (published results), `applicable` by the
    samples that contribute. `denominator` replaces either by a count over the global batch (ranks and accumulation).
    The paper writes a norm of a scalar; the published results used the square (`squared`).
    """
    if where_BN.shape != keep_mask_BN.shape or keep_mask_BN.dim() != 2:
        raise ValueError(
            f"keep_mask {tuple(keep_mask_BN.shape)} and where {tuple(where_BN.shape)} do not fit; give two (B, N)"
        )
    if reduction not in ("batch", "applicable"):
        raise ValueError(f"reduction={reduction!r} is not known; choose 'batch' or 'applicable'")
    if distance not in ("squared", "absolute"):
        raise ValueError(f"distance={distance!r} is not known; choose 'squared' or 'absolute'")
    mask = keep_mask_BN if keep_mask_BN.dtype == torch.float64 else keep_mask_BN.float()
    count_B = where_BN.sum(dim=-1)
    contributes_B = count_B > 0
    if applies_B is not None:
        contributes_B = contributes_B & applies_B
    rate_B = (mask * where_BN).sum(dim=-1) / count_B.clamp(min=1)
    gap_B = rate_B - target
    term_B = gap_B.square() if distance == "squared" else gap_B.abs()
    total = torch.where(contributes_B, term_B, 0.0).sum()
    if denominator is not None:
        return total / denominator
    if reduction == "batch":
        return total / keep_mask_BN.shape[0]
    return total / contributes_B.sum().clamp(min=1)
