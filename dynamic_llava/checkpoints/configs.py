"""From another layout's config.json to ours, and from ours to llava-hf's.

Sizes come from the configuration and, where it is silent, from the shapes of the tensors. That the two agree is not
asked here: every tensor's shape is compared with the model's before anything is written.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig

from dynamic_llava.checkpoints.folders import Say
from dynamic_llava.checkpoints.names import (
    EMBEDDING,
    IMAGE_PREDICTOR,
    OUTPUT_PREDICTOR,
    PROJECTOR,
    TOWER,
    is_predictors,
)
from dynamic_llava.config import SparsityConfig
from dynamic_llava.engine.decoder import FAMILIES
from dynamic_llava.engine.learned import parts_of
from dynamic_llava.files import brief
from dynamic_llava.model import DynamicLlavaConfig
from dynamic_llava.model.supported import check_architecture
from dynamic_llava.projectors import (
    DEFAULT,
    TokenPacker,
    TokenPacker3,
    TokenPacker4,
    image_tokens,
    layers_of,
    tokens_of,
)
from dynamic_llava.sparsity import budget

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of the tensors there are, by our names."""

_TEXT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_bias",
    "attention_dropout", "mlp_bias", "rope_theta", "rope_scaling", "rope_parameters", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip
_WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
"""What other families than Llama say of layers that see the last tokens only, which are refused."""
_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings",
)  # fmt: skip
_VISION = (
    "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads", "num_channels",
    "image_size", "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout", "initializer_range",
    "initializer_factor",
)  # fmt: skip
_SPARSITY = {
    "sparse_layer": "sparse_layer",
    "vision_keep_rate": "image_keep_rate",
    "output_text_keep_rate": "output_keep_rate",
    "output_text_len_for_training": "output_min_length",
    "d_model": "predictor_width",
    "nhead": "predictor_heads",
    "dim_feedforward": "predictor_mlp",
    "num_layers": "predictor_blocks",
    "mask_loss_weight": "keep_rate_weight",
}
"""Keys of the published code's sparse_config, and ours."""
_PREDICTOR_FLAGS = {
    "image_predictor": ("use_vision_predictor",),
    "output_predictor": ("use_text_predictor", "use_output_text_predictor"),
}
_UNUSED = ("use_instruct_predictor", "instruct_keep_rate", "instruct_len_for_training")
_STRATEGIES = {"patch": "default", "cls_patch": "full"}
_PACKED = f"{PROJECTOR}query.weight"
"""A tensor that TokenPacker has, and LLaVA's own projector has not."""
_HEAD_WIDTH = 64
"""Width of an attention head in every one of OpenAI's CLIP towers."""
_LAYER = re.compile(r"\.(?:layers|blocks)\.(\d+)\.")


def config_from_original(
    values: dict[str, Any], shapes: Shapes, vision: dict[str, Any] | None, say: Say, projector: str | None = None
) -> DynamicLlavaConfig:
    """Return our configuration for a config.json of the original LLaVA or of the published Dynamic-LLaVA.

    Or for one of a language model alone, which gets a `projector`. `vision` is the configuration of a separate tower;
    without it config.json's clip_vision_config is used, and without that the shapes, where the tower is one of
    OpenAI's. The vocabulary is still the source's.
    Raises ValueError for settings of another architecture than LLaVA-1.5.
    """
    _check_architecture(values, alone=projector is not None)
    if values.get("image_aspect_ratio") != "pad":
        say("images: padded to a square as LLaVA-1.5 was trained, although config.json does not ask for it")
    text = _text_config(values, shapes)
    tower = _vision_config(values, shapes, vision, say)
    strategy = _STRATEGIES[values.get("mm_vision_select_feature") or "patch"]
    projector = projector_of(values, shapes) if projector is None else projector
    tokens = tokens_of(tower.image_size, tower.patch_size, strategy, projector)
    return DynamicLlavaConfig(
        projector=projector,
        vision_config=tower,
        text_config=text,
        image_seq_length=tokens,
        vision_feature_layer=values.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=False,
        sparsity=_sparsity(values, shapes, text.num_hidden_layers, tokens, say),
        untrained_predictors=_untrained(values.get("sparse_config")),
    )


def projector_of(values: dict[str, Any], shapes: Shapes) -> str:
    """Return the name of the projector of an original LLaVA. ValueError for a TokenPacker of another scale than ours.

    Its tensors tell TokenPacker: the published training writes LLaVA's own mm_projector_type into config.json, and
    where it writes no scale_factor, the code knows 2 alone.
    """
    if _PACKED not in shapes and values.get("mm_projector_type") != "tokenpacker":
        return DEFAULT
    known = {kind.scale: kind.name for kind in (TokenPacker, TokenPacker3, TokenPacker4)}
    scale = values.get("scale_factor", TokenPacker.scale)
    if scale not in known:
        raise ValueError(
            f"config.json has scale_factor: {brief(scale)}, and a TokenPacker has one of {', '.join(map(str, known))}"
        )
    return known[scale]


def config_from_hf(values: dict[str, Any], ours: bool) -> DynamicLlavaConfig:
    """Return our configuration for a config.json of llava-hf, or of this library. ValueError unless it is LLaVA-1.5."""
    check_architecture("config.json", values)
    if values.get("quantization_config"):
        raise ValueError("config.json has a quantization_config; convert the checkpoint that was quantised instead")
    values = {key: value for key, value in values.items() if key != "model_type"}
    config = DynamicLlavaConfig.from_dict(values)
    if not ours:
        config.untrained_predictors = list(parts_of(config.sparsity))
    return config


def config_of_parts(
    config: DynamicLlavaConfig, trained: dict[str, Any], shapes: Shapes, say: Say
) -> DynamicLlavaConfig:
    """Return the base's configuration with what an original LLaVA's config.json says of the parts trained on it.

    Sizes and vocabulary are the base's, which has grown by <image>. Raises ValueError where the parts were trained for
    another architecture, or to see other features of the tower.
    """
    _check_architecture(trained)
    strategy = _STRATEGIES[trained.get("mm_vision_select_feature") or "patch"]
    projector = projector_of(trained, shapes)
    values = {"projector": projector, "vision_feature_layer": trained.get("mm_vision_select_layer", -2)}
    wanted = layers_of(_with(config, **values)), strategy
    if projector != config.projector:  # that of the parts
        config = _with(config, **values)
        config.image_seq_length = image_tokens(config)
    features = (trained.get("mm_vision_select_layer", -2), strategy)
    if wanted != (config.vision_feature_layer, config.vision_feature_select_strategy):
        raise ValueError(
            f"config.json has features {features} of the tower (mm_vision_select_layer, mm_vision_select_feature), and "
            f"the base has {(config.vision_feature_layer, config.vision_feature_select_strategy)}; give the base that "
            "the parts were trained on"
        )
    if trained.get("sparse_config") is not None or (
        config.untrained_predictors and any(is_predictors(name) for name in shapes)
    ):
        layers = config.text_config.num_hidden_layers
        config.sparsity = _sparsity(trained, shapes, layers, config.image_seq_length, say)
        config.untrained_predictors = _untrained(trained.get("sparse_config"))
    return config


def _with(config: DynamicLlavaConfig, **values: Any) -> DynamicLlavaConfig:
    """Return a copy of a configuration with other values."""
    said = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    return DynamicLlavaConfig.from_dict(said | values)


def config_to_hf(config: DynamicLlavaConfig) -> LlavaConfig:
    """Return llava-hf's configuration of the same model without its predictors."""
    own = ("sparsity", "untrained_predictors", "model_type", "architectures", "transformers_version")
    values = {key: value for key, value in config.to_dict().items() if key not in own}
    return LlavaConfig(**values | {"image_seq_length": config.image_seq_length - config.added_image_tokens})


def _check_architecture(values: dict[str, Any], alone: bool = False) -> None:
    for name in ("sparse_config", "clip_vision_config", "vision_config"):
        if not isinstance(values.get(name), dict | None):
            raise ValueError(f"config.json has {name} {brief(values[name])}, which should be an object of settings")
    allowed: dict[str, tuple[Any, ...]] = {
        "mm_projector_type": (None, "mlp2x_gelu", "tokenpacker"),
        "mm_vision_select_feature": (None, *_STRATEGIES),
        "mm_patch_merge_type": (None, "flat"),
        "image_aspect_ratio": (None, "pad", "square"),
        "mm_use_im_start_end": (None, False),
        "mm_resampler_type": (None, "identity"),
        "tie_word_embeddings": (None, False, True) if alone else (None, False),
    }
    for name, choices in allowed.items():
        if values.get(name) not in choices:
            known = ", ".join(repr(choice) for choice in choices if choice is not None)
            raise ValueError(
                f"config.json has {name}: {brief(values[name])}; LLaVA-1.5 has {known}, and no other is known here"
            )


def _text_config(values: dict[str, Any], shapes: Shapes) -> Any:
    family = values.get("model_type") if values.get("model_type") in FAMILIES else "llama"
    given = {name: values[name] for name in _TEXT if values.get(name) is not None}
    if "num_attention_heads" not in given:
        raise ValueError("config.json has no num_attention_heads, which no shape tells; add it")
    for name in _COUNTS:
        if not isinstance(given.get(name, 1), int) or given.get(name, 1) < 1:
            raise ValueError(f"config.json has {name} {brief(given[name])}, which should be a positive whole number")
    if given.get("pad_token_id", 0) < 0:  # old Llamas: no padding token
        del given["pad_token_id"]
    layers = "model.language_model.layers."
    up, key = (shapes.get(f"{layers}0.{part}.weight") for part in ("mlp.up_proj", "self_attn.k_proj"))
    known = {"num_hidden_layers": _count_layers(shapes, layers)}
    if EMBEDDING in shapes:
        known |= {"vocab_size": shapes[EMBEDDING][0], "hidden_size": shapes[EMBEDDING][-1]}
    if up:
        known["intermediate_size"] = up[0]
    sizes = {**known, **given}
    if key and "hidden_size" in sizes:
        head = sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
        sizes.setdefault("num_key_value_heads", key[0] // head)
    window = {name: values[name] for name in _WINDOW if family != "llama" and name in values}  # null counts: no window
    return AutoConfig.for_model(family, **sizes, **window, tie_word_embeddings=False)


def _vision_config(
    values: dict[str, Any], shapes: Shapes, separate: dict[str, Any] | None, say: Say
) -> CLIPVisionConfig:
    given = separate or values.get("clip_vision_config") or values.get("vision_config")
    if given is not None:
        given = given.get("vision_config") or given  # a full CLIPModel keeps the tower's settings one level down
        check_architecture("the vision tower's config.json", {"vision_config": given})
        return CLIPVisionConfig(**{name: given[name] for name in _VISION if given.get(name) is not None})
    name = str(values.get("mm_vision_tower"))
    if not re.search(r"clip-vit-(base|large)-patch\d+", name):
        raise ValueError(
            f"config.json names the vision tower {brief(name)} and has no clip_vision_config, so its number of heads "
            "is not known; add clip_vision_config (the tower's own config.json) to config.json"
        )
    missing = [
        part for part in ("class_embedding", "patch_embedding.weight") if f"{TOWER}embeddings.{part}" not in shapes
    ]
    if missing:
        raise ValueError(
            f"the tensor {TOWER}embeddings.{missing[0]} is missing, so the vision tower's size is not known"
        )
    config = _sizes_of_tower(shapes)
    say(
        f"vision tower: sizes from its tensors ({config.image_size} pixels, {config.num_hidden_layers} layers), "
        f"{config.num_attention_heads} heads of {_HEAD_WIDTH} and quick_gelu as in all of OpenAI's"
    )
    return config


def _sizes_of_tower(shapes: Shapes) -> CLIPVisionConfig:
    width = shapes[f"{TOWER}embeddings.class_embedding"][0]
    patch = shapes[f"{TOWER}embeddings.patch_embedding.weight"][-1]
    places = shapes.get(f"{TOWER}embeddings.position_embedding.weight", (1,))[0]
    mlp = shapes.get(f"{TOWER}encoder.layers.0.mlp.fc1.weight", (4 * width,))[0]
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=_count_layers(shapes, f"{TOWER}encoder.layers."),
        num_attention_heads=max(1, width // _HEAD_WIDTH),
        image_size=patch * math.isqrt(max(1, places - 1)),
        patch_size=patch,
        hidden_act="quick_gelu",
    )


def _count_layers(shapes: Shapes, beginning: str) -> int:
    numbers = [int(match[1]) for name in shapes if name.startswith(beginning) and (match := _LAYER.search(name))]
    return max(numbers, default=-1) + 1


def _sparsity(values: dict[str, Any], shapes: Shapes, layers: int, tokens: int, say: Say) -> SparsityConfig:
    published = values.get("sparse_config")
    if published is None and any(is_predictors(name) for name in shapes):
        raise ValueError(
            "there are predictors, but config.json has no sparse_config, and no tensor tells the keep rates; add the "
            "sparse_config of the training run"
        )
    if published is None:
        # The paper's settings; a toy of two layers has no layer 2.
        return SparsityConfig(sparse_layer=max(1, min(SparsityConfig.sparse_layer, layers - 1)))
    if published.get("use_instruct_predictor"):
        raise ValueError(
            "config.json has sparse_config.use_instruct_predictor: true; that predictor of prompt tokens has learned "
            "questions without their role words, and here they are told by their place, role words included: train one "
            "(sparsity.prompt_keep_rate: 0.7)"
        )
    known = {*_SPARSITY, *_UNUSED, *(flag for flags in _PREDICTOR_FLAGS.values() for flag in flags)}
    unknown = sorted(set(published) - known)
    if unknown:
        say(f"sparse_config: {', '.join(unknown)} mean nothing here and are left out")
    absent = [name for name in ("sparse_layer", "vision_keep_rate") if name not in published]
    if absent:
        raise ValueError(f"config.json's sparse_config has no {absent[0]}; no tensor tells it, so add it")
    given = {ours: published[name] for name, ours in _SPARSITY.items() if name in published}
    sparsity = SparsityConfig(**{**_sizes_of_predictors(shapes), **given})
    _compare_budgets(sparsity, tokens, say)
    return sparsity


def _sizes_of_predictors(shapes: Shapes) -> dict[str, int]:
    sizes = {}
    for name in (f"{OUTPUT_PREDICTOR}down.1.weight", f"{IMAGE_PREDICTOR}down.1.weight"):
        if name in shapes:
            sizes["predictor_width"] = shapes[name][0]
            sizes["predictor_blocks"] = _count_layers(shapes, f"{IMAGE_PREDICTOR}blocks.")
    if f"{IMAGE_PREDICTOR}blocks.0.mlp.0.weight" in shapes:
        sizes["predictor_mlp"] = shapes[f"{IMAGE_PREDICTOR}blocks.0.mlp.0.weight"][0]
    return sizes


def _compare_budgets(sparsity: SparsityConfig, tokens: int, say: Say) -> None:
    ours, theirs = budget(sparsity.image_keep_rate, tokens), int(tokens * sparsity.image_keep_rate)
    if ours != theirs:
        say(
            f"budget: {sparsity.image_keep_rate} of {tokens} image tokens are {ours} here and {theirs} in the "
            "published code, which multiplies in binary fractions"
        )


def _untrained(published: dict[str, Any] | None) -> list[str]:
    if published is None:
        return list(_PREDICTOR_FLAGS)
    return [name for name, flags in _PREDICTOR_FLAGS.items() if not all(published.get(flag, True) for flag in flags)]
