"""The keep-rate regulariser: its formula, its two reductions, global batches, gradients, and the recordings."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dynamic_llava.sparsity import keep_rate_loss

GOLDEN = Path(__file__).parents[1] / "golden"


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
