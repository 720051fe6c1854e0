"""The memory of training on each GPU, for a run's configuration: shapes, DeepSpeed's settings, table and JSON line."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dynamic_llava.config import DataConfig, LoraConfig, ModelConfig, SparsityConfig, TrainConfig, checkpoint_source
from dynamic_llava.costs import LLAVA_SHAPES, LlavaShape, llava_shape, parameter_counts
from dynamic_llava.costs.memory import Sharding, TrainingMemory, training_memory
from dynamic_llava.engine.learned import learned_costs
from dynamic_llava.model.switches import choose_method

GB = 10**9
ROWS = ("weights", "gradients", "optimizer", "activations", "buffers", "total")


@dataclass(frozen=True)
class MemoryCommand:
    """Calculate the memory that training needs on each GPU; exit code 1 where it does not fit into --gpu-memory."""

    config: Path
    """Configuration file of a training run."""
    gpus: int = 1
    """GPUs, with one process each."""
    gpu_memory: float | None = None
    """Memory of one GPU in GB (10^9 bytes), to say whether training fits."""
    shape: Literal["7b", "13b"] | None = None
    """Size of LLaVA-1.5; None: that of the base checkpoint, a folder or a name that contains 7b or 13b."""
    batch_size: int | None = None
    """Samples per GPU and accumulation step; None: train.batch_size."""
    json: bool = False
    """Print the numbers as one line of JSON after the table, in bytes."""


@dataclass(frozen=True)
class MemoryReport:
    """The calculation for one configuration, and what it was made for."""

    memory: TrainingMemory
    gpus: int
    gpu_memory: float | None
    """GB of one GPU, or None."""
    about: dict[str, Any]
    """The settings that the numbers depend on."""

    @property
    def fits(self) -> bool | None:
        """Whether the total fits into one GPU; None if its memory was not given."""
        return None if self.gpu_memory is None else self.memory.total <= self.gpu_memory * GB

    def table(self) -> str:
        """Return the lines that people read."""
        about = self.about
        lines = [
            f"{about['learning']:,} of {about['parameters']:,} parameters learn (train.tune={about['tune']})",
            f"batches of {about['batch_size']} x {about['tokens']} tokens, {self.gpus} GPU(s), {about['spread']}",
            f"{'':12}{'GB per GPU':>12}",
        ]
        lines += [f"{row:12}{getattr(self.memory, row) / GB:12.2f}" for row in ROWS]
        if self.memory.host:
            lines.append(f"{'host':12}{self.memory.host / GB:12.2f}  (per process, in the machine's memory)")
        if self.gpu_memory is not None:
            verb = "fits" if self.fits else "does not fit"
            lines.append(f"{verb} into {self.gpu_memory:g} GB")
        return "\n".join(lines)

    def line(self) -> str:
        """Return the same as one line of JSON, in bytes."""
        sizes = {row: getattr(self.memory, row) for row in (*ROWS, "host")}
        return json.dumps({**self.about, "gpus": self.gpus, **sizes, "gpu_memory": self.gpu_memory, "fits": self.fits})


def memory_report(
    command: MemoryCommand,
    model: ModelConfig,
    data: DataConfig,
    sparsity: SparsityConfig,
    train: TrainConfig,
    lora: LoraConfig | None,
    deepspeed: Mapping[str, Any] | None,
) -> MemoryReport:
    """Calculate for a run's sections and the settings of its DeepSpeed file; every sample is data.max_length long.

    Raises ValueError where the model's shape is unknown.
    """
    shape = LLAVA_SHAPES[command.shape] if command.shape is not None else shape_of(model.base, sparsity)
    if command.batch_size is not None:
        train = replace(train, batch_size=command.batch_size)
    sharding = sharding_of(deepspeed, command.gpus, shape.decoder.hidden)
    method = choose_method(sparsity, **train.switches)
    learned = learned_costs(sparsity, shape.decoder.hidden, method)
    memory = training_memory(shape, model, sparsity, learned, train, lora, tokens=data.max_length, sharding=sharding)
    counts = parameter_counts(shape, learned, lora)
    about = {
        "config": str(command.config),
        "tune": train.tune,
        "parameters": sum(counts.values()),
        "learning": sum(counts[part] for part in train.learning_rates(method.used_parts)),
        "batch_size": train.batch_size,
        "tokens": data.max_length,
        "gradient_checkpointing": train.gradient_checkpointing,
        "spread": f"ZeRO stage {sharding.zero_stage}" if sharding.deepspeed else "nothing spread over GPUs",
    }
    return MemoryReport(memory, command.gpus, command.gpu_memory, about)


def shape_of(base: str, sparsity: SparsityConfig) -> LlavaShape:
    """Return the sizes of a base checkpoint: from its folder, or from a name that contains 7b or 13b."""
    folder = Path(checkpoint_source(base))
    if base and folder.is_dir():
        from dynamic_llava.model import DynamicLlavaConfig  # seconds of imports that a known name does not need

        return llava_shape(DynamicLlavaConfig.from_pretrained(folder, sparsity=sparsity.to_dict()))
    found = re.search(r"(?<![\d.])(7|13)b(?![a-z])", base.lower())
    if found is None:
        raise ValueError(
            f"model.base={base!r} is no folder here and names no known size; give --shape 7b or --shape 13b"
        )
    return LLAVA_SHAPES[f"{found[1]}b"]


def sharding_of(deepspeed: Mapping[str, Any] | None, gpus: int, hidden: int) -> Sharding:
    """Return what a DeepSpeed file's settings mean for `gpus` GPUs; "auto" is what transformers fills in."""
    if deepspeed is None:
        return Sharding(gpus)
    zero = deepspeed.get("zero_optimization", {})

    def offloads(what: str) -> bool:
        return ((zero.get(f"offload_{what}") or {}).get("device") or "none") != "none"

    def parameters(key: str, unset: int, automatic: float) -> int:
        value = unset if zero.get(key) is None else zero[key]
        return int(automatic) if value == "auto" else int(value)

    return Sharding(
        gpus=gpus,
        deepspeed=True,
        zero_stage=int(zero.get("stage", 0)),
        offload_optimizer=offloads("optimizer"),
        offload_weights=offloads("param"),
        live_parameters=parameters("stage3_max_live_parameters", Sharding.live_parameters, Sharding.live_parameters),
        bucket_parameters=parameters("reduce_bucket_size", Sharding.bucket_parameters, hidden**2),
        prefetch_parameters=parameters("stage3_prefetch_bucket_size", Sharding.prefetch_parameters, 0.9 * hidden**2),
    )
