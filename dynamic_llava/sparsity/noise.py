"""Counter-based random numbers: a number depends on (key, token index, stream) and on nothing else.

So a sample gets the same noise alone or in any batch, with gradient accumulation, on any number of ranks, on CPU and on
GPU. The generator is splitmix64's finaliser on int64 tensors, whose multiplication and addition wrap on every device.
Shape suffixes: B rows, N tokens.
"""

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """Return the int64 with the same lowest 64 bits as `value`."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)
_UNIFORM_BITS = 23


def fold_key(*parts: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Fold integers and integer tensors into int64 keys (B,); the order of the parts matters.

    Each part is an int or an integer tensor of shape () or (B,): e.g. `fold_key(seed, epoch, step, sample_id_B)`. Ints
    alone give one key (1,). The keys lie on the tensors' device, or on `device`. Raises ValueError for other types.
    """
    if not parts:
        raise ValueError("fold_key needs at least one part: an int or an integer tensor of shape () or (B,)")
    if device is None:
        device = next((part.device for part in parts if isinstance(part, Tensor)), None)
    key = torch.zeros(1, dtype=torch.int64, device=device)
    for part in parts:
        key = _mix(key ^ _mix(_as_int64(part, key.device) + _GOLDEN))
    return key


def uniform_noise(key_B: Tensor, index: Tensor, stream: int = 0) -> Tensor:
    """Return uniform numbers (B, N), float32, in the open interval (0, 1), bit-identical on every device.

    key_B (B,) int64 from `fold_key`; index (N,) or (B, N) integer: which number of the row's sequence, usually the
    token's place; stream: an independent sequence of the same key.
    """
    if key_B.dim() != 1 or key_B.dtype != torch.int64:
        raise ValueError(f"key is {key_B.dtype} of shape {tuple(key_B.shape)}; give the (B,) int64 that fold_key makes")
    if index.dim() not in (1, 2) or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(f"index is {index.dtype} of shape {tuple(index.shape)}; give integers of shape (N,) or (B, N)")
    if index.dim() == 2 and index.shape[0] != key_B.shape[0]:
        raise ValueError(f"index has {index.shape[0]} rows and key has {key_B.shape[0]}; give one row per key, or (N,)")
    row_B1 = fold_key(key_B, stream)[:, None]
    bits_BN = _mix(row_B1 + (index.to(torch.int64) + 1) * _GOLDEN)
    # 23 bits and a half are exact in float32, so neither 0 nor 1 can come out of rounding.
    top_BN = _shift_right(bits_BN, 64 - _UNIFORM_BITS)
    return (top_BN.to(torch.float32) + 0.5) * 2.0**-_UNIFORM_BITS


def gumbel_noise(key_B: Tensor, index: Tensor, channels: int = 2) -> Tensor:
    """Return standard Gumbel noise (B, N, channels), float32: -log(-log u), each channel from its own stream.

    Arguments as in `uniform_noise`. The logarithms are taken in float64 so that devices round to the same float32.
    """
    uniform = torch.stack([uniform_noise(key_B, index, stream) for stream in range(channels)], dim=-1).double()
    return -torch.log(-torch.log(uniform)).float()


def _as_int64(part: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(part, Tensor):
        if part.is_floating_point() or part.is_complex() or part.dtype == torch.bool or part.dim() > 1:
            raise ValueError(
                f"a key part is {part.dtype} of shape {tuple(part.shape)}; give integers of shape () or (B,)"
            )
        return part.to(device=device, dtype=torch.int64)
    if isinstance(part, bool) or not isinstance(part, int):
        raise ValueError(f"a key part is {part!r}; give an int or an integer tensor of shape () or (B,)")
    return torch.tensor(_signed(part), dtype=torch.int64, device=device)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own shift copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Apply splitmix64's finaliser, a bijection in which every input bit flips about half of the output bits."""
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIER_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIER_2
    return x ^ _shift_right(x, 31)
