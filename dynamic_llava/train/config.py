"""What makes a run another run: its settings, and what the files hold that they name; and what differs between two.

Names of files tell nothing: data may be cleaned under the same name, and a copy elsewhere is the same. So files are
compared as a text of size and SHA-256; of images, which training opens one by one, names and sizes are.
"""

import hashlib
import json
from collections.abc import Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dynamic_llava.config.run import NOT_COMPARED, RunConfig, flat
from dynamic_llava.data import SftDataset
from dynamic_llava.engine.decide import check_training
from dynamic_llava.files import brief, content_of
from dynamic_llava.methods import Dynamic, Method, import_named, print_method, read_method
from dynamic_llava.model.loading import checkpoint_files
from dynamic_llava.model.switches import choose_method
from dynamic_llava.train.distributed import read_deepspeed
from dynamic_llava.train.meter import SCHEDULED

LONGEST_CONTENT = 300
"""Characters of a content that a message shows as it was recorded."""
SAMPLES_PER_STEP = "samples per optimizer step"
COMPARED_BY_CONTENT = {"model.base", "data.json", "data.image_folder", "train.calibrate.json"}
"""Settings that name files: a copy of the same content elsewhere is the same (`run_inputs`)."""
BASE_FILES = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "preprocessor_config.json", "processor_config.json", "chat_template*", "adapter_*",
)  # fmt: skip
"""What loading reads of a base checkpoint beside its weights."""
WEIGHTS_OF_TORCH = "pytorch_model*.bin*"
IMAGES_AT_A_TIME, STAT_THREADS = 512, 16
"""A file system over a network answers many questions at once."""


def run_method(config: RunConfig) -> Method:
    """Return what a run's training decides by; ValueError for a method that it cannot be trained under."""
    import_named(config.sparsity.method)  # a run's file is its user's word, a checkpoint is not
    if config.method is None:
        chosen = choose_method(config.sparsity, **config.train.switches)
        _check_recipe(config, chosen)
        return chosen
    method = read_method(config.method, config.sparsity)
    if isinstance(method, Dynamic):
        raise ValueError(
            f"method={config.method!r}: in a run's file the settings of Dynamic-LLaVA stand in the section `sparsity`, "
            "and what is sparsified in train.sparsity_mode; leave `method` out"
        )
    if method.used_parts:
        raise ValueError(
            f"method={config.method!r} learns, and a checkpoint's settings say whose weights it holds: give it as "
            "sparsity.method instead"
        )
    if not config.train.learning_rates(()):
        raise ValueError(
            f"train.tune={config.train.tune!r} with method={config.method!r} trains nothing: the method has no weights "
            "to learn; choose another tune"
        )
    check_training(method)
    _check_recipe(config, method)
    return method


def _check_recipe(config: RunConfig, method: Method) -> None:
    """Raise ValueError for a way of learning to be sparse that does nothing with this method."""
    train, name = config.train, method.name
    if train.calibrate is not None and not isinstance(method, Dynamic):
        raise ValueError(
            f"train.calibrate with method {name!r}: the margins of Dynamic-LLaVA's predictors are measured, and it has "
            "none; leave it out"
        )
    if train.distill is not None and method.is_dense:
        raise ValueError(f"train.distill with method {name!r}: nothing is dropped, so there is nothing to distill")
    if train.keep_rate_schedule is not None and not method.keep_rates(config.sparsity).keys() & SCHEDULED:
        raise ValueError(
            f"train.keep_rate_schedule with method {name!r}, which aims at no keep rate of images or outputs in "
            "training; leave it out"
        )
    if train.start_keep_rate is None:
        return
    if not method.used_parts:
        raise ValueError(f"train.start_keep_rate with method {name!r}, which has no predictors; leave it out")
    if config.sparsity.relaxation == "soft_topk":
        raise ValueError(
            "train.start_keep_rate with sparsity.relaxation='soft_topk', which keeps the budget of the keep rate "
            "whatever a bias says; leave it out, or let train.keep_rate_schedule begin with every token"
        )


def compared_settings(config: RunConfig, processes: int) -> dict[str, Any]:
    """Return the settings, by dotted name, that a resumed run must share with its checkpoint."""
    said = asdict(config)
    if config.method is not None:
        said["method"] = print_method(run_method(config))  # with what was left to the defaults
    values = json.loads(json.dumps(flat(said)))
    kept = {name: value for name, value in values.items() if name not in NOT_COMPARED}
    train = config.train
    return {**kept, SAMPLES_PER_STEP: train.batch_size * train.gradient_accumulation * processes}


def changes(then: Mapping[str, Any], now: Mapping[str, Any], *, leave_out: Set[str] = frozenset()) -> list[str]:
    """Return what differs between two `compared_settings`, a "NAME was X and is Y" each.

    A setting that an earlier version of this library did not have had its default's meaning. Settings whose files are
    compared by their content are to be left out.
    """
    before = {**compared_settings(RunConfig(), 1), **then}
    names = sorted((set(then) | set(now)) - leave_out)
    return [f"{n} was {brief(before.get(n))} and is {brief(now.get(n))}" for n in names if before.get(n) != now.get(n)]


def file_inputs(config: RunConfig, base: str) -> dict[str, str]:
    """Return name -> content of the data file and of the base checkpoint's files; `base` is its folder or hub name.

    Large files are read once and remembered (`files.file_digest`). Raises OSError where a file is missing.
    """
    found = {"data.json": content_of(Path(config.data.json))}
    if config.train.calibrate is not None:
        found["train.calibrate.json"] = content_of(Path(config.train.calibrate.json))
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
        f"{name} was {_content(then.get(name))} and is {_content(now.get(name))}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]


def _content(recorded: Any) -> str:
    """Return what a record says of an input, for a message: records are files, and may hold anything."""
    if recorded is None:
        return "absent"
    plain = isinstance(recorded, str) and recorded.isprintable() and len(recorded) < LONGEST_CONTENT
    return recorded if plain else brief(recorded)


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
