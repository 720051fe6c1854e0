"""Which share of an answer fits into so many bytes of keys and values: `generate(kv_budget="512MiB")`.

Layers before the cut store every token, and so does a prompt its text; what is left of the budget is spent on output
tokens in the layers behind the cut, and the share of them that fits chooses the threshold (config/calibration.py). A
window holds its last tokens whatever is decided; sinks are part of the share.
Shape suffixes: B rows, N tokens.
"""

import re
from typing import Any

from torch import Tensor

from dynamic_llava.methods import Dynamic
from dynamic_llava.sparsity import budget

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


def keep_rate_within(
    kv_budget: int | str, config: Any, method: Dynamic, inputs: dict[str, Any], new_tokens: int | None, value_bytes: int
) -> float:
    """Return the largest share of output tokens, at most 1, with which the longest row stays within the budget.

    config: the model's; inputs: input_ids (B, N), attention_mask (B, N) or None, of a first turn; new_tokens: most
    tokens of an answer, the last of which is never stored. ValueError where nothing could be dropped, where the prompt
    alone is too large, and for a later turn, whose cache holds other tokens already.
    """
    if not method.sparsifies_output or method.output_selection != "threshold":
        raise ValueError(
            "kv_budget chooses the threshold of output tokens, and this call decides by none; leave it out"
        )
    ids_BN, mask_BN = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids_BN is None or inputs.get("cache") is not None:
        raise ValueError("kv_budget is counted from the input_ids of a first turn; give output_keep_rate instead")
    if not new_tokens or new_tokens < 1:
        raise ValueError("kv_budget needs max_new_tokens, the longest answer that has to fit")
    allowed, text = bytes_of(kv_budget), config.text_config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    one = 2 * text.num_key_value_heads * width * value_bytes
    below, above = method.layer, text.num_hidden_layers - method.layer
    prompt_B, kept_B = _prompts(config, method, ids_BN, mask_BN)
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
    return min(1.0, fits / (stored - window)) if stored > window else 1.0


def _prompts(config: Any, method: Dynamic, ids_BN: Tensor, mask_BN: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B,) int64 each: tokens of a prompt, and those of them that the layers behind the cut store, at most."""
    valid_BN = mask_BN.bool() if mask_BN is not None else ids_BN == ids_BN
    prompt_B = valid_BN.sum(1)
    if not method.sparsifies_image or method.image_selection != "topk":
        return prompt_B, prompt_B
    image_B = (valid_BN & (ids_BN == config.image_token_id)).sum(1)
    each = config.image_seq_length
    return prompt_B, prompt_B - image_B + image_B // each * budget(method.image_keep_rate, each)
