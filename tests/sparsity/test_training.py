"""What decisions are learned by: relaxations, each against its formula in float64; temperature; keep-rate loss."""

import json
import math
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from dynamic_llava.config import SparsityConfig
from dynamic_llava.sparsity import (
    RELAXATIONS,
    budget,
    fold_key,
    gumbel_keep,
    gumbel_noise,
    keep_rate_loss,
    temperature,
    top_k_keep,
)
from dynamic_llava.sparsity.training import gumbel_st, sigmoid_st, soft_topk

every_relaxation = pytest.mark.parametrize("relax", RELAXATIONS.values(), ids=RELAXATIONS)
RATE = 0.3
GOLDEN = Path(__file__).parents[1] / "golden"


def sets_of(lengths, tokens=None, seed=0, dtype=torch.float32, spread=2.0):
    """Return logits, noise and valid of sets with the given numbers of tokens, filled up with other random numbers."""
    generator = torch.Generator().manual_seed(seed)
    tokens = max(lengths) if tokens is None else tokens
    logits = (torch.randn(len(lengths), tokens, 2, generator=generator, dtype=torch.float64) * spread).to(dtype)
    gumbel = gumbel_noise(fold_key(seed, torch.arange(len(lengths))), torch.arange(tokens)).to(dtype)
    return logits.requires_grad_(), gumbel, torch.arange(tokens) < torch.tensor(lengths)[:, None]


def run(relax, logits, gumbel, valid, tau=0.7, rate=RATE, upstream=None):
    """Return the keep mask and the gradient of <keep mask, upstream> over the sets' tokens."""
    keep = relax(logits, gumbel, tau, rate, valid)
    weight = torch.linspace(-1, 2, keep.numel(), dtype=keep.dtype).view_as(keep) if upstream is None else upstream
    (gradient,) = torch.autograd.grad((keep * weight)[valid].sum(), logits)
    return keep.detach(), gradient


def test_the_registry_has_the_names_of_the_setting():
    assert tuple(RELAXATIONS) == get_args(get_type_hints(SparsityConfig)["relaxation"])
    assert SparsityConfig().relaxation == "gumbel_st"


@every_relaxation
def test_values_are_hard_float32_and_repeat(relax):
    arguments = sets_of([40, 25, 3])
    keep, gradient = run(relax, *arguments)
    assert keep.dtype == torch.float32 and set(keep[arguments[2]].unique().tolist()) == {0.0, 1.0}
    again, same_gradient = run(relax, *arguments)
    assert torch.equal(keep, again) and torch.equal(gradient, same_gradient)
    assert gradient[arguments[2]].abs().max() > 0


@every_relaxation
def test_a_set_gets_what_it_gets_alone(relax):
    """Neither other sets nor filler, whatever they hold, have an influence; nor do they get a gradient."""
    lengths = [12, 5, 9, 1]
    logits, gumbel, valid = sets_of(lengths, tokens=20)
    upstream = torch.randn(4, 20)
    keep, gradient = run(relax, logits, gumbel, valid, upstream=upstream)
    for row, length in enumerate(lengths):
        cut = slice(row, row + 1), slice(0, length)
        alone = logits.detach()[cut].clone().requires_grad_()
        kept, expected = run(relax, alone, gumbel[cut], valid[cut], upstream=upstream[cut])
        assert torch.equal(keep[cut], kept)
        torch.testing.assert_close(gradient[cut], expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(gradient[~valid], torch.zeros_like(gradient[~valid]))
    first = relax(logits, gumbel, 0.7, RATE, valid)[0, :12].sum()
    (gradient,) = torch.autograd.grad(first, logits)
    assert torch.equal(gradient[1:], torch.zeros_like(gradient[1:]))


@every_relaxation
@pytest.mark.parametrize("tau", [1.0, 1e-3])
@pytest.mark.parametrize("spread", [0.0, 1.0, 1e4])
def test_gradients_stay_finite(relax, tau, spread):
    keep, gradient = run(relax, *sets_of([30, 17, 1], spread=spread), tau=tau)
    assert torch.isfinite(keep).all() and torch.isfinite(gradient).all()


@every_relaxation
def test_only_the_margin_is_learned(relax):
    """What raises the keep logit lowers the drop logit."""
    _, gradient = run(relax, *sets_of([15, 8]))
    torch.testing.assert_close(gradient[..., 0], -gradient[..., 1], rtol=1e-4, atol=1e-7)


@every_relaxation
def test_no_sets_at_all(relax):
    logits = torch.zeros(0, 16, 2, requires_grad=True)
    keep = relax(logits, torch.zeros(0, 16, 2), 1.0, RATE, torch.ones(0, 16, dtype=torch.bool))
    assert keep.shape == (0, 16) and keep.dtype == torch.float32
    keep.sum().backward()
    assert logits.grad.shape == (0, 16, 2)


@every_relaxation
def test_half_precision_becomes_float32_and_double_stays(relax):
    logits, gumbel, valid = sets_of([6, 4])
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        given_logits = logits.detach().to(dtype).requires_grad_()
        keep = relax(given_logits, gumbel, 1.0, RATE, valid)
        (gradient,) = torch.autograd.grad(keep[valid].square().sum(), given_logits)
        assert keep.dtype == expected and gradient.dtype == dtype


@every_relaxation
def test_refuses_unfit_arguments(relax):
    logits, gumbel, valid = sets_of([6, 4])
    for bad in (logits[0], logits[..., :1], logits[:, :5]):
        with pytest.raises(ValueError, match=r"\(sets, tokens, 2\)"):
            relax(bad, gumbel, 1.0, RATE, valid)
    for bad_valid in (valid[:1], valid.float(), valid[:, :3]):
        with pytest.raises(ValueError, match="sets and tokens of logits"):
            relax(logits, gumbel, 1.0, RATE, bad_valid)
    for tau in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be positive"):
            relax(logits, gumbel, tau, RATE, valid)


def slope_of_sigmoid(score):
    return [1 / (2 + math.exp(x) + math.exp(-x)) for x in score]


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_gumbel_st_is_the_papers_with_its_hand_formula(tau):
    """s = sigmoid((margin + noise of keep - noise of drop) / tau); value s > 1/2, gradient s (1 - s) / tau."""
    logits, gumbel, valid = sets_of([30, 20])
    upstream = torch.randn(2, 30)
    keep, gradient = run(gumbel_st, logits, gumbel, valid, tau=tau, upstream=upstream)
    assert torch.equal(keep, gumbel_keep(logits, gumbel, tau).detach())
    noisy = (logits.detach().double() + gumbel.double()).diff(dim=-1)[..., 0]
    assert torch.equal(keep, (noisy > 0).float())
    slope = torch.tensor(slope_of_sigmoid((noisy / tau).flatten().tolist())).view(2, 30) / tau
    torch.testing.assert_close(gradient[..., 1], (slope * upstream * valid).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_sigmoid_st_is_the_sign_with_its_hand_formula(tau):
    logits, gumbel, valid = sets_of([30, 20])
    upstream = torch.randn(2, 30)
    keep, gradient = run(sigmoid_st, logits, gumbel, valid, tau=tau, upstream=upstream)
    margin = logits.detach().double().diff(dim=-1)[..., 0]
    assert torch.equal(keep, (margin > 0).float())
    slope = torch.tensor(slope_of_sigmoid((margin / tau).flatten().tolist())).view(2, 30) / tau
    torch.testing.assert_close(gradient[..., 1], (slope * upstream * valid).float(), rtol=1e-4, atol=1e-6)


def test_sigmoid_st_is_gumbel_st_without_noise_and_reads_none():
    logits, gumbel, valid = sets_of([30, 20], dtype=torch.float64)
    keep, gradient = run(sigmoid_st, logits, gumbel, valid)
    silent, expected = run(gumbel_st, logits, torch.zeros_like(gumbel), valid)
    assert torch.equal(keep, silent)
    torch.testing.assert_close(gradient, expected)
    tie = torch.zeros(1, 1, 2)
    assert sigmoid_st(tie, tie, 1.0, RATE, torch.ones(1, 1, dtype=torch.bool)).item() == 0, "a tie is dropped (Eq. 5)"


@given(st.data())
def test_soft_topk_keeps_what_inference_keeps(data):
    """The value is the hard top-k of the margins: exact budgets of the sets' own sizes, ties to the lower index."""
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    rate = data.draw(st.sampled_from([0.05, 0.29, 0.5, 0.9, 1.0]))
    levels = st.lists(st.sampled_from([-1.0, 0.0, 0.25]), min_size=max(lengths), max_size=max(lengths))
    margins = torch.tensor(data.draw(st.lists(levels, min_size=len(lengths), max_size=len(lengths))))
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    logits = torch.stack([torch.zeros_like(margins), margins], -1).requires_grad_()
    keep = soft_topk(logits, torch.zeros_like(logits), 0.5, rate, valid)
    for row, length in enumerate(lengths):
        expected = top_k_keep(margins[row : row + 1, :length], budget(rate, length))
        assert torch.equal(keep[row : row + 1, :length].bool(), expected)
    assert torch.equal(keep * ~valid, torch.zeros_like(keep))


def memberships(margins, kept, tau):
    """The definition: sigmoid((m - t) / tau) with the t that makes them sum to `kept`; plain floats."""
    low, high = min(margins) - 60 * tau, max(margins) + 60 * tau

    def at(threshold):
        return [1 / (1 + math.exp(min((threshold - margin) / tau, 700.0))) for margin in margins]

    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) > kept else (low, middle)
    return at((low + high) / 2)


@pytest.mark.parametrize("tau", [1.0, 0.3, 0.1])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_soft_topk_has_the_gradient_of_the_memberships(tau, rate):
    """Against central differences of the definition in float64, which move the threshold too."""
    lengths = [9, 14, 5]
    logits, gumbel, valid = sets_of(lengths, dtype=torch.float64, spread=0.5)
    upstream = torch.randn(3, 14, dtype=torch.float64)
    _, gradient = run(soft_topk, logits, gumbel, valid, tau=tau, rate=rate, upstream=upstream)
    margin = logits.detach().diff(dim=-1)[..., 0]
    for row, length in enumerate(lengths):
        values, kept = margin[row, :length].tolist(), budget(rate, length)
        for place in range(length):
            change = [0.0, 0.0]
            for side, step in enumerate((1e-5, -1e-5)):
                moved = [value + step * (index == place) for index, value in enumerate(values)]
                weights = upstream[row, :length].tolist()
                change[side] = sum(w * p for w, p in zip(weights, memberships(moved, kept, tau), strict=True))
            expected = (change[0] - change[1]) / 2e-5
            assert gradient[row, place, 1].item() == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_soft_topk_at_equal_margins_has_its_hand_formula():
    """All memberships are k / n = p, so the gradient is p (1 - p) / tau times the upstream gradient less its mean."""
    logits = torch.zeros(1, 10, 2, dtype=torch.float64, requires_grad=True)
    upstream, valid = torch.randn(1, 10, dtype=torch.float64), torch.ones(1, 10, dtype=torch.bool)
    _, gradient = run(soft_topk, logits, logits.detach(), valid, tau=0.5, upstream=upstream)
    torch.testing.assert_close(gradient[..., 1], 0.3 * 0.7 / 0.5 * (upstream - upstream.mean()), rtol=1e-9, atol=1e-12)


def test_soft_topk_in_float32_is_the_one_in_float64():
    logits, gumbel, valid = sets_of([576, 100], seed=3)
    upstream = torch.randn(2, 576)
    _, single = run(soft_topk, logits, gumbel, valid, tau=0.1, rate=0.2, upstream=upstream)
    precise = logits.detach().double().requires_grad_()
    _, double = run(soft_topk, precise, gumbel.double(), valid, tau=0.1, rate=0.2, upstream=upstream.double())
    assert (single - double).norm() < 1e-5 * double.norm()


def test_soft_topk_learns_the_choice_and_never_the_number():
    """The memberships' sum is fixed, so a keep rate has no gradient; nor has a set that is kept whole."""
    logits, gumbel, valid = sets_of([40, 20], dtype=torch.float64)
    _, gradient = run(soft_topk, logits, gumbel, valid, upstream=torch.ones(2, 40, dtype=torch.float64))
    assert gradient.abs().max() < 1e-14
    for rate, lengths in ((1.0, [7, 3]), (0.2, [1, 1])):
        keep, gradient = run(soft_topk, *sets_of(lengths), rate=rate)
        assert keep[:, 0].eq(1).all() and gradient.abs().max() == 0


def test_soft_topk_refuses_what_is_no_keep_rate():
    logits, gumbel, valid = sets_of([4])
    with pytest.raises(ValueError, match="keep rate"):
        soft_topk(logits, gumbel, 1.0, 0.0, valid)


def test_decays_exponentially_between_its_ends():
    assert temperature(0, 100) == 1.0
    assert temperature(100, 100) == pytest.approx(0.1, rel=1e-12)
    assert temperature(50, 100) == pytest.approx(math.sqrt(0.1), rel=1e-12)
    ratios = [temperature(t + 1, 40, start=2.0, end=0.5) / temperature(t, 40, start=2.0, end=0.5) for t in range(40)]
    assert ratios == pytest.approx([ratios[0]] * 40, rel=1e-12)


@pytest.mark.parametrize("arguments", [(-1, 10), (11, 10), (0, 0), (0, 10, 0.0, 0.1), (0, 10, 1.0, -0.1)], ids=str)
def test_refuses_what_has_no_temperature(arguments):
    with pytest.raises(ValueError, match=r"give 0 <= step|must be positive"):
        temperature(*arguments)


@pytest.fixture
def batch():
    """Keep rates 0.5, 0.25 and 1.0 over 4, 4 and 2 counted tokens; a fourth sample counts none."""
    keep = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 0, 1], [1, 1, 0, 0, 0], [1, 0, 1, 0, 1]]).float()
    where = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    return keep, where


def test_formula_and_reductions(batch):
    keep, where = batch
    applies = torch.tensor([True, False, True, True])
    squares = 0.3**2 + 0.8**2
    assert keep_rate_loss(keep, where, 0.2, applies).item() == pytest.approx(squares / 4)
    assert keep_rate_loss(keep, where, 0.2, applies, reduction="applicable").item() == pytest.approx(squares / 2)
    assert keep_rate_loss(keep, where, 0.2, applies, distance="absolute").item() == pytest.approx(1.1 / 4)
    everything = keep_rate_loss(keep, where, 0.2, reduction="applicable").item()
    assert everything == pytest.approx((squares + 0.05**2) / 3)


def test_nothing_to_count_gives_zero_and_no_gradient(batch):
    keep, where = batch[0].requires_grad_(), torch.zeros_like(batch[1])
    for reduction in ("batch", "applicable"):
        loss = keep_rate_loss(keep, where, 0.2, reduction=reduction)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, keep)[0].abs().max() == 0


@pytest.mark.parametrize("reduction", ["batch", "applicable"])
def test_parts_of_a_global_batch_add_up(batch, reduction):
    keep, where = batch
    applies = torch.tensor([True, False, True, True])
    whole = keep_rate_loss(keep, where, 0.2, applies, reduction=reduction)
    count = torch.tensor(4 if reduction == "batch" else 2)
    parts = [
        keep_rate_loss(keep[rows], where[rows], 0.2, applies[rows], reduction=reduction, denominator=count)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize(("distance", "slopes"), [("squared", (2 * -0.1, 2 * 0.4)), ("absolute", (-1.0, 1.0))])
def test_gradient_reaches_counted_tokens_of_contributing_samples_only(batch, distance, slopes):
    """The samples' keep rates 0.5 and 1 lie below and above the target 0.6, and are means over 4 and 2 tokens."""
    keep, where = batch[0].double().requires_grad_(), batch[1]
    applies = torch.tensor([True, False, True, True])
    (gradient,) = torch.autograd.grad(keep_rate_loss(keep, where, 0.6, applies, distance=distance), keep)
    expected = torch.zeros(4, 5, dtype=torch.float64)
    expected[0, :4], expected[2, :2] = slopes[0] / 4 / 4, slopes[1] / 2 / 4
    torch.testing.assert_close(gradient, expected)


def test_absolute_distance_rests_at_its_target(batch):
    """Its slope there is 0, not NaN: a sample that keeps exactly its rate is left alone."""
    keep = batch[0].requires_grad_()
    loss = keep_rate_loss(keep[:1], batch[1][:1], 0.5, distance="absolute")
    assert loss.item() == 0 and torch.autograd.grad(loss, keep)[0].abs().max() == 0


def test_half_precision_masks_are_averaged_in_float32():
    keep = (torch.arange(2048)[None] % 3 == 0).to(torch.bfloat16)
    loss = keep_rate_loss(keep, torch.ones(1, 2048, dtype=torch.bool), 0.0)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx((683 / 2048) ** 2, rel=1e-6)


@pytest.mark.parametrize("case", ["tau1.0", "tau0.3"])
def test_golden_losses(case):
    recorded = load_file(GOLDEN / "training.safetensors")
    facts = json.loads((GOLDEN / "training.json").read_text(encoding="utf-8"))[case]
    image = recorded[f"{case}.image_hard"]
    loss = keep_rate_loss(image, torch.ones_like(image, dtype=torch.bool), 0.25)
    assert loss.item() == pytest.approx(facts["image_mask_loss_unweighted"], abs=2e-6)
    lengths = torch.tensor([10, 6, 3])
    text = torch.zeros(3, 10)
    for row, length in enumerate(lengths.tolist()):
        text[row, :length] = recorded[f"{case}.text_hard.{row}"]
    counted = torch.arange(10) < lengths[:, None]
    loss = keep_rate_loss(text, counted, 0.5, lengths >= 4)
    assert loss.item() == pytest.approx(facts["text_mask_loss_unweighted"], abs=2e-6)


def test_refuses_unknown_settings_and_unfit_shapes(batch):
    keep, where = batch
    with pytest.raises(ValueError, match="'batch' or 'applicable'"):
        keep_rate_loss(keep, where, 0.2, reduction="mean")
    with pytest.raises(ValueError, match="'squared' or 'absolute'"):
        keep_rate_loss(keep, where, 0.2, distance="norm")
    with pytest.raises(ValueError, match="do not fit"):
        keep_rate_loss(keep, where[:2], 0.2)
