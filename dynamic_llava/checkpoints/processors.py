"""Tokenizer, prompts and image preparation of a converted checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynamic_llava.checkpoints.layouts import read_json
from dynamic_llava.checkpoints.plan import Target
from dynamic_llava.checkpoints.sources import Source
from dynamic_llava.checkpoints.vocabulary import Vocabulary
from dynamic_llava.model import DynamicLlavaConfig
from dynamic_llava.processing import DynamicLlavaImageProcessor, DynamicLlavaProcessor
from dynamic_llava.processing.folder import write_json

_PIXELS = "preprocessor_config.json"


def write_processor(
    folder: Path,
    source: Source,
    config: DynamicLlavaConfig,
    vocabulary: Vocabulary,
    to: Target,
    say: Callable[[str], None],
) -> None:
    """Write the processor's files; without a tokenizer in the source only those about images, and say so."""
    image_size, colours = config.vision_config.image_size, _colours(source)
    if vocabulary.tokenizer is None:
        write_json(folder / _PIXELS, DynamicLlavaImageProcessor(image_size, **colours).to_dict())
        say(f"{source.folder} holds no tokenizer, so there is no processor of text; the model itself is whole")
        return
    DynamicLlavaProcessor(
        vocabulary.tokenizer,
        image_size,
        config.vision_config.patch_size,
        image_token_id=vocabulary.image_id,
        feature_select=config.vision_feature_select_strategy,
        projector=config.projector,
        **colours,
        chat_template=vocabulary.chat_template,
        ends=vocabulary.ends,
    ).save_pretrained(folder)
    if to == "llava-hf":
        _name_processor(folder, "LlavaProcessor")


def _colours(source: Source) -> dict[str, Any]:
    """Return the source's own mean and deviation of colours; without any, none, which means CLIP's."""
    found = source.config.get("image_processor") or {}
    for folder in (source.folder, source.base, source.vision_tower):
        if not found and folder is not None and (folder / _PIXELS).is_file():
            found = read_json(folder / _PIXELS)
    return {name: found[name] for name in ("image_mean", "image_std") if name in found}


def _name_processor(folder: Path, name: str) -> None:
    """Let transformers find its own class, which knows nothing of ours."""
    for path in (folder / "processor_config.json", folder / "tokenizer_config.json"):
        values = read_json(path) if path.is_file() else {}
        if "processor_class" in values:
            write_json(path, {**values, "processor_class": name})
