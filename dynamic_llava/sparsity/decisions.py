"""From predictor logits to keep masks: Gumbel-Softmax in training, top-k or threshold at inference (Sec. 3.2, 3.3).

Shape suffixes: I images, n image tokens, T output tokens of a batch, A answers. A keep mask is 1 (True) where
the token is kept.
"""

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from dynamic_llava.config import check_keep_rate
from dynamic_llava.sparsity.predictors import KEEP


def budget(rate: float, n: int, minimum: int = 1) -> int:
    """Return how many of `n` tokens a keep rate leaves: floor(rate * n), exact in decimals, at least `minimum`.

    The rate counts as written: 0.29 of 100 is 29, although the binary value of 0.29 is smaller. Never more than n.
    Raises ValueError unless 0 < rate <= 1 (0 is allowed with minimum=0) and n >= 0.
    """
    if not (minimum == 0 and rate == 0):
        check_keep_rate("rate", rate)
    if n < 0:
        raise ValueError(f"n={n} is not a number of tokens; give 0 or more")
    return min(n, max(minimum, int(Decimal(str(rate)) * n)))


def budgets(rate: float, counts: Tensor) -> Tensor:
    """(I,) int64: what a keep rate leaves of each of (I,) int64 `counts`, which are read on the host."""
    return torch.tensor([budget(rate, n) for n in counts.tolist()], dtype=torch.int64, device=counts.device)


def top_k_keep(
    score_In: Tensor, k: int | Tensor | None = None, valid: Tensor | None = None, *, rate: float | None = None
) -> Tensor:
    """Keep the tokens with the highest score in each row (Eq. 11); equal scores go to the lower index.

    score_In (I, n) float, usually `keep_margin`; exactly one of k (an int, or (I,) integers: one count per row) and
    rate (the budget is `budget(rate, valid tokens of the row)`); valid (I, n) bool: only these can be kept.
    Returns (I, n) bool. No host read.
    """
    if (k is None) == (rate is None):
        raise ValueError(
            f"k={k} and rate={rate} were given; give exactly one: k counts tokens, rate is a share of them"
        )
    tokens = score_In.shape[-1]
    if rate is not None:
        k = _budget_per_row(rate, tokens, score_In, valid)
    elif not isinstance(k, Tensor) and (isinstance(k, bool) or not isinstance(k, int) or k < 0):
        raise ValueError(f"k={k!r} is not a count of tokens; give an int of 0 or more, or rate= for a share")
    limit = k[..., None] if isinstance(k, Tensor) and k.dim() else k
    order = torch.sort(score_In, dim=-1, descending=True, stable=True).indices
    if valid is not None:
        valid_first = torch.sort((~valid).gather(-1, order).to(torch.uint8), dim=-1, stable=True).indices
        order = order.gather(-1, valid_first)
    within = (torch.arange(tokens, device=score_In.device) < limit).expand_as(order)
    keep_In = torch.zeros_like(score_In, dtype=torch.bool).scatter(-1, order, within)
    return keep_In if valid is None else keep_In & valid


def threshold_keep(margin: Tensor, threshold: float = 0.0) -> Tensor:
    """Keep where keep logit - drop logit exceeds the threshold (Eq. 5 at 0). margin (...) float -> (...) bool."""
    return margin > threshold


def evenly_spaced(place: Tensor, rate: float) -> Tensor:
    """Bool of the shape of `place` (int64): True where one more token fits under `rate`, taken to four digits.

    Of the first k places floor(rate * k) are True.
    """
    share = Fraction(str(rate)).limit_denominator(10_000)  # keeps the products far from overflow
    up, down = share.numerator, share.denominator
    return (place + 1) * up // down > place * up // down


def top_k_by_answer(margin_T: Tensor, rank_T: Tensor, rate: float) -> Tensor:
    """Keep the floor(rate * n) highest margins of each answer of n tokens; ties go to the earlier token.

    margin_T (T,) float and rank_T (T,) int64, the index of each token in its row's output: whole answers, one behind
    another, each from its first token on. Returns (T,) bool. ValueError where these are no whole answers.
    """
    starts_T = rank_T == 0
    if not bool(starts_T[0]) or bool(starts_T.all()):
        raise ValueError("top-k ranks over whole answers; while decoding, select by threshold instead")
    answer_T = starts_T.cumsum(0) - 1
    by_margin_T = margin_T.argsort(descending=True, stable=True)
    order_T = by_margin_T[answer_T[by_margin_T].argsort(stable=True)]  # by answer, within it by margin
    first_A = starts_T.nonzero().flatten()
    place_T = torch.empty_like(order_T)
    place_T[order_T] = torch.arange(order_T.shape[0], device=order_T.device)
    count_A = (answer_T.bincount() * rate).floor()
    return place_T - first_A[answer_T] < count_A[answer_T]


def gumbel_keep(logits: Tensor, gumbel: Tensor, tau: float) -> Tensor:
    """Draw hard decisions with a straight-through gradient (Gumbel-Softmax, Sec. 3.3.3).

    logits (..., 2) and gumbel (..., 2): drop and keep channel. Returns (...) float32 (float64 for float64 logits),
    exactly 0 or 1; its gradient is that of the soft keep probability softmax((log_softmax(logits) + gumbel) / tau)[1].
    """
    if logits.shape[-1] != 2 or gumbel.shape != logits.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and gumbel {tuple(gumbel.shape)} do not fit; give two equal shapes (..., 2)"
        )
    if not tau > 0:
        raise ValueError(f"tau={tau} must be positive; the schedule runs from 1.0 to 0.1")
    if logits.dtype != torch.float64:
        logits = logits.float()
    noisy = (torch.log_softmax(logits, dim=-1) + gumbel.to(logits.dtype)) / tau
    soft = torch.softmax(noisy, dim=-1)[..., KEEP]
    hard = (noisy.detach().argmax(dim=-1) == KEEP).to(soft.dtype)
    # soft - soft.detach() is exactly 0, so the value stays 0 or 1; hard - soft + soft would round.
    return hard + (soft - soft.detach())


def clip_mask_gradient(keep_mask: Tensor, limit: float | None) -> Tensor:
    """Return the keep mask unchanged, its incoming gradient clamped elementwise to [-limit, limit] on the way back.

    Put it between the decisions and the attention, not before the keep-rate regulariser. None switches it off.
    """
    if limit is None:
        return keep_mask
    if not limit > 0:
        raise ValueError(f"limit={limit} must be positive; use None to leave the gradient as it is")
    return cast(Callable[..., Tensor], _ClampGradient.apply)(keep_mask, limit)


def entering_mask(keep_mask: Tensor, limit: float | None, loss_scale: float = 1.0) -> Tensor:
    """Return the keep mask as it enters the attention of a training pass, float32 of the same shape.

    After a backward pass its `grad` is the gradient of the attention alone, times `loss_scale`, by which the loss was
    multiplied; what flows back to `keep_mask` is clamped to [-limit, limit], counted without that factor.
    """
    clipped = clip_mask_gradient(keep_mask.float(), None if limit is None else limit * loss_scale)
    entering = clipped.view_as(clipped)
    if entering.requires_grad:
        entering.retain_grad()
    return entering


class _ClampGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keep_mask: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return keep_mask.view_as(keep_mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].clamp(-ctx.limit, ctx.limit), None


def _budget_per_row(rate: float, tokens: int, score_In: Tensor, valid: Tensor | None) -> int | Tensor:
    if valid is None:
        return budget(rate, tokens)
    return torch.tensor(_budgets(rate, tokens), device=score_In.device)[valid.sum(dim=-1)]


@cache
def _budgets(rate: float, tokens: int) -> list[int]:
    """The budget of every count up to `tokens`: the exact decimal floor without reading counts on the host."""
    return [budget(rate, n) for n in range(tokens + 1)]
