"""LoRA folders: which matrices belong to which weight, and W + scale * B @ A."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dynamic_llava.checkpoints.layouts import read_json
from dynamic_llava.checkpoints.names import without_peft
from dynamic_llava.model.weight_files import WeightFiles

_PART = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight$")
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
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


def adapter_files(folder: Path) -> WeightFiles:
    """Open adapter_model and, where LLaVA's training wrote it, non_lora_trainables.bin of a LoRA folder."""
    found = [folder / name for name in _FILES if (folder / name).is_file()][:1]
    if not found:
        raise FileNotFoundError(f"{folder} holds adapter_config.json but neither {' nor '.join(_FILES)}")
    whole = folder / _WHOLE
    return WeightFiles([*found, *([whole] if whole.is_file() else [])])


def split_adapter(folder: Path, files: WeightFiles) -> tuple[dict[str, Adapter], dict[str, str]]:
    """Return the adapters by the name of their weight, and the tensors that were trained whole by theirs.

    All names are as the model had them before peft. Raises ValueError for another kind of adapter, and for a matrix
    without its partner.
    """
    settings = _settings(folder)
    parts: dict[str, dict[str, str]] = {}
    whole = {}
    for name in files.heads:
        own = without_peft(name)
        match = _PART.match(own)
        if match is None:
            whole[own] = name
        else:
            parts.setdefault(match["module"], {})[match["side"]] = name
    adapters = {}
    for module, pair in parts.items():
        if len(pair) < 2:
            raise ValueError(f"{folder}: {module} has lora_{''.join(pair)} without the other matrix of the pair")
        rank = files.heads[pair["A"]].shape[0]
        scale = _scale(settings, module, rank)
        adapters[f"{module}.weight"] = Adapter(files, pair["A"], pair["B"], scale)
    return adapters, whole


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    settings = read_json(path)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{path} has peft_type {settings.get('peft_type')!r}; only 'LORA' can be merged")
    for name in ("use_dora", "fan_in_fan_out"):
        if settings.get(name):
            raise ValueError(f"{path} has {name}: {settings[name]}; only plain LoRA of linear maps can be merged")
    if not isinstance(settings.get("lora_alpha"), (int, float)):
        raise ValueError(f"{path} has lora_alpha {settings.get('lora_alpha')!r}; it should be a number")
    return settings


def _scale(settings: dict[str, Any], module: str, rank: int) -> float:
    """Return alpha / r, or alpha / sqrt(r) where the settings say so; a pattern may give a module its own alpha."""
    own = [
        alpha for key, alpha in (settings.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({key})$", module)
    ]
    alpha = own[0] if own else settings["lora_alpha"]
    return float(alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank)
