"""What a run depends on beside its settings: what the files hold that the settings name.

Names tell nothing: data may be cleaned under the same name, and a copy elsewhere is the same. Everything is compared as
a text of size and SHA-256; of images, which training opens one by one, names and sizes are.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dynamic_llava.config.run import RunConfig
from dynamic_llava.data import SftDataset
from dynamic_llava.files import content_of
from dynamic_llava.model.loading import checkpoint_files
from dynamic_llava.train.distributed import read_deepspeed

BASE_FILES = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "preprocessor_config.json", "processor_config.json", "chat_template*", "adapter_*",
)  # fmt: skip
"""What loading reads of a base checkpoint beside its weights."""
WEIGHTS_OF_TORCH = "pytorch_model*.bin*"
IMAGES_AT_A_TIME, STAT_THREADS = 512, 16
"""A file system over a network answers many questions at once."""


def file_inputs(config: RunConfig, base: str) -> dict[str, str]:
    """Return name -> content of the data file and of the base checkpoint's files; `base` is its folder or hub name.

    Large files are read once and remembered (`files.file_digest`). Raises OSError where a file is missing.
    """
    found = {"data.json": content_of(Path(config.data.json))}
    for file in _base_files(base):
        found[f"model.base/{file.name}"] = content_of(file)
    return found


def run_inputs(config: RunConfig, base: str, dataset: SftDataset) -> dict[str, str]:
    """Return name -> content of everything that a run reads: `file_inputs`, samples, images, the DeepSpeed settings."""
    found = file_inputs(config, base)
    found["samples"] = _samples(dataset)
    found["data.image_folder"] = _images(Path(config.data.image_folder), dataset.image_names())
    if config.train.deepspeed is not None:
        found |= _leaves("train.deepspeed", read_deepspeed(config.train.deepspeed))
    return found


def changed_inputs(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return what differs, a "NAME was X and is Y" each."""
    return [
        f"{name} was {then.get(name, 'absent')} and is {now.get(name, 'absent')}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]


def _base_files(base: str) -> list[Path]:
    folder = Path(base)
    try:
        weights = checkpoint_files(base)
        folder = weights[0].parent
    except OSError:
        weights = sorted(folder.glob(WEIGHTS_OF_TORCH))
        if not weights:
            raise
    others = {file for pattern in BASE_FILES for file in folder.glob(pattern) if file.is_file()}
    return sorted({*weights, *others})


def _samples(dataset: SftDataset) -> str:
    """Number and digest of the places and lengths of the samples, which their order in training depends on."""
    places = dataset.rows.select_columns(["index", "length"]).with_format("numpy")[:]
    digest = hashlib.sha256(np.stack([places["index"], places["length"]]).astype("<i8").tobytes())
    return f"{len(dataset):,} samples, sha256 {digest.hexdigest()[:16]}"


def _images(folder: Path, names: list[str]) -> str:
    """Number, size and digest of the images' names and sizes; a missing one counts as such."""

    def sizes(some: list[str]) -> list[int | None]:
        return [_size(folder / name) for name in some]

    parts = [names[start : start + IMAGES_AT_A_TIME] for start in range(0, len(names), IMAGES_AT_A_TIME)]
    with ThreadPoolExecutor(STAT_THREADS) as threads:
        found = [size for part in threads.map(sizes, parts) for size in part]
    digest = hashlib.sha256(json.dumps(sorted(zip(names, found, strict=True))).encode())
    total = sum(size or 0 for size in found)
    return f"{len(names):,} images of {total:,} bytes, sha256 {digest.hexdigest()[:16]}"


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None


def _leaves(name: str, value: object) -> dict[str, str]:
    if isinstance(value, dict) and value:
        return {key: leaf for part, inner in value.items() for key, leaf in _leaves(f"{name}.{part}", inner).items()}
    return {name: json.dumps(value)}
