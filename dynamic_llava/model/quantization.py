"""Quantised loading that leaves the learned parts alone: few weights, which decide over what the layers above see.

transformers replaces every linear layer that its quantisation settings do not exclude. The exclusion is made here, so
that nobody has to know the parts' names.
"""

import copy
from collections.abc import Collection
from typing import Any

from dynamic_llava.engine.learned import HOME

_DEFAULT = ("lm_head",)
"""What transformers excludes by itself, but only where no list is given."""
_FIELDS = ("modules_to_not_convert", "llm_int8_skip_modules", "skip_modules")
"""What the list is called: in torchao and most others, in bitsandbytes, in HQQ."""
_FIELD_OF_METHOD = {"bitsandbytes": "llm_int8_skip_modules", "hqq": "skip_modules"}


def spare_learned(settings: Any, parts: Collection[str]) -> Any:
    """Return a copy of quantisation settings that exclude the learned `parts`, and what they exclude already.

    They keep the number format of the checkpoint, or of `dtype`. `settings` is a configuration of transformers
    (BitsAndBytesConfig, TorchAoConfig, ...), or the dict of one as it stands in config.json. Raises ValueError for a
    configuration that cannot exclude anything.
    """
    settings = copy.deepcopy(settings)
    if isinstance(settings, dict):
        field = _field_of_dict(settings)
        settings[field] = _with_learned(settings.get(field), parts)
        return settings
    field = next((name for name in _FIELDS if hasattr(settings, name)), "")
    if not field:
        raise ValueError(
            f"{type(settings).__name__} has no list of modules to leave out ({', '.join(_FIELDS)}), so it would "
            "quantise what a method has learned; use BitsAndBytesConfig, TorchAoConfig or another one with such a list"
        )
    setattr(settings, field, _with_learned(getattr(settings, field), parts))
    return settings


def _field_of_dict(settings: dict[str, Any]) -> str:
    present = [name for name in _FIELDS if name in settings]
    if present:
        return present[0]
    # bitsandbytes need not say its name: transformers knows it by these two switches.
    switched = settings.get("load_in_8bit") or settings.get("load_in_4bit")
    method = "bitsandbytes" if switched else str(settings.get("quant_method", ""))
    return _FIELD_OF_METHOD.get(method, "modules_to_not_convert")


def _with_learned(given: list[str] | None, parts: Collection[str]) -> list[str]:
    excluded = list(_DEFAULT if given is None else given)
    return excluded + [name for name in (f"{HOME}.{part}" for part in parts) if name not in excluded]
