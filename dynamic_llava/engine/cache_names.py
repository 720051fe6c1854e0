"""What the installed transformers calls the cache: `past_key_values` until 5.23, `cache` from 5.24 on.

This library says `cache`, and takes and gives the earlier name as well, whichever transformers is installed.
"""

import inspect
from typing import Any

from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

EARLIER = "past_key_values"
CACHE = "cache" if "cache" in inspect.signature(LlamaDecoderLayer.forward).parameters else EARLIER
"""Argument of transformers' layers, and key of the arguments that `generate` hands from step to step."""


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Return the cache that was given under either name. ValueError when both were."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument; give one of them")
    return cache if cache is not None else past_key_values


def rename_cache(kwargs: dict[str, Any]) -> None:
    """Give the cache among keyword arguments, if any, the installed transformers' name. ValueError when it is twice."""
    cache = one_cache(kwargs.pop("cache", None), kwargs.pop(EARLIER, None))
    if cache is not None:
        kwargs[CACHE] = cache


def cache_of(output: Any) -> Cache | None:
    """Return the cache of a model's or of generate's output; None where there is none."""
    return getattr(output, CACHE, None)


def is_live(cache: Cache | None) -> bool:
    """Whether a cache has seen tokens."""
    return cache is not None and cache.get_seq_length() > 0
