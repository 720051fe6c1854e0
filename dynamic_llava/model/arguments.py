"""What `forward` and `generate` are given: names that something knows, shapes that fit, modes that can be served.

What cannot be served is refused before any computation, each with the way out.

Shape suffixes: B rows, N tokens, the new ones alone.
"""

import inspect
import logging
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn
from transformers.utils import TransformersKwargs

from dynamic_llava.engine.cache import CACHE, AdmissionCache
from dynamic_llava.layout import chunk_of

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
NO_ROLL_BACK = "it rolls the cache back, and dropped tokens cannot be restored"
REFUSED = {
    "assistant_model": NO_ROLL_BACK,
    "prompt_lookup_num_tokens": NO_ROLL_BACK,
    "prefill_chunk_size": "a chunk could cut an image apart before its tokens are ranked",
    "guidance_scale": "guidance runs a second context through a cache of its own",
    "cache_implementation": "rows of the admission cache have lengths of their own",
    "token_healing": "it writes the prompt anew, without its images",
}
"""Options of `generate` that sparse decoding cannot serve -> why; a dense call serves them as transformers does."""
NO_LLAVA = {
    "assistant_early_exit": "it leaves layers of a language model out by a setting that LLaVA lacks",
    "use_mtp": "it drafts with prediction heads, and a LLaVA has none",
}
"""Options of `generate` that transformers itself serves for other models alone -> why."""
_HARMLESS = {"guidance_scale": 1, "cache_implementation": "dynamic", "use_mtp": False, "token_healing": False}
"""Values of these options that ask for nothing."""
_OF_FORWARD = ("keep_mask", "tau", "num_samples_in_batch", "distill", "loss_scale", "skip_logits")
"""Arguments of `forward` that mean nothing to `generate` (labels, which a Seq2SeqTrainer gives it, are left alone)."""


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


def setting(settings: Any, kwargs: dict[str, Any], name: str) -> Any:
    """Return an option of `generate`: the keyword argument, or the entry of the GenerationConfig `settings`."""
    return kwargs[name] if kwargs.get(name) is not None else getattr(settings, name, None)


def refuse_for_any_sparsity(settings: Any, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for options of other models, and for arguments that `forward` alone can use."""
    for name, reason in NO_LLAVA.items():
        if setting(settings, kwargs, name):
            raise ValueError(f"{name}={setting(settings, kwargs, name)!r} cannot be served: {reason}; leave it out")
    for name in _OF_FORWARD:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name} belongs to forward: generate feeds tokens that nobody can have decided about yet, and learns "
                "nothing; leave it out, or feed the tokens to the model one by one"
            )


def refuse_unsupported(settings: Any, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for options that a sparse generation cannot serve, and for a cache it cannot go on with."""
    for name, reason in REFUSED.items():
        value = setting(settings, kwargs, name)
        if value is not None and value != _HARMLESS.get(name):
            shown = type(value).__name__ if isinstance(value, nn.Module) else repr(value)
            raise ValueError(f"{name}={shown} is not supported with sparsity: {reason}. Use sparsity='none' for it")
    cache = kwargs.get(CACHE)
    if cache is not None and not isinstance(cache, AdmissionCache):
        raise ValueError(
            f"cache is a {type(cache).__name__}; continue with the cache that a sparse call returned, or use "
            "sparsity='none'"
        )
    for name in ("num_beams", "num_return_sequences"):
        copies = setting(settings, kwargs, name) or 1
        if cache is not None and cache.get_seq_length() and copies > 1:
            raise ValueError(
                f"{name}={copies} is not supported on a live cache, which holds one row per conversation; repeat its "
                "rows with cache.batch_repeat_interleave and those of the inputs, or start a new cache"
            )


def refuse_misfits(input_ids: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Refuse masks that do not fit, from which transformers would derive positions, and prompts that end in padding."""
    embeds, cache, attention_mask = kwargs.get("inputs_embeds"), kwargs.get(CACHE), kwargs.get("attention_mask")
    tokens = embeds[..., 0] if embeds is not None else input_ids
    for name in ("attention_mask", "output_mask") if tokens is not None else ():
        if kwargs.get(name) is not None:
            chunk_of(name, kwargs[name], tokens, 0 if cache is None else cache.get_seq_length())
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        rows = (attention_mask[:, -1] == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"attention_mask ends in padding in rows {rows}; generation continues every row at its last column, so pad "
            "prompts on the left (padding_side='left')"
        )
