"""What the kernels have to keep on any device, as plain functions: for tests, and where there is no test runner.

Each law raises AssertionError where it does not hold; those of the compiled step are in step_laws.py. On an
accelerator the kernels are Triton's, and it is an error if they cannot run there; on a CPU they are Triton's in its
interpreter, where that was chosen, and else torch's.
Shape suffixes: B rows, H query heads, K key heads, N tokens, W slots, d head size.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamic_llava.engine.step import compile_options
from dynamic_llava.sparsity import masked_softmax_attention
from dynamic_llava.sparsity.kernels.choice import triton_obstacle
from dynamic_llava.sparsity.ragged_attention import ragged_attention

NAMES = ("output", "query gradient", "key gradient", "value gradient", "mask gradient")
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5}
"""Largest difference from Eq. 7 in float64, relative to the largest entry; half types by their last place."""
Laws = dict[str, Callable[[], None]]


def equation_7(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    padding_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Eq. 7 as it is written, without any stabilisation: give float64, which holds exp(700).

    query (B, H, N, d); key, value (B, K, N, d); keep_mask (B, N); padding_mask (B, N) bool, True at real tokens.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    tokens, device = query.shape[2], query.device
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    itself = torch.eye(tokens, dtype=torch.bool, device=device)
    seen = torch.where(itself, 1.0, keep_mask[:, None, None, :].to(scores.dtype))
    visible = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    if padding_mask is not None:
        visible = visible & padding_mask[:, None, None, :]
    numerator = (scores.exp() * seen).masked_fill(~visible, 0)
    total = numerator.sum(-1, keepdim=True)
    return (numerator / total.masked_fill(total == 0, torch.inf)) @ value


def make(
    batch: int = 2,
    heads: int = 4,
    key_heads: int = 4,
    tokens: int = 63,
    size: int = 16,
    spread: float = 1.5,
    keep: float = 0.5,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return random float64 inputs (query, key, value, keep mask) and an upstream gradient, on the CPU."""
    query, upstream = torch.randn(2, batch, heads, tokens, size, dtype=torch.float64).mul(spread)
    key, value = torch.randn(2, batch, key_heads, tokens, size, dtype=torch.float64).mul(spread)
    mask = (torch.rand(batch, tokens) < keep).double()
    return (query, key, value, mask), upstream


def dominated(dominance: float, tokens: int = 150) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return inputs in which half of the keys are dropped and score `dominance` above every kept one."""
    (query, key, value, mask), upstream = make(tokens=tokens, size=16, spread=0.3)
    direction = torch.zeros(16, dtype=torch.float64)
    direction[0] = 1.0
    query = query - query * direction + 4 * direction
    key = key - key * direction + (mask == 0)[:, None, :, None] * direction * dominance
    return (query, key, value, mask), upstream


def results(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    upstream: Tensor,
    dtype: torch.dtype = torch.float64,
    mask_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Return output and gradients as float64, of inputs rounded to `dtype`."""
    *qkv, mask = inputs
    leaves = [tensor.to(dtype).clone().requires_grad_() for tensor in qkv]
    leaves.append(mask.to(mask_dtype or dtype).clone().requires_grad_())
    with torch.enable_grad():
        output = function(*leaves)
        gradients = torch.autograd.grad(output, leaves, upstream.to(output.dtype))
    return [output.detach().double(), *(gradient.double() for gradient in gradients)]


def assert_equal(
    actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, names: Sequence[str] = NAMES
) -> None:
    """Compare each tensor's largest difference with its largest entry (or with 0.1, where the true gradient is 0)."""
    for name, a, b in zip(names, actual, expected, strict=True):
        assert torch.isfinite(a).all(), f"{name} is not finite"
        error = ((a - b).abs().max() / b.abs().max().clamp(min=0.1)).item()
        assert error <= tolerance, f"{name}: {error:.2e} of its scale, at most {tolerance:.2e}"


def padding(batch: int, tokens: int, side: str | None) -> Tensor | None:
    """Return (B, N) bool: the first row whole, the others shorter and shorter on the given side; None is no padding."""
    if side is None:
        return None
    length = torch.tensor([tokens - row * (tokens // (batch + 1)) for row in range(batch)])
    place = torch.arange(tokens)
    return place < length[:, None] if side == "right" else place >= tokens - length[:, None]


def kernel_on(device: torch.device, fallback: str) -> str:
    """Return the implementation whose laws are looked at. RuntimeError where an accelerator cannot run Triton's."""
    obstacle = triton_obstacle(device, torch.float32, 128)
    if obstacle is None:
        return "triton"
    if device.type != "cpu":
        raise RuntimeError(f"the Triton kernels cannot run on {device}: {obstacle}")
    return fallback


CASES = (
    (torch.float32, {"batch": 3, "key_heads": 2, "tokens": 131}, "left"),
    (torch.float32, {"batch": 2, "key_heads": 4, "tokens": 200}, "right"),
    (torch.float32, {"heads": 2, "key_heads": 1, "tokens": 150, "size": 80}, None),
    (torch.float32, {"heads": 2, "key_heads": 2, "tokens": 65, "size": 128}, "left"),
    (torch.float32, {"tokens": 1}, None),
    (torch.float32, {"tokens": 90, "keep": 0.0}, None),
    (torch.float32, {"tokens": 90, "keep": 1.0}, "right"),
    (torch.bfloat16, {"key_heads": 2, "tokens": 200, "size": 64, "spread": 1.0}, "left"),
    (torch.bfloat16, {"heads": 2, "key_heads": 2, "tokens": 333, "size": 128, "spread": 1.0}, None),
    (torch.float16, {"heads": 2, "key_heads": 1, "tokens": 200, "size": 128, "spread": 1.0}, "right"),
)
"""Types, sizes and padding: heads in groups, odd lengths, padded head sizes, a single token, nothing and all kept."""

RAGGED = (
    (torch.float32, (3, 4, 2, 200, 16)),
    (torch.float32, (2, 8, 1, 640, 80)),
    (torch.float32, (1, 2, 2, 1, 128)),
    (torch.bfloat16, (2, 8, 1, 640, 128)),
    (torch.bfloat16, (4, 3, 3, 65, 64)),
)
"""Types and B, H, K, W, D: one split and several, partial blocks, grouped heads, a padded head size, a single slot.

Few kinds of heads in both tables: each is a kernel of its own, which has to be compiled within the part's time.
"""


def kernel_laws(device: torch.device) -> Laws:
    """Return the laws of MaskedSoftmax and of ragged attention by name."""
    masked, ragged = kernel_on(device, "chunked"), kernel_on(device, "sdpa")
    found: Laws = {}
    for dtype, sizes, side in CASES:
        name = ", ".join([str(dtype).removeprefix("torch."), *(f"{key} {value}" for key, value in sizes.items())])
        law = partial(equals_equation_7, device, masked, dtype, sizes, side)
        found[f"{masked} is Eq. 7, all gradients: {name}, padding {side}"] = law
    for dominance in (50.0, 300.0):
        law = partial(withstands_dropped_keys, device, masked, dominance)
        found[f"{masked}: dropped keys {dominance:g} above kept ones"] = law
    found[f"{masked}: nothing of dropped and future keys leaks"] = partial(leaks_nothing, device, masked)
    found[f"{masked}: runs repeat bit by bit"] = partial(repeats, device, masked)
    found[f"{masked}: several tiles in bfloat16 are float32 without tiles"] = partial(long_rows, device, masked)
    if device.type != "cpu":
        found[f"{masked}: memory is linear in the length"] = partial(memory_is_linear, device, masked)
    for dtype, shape in RAGGED:
        law = partial(equals_filled_slots, device, ragged, shape, dtype)
        found[f"ragged {ragged} is attention over the filled slots: {shape}, {dtype}"] = law
    law = partial(follows_lengths, device, ragged)
    found[f"ragged {ragged}: compiled once, it follows lengths and growth"] = law
    return found


def masked_on(device: torch.device, implementation: Any, padding_mask: Tensor | None = None) -> Callable[..., Tensor]:
    """Return MaskedSoftmax attention of tensors on the CPU, computed on the device."""
    padding_mask = None if padding_mask is None else padding_mask.to(device)

    def run(*inputs: Tensor) -> Tensor:
        given = (tensor.to(device) for tensor in inputs)
        return masked_softmax_attention(*given, padding_mask=padding_mask, implementation=implementation).cpu()

    return run


def equals_equation_7(
    device: torch.device, implementation: str, dtype: torch.dtype, sizes: Mapping[str, Any], side: str | None
) -> None:
    """Output and every gradient are those of float64 autograd through the literal Eq. 7."""
    torch.manual_seed(0)
    inputs, upstream = make(**sizes)
    rounded = [tensor.to(dtype).double() for tensor in inputs]
    upstream, real = upstream.to(dtype).double(), padding(inputs[3].shape[0], inputs[3].shape[1], side)
    expected = results(partial(equation_7, padding_mask=real), rounded, upstream)
    function = masked_on(device, implementation, real)
    mask_dtype = None if dtype in TOLERANCE else torch.float32
    actual = results(function, rounded, upstream, dtype, mask_dtype)
    # Half types: the stored output is rounded, and Triton rounds weights too; dM reads the rounded output.
    tolerance = TOLERANCE.get(dtype, 2 * torch.finfo(dtype).eps)
    assert_equal(actual[:4], expected[:4], tolerance, NAMES[:4])
    assert_equal(actual[4:], expected[4:], tolerance * (1 if dtype in TOLERANCE else 2), NAMES[4:])


def withstands_dropped_keys(device: torch.device, implementation: str, dominance: float) -> None:
    """Dropped keys far above the kept ones move nothing but their own rows; beyond the cap dM is the reference's."""
    torch.manual_seed(0)
    inputs, upstream = dominated(dominance)
    expected = results(equation_7, inputs, upstream)
    actual = results(masked_on(device, implementation), inputs, upstream, torch.float32)
    # Scores of 50 carry a rounding error of 50 * 2^-24 in float32, and the exponential makes it a relative one.
    tolerance = 1e-4 if dominance <= 50 else 2e-4
    assert_equal(actual[:4], expected[:4], tolerance, NAMES[:4])
    if dominance > 50:
        expected = results(masked_on(device, "reference"), inputs, upstream, torch.float32)
    assert_equal(actual[4:], expected[4:], tolerance, NAMES[4:])


def leaks_nothing(device: torch.device, implementation: str) -> None:
    """What dropped and future keys hold changes no bit of the rows that do not see them."""
    torch.manual_seed(0)
    (query, key, value, mask), _ = make(tokens=101, spread=3.0)
    query, key, value = (tensor.float() for tensor in (query, key, value))
    mask[:, 40] = 0
    function = masked_on(device, implementation)
    with torch.no_grad():
        output = function(query, key, value, mask)
        key[:, :, 40], value[:, :, 40] = 30.0, 1e6
        key[:, :, 70:], value[:, :, 70:] = -30.0, 1e6
        changed = function(query, key, value, mask)
    places = torch.arange(101)
    unaffected = (places != 40) & (places < 70)
    assert torch.equal(changed[:, :, unaffected], output[:, :, unaffected]), "a row sees what it must not see"
    assert not torch.equal(changed[:, :, 40], output[:, :, 40]), "a dropped token sees itself"


def repeats(device: torch.device, implementation: str) -> None:
    """Two runs on the same inputs are equal in every bit, gradients included."""
    torch.manual_seed(0)
    inputs, upstream = make(tokens=300)
    first, second = (results(masked_on(device, implementation), inputs, upstream, torch.float32) for _ in range(2))
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert torch.equal(a, b), f"{name} differs between two runs on the same inputs"


def long_rows(device: torch.device, implementation: str) -> None:
    """At a length of many tiles bfloat16 gives what `chunked` gives in float32 for the same rounded inputs."""
    torch.manual_seed(0)
    tokens = 256 if device.type == "cpu" else 2048
    inputs, upstream = make(batch=1, heads=2, key_heads=2, tokens=tokens, size=128, spread=1.0, keep=0.3)
    rounded = [tensor.bfloat16() for tensor in inputs]
    upstream, mask = upstream.bfloat16(), torch.float32
    expected = results(masked_on(device, "chunked"), rounded, upstream, torch.float32)
    actual = results(masked_on(device, implementation), rounded, upstream, torch.bfloat16, mask)
    unit = torch.finfo(torch.bfloat16).eps
    assert_equal(actual[:4], expected[:4], 2 * unit, NAMES[:4])
    assert_equal(actual[4:], expected[4:], 4 * unit, NAMES[4:])


def memory_is_linear(device: torch.device, implementation: Any) -> None:
    """Four times the tokens take at most 4.2 times the memory in both passes; for devices that count theirs."""

    def peak(tokens: int) -> int:
        *qkv, upstream = torch.randn(4, 1, 32, tokens, 128, device=device, dtype=torch.bfloat16)
        mask = (torch.rand(1, tokens, device=device) < 0.3).float().requires_grad_()
        leaves = [*(tensor.requires_grad_() for tensor in qkv), mask]
        for _ in range(2):
            torch.accelerator.reset_peak_memory_stats(device)
            before = torch.accelerator.memory_allocated(device)
            with torch.enable_grad():
                output = masked_softmax_attention(*leaves, implementation=implementation)
                torch.autograd.grad(output, leaves, upstream)
            torch.accelerator.synchronize(device)
        return torch.accelerator.max_memory_allocated(device) - before

    short, long = peak(2048), peak(8192)
    assert long <= 4.2 * short, f"{short} bytes for 2,048 tokens, {long} for 8,192"


def equals_filled_slots(device: torch.device, implementation: Any, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Each row, and each key head of its own length, is attention over its filled slots alone, in float64.

    Triton never reads the others. shape: B, H, K, W, D.
    """
    torch.manual_seed(0)
    batch, heads, key_heads, slots, size = shape
    query = torch.randn(batch, heads, 1, size, dtype=dtype)
    keys, values = torch.randn(2, batch, key_heads, slots, size, dtype=dtype)
    lengths_BK = torch.randint(0, slots, (batch, key_heads))
    lengths_BK[0, 0] = slots - 1
    for lengths in (lengths_BK[:, 0], lengths_BK):
        each_BK = lengths.view(batch, -1).expand(batch, key_heads)
        expected = query.new_empty(batch, key_heads, heads // key_heads, size, dtype=torch.float64)
        for row, head in torch.cartesian_prod(torch.arange(batch), torch.arange(key_heads)).tolist():
            end = int(each_BK[row, head]) + 1
            its = query.unflatten(1, (key_heads, -1))[row, head, :, 0].double()
            filled = (x[row, head, :end].double() for x in (keys, values))
            expected[row, head] = F.scaled_dot_product_attention(its, *filled)
        unfilled = (torch.arange(slots) > each_BK[..., None])[..., None] & (implementation == "triton")
        read = (x.masked_fill(unfilled, torch.nan) for x in (keys, values))
        with torch.no_grad():
            given = (x.to(device) for x in (query, *read, lengths))
            actual = ragged_attention(*given, implementation=implementation)
        assert actual.dtype == dtype
        tolerance = TOLERANCE.get(dtype, 2 * torch.finfo(dtype).eps)
        assert_equal([actual.cpu().double()], [expected.view(actual.shape)], tolerance, ["output"])


def follows_lengths(device: torch.device, implementation: Any) -> None:
    """Compiled as the step is (recorded and replayed on an accelerator), it follows lengths in place and more slots."""
    torch.manual_seed(0)

    def step(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        return ragged_attention(query * 2, keys, values, lengths, implementation=implementation) + 1

    compiled = torch.compile(step, fullgraph=True, dynamic=False, options=compile_options(device.type != "cpu"))
    lengths = torch.tensor([3, 20], device=device)
    torch._dynamo.mark_static_address(lengths)
    for slots in (64, 128):
        keys, values = torch.randn(2, 2, 2, slots, 16, device=device)
        for storage in (keys, values):
            torch._dynamo.mark_dynamic(storage, 2)
            torch._dynamo.mark_static_address(storage)
        for _ in range(4):
            query = torch.randn(2, 4, 1, 16, device=device)
            with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=slots > 64):
                actual, expected = compiled(query, keys, values, lengths).clone(), step(query, keys, values, lengths)
            assert_equal([actual], [expected], 1e-5, [f"output of {slots} slots, lengths {lengths.tolist()}"])
            lengths.add_(slots // 8)
