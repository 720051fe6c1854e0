"""The typed file of a training run: its sections, what they ask of each other, its name and its folder."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from dynamic_llava.config import DataConfig, LoraConfig, ModelConfig, SparsityConfig, TrainConfig

NOT_COMPARED = {
    "name",
    "output_folder",
    "data.workers",
    "data.broken",
    "data.cache_images",
    "train.batch_size",
    "train.gradient_accumulation",
    "train.gradient_checkpointing",
    "train.deepspeed",
    "train.save_every",
    "train.keep_checkpoints",
    "train.resume",
    "train.overwrite",
    "train.accept_changed_inputs",
    "train.report_to",
    "train.peak_tflops",
    "train.log_every",
    "train.keep_rate_tolerance",
    "train.keep_rate_window",
    "train.hard_rate_tolerance",
}
"""Settings that a resumed run may change: they alter no weight. The batch is compared as samples per optimizer step."""


@dataclass(frozen=True)
class RunConfig:
    """A training run; one YAML file holds these keys."""

    SHORT_FLAGS: ClassVar[dict[str, str]] = {"--seed": "--train.seed"}
    """Short forms of often used flags."""

    name: str = ""
    """Name of the run; its files lie in <output_folder>/<name>. Empty: one that is made from its settings."""
    output_folder: str = "runs"
    """Folder of all runs."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Where training starts."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it trains on."""
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    """The method's settings; stored in the trained checkpoint."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How it is optimised."""
    method: Any = None
    """What decides instead of Dynamic-LLaVA: a name, or {name: ..., setting: ...}; see docs/adding-a-method.md."""
    lora: LoraConfig | None = None
    """The adapters of train.tune: lora, which fills in the defaults; belongs to no other way of training."""

    def __post_init__(self) -> None:
        if self.name and Path(self.name).name != self.name:
            raise ValueError(f"name={self.name!r} must be a plain folder name; output_folder says where it lies")
        if self.sparsity.calibration is not None:
            raise ValueError(
                "sparsity.calibration is measured on a trained model (python -m dynamic_llava.calibrate); leave it out"
            )
        held = self.train.calibrate
        if held is not None and Path(held.json).absolute() == Path(self.data.json).absolute():
            raise ValueError(
                f"train.calibrate.json={held.json!r} is the file that is trained on, where margins are others than on "
                "what the model has not seen; hold some samples back in a file of their own"
            )
        if self.method is not None:
            self._take_method()
        if self.train.tune == "lora" and self.lora is None:
            object.__setattr__(self, "lora", LoraConfig())  # so that the written configuration shows them
        if self.train.tune != "lora" and self.lora is not None:
            raise ValueError(f"a `lora` section is given but train.tune={self.train.tune!r}; set it to 'lora'")
        if self.train.tune != "full" and self.model.dtype != "float32" and not self.train.bf16:
            raise ValueError(
                f"model.dtype={self.model.dtype!r} with train.tune={self.train.tune!r} needs train.bf16: what learns "
                "stays in float32 above frozen half-precision weights, and only autocast joins the two"
            )
        keeps_float32 = self.train.deepspeed is not None and self.train.bf16
        if self.train.tune == "full" and self.model.dtype != "float32" and not keeps_float32:
            raise ValueError(
                f"model.dtype={self.model.dtype!r} would lose the small updates of its weights; DeepSpeed with "
                "train.bf16 keeps float32 copies of them, without it set model.dtype to float32"
            )

    def _take_method(self) -> None:
        """Let the training decide by the run's method; ValueError where a mode of Dynamic-LLaVA is given as well."""
        if self.train.sparsity_mode != "both":
            raise ValueError(
                f"train.sparsity_mode={self.train.sparsity_mode!r} and method={self.method!r} contradict each other: "
                "the mode is one of Dynamic-LLaVA; leave one of them out"
            )
        train = replace(self.train)
        object.__setattr__(train, "method", self.method)
        object.__setattr__(self, "train", train)

    @property
    def run_name(self) -> str:
        """Return the name, or else the data file's with a digest of all settings that are not defaults.

        Runs of different settings so never share a folder, and the same settings always find theirs.
        """
        if self.name:
            return self.name
        default, own = flat(asdict(RunConfig(name="x"))), flat(asdict(self))
        told = {key: value for key, value in own.items() if key not in NOT_COMPARED and value != default.get(key)}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
        return f"{Path(self.data.json).stem or 'run'}-{digest}"

    @property
    def folder(self) -> Path:
        """Return the run's folder."""
        return Path(self.output_folder) / self.run_name


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name."""
    found = {}
    for name, value in values.items():
        found.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return found


def target_of(rate: str) -> str:
    """Return the name under which the target of a keep rate is logged: image_keep_rate -> image_keep_target."""
    return rate.removesuffix("rate") + "target"
