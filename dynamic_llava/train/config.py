"""Which settings of a run make another run of it, and what differs between two runs."""

import json
from collections.abc import Mapping, Set
from dataclasses import asdict
from typing import Any

from dynamic_llava.config.run import NOT_COMPARED, RunConfig, flat

SAMPLES_PER_STEP = "samples per optimizer step"
COMPARED_BY_CONTENT = {"model.base", "data.json", "data.image_folder"}
"""Settings that name files: a copy of the same content elsewhere is the same (`inputs.run_inputs`)."""


def compared_settings(config: RunConfig, processes: int) -> dict[str, Any]:
    """Return the settings, by dotted name, that a resumed run must share with its checkpoint."""
    values = json.loads(json.dumps(flat(asdict(config))))
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
