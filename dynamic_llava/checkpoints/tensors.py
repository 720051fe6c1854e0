"""Tensors on their way from one checkpoint into another: one at a time, so that memory holds one of them."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dynamic_llava.checkpoints.folders import Say
from dynamic_llava.model.weight_files import Head, WeightFiles

FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Number formats that weights may have, with their names in a safetensors file."""

Change = Callable[[Tensor], Tensor]
"""Something that happens to a tensor between reading and writing; it returns a new one."""


class NewTensors(WeightFiles):
    """Tensors that no file holds yet, and that are written with those of files."""

    def __init__(self, values: Mapping[str, Tensor], dtype: torch.dtype | str) -> None:
        super().__init__(())
        self._values = values
        self.heads = {name: Head(Path("new"), tuple(value.shape), dtype) for name, value in values.items()}

    def read(self, name: str) -> Tensor:
        """Return the value of a tensor."""
        return self._values[name]


@dataclass(frozen=True)
class Placement:
    """One tensor of the new checkpoint, and where it comes from."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: WeightFiles
    stored: str
    """Its name in the source."""
    changes: tuple[Change, ...] = ()

    @property
    def size(self) -> int:
        """Return its bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        """Return the value that is written."""
        value = self.source.read(self.stored)
        for change in self.changes:
            value = change(value)
        value = value.to(self.dtype)
        assert tuple(value.shape) == self.shape, f"{self.name}: {tuple(value.shape)}, announced as {self.shape}"
        return value


def swap_rows(value: Tensor) -> Tensor:
    """Return the two rows of a predictor's last layer in the other order: (keep, drop) becomes (drop, keep)."""
    return value.flip(0)


def add_mean_rows(count: int) -> Change:
    """Return a change that appends `count` rows, each the mean of the rows there are."""

    def extend(value: Tensor) -> Tensor:
        mean = value.mean(0, dtype=torch.float64).to(value.dtype)
        return torch.cat((value, mean.expand(count, *mean.shape)))

    return extend


def write_weights(folder: Path, placements: Sequence[Placement], shard_bytes: int, say: Say) -> None:
    """Write `model.safetensors`, or shards of at most `shard_bytes` (or one tensor) and their index.

    The placements of one source file should stand together: a file is open only while its own are written.
    """
    shards = _shards(placements, shard_bytes)
    places = {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / name, shard)
        places.update((placement.name, name) for placement in shard)
        say(f"written: {name}, {len(shard)} tensors, {sum(placement.size for placement in shard) / 1e9:.3f} GB")
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(placement.size for placement in placements)}, "weight_map": places}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _shards(placements: Iterable[Placement], shard_bytes: int) -> list[list[Placement]]:
    shards: list[list[Placement]] = []
    filled = 0
    for placement in placements:
        if not shards or filled + placement.size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(placement)
        filled += placement.size
    return shards


def _write_safetensors(path: Path, placements: Sequence[Placement]) -> None:
    """Write a file in the safetensors format tensor by tensor; the library's own function wants all of them at once.

    A file is the length of its header (8 bytes), the header in JSON, and the values one after the other without a gap.
    """
    # Wider formats first: every value then begins at a multiple of its own width, as a memory map needs.
    placements = sorted(placements, key=lambda placement: -placement.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for placement in placements:
        start, end = end, end + placement.size
        header[placement.name] = {
            "dtype": FLOATS[placement.dtype],
            "shape": list(placement.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for placement in placements:
            file.write(placement.read().contiguous().reshape(-1).view(torch.uint8).numpy())
