"""One new token per row over a ragged cache: every implementation against attention over the filled slots alone.

Shape suffixes: B rows, H query heads, K key heads, W slots, D head size.
"""

import pytest
import torch
from torch.nn import functional as F

from dynamic_llava.sparsity import ragged_attention as ragged_module
from dynamic_llava.sparsity.ragged_attention import ragged_attention
from tests.sparsity.implementations import device_of, moved, with_triton

IMPLEMENTATIONS = with_triton("sdpa")
every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
SHAPES = [(1, 2, 2, 64, 64), (3, 4, 2, 200, 16), (2, 8, 1, 640, 80), (1, 2, 2, 1, 128), (4, 3, 3, 65, 8)]
"""B, H, K, W, d: one split and several, partial blocks, grouped heads, a head size that is padded, a single slot."""


def make(batch, heads, key_heads, slots, size, dtype=torch.float32):
    """Query, storages and lengths; the first row is full, the second holds nothing but the token itself."""
    query = torch.randn(batch, heads, 1, size, dtype=dtype)
    keys, values = torch.randn(2, batch, key_heads, slots, size, dtype=dtype)
    lengths = torch.randint(0, slots, (batch,))
    lengths[0] = slots - 1
    lengths[1:2] = 0
    return query, keys, values, lengths


def attend(implementation, *inputs, **arguments):
    device, arguments = device_of(implementation), moved(arguments, implementation)
    inputs = (tensor.to(device) for tensor in inputs)
    with torch.no_grad():
        return ragged_attention(*inputs, implementation=implementation, **arguments).cpu()


def by_definition(query, keys, values, lengths, scale=None):
    """Row by row, over the filled slots and nothing else, in float64."""
    rows = []
    for row, length in enumerate(lengths.tolist()):
        cut = slice(row, row + 1)
        filled = (x[cut, :, : length + 1].double() for x in (keys, values))
        rows.append(F.scaled_dot_product_attention(query[cut].double(), *filled, scale=scale, enable_gqa=True))
    return torch.cat(rows)


@every
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_attention_over_the_filled_slots(implementation, shape, scale):
    inputs = make(*shape)
    actual = attend(implementation, *inputs, scale=scale)
    assert actual.shape == inputs[0].shape and actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), by_definition(*inputs, scale=scale), rtol=2e-5, atol=2e-6)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(implementation, dtype):
    inputs = make(2, 4, 2, 130, 64, dtype=dtype)
    actual = attend(implementation, *inputs)
    expected = by_definition(*inputs)
    assert actual.dtype == dtype
    # The output is rounded; `triton` rounds the weights too, and its interpreter cuts digits off instead of rounding.
    assert (actual - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS, reason="triton cannot run in this process")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_never_reads_an_unfilled_slot(shape):
    query, keys, values, lengths = make(*shape)
    clean = attend("triton", query, keys, values, lengths)
    unfilled = (torch.arange(keys.shape[2]) > lengths[:, None])[:, None, :, None]
    keys, values = (x.masked_fill(unfilled, torch.nan) for x in (keys, values))
    assert torch.equal(attend("triton", query, keys, values, lengths), clean)


@every
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_key_heads_may_have_lengths_of_their_own(implementation, shape):
    """Each key head with its query heads is what a batch of one key head gives; a full, an empty and a strided one."""
    query, keys, values, _ = make(*shape)
    batch, key_heads, slots = keys.shape[:3]
    lengths = torch.randint(0, slots, (key_heads, batch)).t()
    lengths[0, 0], lengths[-1, -1] = slots - 1, 0
    if implementation == "triton":
        unfilled = (torch.arange(slots) > lengths[..., None])[..., None]
        keys, values = (x.masked_fill(unfilled, torch.nan) for x in (keys, values))
    actual = attend(implementation, query, keys, values, lengths)
    groups = query.shape[1] // key_heads
    for head in range(key_heads):
        alone = query[:, head * groups : (head + 1) * groups], keys[:, head : head + 1], values[:, head : head + 1]
        expected = by_definition(*alone, lengths[:, head])
        found = actual[:, head * groups : (head + 1) * groups].double()
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)
    if key_heads > 1:
        with pytest.raises(ValueError, match="of each key head"):
            attend(implementation, query, keys, values, lengths[:, :1])


@every
def test_a_row_alone_gives_what_it_gives_in_a_batch(implementation):
    query, keys, values, lengths = make(4, 4, 2, 150, 32)
    together = attend(implementation, query, keys, values, lengths)
    for row in range(4):
        cut = slice(row, row + 1)
        alone = attend(implementation, query[cut], keys[cut], values[cut], lengths[cut])
        torch.testing.assert_close(together[cut], alone, rtol=1e-5, atol=1e-6)


@every
def test_more_capacity_changes_nothing(implementation):
    query, keys, values, lengths = make(2, 4, 2, 60, 32)
    grown = [F.pad(x, (0, 0, 0, 400)) for x in (keys, values)]
    actual, expected = (
        attend(implementation, query, *grown, lengths),
        attend(implementation, query, keys, values, lengths),
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@every
def test_any_strides(implementation):
    """Storages may be views: heads behind slots, a slice of a longer storage."""
    query, keys, values, lengths = make(2, 4, 2, 50, 16)
    expected = attend(implementation, query, keys, values, lengths)
    keys = keys.transpose(1, 2).contiguous().transpose(1, 2)
    values = F.pad(values, (0, 0, 0, 7))[:, :, :50]
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(attend(implementation, query, keys, values, lengths), expected)


@pytest.mark.slow
@every
def test_is_one_graph_that_growth_does_not_compile_anew(implementation):
    device = device_of(implementation)

    def step(query, keys, values, lengths):
        return ragged_attention(query * 2, keys, values, lengths, implementation=implementation) + 1

    compiled = torch.compile(step, fullgraph=True)
    for slots in (64, 128, 192):
        inputs = [tensor.to(device) for tensor in make(2, 4, 2, slots, 16)]
        for storage in inputs[1:3]:
            torch._dynamo.mark_dynamic(storage, 2)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=slots > 64):
            torch.testing.assert_close(compiled(*inputs), step(*inputs), rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_sdpa_only():
    query, keys, values, lengths = make(1, 2, 2, 10, 16)
    ragged_attention(query.requires_grad_(), keys, values, lengths).sum().backward()
    assert query.grad.abs().max() > 0
    if "triton" in IMPLEMENTATIONS:
        with pytest.raises(ValueError, match="no gradient"):
            ragged_attention(query, keys, values, lengths, implementation="triton")


def test_refuses_what_does_not_fit():
    query, keys, values, lengths = make(2, 4, 2, 9, 16)
    cases = [
        ((query, keys, values, lengths), {"implementation": "flash"}, "choose one of"),
        ((query.expand(-1, -1, 2, -1), keys, values, lengths), {}, r"\(B, H, 1, d\)"),
        ((query, keys, values[:, :, :8], lengths), {}, r"\(B, K, W, d\)"),
        ((query[:, :3], keys, values, lengths), {}, "K does not divide H"),
        ((query[..., :8], keys, values, lengths), {}, "differ in B or d"),
        ((query.double(), keys, values, lengths), {}, "one float dtype"),
        ((query, keys, values, lengths.int()), {}, "int64"),
        ((query, keys, values, lengths[:1]), {}, r"int64 of shape \(2,\)"),
    ]
    for inputs, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            ragged_attention(*inputs, **arguments)


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS, reason="triton cannot run in this process")
@pytest.mark.parametrize(("rows", "slots", "processors"), [(1, 640, 108), (32, 640, 132), (400, 64, 132), (3, 1, 4)])
def test_triton_splits_cover_every_slot(rows, slots, processors):
    from dynamic_llava.sparsity.kernels.triton_ragged import split_slots

    splits, each = split_slots(rows, slots, 64, processors)
    assert each % 64 == 0 and (splits - 1) * each < slots <= splits * each
    assert splits == 1 or rows * (splits - 1) <= 2 * processors + rows


@pytest.mark.parametrize(("compiling", "asked"), [(False, "sdpa"), (True, "auto")])
def test_auto_is_a_kernel_of_ours_only_where_no_launch_costs_anything(monkeypatch, compiling, asked):
    chosen = []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(ragged_module, "choose", lambda _, implementation, *__: chosen.append(implementation) or "sdpa")
    query, keys, values = torch.randn(1, 2, 1, 8), *torch.randn(2, 1, 2, 5, 8)
    ragged_module.ragged_attention(query, keys, values, torch.tensor([2]))
    assert chosen == [asked]
