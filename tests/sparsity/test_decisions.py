"""Budgets, top-k, thresholds, Gumbel decisions and the gradient clamp."""

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from dynamic_llava.sparsity import (
    budget,
    clip_mask_gradient,
    fold_key,
    gumbel_keep,
    gumbel_noise,
    keep_margin,
    threshold_keep,
    top_k_keep,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def test_budget_is_the_exact_decimal_floor():
    assert budget(0.29, 100) == 29 and int(0.29 * 100) == 28
    assert budget(0.2, 576) == 115
    assert budget(0.8, 576) == 460
    assert [budget(rate / 100, 100) for rate in range(1, 101)] == list(range(1, 101))


@given(st.integers(1, 1000), st.integers(1, 3000))
def test_budget_equals_rational_arithmetic(thousandths, n):
    assert budget(thousandths / 1000, n) == max(1, math.floor(Fraction(thousandths, 1000) * n))


def test_budget_has_a_floor_and_a_ceiling():
    assert budget(0.01, 16) == 1 and budget(1, 16) == 16 and budget(0.5, 0) == 0
    assert budget(0.01, 16, minimum=0) == 0 and budget(0, 16, minimum=0) == 0
    assert budget(1e-9, 4) == 1


@pytest.mark.parametrize("rate", [0, -0.1, 1.01, "0.2", True, float("nan")], ids=str)
def test_budget_refuses_what_is_no_keep_rate(rate):
    with pytest.raises(ValueError, match="keep rate"):
        budget(rate, 10)


def test_budget_refuses_a_negative_count():
    with pytest.raises(ValueError, match="number of tokens"):
        budget(0.5, -1)


def keep_by_sorting(scores, k, valid):
    """The definition: highest score first, then lowest index."""
    places = [i for i in range(len(scores)) if valid[i]]
    chosen = sorted(places, key=lambda i: (-scores[i], i))[:k]
    return [i in chosen for i in range(len(scores))]


@given(st.data())
def test_top_k_equals_its_definition_with_ties_padding_and_per_row_counts(data):
    rows, tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    levels = st.sampled_from([-math.inf, -1.5, 0.0, 0.25, 3.0])
    scores = data.draw(st.lists(st.lists(levels, min_size=tokens, max_size=tokens), min_size=rows, max_size=rows))
    flags = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    valid = data.draw(st.lists(flags, min_size=rows, max_size=rows))
    counts = data.draw(st.lists(st.integers(0, tokens + 2), min_size=rows, max_size=rows))
    keep = top_k_keep(torch.tensor(scores), torch.tensor(counts), torch.tensor(valid))
    assert keep.tolist() == [keep_by_sorting(*row) for row in zip(scores, counts, valid, strict=True)]
    everything = [[True] * tokens] * rows
    keep = top_k_keep(torch.tensor(scores), counts[0])
    expected = [keep_by_sorting(row, counts[0], all_) for row, all_ in zip(scores, everything, strict=True)]
    assert keep.tolist() == expected


def test_top_k_by_rate_budgets_each_row_by_its_valid_tokens():
    scores = torch.rand(3, 100)
    valid = torch.arange(100) < torch.tensor([100, 10, 3])[:, None]
    assert top_k_keep(scores, rate=0.29).sum(-1).tolist() == [29, 29, 29]
    assert top_k_keep(scores, valid=valid, rate=0.29).sum(-1).tolist() == [29, 2, 1]


@pytest.mark.parametrize("arguments", [{}, {"k": 3, "rate": 0.5}, {"k": 0.5}, {"k": True}, {"k": -1}], ids=str)
def test_top_k_refuses_an_unclear_budget(arguments):
    with pytest.raises(ValueError, match=r"exactly one|count of tokens"):
        top_k_keep(torch.rand(1, 4), **arguments)


def test_threshold_is_strict():
    margin = torch.tensor([-1.0, 0.0, 1e-6, 2.0])
    assert threshold_keep(margin).tolist() == [False, False, True, True]
    assert threshold_keep(margin, 1.0).tolist() == [False, False, False, True]


def test_gumbel_decisions_are_exactly_zero_or_one_with_the_soft_gradient():
    logits = (torch.randn(6, 40, 2) * 5).requires_grad_()
    gumbel = gumbel_noise(fold_key(0, torch.arange(6)), torch.arange(40))
    upstream = torch.randn(6, 40)
    keep = gumbel_keep(logits, gumbel, 0.3)
    assert keep.dtype == torch.float32 and set(keep.unique().tolist()) == {0.0, 1.0}
    (straight,) = torch.autograd.grad((keep * upstream).sum(), logits)
    soft = torch.softmax((torch.log_softmax(logits, -1) + gumbel) / 0.3, -1)[..., 1]
    (expected,) = torch.autograd.grad((soft * upstream).sum(), logits)
    torch.testing.assert_close(straight, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(keep == 1, keep_margin(logits + gumbel) > 0)


def test_gumbel_decisions_follow_the_keep_probability_at_every_temperature():
    keys = fold_key(1, torch.arange(100))
    for margin in (-2.0, 0.0, 1.0):
        logits = torch.tensor([0.0, margin]).expand(100, 500, 2)
        for tau in (1.0, 0.1):
            rate = gumbel_keep(logits, gumbel_noise(keys, torch.arange(500)), tau).mean()
            assert rate == pytest.approx(1 / (1 + math.exp(-margin)), abs=0.01)


def test_gumbel_decisions_in_half_precision_are_float32_and_in_double_double():
    gumbel = torch.zeros(3, 2)
    assert gumbel_keep(torch.randn(3, 2, dtype=torch.bfloat16), gumbel, 1.0).dtype == torch.float32
    assert gumbel_keep(torch.randn(3, 2, dtype=torch.float64), gumbel, 1.0).dtype == torch.float64


@pytest.mark.parametrize("case", ["tau1.0", "tau0.3"])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_golden_decisions(case, kind):
    recorded = load_file(GOLDEN / "training.safetensors")
    logits = recorded[f"{case}.{kind}_logits"].flip(-1).requires_grad_()
    uniform = recorded[f"{case}.u_{kind}"].flip(-1)
    tau = float(case.removeprefix("tau"))
    keep = gumbel_keep(logits, -torch.log(-torch.log(uniform)), tau)
    if kind == "image":
        assert torch.equal(keep, recorded[f"{case}.image_hard"])
    else:
        # The third answer is shorter than the minimum: its decisions are replaced by 1 outside this function.
        for row, length in ((0, 10), (1, 6)):
            assert torch.equal(keep[row, :length], recorded[f"{case}.text_hard.{row}"])
        assert recorded[f"{case}.text_hard.2"].tolist() == [1.0] * 3
    soft = recorded[f"{case}.{kind}_soft"][..., 0]
    (gradient,) = torch.autograd.grad(keep.sum(), logits)
    torch.testing.assert_close(gradient[..., 1], soft * (1 - soft) / tau, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(gradient[..., 0], -gradient[..., 1], rtol=1e-4, atol=2e-6)


def test_gumbel_refuses_unfit_shapes_and_temperatures():
    with pytest.raises(ValueError, match="equal shapes"):
        gumbel_keep(torch.randn(3, 2), torch.randn(2, 2), 1.0)
    with pytest.raises(ValueError, match="equal shapes"):
        gumbel_keep(torch.randn(3, 3), torch.randn(3, 3), 1.0)
    for tau in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be positive"):
            gumbel_keep(torch.randn(3, 2), torch.randn(3, 2), tau)


def test_gradient_clamp_changes_gradients_only():
    mask = torch.tensor([0.0, 1.0, 1.0, 0.0], requires_grad=True)
    factor = torch.tensor([5.0, -0.5, -30.0, math.inf])
    clipped = clip_mask_gradient(mask, 2.0)
    assert torch.equal(clipped, mask)
    (gradient,) = torch.autograd.grad(clipped, mask, factor)
    assert gradient.tolist() == [2.0, -0.5, -2.0, 2.0]
    regulariser = (mask * factor[:1]).sum() + (clip_mask_gradient(mask, 2.0) * 10).sum()
    (gradient,) = torch.autograd.grad(regulariser, mask)
    assert gradient.tolist() == [7.0] * 4


def test_gradient_clamp_can_be_off():
    mask = torch.ones(3, requires_grad=True)
    assert clip_mask_gradient(mask, None) is mask
    for limit in (0.0, -1.0):
        with pytest.raises(ValueError, match="None to leave"):
            clip_mask_gradient(mask, limit)
