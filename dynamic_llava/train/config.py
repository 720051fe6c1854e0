"""The typed file of a training run: its sections and its name."""

from dataclasses import dataclass, field
from pathlib import Path

from dynamic_llava.config import DataConfig, LoraConfig, ModelConfig, SparsityConfig, TrainConfig
from dynamic_llava.tiny.config import TinyJobConfig


@dataclass(frozen=True)
class RunConfig:
    """A training run; one YAML file holds these keys. With a `tiny` section it is the tiny world's main job."""

    name: str = "run"
    """Name of the run; its files lie in <output_folder>/<name>."""
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
        if not self.name or Path(self.name).name != self.name:
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
        if self.tiny is not None and self.train.deepspeed is not None:
            raise ValueError("the tiny world's main job trains in one process; leave train.deepspeed out")
        keeps_float32 = self.train.deepspeed is not None and self.train.bf16
        if self.train.tune == "full" and self.model.dtype != "float32" and not keeps_float32:
            raise ValueError(
                f"model.dtype={self.model.dtype!r} would lose the small updates of its weights; DeepSpeed with "
                "train.bf16 keeps float32 copies of them, without it set model.dtype to float32"
            )

    @property
    def folder(self) -> Path:
        """Return the run's folder."""
        return Path(self.output_folder) / self.name
