"""LLaVA-format data: reading and checking the JSON, tokenised samples on disk, their order, and batches.

The names below are loaded when they are first used: the package's commands answer --help without `datasets`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamic_llava.data.llava_json import LlavaSample, read_samples, resolve_image
    from dynamic_llava.data.sampling import FILLER, EpochSampler
    from dynamic_llava.data.sft import Collator, SftDataset, SftSample, Unread, UnreadError

__all__ = [
    "FILLER",
    "Collator",
    "EpochSampler",
    "LlavaSample",
    "SftDataset",
    "SftSample",
    "Unread",
    "UnreadError",
    "read_samples",
    "resolve_image",
]

_HOME_OF = {
    "Collator": "sft",
    "LlavaSample": "llava_json",
    "read_samples": "llava_json",
    "resolve_image": "llava_json",
    "FILLER": "sampling",
    "EpochSampler": "sampling",
    "SftDataset": "sft",
    "SftSample": "sft",
    "Unread": "sft",
    "UnreadError": "sft",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"{__name__} has no attribute {name!r}; its names are {', '.join(__all__)}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value
