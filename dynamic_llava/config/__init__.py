"""Settings: frozen dataclasses, one line of meaning under each field (standard library only).

SparsityConfig is the method; ModelConfig, DataConfig, TrainConfig and LoraConfig are the sections of a training run's
file (`run.py`).
"""

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from dynamic_llava.config.calibration import check_calibration
from dynamic_llava.config.checks import at_least as _at_least
from dynamic_llava.config.checks import check_finite as check_finite
from dynamic_llava.config.checks import check_keep_rate as check_keep_rate
from dynamic_llava.config.checks import check_sparse_layer as check_sparse_layer
from dynamic_llava.config.checks import one_of as _one_of
from dynamic_llava.config.recipe import CalibrateConfig as CalibrateConfig
from dynamic_llava.config.recipe import DistillConfig as DistillConfig
from dynamic_llava.config.recipe import KeepRateSchedule as KeepRateSchedule
from dynamic_llava.config.spelling import nested_method as nested_method

SHIPPED = {"tiny": Path(__file__).parent.parent / "tiny" / "weights"}
"""Checkpoints that come with the package: the name that stands for one where a checkpoint is named -> its folder."""
SPARSITY_MODES = ("both", "image", "output", "none")
SparsityMode = Literal["both", "image", "output", "none"]
"""The switch `sparsity` of a call: which context is sparsified in it, image tokens, output tokens, both or neither."""


@dataclass(frozen=True)
class SparsityConfig:
    """The settings that define Dynamic-LLaVA: the section `sparsity` of a run's file and of a checkpoint's config.json.

    Raises ValueError when a value is outside its range. The defaults are the paper's (Sec. 4.1, A.2).
    """

    sparse_layer: int = 2
    """l: decoder layers 0..l-1 see every token; the decision is taken on the hidden states that enter layer l."""
    image_keep_rate: float = 0.2
    """r_I: share of each image's tokens that the layers >= l see."""
    output_keep_rate: float = 0.5
    """r_OT: target of the keep-rate regulariser for output tokens in training; at inference the predictor decides."""
    image_selection: Literal["topk", "threshold"] = "topk"
    """Image decision at inference: the floor(r_I * n) highest margins (Eq. 11), or every positive margin (Eq. 5)."""
    output_threshold: float = 0.0
    """An output token is kept where keep logit - drop logit exceeds this; 0 is the paper's rule (Eq. 5)."""
    output_window: int = 0
    """w: a dropped output token is still seen in the next w steps (docs/method.md, section 9); 0: the paper."""
    output_sinks: int = 0
    """s: the first s tokens of each answer are kept whatever the predictor says; 0: the paper."""
    output_min_length: int = 50
    """LEN_OT: shorter answers are not sparsified in training."""
    prompt_keep_rate: float | None = None
    """Share of a question's tokens that training aims to keep by a third predictor (Table 9: 0.7); None (the paper's
    method): there is no such predictor, and prompt tokens stay."""
    prompt_min_length: int = 25
    """Shorter questions are not sparsified in training; of use with prompt_keep_rate alone."""
    output_segments: Literal["last", "all"] = "last"
    """Which answers of a multi-turn training sample count as output: the last one (published results), or all."""
    predictor_width: int = 512
    """Width of both predictors after their down-projection (A.4.1)."""
    predictor_heads: int = 8
    """Attention heads of the image predictor's transformer blocks."""
    predictor_mlp: int = 2048
    """MLP width of the image predictor's transformer blocks."""
    predictor_blocks: int = 2
    """Number of transformer blocks in the image predictor."""
    cache_block: int = 64
    """Slots by which the key-value cache grows."""
    keep_rate_weight: float = 100.0
    """lambda: weight of the keep-rate regulariser (Eq. 10)."""
    keep_rate_reduction: Literal["batch", "applicable"] = "batch"
    """Denominator of the regulariser: every sample (published results), or the samples a term applies to."""
    keep_rate_distance: Literal["squared", "absolute"] = "squared"
    """Distance between realised and target keep rate: the square is what the published results used."""
    mask_grad_clip: float | None = None
    """Elementwise bound on the task gradient that enters the keep mask; None (the paper) leaves it unbounded."""
    relaxation: Literal["gumbel_st", "sigmoid_st", "soft_topk"] = "gumbel_st"
    """How training decides with a gradient: Gumbel-Softmax (the paper), sign and sigmoid, or exact budget and top-k."""
    dropped_tokens: Literal["masked_softmax", "zero_vectors"] = "masked_softmax"
    """What training does with dropped tokens: hide them by Eq. 7 (the paper), or make them zero (Table 7, "w/o")."""
    masked_softmax: Literal["auto", "reference", "chunked", "triton"] = "auto"
    """Implementation of MaskedSoftmax attention (Eq. 7) in training and scoring; `auto`: the fastest that can run."""

    calibration: Any = None
    """Margins of the predictors on held data, as quantiles, by which an asked keep rate becomes a threshold;
    `python -m dynamic_llava.calibrate` writes them into a checkpoint."""
    method: Any = None
    """The learned method whose weights a checkpoint holds, its name and settings ({name: ...}); None: Dynamic-LLaVA."""

    def __post_init__(self) -> None:
        check_finite("", self)
        _at_least("sparse_layer", self.sparse_layer, 1, "layer 0 has no earlier layer whose output could be judged")
        check_keep_rate("image_keep_rate", self.image_keep_rate)
        check_keep_rate("output_keep_rate", self.output_keep_rate)
        if self.prompt_keep_rate is not None:
            check_keep_rate("prompt_keep_rate", self.prompt_keep_rate)
        for name, low in (("predictor_width", 4), ("predictor_heads", 1), ("predictor_mlp", 1), ("cache_block", 1)):
            _at_least(name, getattr(self, name), low, "choose a larger value")
        counts = ("output_min_length", "prompt_min_length", "output_window", "output_sinks", "predictor_blocks")
        for name in (*counts, "keep_rate_weight"):
            _at_least(name, getattr(self, name), 0, "choose 0 or more")
        if self.predictor_width % self.predictor_heads:
            raise ValueError(
                f"predictor_width={self.predictor_width} is not a multiple of predictor_heads={self.predictor_heads}; "
                "choose a number of heads that divides the width"
            )
        _one_of("image_selection", self.image_selection, ("topk", "threshold"))
        _one_of("output_segments", self.output_segments, ("last", "all"))
        _one_of("keep_rate_reduction", self.keep_rate_reduction, ("batch", "applicable"))
        _one_of("keep_rate_distance", self.keep_rate_distance, ("squared", "absolute"))
        _one_of("relaxation", self.relaxation, ("gumbel_st", "sigmoid_st", "soft_topk"))
        _one_of("dropped_tokens", self.dropped_tokens, ("masked_softmax", "zero_vectors"))
        _one_of("masked_softmax", self.masked_softmax, ("auto", "reference", "chunked", "triton"))
        check_calibration(self.calibration)
        if self.output_window and self.dropped_tokens == "zero_vectors":
            raise ValueError(
                f"output_window={self.output_window} and dropped_tokens='zero_vectors' contradict each other: a token "
                "that is a zero vector cannot be seen by those in its window; leave one of them out"
            )
        if self.mask_grad_clip is not None and self.mask_grad_clip <= 0:
            raise ValueError(f"mask_grad_clip={self.mask_grad_clip} must be positive; use None to switch it off")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SparsityConfig":
        """Build from a plain dict; an unknown key is a ValueError that lists the known ones."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown sparsity settings {unknown}; the known ones are {known}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the plain dict that config.json stores.

        `method` only where it is not Dynamic-LLaVA, `calibration`, a window and sinks where there are some, and what
        belongs to a prompt predictor only where there is one.
        """
        names = ("method", "calibration", "output_window", "output_sinks")
        without = {name for name in names if not getattr(self, name)}
        if self.prompt_keep_rate is None:
            without |= {"prompt_keep_rate", "prompt_min_length"}
        return {name: value for name, value in asdict(self).items() if name not in without}


@dataclass(frozen=True)
class ModelConfig:
    """Section `model`: where training starts."""

    base: str = ""
    """Checkpoint to start from: a folder or hub name in llava-hf layout, or `tiny`, which comes with the package."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights; train.bf16 computes in bfloat16 over float32 weights."""
    projector: str | None = None
    """Projector by its name or as package.module:Class; a new one, where the base has another. None: the base's."""

    def __post_init__(self) -> None:
        _one_of("model.dtype", self.dtype, ("float32", "bfloat16", "float16"))

    @property
    def source(self) -> str:
        """Return where `base` lies: the folder or the hub name."""
        return checkpoint_source(self.base)


@dataclass(frozen=True)
class DataConfig:
    """Section `data`: LLaVA-format samples."""

    json: str = ""
    """LLaVA-format JSON file: a list of {"id", "image", "conversations"} or {"id", "images", "messages"}."""
    image_folder: str = ""
    """Folder that the image paths in the JSON are relative to; none may leave it."""
    text_only: Literal["skip", "dense", "sparse"] = "skip"
    """Samples without an image: leave them out (the paper), or train on them, without sparsity or with it."""
    broken: Literal["refuse", "skip"] = "refuse"
    """Samples whose image is missing or cannot be read: end with their names, or leave them out, counted and listed."""
    template: Literal["chat", "plain"] = "chat"
    """How samples are written: as conversations, or, for LLaVA's first stage, as an image with its caption alone."""
    max_length: int = 2048
    """Most tokens of a sample, image tokens included; longer text is cut; a sample whose image would be is left out."""
    workers: int = 0
    """Processes that decode images beside each training process; preparing and checking take one per core for 0."""
    cache_images: int = 0
    """Prepared images kept in memory by each of these processes (for small data that shows an image several times)."""

    def __post_init__(self) -> None:
        _one_of("data.text_only", self.text_only, ("skip", "dense", "sparse"))
        _one_of("data.broken", self.broken, ("refuse", "skip"))
        _one_of("data.template", self.template, ("chat", "plain"))
        _at_least("data.max_length", self.max_length, 1, "LLaVA-1.5 uses 2048")
        _at_least("data.workers", self.workers, 0, "0 decodes images in the training process")
        _at_least("data.cache_images", self.cache_images, 0, "0 keeps none")


@dataclass(frozen=True)
class TrainConfig:
    """Section `train`: the optimisation. The defaults are the paper's (A.2), the batch and its length apart."""

    sparsity_mode: SparsityMode = "both"
    """What is sparsified: both (I|T), image (I), output (T), or none (the dense control: same data, no predictors)."""
    tune: Literal["full", "lora", "predictors"] = "full"
    """What learns beside the predictors: the whole language model (the paper), LoRA adapters in it, or nothing."""
    learning_rate: float = 5e-6
    """Peak learning rate of the language model, or of its LoRA adapters; unused with tune: predictors."""
    predictor_learning_rate: float = 2e-4
    """Peak learning rate of the predictors."""
    projector_learning_rate: float | None = None
    """Peak learning rate of the projector; None freezes it, as the paper says. The authors' script trains it."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    batch_size: int = 8
    """Samples per process and accumulation step."""
    gradient_accumulation: int = 1
    """Batches per optimizer step; losses and noise do not depend on how a global batch is split."""
    group_by_length: bool = False
    """Put samples of similar length into a step: less padding, but steps that are no longer random samples."""
    epochs: float = 1.0
    """Passes over the data, unless max_steps is set."""
    max_steps: int | None = None
    """Optimizer steps; None trains for `epochs`."""
    warmup_ratio: float = 0.03
    """Share of the steps over which the learning rates rise; afterwards they follow a cosine to 0."""
    tau_start: float = 1.0
    """Temperature of the Gumbel-Softmax at the first step."""
    tau_end: float = 0.1
    """Temperature at the end; it decays exponentially."""
    distill: DistillConfig | None = None
    """Distillation from the same weights without sparsity, computed in the same step; None (the paper) has none."""
    start_keep_rate: float | None = None
    """Share of tokens that new predictors begin by keeping, through their last bias; None (the paper): about half."""
    keep_rate_schedule: KeepRateSchedule | None = None
    """How the keep rates that training aims at fall from 1 to the targets; None (the paper): the targets at once."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them as they are."""
    clip_predictors_separately: bool = False
    """Clip each predictor's gradient by its own norm, so that a large mask gradient does not shrink the rest."""
    bf16: bool = False
    """Compute in bfloat16 (autocast)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    seed: int = 0
    """Seed of data order, new weights and Gumbel noise."""
    peak_tflops: float | None = None
    """Dense peak of one device in TFLOP/s, for the log's MFU; None looks it up by the device's name."""
    deepspeed: str | None = None
    """DeepSpeed's JSON file, e.g. configs/deepspeed/zero3.json; None trains without DeepSpeed."""
    save_every: int | None = None
    """Steps between two checkpoints to resume from; None writes one only when the run is told to stop or fails."""
    keep_checkpoints: int = 2
    """Newest complete checkpoints that stay in the run's folder; one more lies there while it is written.

    Where 1 stays, the one before it is removed a step later, when the newest has shown that its loss is finite.
    """
    resume: bool = True
    """Go on from the newest complete checkpoint in the run's folder; false removes what is there and starts over."""
    accept_changed_inputs: bool = False
    """Go on from a checkpoint although data, images, base or DeepSpeed file have changed since it was written."""
    overwrite: bool = False
    """Train over a finished model in the run's folder: it and its checkpoints are removed as training begins."""
    report_to: Literal["none", "wandb"] = "none"
    """Where the lines of metrics.jsonl go as well: Weights & Biases, offline without an API key, or nowhere."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl; values are means over these steps."""
    keep_rate_tolerance: float = 0.1
    """A warning is given when the mean keep rate over keep_rate_window steps is farther than this from its target."""
    keep_rate_window: int = 50
    """Steps of that mean."""
    hard_rate_tolerance: float = 0.1
    """A warning is given at the end where inference keeps a share of the training's tokens that is farther than this
    from the share that training samples; 1: nothing is measured."""
    calibrate: CalibrateConfig | None = None
    """Held data by which keep rates choose thresholds, measured at the end; None: `python -m dynamic_llava.calibrate`
    does it later."""

    method: ClassVar[Any] = None
    """What decides instead of `sparsity_mode`, where a run's file names a method: set by RunConfig, no setting here."""

    @property
    def switches(self) -> dict[str, Any]:
        """Return what a training call decides by, as arguments of `forward`."""
        return {"sparsity": self.sparsity_mode} if self.method is None else {"method": self.method}

    def __post_init__(self) -> None:
        check_finite("train.", self)
        _one_of("train.sparsity_mode", self.sparsity_mode, SPARSITY_MODES)
        _one_of("train.tune", self.tune, ("full", "lora", "predictors"))
        if self.tune == "predictors" and self.sparsity_mode == "none" and self.projector_learning_rate is None:
            raise ValueError(
                "train.tune='predictors' with train.sparsity_mode='none' trains nothing; choose another sparsity_mode "
                "or another tune"
            )
        self._check_recipe()
        for name in ("batch_size", "gradient_accumulation", "log_every", "keep_rate_window"):
            _at_least(f"train.{name}", getattr(self, name), 1, "give 1 or more")
        rates = ("learning_rate", "predictor_learning_rate", "weight_decay", "max_grad_norm", "warmup_ratio")
        for name in (*rates, "keep_rate_tolerance", "hard_rate_tolerance", "seed"):
            _at_least(f"train.{name}", getattr(self, name), 0, "give 0 or more")
        if self.projector_learning_rate is not None:
            _at_least("train.projector_learning_rate", self.projector_learning_rate, 0, "null keeps it frozen")
        if self.max_steps is not None:
            _at_least("train.max_steps", self.max_steps, 1, "null trains for train.epochs")
        _one_of("train.report_to", self.report_to, ("none", "wandb"))
        _at_least("train.keep_checkpoints", self.keep_checkpoints, 1, "a run needs one to go on from")
        if self.save_every is not None:
            _at_least("train.save_every", self.save_every, 1, "null writes none but when told to stop, or failing")
        if self.deepspeed is not None and self.clip_predictors_separately:
            raise ValueError("train.clip_predictors_separately needs whole gradients, which DeepSpeed keeps in parts")
        if self.clip_predictors_separately and self.max_grad_norm == 0:
            raise ValueError(
                "train.clip_predictors_separately clips to train.max_grad_norm, and 0 clips nothing; give a norm or "
                "leave it out"
            )
        if self.warmup_ratio >= 1:
            raise ValueError(f"train.warmup_ratio={self.warmup_ratio} is a share of the steps; give a number below 1")
        for name in ("epochs", "tau_start", "tau_end"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train.{name}={getattr(self, name)} must be positive")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"train.peak_tflops={self.peak_tflops} must be positive; null looks it up")

    def _check_recipe(self) -> None:
        """Raise ValueError for what belongs to sparse training, given to a dense one, and for a rate that is none."""
        names = ("distill", "start_keep_rate", "keep_rate_schedule", "calibrate")
        for name in (one for one in names if getattr(self, one) is not None and self.sparsity_mode == "none"):
            raise ValueError(
                f"train.{name} with train.sparsity_mode='none': nothing is dropped, so there is nothing to learn it "
                f"from; leave train.{name} out, or choose another sparsity_mode"
            )
        if self.start_keep_rate is not None and not 0 < self.start_keep_rate < 1:
            raise ValueError(
                f"train.start_keep_rate={self.start_keep_rate} must lie between 0 and 1, which no bias reaches; 0.98 "
                "begins with almost every token kept"
            )

    def learning_rates(self, learned: Iterable[str]) -> dict[str, float]:
        """Return the parts that learn, by their names in train/optimizer.py, with their peak learning rates.

        `learned` are the parts of the method that do (`Method.used_parts`).
        """
        rates = {"full": {"language_model": self.learning_rate}, "lora": {"adapters": self.learning_rate}}
        learning = dict(rates.get(self.tune, {}))
        learning |= dict.fromkeys(learned, self.predictor_learning_rate)
        if self.projector_learning_rate is not None:
            learning["projector"] = self.projector_learning_rate
        return learning


@dataclass(frozen=True)
class LoraConfig:
    """Section `lora`: the adapters of train.tune: lora, in every linear map of the language model's layers."""

    rank: int = 128
    """r: inner width of an adapter. The defaults are those of LLaVA-1.5's own LoRA recipe."""
    alpha: float = 256.0
    """An adapter's product is multiplied by alpha / rank."""
    dropout: float = 0.05
    """Dropout on what enters an adapter; drawn by torch's generator, so it differs between numbers of processes."""

    def __post_init__(self) -> None:
        check_finite("lora.", self)
        _at_least("lora.rank", self.rank, 1, "128 is usual")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha={self.alpha} must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout} is a share; give a number in [0, 1)")


def checkpoint_source(name: str) -> str:
    """Return the folder of a checkpoint that comes with the package; another folder's or the hub's name as it is."""
    return str(SHIPPED.get(name, name))


def cache_folder() -> Path:
    """Return the folder of generated files: $DYNAMIC_LLAVA_CACHE, or ~/.cache/dynamic_llava."""
    return Path(os.environ.get("DYNAMIC_LLAVA_CACHE") or Path.home() / ".cache" / "dynamic_llava")


def check_sparsity_mode(value: str) -> None:
    """Raise ValueError unless `value` is one of the switch `sparsity`."""
    _one_of("sparsity", value, SPARSITY_MODES)
