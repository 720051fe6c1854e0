"""The typed file of a training run: its sections, its name, and which of its settings make another run of it."""

import hashlib
import json
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dynamic_llava.config import DataConfig, LoraConfig, ModelConfig, SparsityConfig, TrainConfig
from dynamic_llava.tiny.config import TinyJobConfig

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
}
"""Settings that a resumed run may change: they alter no weight. The batch is compared as samples per optimizer step."""
SAMPLES_PER_STEP = "samples per optimizer step"
COMPARED_BY_CONTENT = {"model.base", "data.json", "data.image_folder"}
"""Settings that name files: a copy of the same content elsewhere is the same (`inputs.run_inputs`)."""


@dataclass(frozen=True)
class RunConfig:
    """A training run; one YAML file holds these keys. With a `tiny` section it is the tiny world's main job."""

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
    lora: LoraConfig | None = None
    """The adapters of train.tune: lora, which fills in the defaults; belongs to no other way of training."""
    tiny: TinyJobConfig | None = None
    """The tiny world's main job: generate its data, train, evaluate, report. Absent: plain training."""

    def __post_init__(self) -> None:
        if self.name and Path(self.name).name != self.name:
            raise ValueError(f"name={self.name!r} must be a plain folder name; output_folder says where it lies")
        if self.train.tune == "lora" and self.lora is None:
            object.__setattr__(self, "lora", LoraConfig())  # so that the written configuration shows them
        if self.train.tune != "lora" and self.lora is not None:
            raise ValueError(f"a `lora` section is given but train.tune={self.train.tune!r}; set it to 'lora'")
        if self.train.tune != "full" and self.model.dtype != "float32" and not self.train.bf16:
            raise ValueError(
                f"model.dtype={self.model.dtype!r} with train.tune={self.train.tune!r} needs train.bf16: what learns "
                "stays in float32 above frozen half-precision weights, and only autocast joins the two"
            )
        if self.tiny is not None:
            self._check_main_job()
        keeps_float32 = self.train.deepspeed is not None and self.train.bf16
        if self.train.tune == "full" and self.model.dtype != "float32" and not keeps_float32:
            raise ValueError(
                f"model.dtype={self.model.dtype!r} would lose the small updates of its weights; DeepSpeed with "
                "train.bf16 keeps float32 copies of them, without it set model.dtype to float32"
            )

    def _check_main_job(self) -> None:
        """Refuse what the tiny world's main job, which has data and trainings of its own, would not do."""
        for name, value in (("data.json", self.data.json), ("data.image_folder", self.data.image_folder)):
            if value:
                raise ValueError(
                    f"{name}={value!r} and a `tiny` section contradict each other: with the section the tiny world's "
                    "main job runs, on data that it generates itself. To train on your own data, leave the section out "
                    "(`tiny: null` under a file that has it); configs/your_data.yaml is the example to start from"
                )
        if self.train.deepspeed is not None:
            raise ValueError("the tiny world's main job trains in one process; leave train.deepspeed out")
        if self.train.sparsity_mode != "both":
            raise ValueError(
                f"train.sparsity_mode={self.train.sparsity_mode!r} and a `tiny` section contradict each other: the "
                "main job trains both, image and the dense control, each with its own mode; leave one of them out"
            )
        if self.train.tune == "predictors" and self.train.projector_learning_rate is None:
            raise ValueError(
                "train.tune='predictors' and a `tiny` section contradict each other: the main job trains a dense "
                "control as well, in which nothing would learn; choose another tune, or leave the section out"
            )

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


def compared_settings(config: RunConfig, processes: int) -> dict[str, Any]:
    """Return the settings, by dotted name, that a resumed run must share with its checkpoint."""
    values = json.loads(json.dumps(flat(asdict(config))))
    kept = {name: value for name, value in values.items() if name not in NOT_COMPARED}
    train = config.train
    return {**kept, SAMPLES_PER_STEP: train.batch_size * train.gradient_accumulation * processes}


def changes(then: Mapping[str, Any], now: Mapping[str, Any], *, leave_out: Set[str] = frozenset()) -> list[str]:
    """Return what differs between two `compared_settings`, a "NAME was X and is Y" each.

    A setting that an earlier version of this library did not have had its default's meaning. Settings whose files are
    compared by their content are to be left out.
    """
    before = {**compared_settings(RunConfig(), 1), **then}
    names = sorted((set(then) | set(now)) - leave_out)
    return [f"{n} was {before.get(n)!r} and is {now.get(n)!r}" for n in names if before.get(n) != now.get(n)]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name."""
    found = {}
    for name, value in values.items():
        found.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return found
