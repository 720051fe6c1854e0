"""Which settings of a run make another run of it, and what differs between two runs."""

import json
from collections.abc import Mapping, Set
from dataclasses import asdict
from typing import Any

from dynamic_llava.config.run import NOT_COMPARED, RunConfig, flat
from dynamic_llava.engine.decide import check_training
from dynamic_llava.methods import Dynamic, Method, print_method, read_method
from dynamic_llava.model.switches import choose_method

SAMPLES_PER_STEP = "samples per optimizer step"
COMPARED_BY_CONTENT = {"model.base", "data.json", "data.image_folder"}
"""Settings that name files: a copy of the same content elsewhere is the same (`inputs.run_inputs`)."""


def run_method(config: RunConfig) -> Method:
    """Return what a run's training decides by; ValueError for a method that it cannot be trained under."""
    import_learned(config)
    if config.method is None:
        return choose_method(config.sparsity, **config.train.switches)
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
    return method


def import_learned(config: RunConfig) -> None:
    """Import the class of a learned method of one's own: a run's file is its user's word, a checkpoint is not."""
    if config.sparsity.method is not None:
        read_method(config.sparsity.method, config.sparsity)


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
    return [f"{n} was {before.get(n)!r} and is {now.get(n)!r}" for n in names if before.get(n) != now.get(n)]
