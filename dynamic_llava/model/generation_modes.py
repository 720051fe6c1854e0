"""What `generate` is asked for that cannot be served, refused before any computation, each with the way out."""

from typing import Any

from torch import Tensor, nn

from dynamic_llava.engine.cache import AdmissionCache
from dynamic_llava.engine.cache_names import CACHE
from dynamic_llava.layout import chunk_of

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
    "assistant_early_exit": "it leaves layers of a language model out by its own configuration, which LLaVA has not",
    "use_mtp": "it drafts with heads that a LLaVA has not",
}
"""Options of `generate` that transformers itself serves for other models alone -> why."""
_HARMLESS = {"guidance_scale": 1, "cache_implementation": "dynamic", "use_mtp": False, "token_healing": False}
"""Values of these options that ask for nothing."""
_OF_FORWARD = ("keep_mask", "tau", "num_samples_in_batch", "loss_scale")
"""Arguments of `forward` that mean nothing to `generate` (labels, which a Seq2SeqTrainer gives it, are left alone)."""


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
