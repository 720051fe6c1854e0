"""Every implementation of MaskedSoftmax against float64 autograd of the literal Eq. 7, values and every gradient."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from dynamic_llava.sparsity import masked_softmax_attention, masked_softmax_weights
from dynamic_llava.sparsity.kernels import EXPONENT_CAP, chunked
from tests.sparsity.equation_7 import (
    NAMES,
    assert_equal,
    attention,
    dominated,
    dtypes,
    equation_7,
    every,
    make,
    padding,
    results,
    set_tiles,
)
from tests.sparsity.implementations import INTERPRETED

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def few_large_tiles(request, monkeypatch):
    """Triton's interpreter takes its time per operation, whatever the size of the tile."""
    if INTERPRETED and "triton" in request.node.name:
        set_tiles(monkeypatch, 64, 64)


@every
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("tokens", [1, 7, 64, 131])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_equals_equation_7(implementation, side, tokens, key_heads):
    inputs, upstream = make(batch=3, tokens=tokens, key_heads=key_heads)
    settings = {"padding_mask": padding(3, tokens, side), "scale": 0.2}
    expected = results(lambda *x: equation_7(*x, **settings), inputs, upstream)
    function = attention(implementation, **settings)
    for dtype in dtypes(implementation):
        tolerance = 2e-5 if dtype == torch.float32 else 1e-13
        assert_equal(results(function, inputs, upstream, dtype), expected, tolerance)


@every
@settings(max_examples=8 if INTERPRETED else 30)
@given(st.data())
def test_equals_equation_7_on_random_layouts(implementation, data):
    batch, key_heads, groups = (data.draw(st.integers(1, 3)) for _ in range(3))
    tokens, size = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 9))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    inputs, upstream = make(batch, key_heads * groups, key_heads, tokens, size, keep=data.draw(st.floats(0, 1)))
    # Holes anywhere, not only at the ends.
    padding_mask = torch.rand(batch, tokens) < data.draw(st.sampled_from([0.2, 0.9, 1.1]))
    expected = results(lambda *x: equation_7(*x, padding_mask=padding_mask), inputs, upstream)
    for dtype in dtypes(implementation):
        actual = results(attention(implementation, padding_mask=padding_mask), inputs, upstream, dtype)
        assert_equal(actual, expected, 5e-5 if dtype == torch.float32 else 1e-11)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dropped_keys_that_dominate_by_fifty(implementation, dtype):
    """A dropped query still sees itself, with its dominating key; kept ones must see nothing of it."""
    if dtype not in dtypes(implementation):
        pytest.skip("triton computes in float32")
    inputs, upstream = dominated(50.0)
    scores = inputs[0] @ inputs[1].transpose(-1, -2) / 4
    assert ((scores * (inputs[3] == 0)[:, None, None, :]).amax() - 50).abs() < 5
    expected = results(equation_7, inputs, upstream)
    actual = results(attention(implementation), inputs, upstream, dtype)
    # Scores of 50 carry a rounding error of 50 * 2^-24 in float32, and the exponential makes it a relative one.
    assert_equal(actual, expected, 1e-4 if dtype == torch.float32 else 1e-11)
    # Each entry on its own scale too: the largest entries of this gradient are some e^50 times the smallest.
    relative = ((actual[-1] - expected[-1]).abs() / expected[-1].abs())[:, :-1]  # no query follows the last key
    assert relative.median() < (1e-5 if dtype == torch.float32 else 1e-12)
    kept = inputs[3] == 1
    assert_equal([actual[0].transpose(1, 2)[kept]], [expected[0].transpose(1, 2)[kept]], 1e-5, ["kept rows"])


@every
@pytest.mark.parametrize("dominance", [80.0, 300.0])
def test_mask_gradient_beyond_the_cap_is_finite_term_by_term_of_the_right_sign(implementation, dominance):
    inputs, upstream = dominated(dominance)
    expected = results(equation_7, inputs, upstream)
    actual, reference = (
        results(attention(name), inputs, upstream, torch.float32) for name in (implementation, "reference")
    )
    assert_equal(actual[:4], expected[:4], 2e-4, NAMES[:4])
    assert_equal(actual, reference, 2e-4)
    # One query, one dropped key: there the clamp can only change the size. Of sums nothing of the kind holds.
    query, key = torch.ones(1, 1, 2, 1), torch.tensor([dominance, 0.0]).view(1, 1, 2, 1)
    value = torch.tensor([-1.0, 1.0]).view(1, 1, 2, 1)
    mask = torch.zeros(1, 2, requires_grad=True)
    output = attention(implementation, scale=1.0)(query, key, value, mask)
    assert output.flatten().tolist() == [-1.0, 1.0]
    (gradient,) = torch.autograd.grad(output[..., 1, :].sum(), mask)
    assert gradient[0].tolist() == pytest.approx([-2 * math.exp(EXPONENT_CAP), 0.0], rel=1e-5)


@every
def test_huge_upstream_gradients_never_become_nan(implementation):
    """A loss scale of 1e8 above the cap: the mask gradient may overflow to infinity, the others stay as they are."""
    inputs, upstream = dominated(300.0)
    side = padding(2, 150, "right")
    function = attention(implementation, padding_mask=side)
    actual = results(function, inputs, upstream * 1e8, torch.float32)
    expected = results(lambda *x: equation_7(*x, padding_mask=side), inputs, upstream)
    assert_equal([tensor / 1e8 for tensor in actual[1:4]], expected[1:4], 2e-4, NAMES[1:4])
    assert not actual[4].isnan().any() and (actual[4] * ~side).abs().max() == 0


@every
def test_mask_gradient_stays_finite_at_full_size(implementation):
    """Every query of 8 heads and 512 tokens at the cap, summed into one entry."""
    query, key = torch.full((1, 8, 512, 4), 100.0), torch.zeros(1, 8, 512, 4)
    key[:, :, 0] = 100.0
    value = torch.full((1, 8, 512, 4), -1000.0)
    value[:, :, 0] = 1000.0
    mask = torch.ones(1, 512)
    mask[0, 0] = 0
    mask.requires_grad_()
    attention(implementation)(query, key, value, mask).sum().backward()
    assert torch.isfinite(mask.grad).all() and mask.grad[0, 0] > 1e33


@every
def test_nothing_leaks_to_dropped_or_future_keys(implementation):
    (query, key, value, mask), _ = make(tokens=101, spread=3.0)
    query, key, value = (tensor.float().requires_grad_() for tensor in (query, key, value))
    mask[:, 40] = 0
    output = attention(implementation)(query, key, value, mask)
    others = torch.arange(101) != 40
    gradients = torch.autograd.grad(output[:, :, others].square().sum(), (key, value), retain_graph=True)
    assert all(gradient[:, :, 40].abs().max() == 0 for gradient in gradients)
    gradients = torch.autograd.grad(output[:, :, :70].square().sum(), (query, key, value))
    assert all(gradient[:, :, 70:].abs().max() == 0 for gradient in gradients)
    with torch.no_grad():
        changed_key, changed_value = key.clone(), value.clone()
        changed_key[:, :, 40], changed_value[:, :, 40] = 30.0, 1e6
        changed_key[:, :, 70:], changed_value[:, :, 70:] = -30.0, 1e6
        changed = attention(implementation)(query, changed_key, changed_value, mask)
    unaffected = others & (torch.arange(101) < 70)
    assert torch.equal(changed[:, :, unaffected], output[:, :, unaffected])


@every
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_invisible_and_blind_rows_give_zero(implementation, side):
    (query, key, value, mask), upstream = make(batch=3, tokens=90)
    real = padding(3, 90, side)
    garbage = torch.where(real[:, None, :, None], 0.0, 1e4)
    inputs = (query, key + garbage, value - garbage, mask)
    actual = results(attention(implementation, padding_mask=real), inputs, upstream, torch.float32)
    clean = results(attention(implementation, padding_mask=real), (query, key, value, mask), upstream, torch.float32)
    output, _, d_key, d_value, d_mask = actual
    assert torch.equal(output, clean[0])
    fill = ~real[:, None, :, None]
    assert (d_key * fill).abs().max() == 0 and (d_value * fill).abs().max() == 0 and (d_mask * ~real).abs().max() == 0
    for row in range(3):
        alone = slice(None) if row == 0 else real[row]
        single = [tensor[row : row + 1, :, alone] for tensor in (query, key, value)] + [mask[row : row + 1, alone]]
        expected = attention(implementation)(*(tensor.float() for tensor in single))
        torch.testing.assert_close(output[row, :, alone].float(), expected[0], rtol=1e-5, atol=1e-5)
    if side == "left":
        assert (output * fill).abs().max() == 0 and (actual[1] * fill).abs().max() == 0


@every
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "key", "value", "all"])
@pytest.mark.parametrize("kind", ["dropped", "left", "right"])
def test_a_token_that_is_not_finite_is_invisible_too(implementation, poison, where, kind):
    """Dropped tokens and padding that hold nan or inf: every other row, and its gradients, as with finite ones."""
    (query, key, value, mask), upstream = make(batch=2, heads=2, key_heads=1, tokens=45)
    real = padding(2, 45, None if kind == "dropped" else kind)
    mask[:, 30:40] = 0
    hidden = torch.zeros(2, 45, dtype=torch.bool) if real is None else ~real
    hidden[:, 35] |= kind == "dropped"
    seen = (~hidden)[:, None, :, None]
    clean = (query, key, value, mask)
    dirty = [x.masked_fill(~seen, poison) if where in (name, "all") else x for name, x in
             zip(("query", "key", "value"), clean[:3], strict=True)]  # fmt: skip
    function = attention(implementation, padding_mask=real)
    expected = results(function, clean, upstream * seen, torch.float32)
    actual = results(function, (*dirty, mask), upstream * seen, torch.float32)
    held = 1 if implementation == "triton" else 4  # its gradients do not promise it
    finite = [tensor.where(seen, 0) for tensor in actual[:held]]
    assert_equal(finite, [tensor.where(seen, 0) for tensor in expected[:held]], 1e-6, NAMES[:held])
    if held > 1:
        assert_equal([actual[4].where(~hidden, 0)], [expected[4].where(~hidden, 0)], 1e-6, ["mask gradient"])
    if kind == "dropped" and where in ("value", "all"):
        assert not actual[0][:, :, 35].isfinite().any(), "a real token's own row says that it is not finite"
    if kind == "left":
        assert (actual[0] * ~seen).abs().max() == 0


@every
@pytest.mark.parametrize("shape", [(2, 0), (0, 5), (0, 0)])
def test_nothing_gives_nothing(implementation, shape):
    batch, tokens = shape
    leaves = [torch.zeros(batch, heads, tokens, 8, requires_grad=True) for heads in (4, 2, 2)]
    mask = torch.ones(batch, tokens, requires_grad=True)
    output = attention(implementation, padding_mask=torch.ones(batch, tokens, dtype=torch.bool))(*leaves, mask)
    assert output.shape == (batch, 4, tokens, 8)
    output.sum().backward()


@every
def test_equals_attention_over_the_kept_tokens_alone(implementation):
    (query, key, value, mask), _ = make(batch=1, tokens=77, key_heads=2)
    query, key, value = (tensor.to(dtypes(implementation)[-1]) for tensor in (query, key, value))
    kept = mask[0] == 1
    output = attention(implementation)(query, key, value, mask)
    short = [tensor[:, :, kept] for tensor in (query, key, value)]
    expected = F.scaled_dot_product_attention(*short, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(output[:, :, kept], expected)


@every
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_everything_kept_is_ordinary_causal_attention(implementation, mask_dtype):
    (query, key, value, _), _ = make(tokens=70)
    query, key, value = (tensor.to(dtypes(implementation)[-1]) for tensor in (query, key, value))
    mask = torch.ones(2, 70, dtype=mask_dtype)
    output = attention(implementation)(query, key, value, mask)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(query, key, value, is_causal=True))


@every
@pytest.mark.parametrize("side", [None, "left"])
def test_gradcheck(implementation, side, monkeypatch):
    """Numerical derivatives, at fractional masks where Eq. 7 is smooth on both sides; blocks of 2 queries, 1 head."""
    if torch.float64 not in dtypes(implementation):
        pytest.skip("numerical derivatives need float64")
    monkeypatch.setattr(chunked, "BLOCK_ROWS", 2)
    monkeypatch.setattr(chunked, "CPU_PART", 1)
    (query, key, value, _), _ = make(batch=2, heads=2, key_heads=1, tokens=5, size=3, spread=1.0)
    mask = torch.rand(2, 5, dtype=torch.float64) * 0.7 + 0.2
    leaves = [tensor.requires_grad_() for tensor in (query, key, value, mask)]
    assert torch.autograd.gradcheck(attention(implementation, padding_mask=padding(2, 5, side)), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every
def test_half_types_accumulate_in_float32(implementation, dtype):
    inputs, upstream = make(tokens=200, spread=1.0)
    rounded = tuple(tensor.to(dtype).double() for tensor in inputs)
    upstream = upstream.to(dtype).double()
    expected = results(equation_7, rounded, upstream)
    actual = results(attention(implementation), rounded, upstream, dtype, mask_dtype=torch.float32)
    # Only the stored output and gradients are rounded: half a unit in the last place of their largest entry. The
    # `chunked` mask gradient also reads the rounded output, as FlashAttention's backward pass does; `triton` rounds
    # weights too, and its interpreter cuts digits off instead of rounding.
    unit = torch.finfo(dtype).eps * (2 if implementation == "triton" else 1)
    assert_equal(actual[:4], expected[:4], unit, NAMES[:4])
    assert_equal(actual[4:], expected[4:], 2 * unit, NAMES[4:])
    query, key, value, mask = rounded
    output = attention(implementation)(query.to(dtype), key.to(dtype), value.to(dtype), mask.float())
    assert output.dtype == dtype


@pytest.mark.parametrize("backward_too", [False, True])
@every
def test_autocast_does_not_lower_the_precision(implementation, backward_too):
    if backward_too and implementation == "reference":
        pytest.skip("a backward pass inside autocast is rounded by autograd itself; torch advises against it")
    inputs, upstream = make(tokens=50)
    expected = results(attention(implementation), inputs, upstream, torch.float32)
    leaves = [tensor.float().requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = attention(implementation)(*leaves)
        if backward_too:
            output.backward(upstream.float())
    if not backward_too:
        output.backward(upstream.float())
    assert_equal([output.detach(), *(leaf.grad for leaf in leaves)], expected, 1e-6)


@every
@pytest.mark.parametrize("case", ["causal", "full"])
def test_golden_weights_and_gradients_without_epsilon(implementation, case):
    if implementation != "reference" and case == "full":
        pytest.skip("only the definition is also defined for other than causal attention")
    recorded = load_file(GOLDEN / "softmax_with_policy.safetensors")
    scores, mask = recorded[f"{case}.attn"], recorded["policy"][..., 0].clone().requires_grad_()
    visible = scores.isfinite()
    scores = scores.masked_fill(~visible, 0).requires_grad_()
    if implementation == "reference":
        weights = masked_softmax_weights(scores, mask, visible)
    else:
        # With unit vectors as keys and values the scores are the queries and the output is the weights.
        unit = torch.eye(6).expand(2, 3, 6, 6)
        weights = attention(implementation, scale=1.0)(scores, unit, unit, mask)
    torch.testing.assert_close(weights, recorded[f"{case}.eps0.out"], rtol=0, atol=1e-6)
    d_scores, d_mask = torch.autograd.grad(weights, (scores, mask), recorded["upstream_grad"])
    torch.testing.assert_close(d_scores, recorded[f"{case}.eps0.grad_attn"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(d_mask, recorded[f"{case}.eps0.grad_policy"][..., 0], rtol=1e-4, atol=1e-6)


def test_refuses_what_does_not_fit():
    (query, key, value, mask), _ = make(tokens=9)
    cases = [
        ((query, key, value, mask), {"implementation": "fused"}, "choose one of"),
        ((query, key[:, :3], value[:, :3], mask), {}, "K dividing H"),
        ((query, key, value[:, :2], mask), {}, "K dividing H"),
        ((query, key[:, :, :8], value[:, :, :8], mask), {}, "differ in B, N or d"),
        ((query, key.float(), value, mask), {}, "one float dtype"),
        ((query, key, value, mask[:, :8]), {}, "one entry per token"),
        ((query, key, value, mask.half().requires_grad_()), {}, "float32 keep_mask"),
        ((query, key, value, mask), {"padding_mask": torch.ones(2, 9)}, "give bool of shape"),
        ((query, key, value, mask), {"padding_mask": torch.ones(2, 8, dtype=torch.bool)}, "give bool of shape"),
    ]
    for inputs, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            masked_softmax_attention(*inputs, **arguments)
