"""Where a checkpoint lies: what was given is a folder, a name of the hub, or a mistake that is easily mended."""

import json
import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from dynamic_llava.model.supported import SETTINGS_FILES, read_settings_file
from dynamic_llava.model.weight_files import all_weight_files, holds_model

ADAPTER_SETTINGS = "adapter_config.json"
CONVERT = "python -m dynamic_llava.checkpoints convert"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_DEPTH = 3
"""How far below a run's folder its models lie: runs/tiny/seed0/both/model."""
_SHOWN = 4


def check_place(source: str | os.PathLike[str], arguments: Mapping[str, Any]) -> None:
    """Raise FileNotFoundError for a path that is no folder, and for the folder of a run, which names its models.

    A name of the hub, owner/name, and a settings file (.json) pass. `arguments` may hold transformers' `subfolder`.
    """
    place = Path(source)
    if place.is_dir():
        place /= arguments.get("subfolder") or ""
    if place.is_dir():
        if not _looks_like_checkpoint(place) and (models := _models_below(place)):
            raise FileNotFoundError(
                f"{place} holds no checkpoint that can be read; did you mean {' or '.join(map(str, models))}?"
            )
        return
    if place.is_file():
        if place.suffix == ".json":
            return
        raise FileNotFoundError(f"{place} is a file; give the folder that it lies in, {place.parent}")
    if _HUB_NAME.fullmatch(str(source)) and not place.parent.is_dir():
        return
    near = next(folder for folder in place.absolute().parents if folder.is_dir())
    raise FileNotFoundError(
        f"there is no model folder {place}: {near} holds no {place.absolute().relative_to(near).parts[0]}; give the "
        "folder of a checkpoint, or a name of the hub such as llava-hf/llava-1.5-7b-hf"
    )


def refuse_adapter(source: str, arguments: MutableMapping[str, Any]) -> None:
    """Raise ValueError for LoRA matrices, beside a model or alone, in a folder or hub name.

    transformers would apply them while it loads: without a word where a model lies beside them, and without what was
    trained whole (the projector of LLaVA's training).
    """
    explicit = (arguments.get("adapter_kwargs") or {}).get("_adapter_model_path")
    place = str(explicit or source)
    try:
        settings = read_settings_file(place, ADAPTER_SETTINGS, arguments)
    except OSError:
        return  # nothing can be read, which the loading itself will say
    if settings is None:
        return
    raise ValueError(_adapter_message(Path(place), settings))


def _adapter_message(place: Path, settings: Mapping[str, Any]) -> str:
    if place.is_dir() and holds_model(place):
        return (
            f"{place} holds LoRA matrices (adapter_config.json) beside a model, and it is not said whether they belong "
            f"to it: merge them, {CONVERT} {place} NEW_FOLDER --base {place}, or move adapter_config.json and "
            "adapter_model.* out of the folder"
        )
    merged = place.parent / "model"
    if (merged / "config.json").is_file():
        return f"{place} holds LoRA matrices, no model; the training has written the merged model beside it, {merged}"
    named = settings.get("base_model_name_or_path")
    return (
        f"{place} holds LoRA matrices, no model; merge them with the model that they were trained on"
        f"{f' ({named})' if named else ''}: {CONVERT} {place} NEW_FOLDER --base MODEL"
    )


def _looks_like_checkpoint(folder: Path) -> bool:
    known = (*SETTINGS_FILES, ADAPTER_SETTINGS, "tokenizer.json", "tokenizer.model")
    return any((folder / name).is_file() for name in known) or bool(all_weight_files(folder))


def _models_below(folder: Path) -> list[Path]:
    """Return the nearest folders with a config.json below a folder, the first few of them."""
    for depth in range(1, _DEPTH + 1):
        found = []
        for path in sorted(folder.glob("/".join(["*"] * depth) + "/config.json")):
            try:
                kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
            except (OSError, ValueError, AttributeError):
                continue
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if kind is not None and not hidden and not (path.parent / ADAPTER_SETTINGS).is_file():
                found.append(path.parent)
        if found:
            return found[:_SHOWN]
    return []
