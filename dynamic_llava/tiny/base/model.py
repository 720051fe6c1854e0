"""The tiny LLaVA: transformers' own classes (CLIP tower, two-layer projector, Llama) at 1.7 million parameters.

It is exported as an ordinary llava-hf folder: config, safetensors, tokenizer, image settings, provenance.
"""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from dynamic_llava.files import give_usual_modes
from dynamic_llava.tiny.world.scenes import IMAGE_SIZE, PATCH_SIZE, TOKENS_PER_IMAGE

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)

CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def tiny_config(vocab_size: int, pad_id: int, bos_id: int, eos_id: int, image_id: int) -> LlavaConfig:
    """Shapes of the shipped base: tower 96 x 4 layers, decoder 128 x 6 layers with 4 heads, 64 image tokens.

    The features of the last tower layer are used (the tower has no spare layer), without CLS as in LLaVA-1.5.
    """
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        projection_dim=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        pad_token_id=pad_id,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_id,
        image_seq_length=TOKENS_PER_IMAGE,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        pad_token_id=pad_id,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
    )


def build_tiny_llava(config: LlavaConfig, seed: int) -> LlavaForConditionalGeneration:
    """Randomly initialised float32 model; the same seed gives the same weights. The global RNG is left untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config).float()


def build_tower(config: LlavaConfig, seed: int) -> CLIPVisionModel:
    """The vision tower of `config` alone, randomly initialised; independent of the text side's shapes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPVisionModel(config.vision_config).float()


def folded(model: LlavaForConditionalGeneration, feature_scale: float) -> LlavaForConditionalGeneration:
    """A copy that takes the tower's features as they are: the division by their deviation moves into the projector."""
    result = copy.deepcopy(model).eval()
    with torch.no_grad():
        result.model.multi_modal_projector.linear_1.weight /= feature_scale
    return result.requires_grad_(False)


def image_settings() -> dict[str, Any]:
    """preprocessor_config.json: LLaVA-1.5's preparation (expand to square, resize, CLIP's mean and deviation)."""
    return {
        "image_processor_type": "LlavaImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_pad": True,
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "patch_size": PATCH_SIZE,
        "vision_feature_select_strategy": "default",
    }


def export(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    provenance: dict[str, Any],
    log: Path | None,
) -> None:
    """Writes `model` (already folded) to `folder`, replacing an earlier export as a whole.

    The new folder is complete before it takes the place of the old one. A folder that is no earlier export (it lacks
    provenance.json) is left alone: ValueError.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "provenance.json").exists():
        raise ValueError(f"{folder} holds other files; give an empty folder or an earlier export")
    fresh = folder.with_name(folder.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    config = model.config
    text = config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    _write_json(fresh / "preprocessor_config.json", image_settings())
    _write_json(fresh / "provenance.json", provenance)
    if log is not None:
        shutil.copyfile(log, fresh / "training_log.jsonl")
    give_usual_modes(fresh)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
