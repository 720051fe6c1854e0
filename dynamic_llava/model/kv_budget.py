"""Which share of an answer fits into so many bytes of keys and values: `generate(kv_budget="512MiB")`.

Layers before the cut store every token, and so does a prompt its text; what is left of the budget is spent on output
tokens in the layers behind the cut, and the share of them that fits chooses the threshold (config/calibration.py). A
window holds its last tokens whatever is decided; sinks are part of the share.
Shape suffixes: B rows, N tokens.
"""

import re
from typing import Any

from torch import Tensor

from dynamic_llava.engine.cache import CACHE, AdmissionCache
from dynamic_llava.methods import Dynamic, Method
from dynamic_llava.model.switches import at_keep_rate
from dynamic_llava.sparsity import budget

LEAST_RATE = 1e-6
"""The rate of a budget that has no room for any output token beside those that stay anyway."""
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def bytes_of(size: int | str) -> int:
    """Return a number of bytes: an int as it is, or a number with a unit, such as "512MiB". ValueError else."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    said = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?i?B)", size) if isinstance(size, str) else None
    if said is None or said[2] not in UNITS or not float(said[1]) > 0:
        raise ValueError(
            f"kv_budget={size!r} is no number of bytes; give an int above 0, or a number and one of {', '.join(UNITS)}"
        )
    return int(float(said[1]) * UNITS[said[2]])


def check_kv_budget(kv_budget: int | str, config: Any, method: Method) -> Dynamic:
    """Return the method of a call that a budget is given to, before there is a prompt.

    config: the model's. ValueError for no number of bytes, a method that keeps all output tokens or has no threshold,
    and a checkpoint without a calibration.
    """
    bytes_of(kv_budget)
    if getattr(config, "image_grid_pinpoints", None) is not None:
        raise ValueError(
            "kv_budget counts images of one size, and those of a LLaVA-NeXT have any; give output_keep_rate or "
            "output_threshold instead"
        )
    if not isinstance(method, Dynamic):
        raise ValueError(f"kv_budget means nothing to method {method.name!r}; leave it out, or give its own settings")
    if not method.sparsifies_output or method.output_selection != "threshold":
        raise ValueError(
            "kv_budget chooses the threshold of output tokens, and this call decides by none; leave it out"
        )
    at_keep_rate(method, "output_keep_rate", 1.0, config.sparsity)
    return method


def method_within(
    kv_budget: int | str, config: Any, method: Method, inputs: dict[str, Any], new_tokens: int | None, value_bytes: int
) -> Dynamic:
    """Return Dynamic-LLaVA with the threshold of the rate that `keep_rate_within` finds; its arguments are these.

    ValueError, also, as `check_kv_budget` raises it.
    """
    chosen = check_kv_budget(kv_budget, config, method)
    rate = keep_rate_within(kv_budget, config, chosen, inputs, new_tokens, value_bytes)
    return at_keep_rate(chosen, "output_keep_rate", rate, config.sparsity)


def keep_rate_within(
    kv_budget: int | str, config: Any, method: Dynamic, inputs: dict[str, Any], new_tokens: int | None, value_bytes: int
) -> float:
    """Return the largest share of an answer's tokens, at most 1, with which the longest row stays within the budget.

    config: the model's; inputs: input_ids (B, N), attention_mask (B, N) or None, all of them so far, and the cache of
    the turns before, whose tokens count as they are stored; new_tokens: most tokens of an answer, the last of which is
    never stored. ValueError where one of these is missing, and where what is there before the answer is too large.
    """
    ids_BN, mask_BN = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids_BN is None:
        raise ValueError("kv_budget is counted from input_ids, and this call has none; give output_keep_rate instead")
    if not new_tokens or new_tokens < 1:
        raise ValueError("kv_budget needs max_new_tokens, the longest answer that has to fit")
    allowed, text = bytes_of(kv_budget), config.text_config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    one = 2 * text.num_key_value_heads * width * value_bytes
    below, above = method.layer, text.num_hidden_layers - method.layer
    prompt_B, kept_B = _prompts(config, method, ids_BN, mask_BN, inputs.get(CACHE))
    stored = new_tokens - 1
    window = min(method.drop_delay, stored)
    held = min(window + method.output_sinks, stored)
    fixed = one * int((below * (prompt_B + stored) + above * (kept_B + held)).max())
    if allowed < fixed:
        what = f"the {held} output tokens of window and sinks" if held else "any output token"
        raise ValueError(
            f"kv_budget={kv_budget!r} is {allowed:,} bytes, and the longest row takes {fixed:,} "
            f"{'with' if held else 'without'} {what} behind layer {method.layer}; give more, or a lower "
            "image_keep_rate, or fewer max_new_tokens"
        )
    fits = (allowed - fixed) / (one * above) + held - window
    return max(LEAST_RATE, min(1.0, fits / (stored - window))) if stored > window else 1.0


def _prompts(config: Any, method: Dynamic, ids_BN: Tensor, mask_BN: Tensor | None, cache: Any) -> tuple[Tensor, Tensor]:
    """(B,) int64 each: tokens before an answer, and those of them that the layers behind the cut store, at most."""
    valid_BN = mask_BN.bool() if mask_BN is not None else ids_BN == ids_BN
    behind_B = before_B = ids_BN.new_zeros(len(ids_BN))
    if isinstance(cache, AdmissionCache) and cache.is_live:
        ids_BN, valid_BN = ids_BN[:, cache.seen_tokens :], valid_BN[:, cache.seen_tokens :]
        behind_B, before_B = cache.lengths()
    prompt_B = valid_BN.sum(1)
    kept_B = prompt_B
    if method.sparsifies_image and method.image_selection == "topk":
        image_B = (valid_BN & (ids_BN == config.image_token_id)).sum(1)
        each = config.image_seq_length
        kept_B = prompt_B - image_B + image_B // each * budget(method.image_keep_rate, each)
    return before_B + prompt_B, behind_B + kept_B
