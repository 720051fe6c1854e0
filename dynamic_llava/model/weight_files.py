"""A folder's files of weights, opened safely: safetensors, or .bin files that hold tensors and nothing else.

Names, shapes and number formats are read at once, from the heads of the files; values one by one, from one open file at
a time, so that a checkpoint of any size passes through little memory.
"""

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynamic_llava.files import brief, brief_text

STEMS = ("model.safetensors", "pytorch_model.bin")
"""What transformers calls a checkpoint's file, or the first part of its shards' names; the first one found counts."""

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of files that may hold tensors for torch."""
_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state\w*|random_states\w*)\.\w+")
"""What a Trainer leaves beside weights: its own state, no part of a model."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_GLOBAL = re.compile(r"(?:GLOBAL|class|type)\s+([\w.]+\.\w+)")


class Head(NamedTuple):
    """What is known of a stored tensor without reading it; `dtype` is a string where torch has no such format."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str


class WeightFiles:
    """The tensors of one checkpoint: `heads` by name, and `read` for a value.

    Args:
        files: the files, in the order in which they should be read.
        index: name -> file name, where an index lists what there must be.
    Raises FileNotFoundError for a missing file, and ValueError for a damaged one, for one that holds something else
    than tensors (it is not executed), for a tensor that is stored twice, and for an index that does not fit its files.
    """

    def __init__(self, files: Sequence[Path], index: Mapping[str, str] | None = None) -> None:
        self.files = list(files)
        self.heads: dict[str, Head] = {}
        for file in self.files:
            self._add(file)
        self._opened: tuple[Path, Any] | None = None
        for name, file_name in (index or {}).items():
            if name not in self.heads or self.heads[name].file.name != file_name:
                raise ValueError(
                    f"{self.files[0].parent / file_name} lacks the tensor {name}, which the folder's index places "
                    "there; get the folder's files again"
                )

    @classmethod
    def of_folder(cls, folder: str | Path) -> "WeightFiles":
        """Open a checkpoint's folder: one file, an index with its shards, or shards that are numbered completely."""
        files, index = _find(Path(folder))
        return cls(files, index)

    def read(self, name: str) -> Tensor:
        """Return the value of a tensor; it may be a view of the file's memory map, so nothing may write to it."""
        file = self.heads[name].file
        if self._opened is None or self._opened[0] != file:
            self._opened = None  # the memory of the file before goes first
            self._opened = (file, _open_safetensors(file) if _is_safetensors(file) else _load_bin(file))
        opened = self._opened[1]
        value: Tensor = opened[name].detach() if isinstance(opened, dict) else opened.get_tensor(name)
        return value

    def close(self) -> None:
        """Let go of the file that is open."""
        self._opened = None

    def _add(self, file: Path) -> None:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; the checkpoint's folder is not complete")
        heads = _safetensors_heads(file) if _is_safetensors(file) else _bin_heads(file)
        for name, head in heads.items():
            if name in self.heads:
                raise ValueError(f"the tensor {name} is stored twice, in {self.heads[name].file} and in {file}")
            self.heads[name] = head


def all_weight_files(folder: Path) -> list[Path]:
    """Return every file of a folder that may hold weights for torch, read or not; a Trainer's own state is none."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and path.is_file() and not _STATE.fullmatch(path.name)
    )


def holds_model(folder: Path) -> bool:
    """Return whether a folder holds the weights of a whole model, in a file or in shards."""
    return any((folder / stem).is_file() or (folder / f"{stem}.index.json").is_file() for stem in STEMS) or any(
        _numbered_shards(folder, stem) for stem in STEMS
    )


def _find(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Return the files of weights of a folder and, where there is one, its index."""
    for stem in STEMS:
        single, listing = folder / stem, folder / f"{stem}.index.json"
        if single.is_file():
            return [single], None
        if listing.is_file():
            index = read_index(listing)
            files = [folder / name for name in dict.fromkeys(index.values())]
            if missing := next((file for file in files if not file.is_file()), None):
                raise FileNotFoundError(
                    f"{missing} is missing, and {listing.name} names it; the checkpoint's folder is not complete"
                )
            return files, index
        shards = _numbered_shards(folder, stem)
        if shards:
            return shards, None
    looked = ", ".join(f"{stem}, {stem}.index.json" for stem in STEMS)
    raise FileNotFoundError(f"{folder} holds no weights: none of {looked}, nor numbered shards without an index")


def read_index(path: Path) -> dict[str, str]:
    """Return tensor -> file of an index of shards. ValueError where transformers could not read it, or must not."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        index, metadata = values["weight_map"], values["metadata"]
        names = set(index.values())
        if not isinstance(metadata, dict):
            raise TypeError(f"its metadata is {brief(metadata)}, no object")
    except UnicodeDecodeError as error:  # it would show the whole file
        raise ValueError(
            f"{path} is no index of weights (no UTF-8 at byte {error.start}: {error.reason}); get the file again"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of weights ({brief_text(repr(error))}); get the file again") from None
    for name in names:
        own = isinstance(name, str) and Path(name).name == name and name.isprintable()
        if not own or not name.endswith((".safetensors", ".bin")):
            raise ValueError(
                f"{path} names the file {brief(name)}; an index may name files of weights (.safetensors, .bin) of its "
                "own folder only"
            )
    return dict(index)


def _numbered_shards(folder: Path, stem: str) -> list[Path]:
    """Return model-00001-of-0000N.safetensors and so on, N of them, of a folder without an index."""
    base, suffix = stem.rsplit(".", 1)
    pattern = re.compile(rf"{base}-(\d+)-of-(\d+)\.{suffix}")
    found = {
        path: match for path in sorted(folder.glob(f"{base}-*.{suffix}")) if (match := pattern.fullmatch(path.name))
    }
    if not found:
        return []
    totals = {int(match[2]) for match in found.values()}
    numbers = [int(match[1]) for match in found.values()]
    if len(totals) > 1 or numbers != list(range(1, totals.pop() + 1)):
        raise FileNotFoundError(f"{folder} lacks some of its shards: only {', '.join(path.name for path in found)}")
    return list(found)


def _is_safetensors(file: Path) -> bool:
    return file.suffix.lower() == ".safetensors"


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from None


def _safetensors_heads(file: Path) -> dict[str, Head]:
    heads = {}
    with _open_safetensors(file) as opened:
        for name in opened.keys():  # noqa: SIM118
            part = opened.get_slice(name)
            heads[name] = Head(file, tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype()))
    return heads


def _bin_heads(file: Path) -> dict[str, Head]:
    return {name: Head(file, tuple(value.shape), value.dtype) for name, value in _load_bin(file).items()}


def _load_bin(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of torch.save, mapped into memory where its format allows that."""
    try:
        values = _torch_load(file)
    except pickle.UnpicklingError as error:
        named = _GLOBAL.search(str(error))
        raise ValueError(
            f"{file} holds {named[1] if named else 'something that'} beside tensors{'' if named else ' is not one'}; "
            "opening it could run code, so it is refused. Get the weights as safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise _damaged(file, error) from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{file} holds a {type(values).__name__}; a file of weights holds tensors by their names")
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(
                f"{file}: the entry {brief(name)} is no plain tensor but {type(value).__name__}; remove it"
            )
    return dict(values)


def _torch_load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
    return torch.load(file, map_location="cpu", weights_only=True)  # the format of torch before 1.6


def _damaged(file: Path, error: Exception) -> ValueError:
    reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    return ValueError(f"{file} is damaged or was not copied completely ({brief_text(reason)}); get the file again")
