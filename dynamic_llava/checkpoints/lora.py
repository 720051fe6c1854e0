"""LoRA folders: which matrices belong to which weight, and W + scale * B @ A."""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dynamic_llava.checkpoints.layouts import read_json
from dynamic_llava.checkpoints.names import without_peft
from dynamic_llava.files import brief
from dynamic_llava.model.weight_files import WeightFiles, holds_model

_PART = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight$")
_PROJECTOR = re.compile(r"(^|\.)(mm_projector|multi_modal_projector)\.(?!.*\.lora_)")
SETTINGS_FILE = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PROJECTOR_FILE = "mm_projector.bin"
"""A projector alone: what LLaVA's first stage writes, and later ones beside other files."""
_WHOLE = "non_lora_trainables.bin"


@dataclass(frozen=True)
class Adapter:
    """The trained matrices of one weight: W becomes W + scale * B @ A, computed in float32 and kept in W's format."""

    source: WeightFiles
    inner: str
    """Name of A (r, in) in the source."""
    outer: str
    """Name of B (out, r) in the source."""
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the weight that it belongs to. ValueError where A and B do not fit each other."""
        inner, outer = (self.source.heads[name] for name in (self.inner, self.outer))
        if len(inner.shape) != 2 or len(outer.shape) != 2 or outer.shape[1] != inner.shape[0]:
            raise ValueError(
                f"{outer.file}: {self.outer} {outer.shape} and {self.inner} {inner.shape} are no pair of LoRA matrices"
            )
        return outer.shape[0], inner.shape[1]

    def merge(self, weight: Tensor) -> Tensor:
        """Return the weight with the adapter in it."""
        inner, outer = (self.source.read(name).float() for name in (self.inner, self.outer))
        return weight.float().addmm(outer, inner, alpha=self.scale).to(weight.dtype)


def holds_parts(folder: Path, leave_out: Collection[str]) -> bool:
    """Return whether a folder holds LoRA matrices, beside whatever else; or a projector alone instead of a model."""
    if any((folder / name).is_file() for name in (*ADAPTER_FILES, _WHOLE) if name not in leave_out):
        return True
    alone = not holds_model(folder)
    return alone and any((folder / name).is_file() for name in (SETTINGS_FILE, PROJECTOR_FILE))


def part_files(folder: Path, leave_out: Collection[str]) -> WeightFiles:
    """Open adapter_model and what LLaVA's training wrote beside it: non_lora_trainables.bin, or mm_projector.bin.

    A folder of LLaVA's first stage holds the last one alone.
    """
    there = [name for name in (*ADAPTER_FILES, _WHOLE, PROJECTOR_FILE) if (folder / name).is_file()]
    there = [name for name in there if name not in leave_out]
    adapter = [name for name in there if name in ADAPTER_FILES][:1]
    if not adapter and ((folder / SETTINGS_FILE).is_file() or _WHOLE in there):
        raise FileNotFoundError(f"{folder} holds parts of a LoRA training, but neither {' nor '.join(ADAPTER_FILES)}")
    names = [*adapter, *(name for name in there if name == _WHOLE)]
    files = WeightFiles([folder / name for name in names])
    if PROJECTOR_FILE in there and not any(_PROJECTOR.search(name) for name in files.heads):
        files = WeightFiles([folder / name for name in (*names, PROJECTOR_FILE)])
    return files


def split_adapter(folder: Path, files: WeightFiles) -> tuple[dict[str, Adapter], dict[str, str]]:
    """Return the adapters by the name of their weight, and the tensors that were trained whole by theirs.

    All names are as the model had them before peft. Raises ValueError for another kind of adapter, for a matrix without
    its partner, for one tensor under two names, and where a module is missing that was trained whole.
    """
    parts: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for name in files.heads:
        own = without_peft(name)
        match = _PART.match(own)
        place, key = (whole, own) if match is None else (parts.setdefault(match["module"], {}), match["side"])
        if key in place:
            raise ValueError(
                f"{folder}: {place[key]} in {files.heads[place[key]].file.name} and {name} in "
                f"{files.heads[name].file.name} are the same tensor; remove one of them"
            )
        place[key] = name
    settings = _settings(folder) if parts or (folder / SETTINGS_FILE).is_file() else {}
    for module in settings.get("modules_to_save") or ():
        if not any(f".{module}." in f".{name}" for name in whole):
            raise ValueError(
                f"{folder / SETTINGS_FILE} has {module} among its modules_to_save, and no file of the folder holds "
                "it; copy the missing file into the folder"
            )
    adapters = {}
    for module, pair in parts.items():
        if len(pair) < 2:
            raise ValueError(f"{folder}: {module} has lora_{''.join(pair)} without the other matrix of the pair")
        rank = files.heads[pair["A"]].shape[0]
        scale = _scale(settings, module, rank)
        adapters[f"{module}.weight"] = Adapter(files, pair["A"], pair["B"], scale)
    return adapters, whole


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS_FILE
    settings = read_json(path)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{path} has peft_type {brief(settings.get('peft_type'))}; only 'LORA' can be merged")
    for name in ("use_dora", "fan_in_fan_out"):
        if settings.get(name):
            raise ValueError(f"{path} has {name}: {settings[name]}; only plain LoRA of linear maps can be merged")
    if not isinstance(settings.get("lora_alpha"), (int, float)):
        raise ValueError(f"{path} has lora_alpha {brief(settings.get('lora_alpha'))}; it should be a number")
    return settings


def _scale(settings: dict[str, Any], module: str, rank: int) -> float:
    """Return alpha / r, or alpha / sqrt(r) where the settings say so; a pattern may give a module its own alpha."""
    own = [
        alpha for key, alpha in (settings.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({key})$", module)
    ]
    alpha = own[0] if own else settings["lora_alpha"]
    return float(alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank)
