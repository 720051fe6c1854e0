"""What `forward` and `generate` are given: names that something knows, shapes that fit one another.

Shape suffixes: B rows, N new tokens, P tokens that a cache has seen before them.
"""

import inspect
import logging
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from torch import Tensor
from transformers.utils import TransformersKwargs

logger = logging.getLogger(__name__)

DEBUGGING = frozenset({"debug_io", "debug_io_dir", "prune_layers"})
"""Arguments of every transformers model, read by a decorator of its forward."""
TOKEN_KINDS = frozenset({"token_type_ids", "mm_token_type_ids"})
"""Tensors that processors and collators of other models add; decoders have no use for them, here as in transformers."""
PASSED_ON = TransformersKwargs.__optional_keys__ | DEBUGGING | TOKEN_KINDS | {"return_dict", "interpolate_pos_encoding"}
"""Names that transformers' LLaVA hands on to its layers, its vision tower and its loss."""
DENSE_ONLY = {
    "cu_seq_lens_q": "packed sequences",
    "cu_seq_lens_k": "packed sequences",
    "max_length_q": "packed sequences",
    "max_length_k": "packed sequences",
    "seq_idx": "packed sequences",
    "is_causal": "attention to later tokens",
    "interpolate_pos_encoding": "images of other sizes",
    "image_sizes": "images of several sizes",
}
"""Names that a sparse call cannot serve -> what they ask for."""


def names_of(model_class: type) -> frozenset[str]:
    """Return the names of the arguments of a model's forward."""
    return frozenset(inspect.signature(model_class.forward).parameters) - {"self", "kwargs"}


def check_names(given: Mapping[str, Any], known: Collection[str], what: str) -> None:
    """Raise ValueError for an argument of `what` that nothing knows, and name the one that it resembles."""
    for name, value in given.items():
        if value is None or name in known or name in PASSED_ON:
            continue
        near = get_close_matches(name, sorted({*known, *PASSED_ON}), n=1, cutoff=0.7)
        hint = f"did you mean {near[0]!r}?" if near else "leave it out"
        raise ValueError(f"{what} has no argument {name!r} (given: {_shown(value)}); {hint}")


def check_served(given: Mapping[str, Any]) -> None:
    """Raise ValueError for an argument of transformers' that a sparse call cannot serve."""
    for name, wish in DENSE_ONLY.items():
        value = given.get(name)
        if value is None or (name == "is_causal" and value is True) or (value is False and name != "is_causal"):
            continue
        raise ValueError(
            f"{name}={_shown(value)} asks for {wish}, which sparse layers cannot serve; leave it out, or pass "
            "sparsity='none'"
        )


def check_shapes(batch: int, tokens: int, **given: Any) -> None:
    """Raise ValueError unless tensors of one value per token, and those of one per sample, fit (B, N) tokens.

    Names without a rule here are let through: masks that may cover a cache too are checked where they are cut
    (`chunk_of`).
    """
    allowed = {
        "position_ids": [(batch, tokens), (1, tokens)],
        "labels": [(batch, tokens)],
        "shift_labels": [(batch, tokens)],
        "image_mask": [(batch, tokens)],
        "sample_key": [(batch,)],
    }
    for name, value in given.items():
        shape = tuple(getattr(value, "shape", ()))
        if name == "attention_mask" and value is not None and len(shape) != 2:
            raise ValueError(
                f"attention_mask has shape {shape}, but sparse layers need one value per token, ({batch}, {tokens}); "
                "give that, or pass sparsity='none', which takes every mask that transformers takes"
            )
        if value is not None and name in allowed and shape not in allowed[name]:
            raise ValueError(
                f"{name} has shape {shape} but the tokens have shape ({batch}, {tokens}); give shape "
                f"{' or '.join(map(str, allowed[name]))}"
            )


def warn_past_positions(config: Any, tokens: int) -> None:
    """Log a warning, once, where a generation leaves the positions that the language model was trained on."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        logger.warning_once(  # transformers gives it to every logger
            f"this generation has gone past the {limit} positions that the model knows (max_position_embeddings): what "
            "follows may be of any quality; ask for fewer new tokens, or shorten the conversation"
        )


def _shown(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
