"""Implementations of MaskedSoftmax attention that save no N x N tensor, and the numerics all implementations share."""

import torch
from torch import Tensor

EXPONENT_CAP = 64.0
"""Bound on (score - row maximum over kept keys) of a dropped key. exp(64) = 6.2e27, so the sum over heads and queries
that forms a mask gradient stays below float32's 3.4e38 while the summed |dP - D| is below 5e10."""


def compute_dtype(query: Tensor) -> torch.dtype:
    """Return the dtype to compute and accumulate in: float64 for float64, float32 for everything else."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32
