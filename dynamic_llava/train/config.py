"""The typed file of a training run: its sections and its name."""

from dataclasses import dataclass, field
from pathlib import Path

from dynamic_llava.config import DataConfig, ModelConfig, SparsityConfig, TrainConfig
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
    tiny: TinyJobConfig | None = None
    """The tiny world's main job: generate its data, train, evaluate, report. Absent: plain training."""

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name={self.name!r} must be a plain folder name; output_folder says where it lies")

    @property
    def folder(self) -> Path:
        """Return the run's folder."""
        return Path(self.output_folder) / self.name
