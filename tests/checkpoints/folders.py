"""Tiny checkpoints in every layout that is read, written with names spelled out here and not taken from the tables."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

from tests.builders import IMAGE_TOKEN, build_model

PREDICTORS = ("model.language_model.image_predictor.", "model.language_model.output_predictor.")
_ORIGINAL = [
    (r"^model\.language_model\.", "model."),
    (r"^model\.multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^model\.multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
]
_IMAGE = [
    (r"^down\.", "down_mlp."),
    (r"^head\.", "output_mlp."),
    (r"^blocks\.(\d+)\.attention_norm\.", r"transformer.\1.norm1."),
    (r"^blocks\.(\d+)\.attention\.", r"transformer.\1.attn."),
    (r"^blocks\.(\d+)\.mlp_norm\.", r"transformer.\1.norm2."),
    (r"^blocks\.(\d+)\.mlp\.0\.", r"transformer.\1.mlp.fc1."),
    (r"^blocks\.(\d+)\.mlp\.2\.", r"transformer.\1.mlp.fc2."),
]
_OUTPUT = [
    (r"^down\.", "output_mlp."),
    (r"^head\.0\.", "output_mlp.3."),
    (r"^head\.2\.", "output_mlp.5."),
    (r"^head\.4\.", "output_mlp.7."),
]


def rename(name, rules):
    """Apply the first rule that fits."""
    for pattern, replacement in rules:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def original_weights(model, predictors=False):
    """Return a model's tensors under LLaVA's own names; with predictors, those of the published code."""
    weights = {}
    for name, value in model.state_dict().items():
        if name.startswith(PREDICTORS[0]):
            own = "model.image_score_predictor." + rename(name.removeprefix(PREDICTORS[0]), _IMAGE)
            flipped = name.removeprefix(PREDICTORS[0]).startswith("head.4.")
        elif name.startswith(PREDICTORS[1]):
            own = "model.output_text_score_predictor." + rename(name.removeprefix(PREDICTORS[1]), _OUTPUT)
            flipped = name.removeprefix(PREDICTORS[1]).startswith("head.4.")
        else:
            weights[rename(name, _ORIGINAL)] = value.clone()
            continue
        if predictors:
            weights[own] = value.flip(0).clone() if flipped else value.clone()
    return weights


def original_config(model, **changes):
    """Return config.json as LLaVA writes it, from transformers 4's keys; <image> is a word the model has."""
    text, vision = model.config.text_config, model.config.vision_config
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        **{name: getattr(text, name) for name in (*sizes, "num_key_value_heads", "vocab_size", "rms_norm_eps")},
        "max_position_embeddings": text.max_position_embeddings,
        "rope_theta": text.rope_parameters["rope_theta"],
        "rope_scaling": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "image_token_index": IMAGE_TOKEN,
        "mm_vision_tower": "openai/some-tiny-tower",
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
        "clip_vision_config": {
            **{name: getattr(vision, name) for name in (*sizes, "image_size", "patch_size", "hidden_act")},
            "layer_norm_eps": vision.layer_norm_eps,
        },
    }
    return config | changes


def sparse_config(model, **changes):
    """Return the published code's sparse_config of a model."""
    own = model.config.sparsity
    return {
        "use_vision_predictor": True,
        "vision_keep_rate": own.image_keep_rate,
        "use_text_predictor": True,
        "use_output_text_predictor": True,
        "output_text_keep_rate": own.output_keep_rate,
        "output_text_len_for_training": own.output_min_length,
        "use_instruct_predictor": False,
        "instruct_keep_rate": 0.7,
        "instruct_len_for_training": 25,
        "sparse_layer": own.sparse_layer,
        "d_model": own.predictor_width,
        "nhead": own.predictor_heads,
        "dim_feedforward": own.predictor_mlp,
        "num_layers": own.predictor_blocks,
        "mask_loss_weight": own.keep_rate_weight,
    } | changes


def write(folder, config, weights, files="safetensors"):
    """Write a folder; `files`: safetensors, bin, old-bin, and with -shards, or -numbered (shards without an index)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    stem, suffix = ("model", "safetensors") if files.startswith("safetensors") else ("pytorch_model", "bin")

    def save(tensors, path):
        if suffix == "safetensors":
            save_file(tensors, path, metadata={"format": "pt"})
        else:
            torch.save(tensors, path, _use_new_zipfile_serialization=not files.startswith("old"))

    if not files.endswith(("shards", "numbered")):
        save(weights, folder / f"{stem}.{suffix}")
        return folder
    names = sorted(weights)
    parts = [names[start::3] for start in range(3)]
    index = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}-{number:05d}-of-00003.{suffix}"
        save({name: weights[name] for name in part}, folder / file)
        index.update(dict.fromkeys(part, file))
    if files.endswith("shards"):
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / f"{stem}.{suffix}.index.json").write_text(text, encoding="utf-8")
    return folder


def original_folder(folder, model=None, files="safetensors", without=(), **changes):
    """Write a model as the original LLaVA; `without`: beginnings of names that are left out."""
    model = model or build_model()
    weights = {n: v for n, v in original_weights(model).items() if not n.startswith(tuple(without) or "-")}
    return write(folder, original_config(model, **changes), weights, files)


def published_folder(folder, model=None, files="safetensors", **changes):
    """Write a model as the published Dynamic-LLaVA."""
    model = model or build_model()
    config = original_config(model, model_type="dynamic_llava_llama", sparse_config=sparse_config(model)) | changes
    return write(folder, config, original_weights(model, predictors=True), files)


def clip_folder(folder, model, full=False):
    """Write a model's vision tower as a CLIPVisionModel of old transformers, or as a full CLIPModel."""
    vision = model.config.vision_config
    weights = {
        "vision_model." + name.removeprefix("model.vision_tower."): value.clone()
        for name, value in model.state_dict().items()
        if name.startswith("model.vision_tower.")
    }
    weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    config = vision.to_dict()
    if full:
        text = CLIPTextConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
        )
        clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))
        weights |= {n: v for n, v in clip.state_dict().items() if not n.startswith("vision_model.")}
        config = clip.config.to_dict()
    return write(folder, config, weights, "bin")


def same_tensors(actual, expected):
    """Assert that two state dicts hold the same names, formats and bits."""
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name
