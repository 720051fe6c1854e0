"""How decisions are learned: relaxations, their temperature, the keep-rate regulariser (Eq. 10) and what it aims at.

A relaxation takes 0/1 decisions that have a gradient; there are three, with one signature.
Each decides on J sets of N tokens; the tokens of a set (those of one image, or of one answer) may compete, sets never
see each other. The value is hard, the gradient that of something soft (straight-through):

    gumbel_st    the paper's: a sample of Gumbel-Softmax, each token alone (Sec. 3.3.3)
    sigmoid_st   no noise: the sign of the margin, with the gradient of sigmoid(margin / tau)
    soft_topk    no noise: exactly the budget of the keep rate, with the gradient of a soft top-k

Arguments and result: logits_JN2 (J, N, 2) float, drop and keep; gumbel_JN2 (J, N, 2), the tokens' Gumbel noise, which
only `gumbel_st` reads; tau, the temperature; keep_rate in (0, 1], which only `soft_topk` reads; valid_JN (J, N) bool,
True at tokens of the set, False at filler, whose result means nothing. Returns (J, N) float32 (float64 for float64
logits), exactly 0 or 1. All raise ValueError for unfit shapes and for a temperature that is not positive.
Shape suffixes: J sets, B rows, N tokens of a set or a row.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from dynamic_llava.sparsity.decisions import gumbel_keep, threshold_keep, top_k_keep
from dynamic_llava.sparsity.predictors import keep_margin

Relaxation = Callable[[Tensor, Tensor, float, float, Tensor], Tensor]

_BISECTIONS = 50
"""Halvings of a threshold's bracket, which is as wide as the margins of a set lie apart, in units of tau."""


def gumbel_st(logits_JN2: Tensor, gumbel_JN2: Tensor, tau: float, keep_rate: float, valid_JN: Tensor) -> Tensor:
    """Sample by Gumbel-Softmax, Eq. 8 and 9 (`gumbel_keep`); the keep rate is held by the regulariser alone."""
    _check(logits_JN2, gumbel_JN2, tau, valid_JN)
    return gumbel_keep(logits_JN2, gumbel_JN2, tau)


def sigmoid_st(logits_JN2: Tensor, gumbel_JN2: Tensor, tau: float, keep_rate: float, valid_JN: Tensor) -> Tensor:
    """Keep where the margin is positive (Eq. 5); the gradient is that of s = sigmoid(margin / tau).

    With m = keep logit - drop logit: d/dm = s (1 - s) / tau. This is `gumbel_st` at noise 0: training decides as Eq. 5
    does at inference, but never tries the other decision, so tokens far from the border, in units of tau, stay as they
    are. The keep rate is held by the regulariser alone.
    """
    _check(logits_JN2, gumbel_JN2, tau, valid_JN)
    margin_JN = keep_margin(logits_JN2)
    soft_JN = torch.sigmoid(margin_JN / tau)
    return threshold_keep(margin_JN.detach()).to(soft_JN.dtype) + (soft_JN - soft_JN.detach())


def soft_topk(logits_JN2: Tensor, gumbel_JN2: Tensor, tau: float, keep_rate: float, valid_JN: Tensor) -> Tensor:
    """Keep the k = budget(keep_rate, tokens of the set) highest margins (Eq. 11); the gradient is that of a soft top-k.

    Memberships p_j = sigmoid((m_j - t) / tau) sum to k, which defines the threshold t and, by the implicit function
    theorem, its gradient: with slopes w_j = p_j (1 - p_j) / tau,  dp_j = w_j (dm_j - sum_i w_i dm_i / sum_i w_i).
    A set that is kept whole has no gradient. The sum of dp_j is 0: only the choice is learned, never the number, so the
    keep-rate regulariser (Eq. 10) has no gradient here, and its value is the budget's rounding.

    Images: value, ties and budget are those of inference. Answers: a budget needs the whole answer, which decoding does
    not have. Training keeps the share r_OT of each answer; inference keeps margins above a threshold (Eq. 5), which
    nothing here ties to t: keep rates of output tokens at inference may be anything, and have to be measured.
    """
    _check(logits_JN2, gumbel_JN2, tau, valid_JN)
    margin_JN = keep_margin(logits_JN2)
    hard_JN = top_k_keep(margin_JN.detach(), rate=keep_rate, valid=valid_JN)
    slope_JN = _membership_slopes(margin_JN.detach(), hard_JN.sum(dim=-1), valid_JN, tau)
    smallest = torch.finfo(slope_JN.dtype).tiny
    share_JN = slope_JN / slope_JN.sum(dim=-1, keepdim=True).clamp(min=smallest)
    # Linear in the margins, with exactly the memberships' gradient; its value is taken away again.
    soft_JN = slope_JN * (margin_JN - (share_JN * margin_JN).sum(dim=-1, keepdim=True))
    return hard_JN.to(soft_JN.dtype) + (soft_JN - soft_JN.detach())


RELAXATIONS: dict[str, Relaxation] = {"gumbel_st": gumbel_st, "sigmoid_st": sigmoid_st, "soft_topk": soft_topk}
"""By the name that `SparsityConfig.relaxation` has."""


@torch.no_grad()
def _membership_slopes(margin_JN: Tensor, kept_J: Tensor, valid_JN: Tensor, tau: float) -> Tensor:
    """Return w_j = p_j (1 - p_j) / tau (J, N) at the threshold where each set's memberships sum to kept_J.

    0 at filler and in sets that are kept whole or are empty. The threshold is found by bisection in float64: were all
    margins equal, it would lie at that margin - tau * logit(k / n), so it lies between those of the extreme margins.
    """
    score_JN = (margin_JN.double() / tau).masked_fill(~valid_JN, -torch.inf)
    count_J = valid_JN.sum(dim=-1)
    undecided_J = (kept_J > 0) & (kept_J < count_J)
    offset_J = torch.logit(torch.where(undecided_J, kept_J.double() / count_J, 0.5))
    low_J = score_JN.masked_fill(~valid_JN, torch.inf).amin(dim=-1) - offset_J
    high_J = score_JN.amax(dim=-1) - offset_J
    for _ in range(_BISECTIONS):
        middle_J = (low_J + high_J) / 2
        too_many_J = torch.sigmoid(score_JN - middle_J[:, None]).sum(dim=-1) > kept_J
        low_J, high_J = torch.where(too_many_J, middle_J, low_J), torch.where(too_many_J, high_J, middle_J)
    distance_JN = score_JN - ((low_J + high_J) / 2)[:, None]
    slope_JN = torch.sigmoid(distance_JN) * torch.sigmoid(-distance_JN) / tau
    return torch.where(undecided_J[:, None] & valid_JN, slope_JN, 0.0).to(margin_JN.dtype)


def _check(logits_JN2: Tensor, gumbel_JN2: Tensor, tau: float, valid_JN: Tensor) -> None:
    if logits_JN2.dim() != 3 or logits_JN2.shape[-1] != 2 or gumbel_JN2.shape != logits_JN2.shape:
        raise ValueError(
            f"logits {tuple(logits_JN2.shape)} and gumbel {tuple(gumbel_JN2.shape)} do not fit; give two equal shapes "
            "(sets, tokens, 2)"
        )
    if valid_JN.shape != logits_JN2.shape[:2] or valid_JN.dtype != torch.bool:
        raise ValueError(
            f"valid is {valid_JN.dtype} of shape {tuple(valid_JN.shape)}; give bool of shape "
            f"{tuple(logits_JN2.shape[:2])}, the sets and tokens of logits"
        )
    if not tau > 0:
        raise ValueError(f"tau={tau} must be positive; the schedule runs from 1.0 to 0.1")


def temperature(step: int, total: int, start: float = 1.0, end: float = 0.1) -> float:
    """Return tau at `step` of `total` optimizer steps: exponential decay start * (end / start) ** (step / total).

    Raises ValueError unless total >= 1, 0 <= step <= total, and start and end are positive.
    """
    if total < 1 or not 0 <= step <= total:
        raise ValueError(f"step={step} of total={total} does not exist; give 0 <= step <= total and total >= 1")
    if start <= 0 or end <= 0:
        raise ValueError(f"start={start} and end={end} must be positive temperatures; the paper runs from 1.0 to 0.1")
    return float(start * (end / start) ** (step / total))


def scheduled_keep_rate(
    step: int, total: int, target: float, share: float = 0.5, shape: Literal["linear", "cosine"] = "linear"
) -> float:
    """Return the keep rate that training aims at in `step` of `total`: from 1 to `target` over a share of the steps.

    With x = step / (share * total), at most 1: target + (1 - target) * (1 - x), or, as a cosine,
    target + (1 - target) * (1 + cos(pi * x)) / 2. From x = 1 on it is exactly the target. Raises ValueError for a step
    that does not exist, and for a share outside (0, 1].
    """
    if total < 1 or not 0 <= step <= total:
        raise ValueError(f"step={step} of total={total} does not exist; give 0 <= step <= total and total >= 1")
    if not 0 < share <= 1:
        raise ValueError(f"share={share} is no share of the steps; give a number in (0, 1]")
    done = step / (share * total)
    if done >= 1:
        return target
    left = 1 - done if shape == "linear" else (1 + math.cos(math.pi * done)) / 2
    return target + (1 - target) * left


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
