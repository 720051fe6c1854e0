"""What a checkpoint's folder says about prompts and images: config.json and the two files of a saved processor."""

import json
from pathlib import Path
from typing import Any

from transformers import LlavaConfig
from transformers.utils import cached_file

from dynamic_llava.processing.images import CLIP_MEAN, CLIP_STD

_HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


def read_settings(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the processor's settings, by the names of its constructor, of a folder or hub name.

    config.json is asked first, then processor_config.json with preprocessor_config.json. `arguments` may hold
    transformers' hub arguments; others are left alone.
    Raises FileNotFoundError when the sizes are nowhere to be found, and ValueError when two files contradict.
    """
    hub = {key: arguments[key] for key in _HUB_ARGUMENTS if key in arguments}
    model, processor = _read_json(name, "config.json", hub), _read_json(name, "processor_config.json", hub) or {}
    pixels = _read_json(name, "preprocessor_config.json", hub) or processor.get("image_processor") or {}
    if model is None and not ("patch_size" in processor and "crop_size" in pixels):
        raise FileNotFoundError(
            f"{name} holds neither config.json nor processor_config.json with preprocessor_config.json; "
            "give the folder of a LLaVA checkpoint (llava-hf layout) or of a saved processor"
        )
    settings = _sizes_of_model(model) if model is not None else _sizes_of_processor(processor, pixels)
    _check_pixels(name, pixels, settings["image_size"])
    return {
        **settings,
        "image_mean": pixels.get("image_mean", CLIP_MEAN),
        "image_std": pixels.get("image_std", CLIP_STD),
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` as a JSON file with sorted keys."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sizes_of_model(values: dict[str, Any]) -> dict[str, Any]:
    own = ("sparsity", "untrained_predictors")  # the keys that DynamicLlavaConfig adds
    config = LlavaConfig.from_dict({key: value for key, value in values.items() if key not in own})
    return {
        "image_size": config.vision_config.image_size,
        "patch_size": config.vision_config.patch_size,
        "image_token_id": config.image_token_index,
        "feature_select": config.vision_feature_select_strategy,
    }


def _sizes_of_processor(processor: dict[str, Any], pixels: dict[str, Any]) -> dict[str, Any]:
    return {
        "image_size": _side(pixels["crop_size"]),
        "patch_size": processor["patch_size"],
        "feature_select": processor.get("vision_feature_select_strategy", "default"),
    }


def _check_pixels(name: str, pixels: dict[str, Any], image_size: int) -> None:
    if "crop_size" in pixels and _side(pixels["crop_size"]) != image_size:
        raise ValueError(
            f"{name}: preprocessor_config.json makes images of {_side(pixels['crop_size'])} pixels and the vision "
            f"tower sees {image_size}; correct one of the two files"
        )
    if abs(pixels.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise ValueError(f"{name}: rescale_factor={pixels['rescale_factor']} is not offered; LLaVA-1.5 uses 1/255")


def _side(size: int | dict[str, int]) -> int:
    return size if isinstance(size, int) else size["height"]


def _read_json(name: str, file: str, hub: dict[str, Any]) -> dict[str, Any] | None:
    found = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub)
    if found is None:
        return None
    try:
        return json.loads(Path(found).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{found} is no valid JSON ({error}); replace the file") from None
