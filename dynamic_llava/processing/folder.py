"""What a checkpoint's folder says about prompts and images: config.json and the two files of a saved processor."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlavaConfig
from transformers.utils import cached_file

from dynamic_llava.config import SparsityConfig
from dynamic_llava.engine.learned import added_tokens
from dynamic_llava.files import brief, brief_text
from dynamic_llava.model.supported import (
    HUB_ARGUMENTS,
    check_architecture,
    check_place,
    naming_config,
    read_settings_file,
    refuse_adapter,
    refuse_code,
)
from dynamic_llava.model.tiles import pinpoints_of
from dynamic_llava.processing.base_template import Ends
from dynamic_llava.processing.image_processor import DynamicLlavaImageProcessor
from dynamic_llava.processing.images import CLIP_MEAN, CLIP_STD
from dynamic_llava.projectors import DEFAULT


def read_settings(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the processor's settings, by the names of its constructor, of a folder or hub name.

    config.json is asked first, then processor_config.json with preprocessor_config.json. `arguments` may hold
    transformers' hub arguments; others are left alone.
    Raises FileNotFoundError when the sizes are nowhere to be found, and ValueError when two files contradict.
    """
    check_place(name, arguments)
    model = read_settings_file(name, "config.json", arguments)
    processor = read_settings_file(name, "processor_config.json", arguments) or {}
    pixels = read_settings_file(name, "preprocessor_config.json", arguments) or processor.get("image_processor") or {}
    if model is None and not ("patch_size" in processor and "crop_size" in pixels):
        refuse_adapter(name, arguments)
        raise FileNotFoundError(
            f"{name} holds neither config.json nor processor_config.json with preprocessor_config.json; "
            "give the folder of a LLaVA checkpoint (llava-hf layout) or of a saved processor"
        )
    if not isinstance(pixels, dict):
        raise ValueError(f"processor_config.json of {name} has image_processor {brief(pixels)}, where settings belong")
    settings = _sizes_of_model(name, model) if model is not None else _sizes_of_processor(name, processor, pixels)
    _check_pixels(name, pixels, settings["image_size"])
    colours = {"image_mean": pixels.get("image_mean", CLIP_MEAN), "image_std": pixels.get("image_std", CLIP_STD)}
    try:
        DynamicLlavaImageProcessor(settings["image_size"], **colours)
    except ValueError as error:
        raise ValueError(f"preprocessor_config.json of {name}: {brief_text(error)}") from None
    return {**settings, **colours}


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise ValueError where tokenizers panics: a panic in Rust is a BaseException, and no `except Exception` meets it.

    A vocabulary with a hole in it, for one, shows at the first text in this way.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # pyo3 makes the class as it goes; nothing exports it
            raise
        raise ValueError(str(error)) from None


def load_tokenizer(name: str | Path, **arguments: Any) -> Any:
    """Return the tokenizer of a folder or hub name, of one of transformers' own classes; no code of the folder is run.

    `arguments` are those of transformers' AutoTokenizer. Raises ValueError where the folder asks for code of its own.
    """
    check_place(name, arguments)
    refuse_code(name, arguments)
    try:
        with panics_as_errors():
            tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False, **arguments)
            tokenizer("a")  # some damage shows at the first text only: a longest length that is no number
    except (OSError, ImportError):
        raise
    except Exception as error:  # transformers and tokenizers raise what they like for a damaged file
        reason = brief_text(" ".join(str(error).split()) or type(error).__name__)
        raise ValueError(f"the tokenizer of {name} cannot be read ({reason}); get its files again") from error
    return tokenizer


def template_of(tokenizer: Any) -> str | None:
    """Return the chat template that a tokenizer brings; of several with names, the one that is called default."""
    found = getattr(tokenizer, "chat_template", None)
    return found.get("default") if isinstance(found, dict) else found


def read_template(name: str | Path, tokenizer: Any, arguments: dict[str, Any]) -> str | None:
    """Return the chat template of a folder or hub name, looked for in transformers' order; None without one.

    chat_template.jinja, which the tokenizer has read, counts most; then the processor's files; then the tokenizer's.
    Raises ValueError that names the file where a template is no text.
    """
    hub = {key: arguments[key] for key in HUB_ARGUMENTS if key in arguments}
    if cached_file(str(name), "chat_template.jinja", _raise_exceptions_for_missing_entries=False, **hub) is None:
        for file in ("chat_template.json", "processor_config.json"):
            found = (read_settings_file(name, file, arguments) or {}).get("chat_template")
            if found is not None and not isinstance(found, str):
                raise ValueError(f"{file} of {name} has a chat_template of type {type(found).__name__}; give a text")
            if found:
                return found
    return template_of(tokenizer)


def read_ends(name: str | Path, arguments: dict[str, Any]) -> Ends | None:
    """Return the ids at which generation stops, as transformers finds them; None where no file says so.

    Raises ValueError that names the file where they are neither a whole number nor a list of such.
    """
    for file, parts in (("generation_config.json", ()), ("config.json", ("text_config",)), ("config.json", ())):
        values: Any = read_settings_file(name, file, arguments) or {}
        for part in parts:
            values = values.get(part) or {}
        found = values.get("eos_token_id") if isinstance(values, dict) else None
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(type(number) is int for number in ids):
            raise ValueError(f"{file} of {name} has eos_token_id {brief(found)}; give a token id or a list of them")
        return Ends(ids, file)
    return None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` as a JSON file with sorted keys."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sizes_of_model(name: str, values: dict[str, Any]) -> dict[str, Any]:
    check_architecture(name, values)
    if pinpoints_of(values) is not None:
        raise ValueError(
            f"{name} is a LLaVA-NeXT, whose images become as many tokens as their sizes make, and this processor makes "
            "images of one size alone: so training, eval, chat, look and calibrate do not carry it yet. Make inputs by "
            "transformers' own LlavaNextProcessor of the dense checkpoint, and give them to the model, which does"
        )
    own = ("sparsity", "projector", "untrained_predictors")  # the keys that DynamicLlavaConfig adds
    with naming_config(name):
        config = LlavaConfig.from_dict({key: value for key, value in values.items() if key not in own})
    return {
        "image_size": config.vision_config.image_size,
        "patch_size": config.vision_config.patch_size,
        "image_token_id": config.image_token_index,
        "feature_select": config.vision_feature_select_strategy,
        "projector": values.get("projector", DEFAULT),
        "added_tokens": _added_tokens(name, values.get("sparsity") or {}),
    }


def _added_tokens(name: str, sparsity: dict[str, Any]) -> int:
    """Return how many tokens a checkpoint's method adds to an image; ValueError where it says no method."""
    try:
        return added_tokens(SparsityConfig(method=sparsity.get("method")))
    except (AttributeError, ValueError) as error:
        raise ValueError(f"config.json of {name} has sparsity {brief(sparsity)}: {brief_text(error)}") from None


def _sizes_of_processor(name: str, processor: dict[str, Any], pixels: dict[str, Any]) -> dict[str, Any]:
    sizes = {"image_size": _side(pixels["crop_size"]), "patch_size": processor["patch_size"]}
    for what, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(
                f"the saved processor of {name} has {what} {brief(size)}; give a whole number of 1 or more"
            )
    additional = processor.get("num_additional_image_tokens", 1)
    if type(additional) is not int or additional < 0:
        raise ValueError(
            f"the saved processor of {name} has num_additional_image_tokens {brief(additional)}; give a whole number: "
            "1 is CLIP's class token, and each further one stands for a token that the model's method adds"
        )
    return {
        **sizes,
        "feature_select": processor.get("vision_feature_select_strategy", "default"),
        "projector": processor.get("projector", DEFAULT),
        "added_tokens": max(additional - 1, 0),  # 0 was written once, and meant no other number of tokens
    }


def _check_pixels(name: str, pixels: dict[str, Any], image_size: int) -> None:
    if "crop_size" in pixels and _side(pixels["crop_size"]) != image_size:
        raise ValueError(
            f"{name}: preprocessor_config.json makes images of {brief(_side(pixels['crop_size']))} pixels and the "
            f"vision tower sees {image_size}; correct one of the two files"
        )
    factor = pixels.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or abs(factor - 1 / 255) > 1e-9:
        raise ValueError(f"{name}: rescale_factor={brief(factor)} is not offered; LLaVA-1.5 uses 1/255")


def _side(size: Any) -> Any:
    return size.get("height") if isinstance(size, dict) else size
