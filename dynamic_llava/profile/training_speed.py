"""How fast a training step is, and what it needs: forward, backward and AdamW on random samples.

The time stands beside the device's peak rate, the peak of the memory beside the calculation of costs/memory.py.
"""

from typing import Any

import torch

from dynamic_llava.config import ModelConfig, TrainConfig
from dynamic_llava.costs import training_flops
from dynamic_llava.costs.memory import training_memory
from dynamic_llava.engine.learned import learned_costs
from dynamic_llava.profile.measuring import Peak, Timing, peak_memory, time_in_turn
from dynamic_llava.profile.presets import Preset
from dynamic_llava.profile.results import Column, Report
from dynamic_llava.profile.workload import BEFORE_IMAGE, IMAGE_TOKEN, build_model, random_ids
from dynamic_llava.train.optimizer import recompute_activations

ANSWER = 448
"""Learned tokens of a sample; with the image and its prompt about the mixture's mean length."""


def training_report(preset: Preset, device: torch.device, dtype: torch.dtype, peak: float, rounds: int = 3) -> Report:
    """Time and measure whole steps of the paper's recipe.

    Both predictors and the language model learn, the vision tower is frozen. Weights, gradients and AdamW's states are
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
    learned = learned_costs(preset.sparsity, settings.shape.decoder.hidden)
    flops = training_flops(settings.shape, preset.sparsity, learned, train)
    done = flops.of_batch(preset.batch, tokens, preset.batch, preset.batch * ANSWER)
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
    learning = list(model.model.language_model.parameters()) + list(model.lm_head.parameters())
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
        model(input_ids=ids_BN, pixel_values=pixels, labels=labels_BN).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    timing = time_in_turn({"step": step}, device, rounds, warmup=1)["step"]
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = [*model.parameters(), *states, ids_BN, labels_BN, pixels]
    return timing, peak_memory(lambda: None, lambda _: step(), device, held)
