"""How a method is spelled by its settings, one by one."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any


def nested_method(settings: Iterable[tuple[str, Any]], before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the mapping that spells a method (methods/registry.py) from its settings by dotted name.

    ("name", "mixed"), ("output_by", "random"), ("output_by.seed", "3") give {"name": "mixed", "output_by": {"name":
    "random", "seed": "3"}}. They are added to those of `before`; of two values of one setting the last holds.
    """
    method = deepcopy(dict(before or {}))
    for path, value in settings:
        *outer, last = path.replace("-", "_").split(".")
        place = method
        for name in outer:
            inner = place.get(name)
            place[name] = inner if isinstance(inner, dict) else {} if inner is None else {"name": inner}
            place = place[name]
        if isinstance(place.get(last), dict):
            place[last]["name"] = value
        else:
            place[last] = value
    return method
