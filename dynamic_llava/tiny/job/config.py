"""The typed file of the tiny world's main job: a training run's, and what is generated, evaluated and drawn."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from dynamic_llava.config import check_keep_rate
from dynamic_llava.config.run import RunConfig


@dataclass(frozen=True)
class TinyJobConfig:
    """What the main job evaluates, how much of it, and what it draws.

    The defaults keep the whole job (three trainings included) within eight minutes on two CPU cores.
    Raises ValueError when a value is outside its range.
    """

    seeds: int = 1
    """How many seeds to train and evaluate, counted up from the training seed; several print mean and interval."""
    world: str = "default"
    """World of the scenes and descriptions: default, or long, whose descriptions have 100 to 250 tokens with counts at
    their ends (configs/tiny_long.yaml)."""
    base_steps: int = 0
    """Steps that the base is trained first, dense, on this world: once for all seeds, which start from the result."""
    more_output_rates: list[float] = field(default_factory=list)
    """Further r_OT that Dynamic I|T is trained at, each with rows of its own beside simple rules at as many slots."""
    untrained_base: bool = False
    """Also train from a randomly initialised language model: the control of the overlap table (`--full`)."""
    dynamic_image: bool = True
    """Also train the model whose image tokens alone are sparsified (row "Dynamic I")."""
    train_images: int = 5000
    """Scenes of the training split from which the samples of the trainings are made."""
    test_images: int = 800
    """Unseen scenes of the test split."""
    data_seed: int = 0
    """Seed of the world's train and test scenes; the training seed leaves them unchanged."""
    questions: int = 700
    """Short questions per row, spread evenly over the kinds."""
    descriptions: int = 64
    """Descriptions per row: perplexity, attribute recall and the cache are measured on them."""
    uncached_questions: int = 70
    """Questions of the row that decodes without a cache (a subset of the row above it)."""
    uncached_descriptions: int = 12
    """Descriptions of the row that decodes without a cache (a subset of the row above it)."""
    batch_size: int = 100
    """Rows per batch in evaluation; the answers do not depend on it."""
    answer_tokens: int = 6
    """Most tokens of a short answer."""
    description_tokens: int = 120
    """Most tokens of a description."""
    timing_batch: int = 8
    """Rows of the batch whose prefill and decoding are timed."""
    timing_tokens: int = 32
    """Decoded tokens that are timed."""
    timing_repeats: int = 3
    """Repetitions of each timing; the median is reported."""
    rivals: str = "fastv:layer=2,divprune,visionzip,tome,random:output_keep_rate=none"
    """Methods that learn nothing, spelled as `eval compare` reads them (docs/comparing.md). The report compares them
    with the learned selection, each with as many image tokens; "" compares none."""
    rival_questions: int = 100
    """Questions of each kind of the comparison with rivals."""
    picture_scenes: int = 6
    """Test scenes in the picture of kept patches."""
    picture_answers: int = 3
    """Descriptions in the picture of greyed answers."""

    @property
    def with_uncached(self) -> bool:
        """Whether there is a row that decodes without a cache."""
        return bool(self.uncached_questions and self.uncached_descriptions)

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.type in (bool, "bool") or one.name in ("data_seed", "rivals", "world", "more_output_rates"):
                continue
            least = 0 if one.name.startswith(("uncached_", "picture_", "base_")) else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"tiny.{one.name}={value!r} is not allowed; give a whole number of at least {least}")
        for rate in self.more_output_rates:
            check_keep_rate("tiny.more_output_rates", rate)
        if len({*self.more_output_rates}) < len(self.more_output_rates):
            raise ValueError(f"tiny.more_output_rates={self.more_output_rates} names a rate twice; name each once")
        for part, whole in (("uncached_questions", "questions"), ("uncached_descriptions", "descriptions")):
            if getattr(self, part) > getattr(self, whole):
                raise ValueError(
                    f"tiny.{part}={getattr(self, part)} exceeds tiny.{whole}={getattr(self, whole)}; "
                    "the row without a cache is compared on a subset, so give a smaller number"
                )


@dataclass(frozen=True)
class JobConfig(RunConfig):
    """The main job: generate its data, train, evaluate, report. The sections of a run hold for all its trainings.

    `method` names one more row: the dense control under that method, which learns nothing.
    """

    SHORT_FLAGS: ClassVar[dict[str, str]] = {
        **RunConfig.SHORT_FLAGS,
        "--seeds": "--tiny.seeds",
        "--full": "--tiny.untrained-base",
    }
    tiny: TinyJobConfig = field(default_factory=TinyJobConfig)
    """What is generated, evaluated and drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("data.json", self.data.json), ("data.image_folder", self.data.image_folder)):
            if value:
                raise ValueError(
                    f"{name}={value!r} and a `tiny` section contradict each other: with the section the tiny world's "
                    "main job runs, on data that it generates itself. To train on your own data, leave the section out "
                    "(`tiny: null` under a file that has it) and give the file to bash scripts/train.sh; "
                    "configs/your_data.yaml is the example to start from"
                )
        if self.train.deepspeed is not None:
            raise ValueError("the tiny world's main job trains in one process; leave train.deepspeed out")
        if self.train.sparsity_mode != "both":
            raise ValueError(
                f"train.sparsity_mode={self.train.sparsity_mode!r} and a `tiny` section contradict each other: the "
                "main job trains both, image and the dense control, each with its own mode; leave one of them out"
            )
        if self.sparsity.output_keep_rate in self.tiny.more_output_rates:
            raise ValueError(
                f"tiny.more_output_rates={self.tiny.more_output_rates} holds sparsity.output_keep_rate, which is "
                "trained anyway; leave it out"
            )
        if self.train.tune == "predictors" and self.train.projector_learning_rate is None:
            raise ValueError(
                "train.tune='predictors' and a `tiny` section contradict each other: the main job trains a dense "
                "control as well, in which nothing would learn; choose another tune, or leave the section out"
            )

    def training(self, **changes: Any) -> RunConfig:
        """Return one training of the job: its own sections, with `changes` of them."""
        return RunConfig(**{**{one.name: getattr(self, one.name) for one in fields(RunConfig)}, **changes})
