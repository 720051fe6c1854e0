"""Which layout a checkpoint's folder has, found from its config.json and confirmed by the names of its tensors."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamic_llava.checkpoints import names
from dynamic_llava.checkpoints.names import Rule
from dynamic_llava.engine.decoder import FAMILIES
from dynamic_llava.files import brief
from dynamic_llava.model.tiles import pinpoints_of


@dataclass(frozen=True)
class Layout:
    """One way to store LLaVA: what it is called, its table of names, and what its tensors' names begin with."""

    title: str
    rules: tuple[Rule, ...]
    beginnings: tuple[str, ...]


OURS = Layout("this library's own layout", names.OURS, ("model.language_model.layers.",))
LLAVA_HF = Layout("llava-hf layout", names.LLAVA_HF, ("language_model.model.layers.", "model.language_model.layers."))
ORIGINAL = Layout("the original LLaVA layout", names.ORIGINAL, ("model.layers.",))
PUBLISHED = Layout("the layout of the published Dynamic-LLaVA code", names.PUBLISHED, ("model.layers.",))
LANGUAGE = Layout("a language model alone", names.ORIGINAL, ("model.layers.",))
ADAPTER = Layout("a LoRA folder", (*names.PARTS, *names.LLAVA_HF), ())
"""An adapter over any of the others: the tables have no name in common that they would place differently."""
PROJECTOR = Layout("a projector alone, of LLaVA's first stage", ADAPTER.rules, ())
CLIP = Layout("a CLIP vision tower", names.CLIP, ("vision_model.encoder.", "encoder."))

_ORIGINAL_TYPES = ("llava", "llava_llama", "dynamic_llava_llama")
_SHOWN = 3


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. FileNotFoundError without it, ValueError where it holds something else."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the checkpoint's folder is not complete")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON ({error}); get the file again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; it should hold an object of settings")
    return values


def find_layout(folder: Path, config: dict[str, Any], stored: Collection[str]) -> Layout:
    """Return the layout of a checkpoint with this config.json and tensors of these names.

    Raises ValueError, with what was found, where the two contradict each other or are of no layout known here.
    """
    layout = _by_config(folder, config, stored)
    if not any(name.startswith(layout.beginnings) for name in stored):
        raise ValueError(
            f"{folder}: config.json describes {layout.title}, whose tensors begin with "
            f"{' or '.join(layout.beginnings)}, but none does; found {', '.join(sorted(stored)[:_SHOWN])}, ..."
        )
    return layout


def is_original(layout: Layout) -> bool:
    """Return whether a layout is of the original LLaVA's family, whose vocabulary has no <image>."""
    return layout not in (OURS, LLAVA_HF)


def layout_by_config(folder: Path, config: dict[str, Any]) -> Layout:
    """Return the layout that a config.json alone describes, for a folder without a model's tensors."""
    return _by_config(folder, config, ())


def _by_config(folder: Path, config: dict[str, Any], stored: Collection[str]) -> Layout:
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    nested, flat = "text_config" in config, any(key.startswith("mm_") for key in config)
    found = f"model_type {brief(kind)}, architectures {architectures}"
    if nested and flat:
        raise ValueError(
            f"{folder}: config.json is ambiguous: it has text_config, as llava-hf, and mm_ settings, as the original "
            f"LLaVA ({found}); keep one of them"
        )
    if kind in ("llava_next", "dynamic_llava") and pinpoints_of(config) is not None:
        raise ValueError(
            f"{folder} is a LLaVA-NeXT ({found}), which is not converted: the model loads llava-hf's folder as it is, "
            "by DynamicLlavaForConditionalGeneration.from_pretrained, and there is no way back into that layout yet"
        )
    if kind == "dynamic_llava":
        return OURS
    if kind == "llava" and (nested or "LlavaForConditionalGeneration" in architectures):
        return LLAVA_HF
    if flat and (kind is None or kind in _ORIGINAL_TYPES):
        published = "sparse_config" in config or any("_score_predictor." in name for name in stored)
        return PUBLISHED if published else ORIGINAL
    if kind in FAMILIES:
        return LANGUAGE
    raise ValueError(
        f"{folder} is of no known layout: config.json has {found}. Known are llava-hf (model_type 'llava' with "
        f"text_config), the original LLaVA-1.5 (one of {', '.join(_ORIGINAL_TYPES)} with mm_ settings), the published "
        "Dynamic-LLaVA (the same with sparse_config), this library's own ('dynamic_llava') and a language model alone "
        f"({', '.join(FAMILIES)})"
    )
