"""Implementations of MaskedSoftmax attention that save no N x N tensor, and the numerics all implementations share."""

import torch
from torch import Tensor

EXPONENT_CAP = 64.0
"""Bound on (score - row maximum over kept keys) of a dropped key. exp(64) = 6.2e27, so the sum over heads and queries
that forms a mask gradient stays below float32's 3.4e38 while the summed |dP - D| is below 5e10."""


def compute_dtype(query: Tensor) -> torch.dtype:
    """Return the dtype to compute and accumulate in: float64 for float64, float32 for everything else."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def broken_tokens(query_BKGNd: Tensor, key_BKNd: Tensor, value_BKNd: Tensor, keep_BN: Tensor) -> Tensor:
    """(B, K, N) bool: tokens that no other token sees, dropped ones and padding, and that are not finite in a key head.

    keep_BN is the keep mask with 0 at padding, and not 0 at what has a band. Whoever multiplies such a token's weight,
    which is 0, by its values has to leave it out: 0 * nan is nan.
    """
    finite = query_BKGNd.isfinite().all(-1).all(2) & key_BKNd.isfinite().all(-1) & value_BKNd.isfinite().all(-1)
    return ~finite & (keep_BN == 0)[:, None]
