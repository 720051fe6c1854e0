"""Writes the base as an ordinary llava-hf folder: config, safetensors, tokenizer, image settings, provenance."""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from dynamic_llava.files import give_usual_modes
from dynamic_llava.tiny.base.model import CLIP_MEAN, CLIP_STD
from dynamic_llava.tiny.world.scenes import IMAGE_SIZE, PATCH_SIZE


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
