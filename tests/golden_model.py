"""The recorded model of the published code (tests/golden/) under this library's names.

The published predictors give (keep, drop), ours (drop, keep): the rows of their last layers are swapped here, and so is
the recorded two-channel noise. tests/golden/ holds the recordings and says how they were made.
"""

import json
import re
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, SparsityConfig

FOLDER = Path(__file__).parent / "golden"
OFFICIAL_IMAGE, IMAGE_TOKEN = -200, 127
"""-200 marks an image in the published code's ids; 127 is the one id that no recording uses."""
TOKENS_PER_IMAGE = 16

# The head of Sequential heads: (official name, ours), applied to names below the predictor.
_IMAGE_PREDICTOR = [
    (r"^down_mlp\.", "down."),
    (r"^output_mlp\.", "head."),
    (r"^transformer\.(\d+)\.norm1\.", r"blocks.\1.attention_norm."),
    (r"^transformer\.(\d+)\.attn\.", r"blocks.\1.attention."),
    (r"^transformer\.(\d+)\.norm2\.", r"blocks.\1.mlp_norm."),
    (r"^transformer\.(\d+)\.mlp\.fc1\.", r"blocks.\1.mlp.0."),
    (r"^transformer\.(\d+)\.mlp\.fc2\.", r"blocks.\1.mlp.2."),
]
_OUTPUT_PREDICTOR = [
    (r"^output_mlp\.([01])\.", r"down.\1."),
    (r"^output_mlp\.3\.", "head.0."),
    (r"^output_mlp\.5\.", "head.2."),
    (r"^output_mlp\.7\.", "head.4."),
]
_MODEL = [
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
]
_PREDICTOR_PREFIX = {
    "model.image_score_predictor.": ("model.language_model.image_predictor.", _IMAGE_PREDICTOR),
    "model.output_text_score_predictor.": ("model.language_model.output_predictor.", _OUTPUT_PREDICTOR),
}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_LAST_LAYERS = ("image_score_predictor.output_mlp.4.", "output_text_score_predictor.output_mlp.7.")


def recording(name):
    """Return the tensors of tests/golden/<name>.safetensors."""
    return load_file(FOLDER / f"{name}.safetensors")


def facts(name):
    """Return tests/golden/<name>.json."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def our_name(official):
    """Translate the name of a tensor."""
    rules, prefix, rest = _MODEL, "", official
    for head, (ours, below) in _PREDICTOR_PREFIX.items():
        if official.startswith(head):
            rules, prefix, rest = below, ours, official.removeprefix(head)
    for pattern, replacement in rules:
        renamed = re.sub(pattern, replacement, rest)
        if renamed != rest:
            return prefix + renamed
    return prefix + rest


def our_value(official, tensor):
    """Translate a tensor or its gradient: the two rows of a predictor's last layer change places."""
    return tensor.flip(0) if any(part in official for part in _LAST_LAYERS) else tensor


@lru_cache(maxsize=2)
def golden_model(attention="sdpa"):
    """Return the recorded model; shared, so nothing may write to its weights."""
    recorded = facts("config")
    clip, sparse = recorded["clip_vision_config"], recorded["sparse_config"]
    vision = CLIPVisionConfig(
        **{name: clip[name] for name in (*_SIZES, "image_size", "patch_size", "hidden_act", "layer_norm_eps")}
    )
    text = LlamaConfig(
        **{name: recorded[name] for name in (*_SIZES, "num_key_value_heads", "vocab_size")},
        max_position_embeddings=recorded["max_position_embeddings"],
        rms_norm_eps=recorded["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": recorded["rope_theta"]},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    config = DynamicLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        image_seq_length=TOKENS_PER_IMAGE,
        vision_feature_layer=recorded["mm_vision_select_layer"],
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        sparsity=SparsityConfig(
            sparse_layer=sparse["sparse_layer"],
            image_keep_rate=sparse["vision_keep_rate"],
            output_keep_rate=sparse["output_text_keep_rate"],
            output_min_length=sparse["output_text_len_for_training"],
            predictor_width=sparse["d_model"],
            predictor_heads=sparse["nhead"],
            predictor_mlp=sparse["dim_feedforward"],
            predictor_blocks=sparse["num_layers"],
            keep_rate_weight=sparse["mask_loss_weight"],
            cache_block=8,
        ),
    )
    config._attn_implementation = attention
    model = DynamicLlavaForConditionalGeneration(config).eval()
    weights = {our_name(name): our_value(name, tensor) for name, tensor in recording("model").items()}
    model.load_state_dict(weights, strict=True)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def expand(ids, values=None, filler=0):
    """Replace the single -200 of each row of ids (B, n) by 16 image tokens.

    With `values` (B, n), such as labels or a mask, the same places are filled with `filler` instead.
    """
    rows = []
    for row, source in zip(ids, ids if values is None else values, strict=True):
        place = int((row == OFFICIAL_IMAGE).nonzero())  # one image per row in every recording
        image = torch.full((TOKENS_PER_IMAGE,), IMAGE_TOKEN if values is None else filler, dtype=source.dtype)
        rows.append(torch.cat([source[:place], image, source[place + 1 :]]))
    return torch.stack(rows)
