"""What a value of a setting may be: each check raises a ValueError that says what was given and what is allowed."""

import math
from dataclasses import fields
from typing import Any


def check_finite(prefix: str, settings: Any) -> None:
    """Raise ValueError for a number of a dataclass that is not finite: NaN passes every comparison with a limit.

    `prefix` is what a message calls the section: "train.".
    """
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{prefix}{setting.name}={value!r} is no finite number; give one, such as 1e-5")


def check_keep_rate(name: str, value: float) -> None:
    """Raise ValueError unless 0 < value <= 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name}={value!r} is not a keep rate; give a number in (0, 1], 1 keeps every token")


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of the words that a setting takes."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, allowed))}")


def at_least(name: str, value: float, low: float, advice: str) -> None:
    """Raise ValueError for a number below `low`; `advice` says what to give instead."""
    if value < low:
        raise ValueError(f"{name}={value!r} is below its least value {low}; {advice}")


def check_one_rate(output_keep_rate: float | None, kv_budget: str | None) -> None:
    """Raise ValueError where a rate and a budget of bytes both say how many output tokens stay."""
    if output_keep_rate is not None and kv_budget is not None:
        raise ValueError("kv_budget and output_keep_rate both say how many output tokens stay; leave one of them out")


def check_sparse_layer(sparse_layer: int, layers: int) -> None:
    """Raise ValueError unless a language model of `layers` layers has a layer before and at the sparse one."""
    if not 1 <= sparse_layer < layers:
        raise ValueError(
            f"sparse_layer={sparse_layer} is outside 1..{layers - 1} of a {layers}-layer language model; choose a "
            "layer that has one before it"
        )
