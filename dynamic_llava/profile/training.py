"""What training costs: the memory on each GPU, calculated for a run's configuration, and a step that is measured.

The calculation knows shapes and DeepSpeed's settings; it gives a table and a line of JSON. The step is forward,
backward and AdamW on random samples: its time stands beside the device's peak rate, its peak of memory beside the
calculation of costs/memory.py.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from dynamic_llava.config import DataConfig, LoraConfig, ModelConfig, SparsityConfig, TrainConfig, checkpoint_source
from dynamic_llava.costs import LLAVA_SHAPES, LlavaShape, llava_shape, parameter_counts, training_flops
from dynamic_llava.costs.memory import Sharding, TrainingMemory, training_memory
from dynamic_llava.engine.learned import learned_costs
from dynamic_llava.methods import import_named
from dynamic_llava.model.switches import choose_method
from dynamic_llava.profile.measuring import Peak, Timing, peak_memory, time_in_turn
from dynamic_llava.profile.presets import Preset
from dynamic_llava.profile.results import Column, Report
from dynamic_llava.profile.workload import BEFORE_IMAGE, IMAGE_TOKEN, build_model, random_ids
from dynamic_llava.train.optimizer import recompute_activations

GB = 10**9

ROWS = ("weights", "gradients", "optimizer", "activations", "buffers", "total")

ANSWER = 448
"""Learned tokens of a sample; with the image and its prompt about the mixture's mean length."""


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
            f"batches of {about['batch_size']} x {about['tokens']} tokens, {self.gpus} GPU(s), {about['spread']}"
            + (", and a dense pass to distill from" if about["distill"] else ""),
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
    import_named(sparsity.method)  # a run's file is its user's word
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
        "distill": train.distill is not None,
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


def training_report(preset: Preset, device: torch.device, dtype: torch.dtype, peak: float, rounds: int = 3) -> Report:
    """Time and measure whole steps of the paper's recipe.

    Both predictors and the language model learn, the vision tower is frozen; under a method of the preset's own, which
    learns nothing, the language model alone. Weights, gradients and AdamW's states are
    in `dtype`, with gradient checkpointing. Where that does not fit, the decoder is halved until it does, and the row
    says how many layers were run. `peak` is in FLOP/s. Raises torch.OutOfMemoryError when a few layers do not fit
    either.
    """
    layers = preset.shape.decoder.layers
    while True:
        settings = preset.with_layers(layers)
        try:
            timing, memory = _measured_step(settings, device, dtype, rounds)
            break
        except torch.OutOfMemoryError:
            if layers < 4 * preset.sparse_layer:
                raise
        layers //= 2
        torch.accelerator.empty_cache()
    train = TrainConfig(batch_size=preset.batch, gradient_checkpointing=True)
    tokens = settings.prompt + ANSWER
    learned = learned_costs(preset.sparsity, settings.shape.decoder.hidden, preset.method)
    flops = training_flops(settings.shape, preset.sparsity, learned, train)
    done = flops.of_batch(preset.batch, tokens, preset.batch, *[preset.batch * ANSWER] * 2)
    weights = ModelConfig(dtype=str(dtype).removeprefix("torch."))  # type: ignore[arg-type]
    needed = training_memory(settings.shape, weights, preset.sparsity, learned, train, tokens=tokens)
    row = {
        "preset": preset.name,
        "layers": layers,
        "batch": preset.batch,
        "tokens": tokens,
        "seconds": timing.median,
        "calls": timing.calls,
        "flops": done,
        "share": done / timing.median / peak,
        "tokens_per_second": preset.batch * tokens / timing.median,
        "memory": memory.bytes,
        "memory_calculated": needed.total,
    }
    columns = (
        Column("preset", "preset"),
        Column("layers", "layers"),
        Column("batch", "samples"),
        Column("tokens", "tokens each"),
        Column("seconds", "step, s", ".3f"),
        Column("tokens_per_second", "tokens/s", ".0f"),
        Column("flops", "TFLOP", ".4g", 1e-12),
        Column("share", "MFU", ".1%"),
        Column("memory", "peak, GiB", ".3f", 2**-30),
        Column("memory_calculated", "calculated, GiB", ".3f", 2**-30),
    )
    notes = [
        f"{dtype}, AdamW, gradient checkpointing (recomputing is no useful work); peak {peak / 1e12:.3f} TFLOP/s.",
        f"Memory: {memory.how}, of one whole step from a reset; calculated as `memory CONFIG.yaml` does.",
    ]
    if layers < preset.shape.decoder.layers:
        notes.append(f"{layers} of {preset.shape.decoder.layers} layers: more did not fit into the device's memory.")
    return Report("training", f"A training step, {preset.name}", columns, [row], notes)


def _measured_step(preset: Preset, device: torch.device, dtype: torch.dtype, rounds: int) -> tuple[Timing, Peak]:
    model: Any = build_model(preset, device, dtype).train()
    language_model, method = model.model.language_model, preset.method
    idle = () if method is None else set(language_model.learner.parts) - set(method.used_parts)
    unused = {id(parameter) for part in idle for parameter in language_model.get_submodule(part).parameters()}
    learning = [parameter for parameter in language_model.parameters() if id(parameter) not in unused]
    learning += model.lm_head.parameters()
    for parameter in learning:
        parameter.requires_grad_(True)
    recompute_activations(model)
    optimizer = torch.optim.AdamW(learning, lr=1e-6, weight_decay=0.0, fused=True)
    vision, shape = preset.shape.vision, preset.shape
    side = vision.patch * round(vision.patches**0.5)
    ids_BN = random_ids(model, preset.batch, preset.prompt + ANSWER)
    ids_BN[:, BEFORE_IMAGE : BEFORE_IMAGE + shape.tokens_per_image] = IMAGE_TOKEN
    labels_BN = ids_BN.clone()
    labels_BN[:, : preset.prompt] = -100
    pixels = torch.randn(preset.batch, 3, side, side, device=device, dtype=dtype)

    def step() -> None:
        model(input_ids=ids_BN, pixel_values=pixels, labels=labels_BN, method=method, skip_logits=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    timing = time_in_turn({"step": step}, device, rounds, warmup=1)["step"]
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = [*model.parameters(), *states, ids_BN, labels_BN, pixels]
    return timing, peak_memory(lambda: None, lambda _: step(), device, held)
