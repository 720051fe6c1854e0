"""How fast a training step is: forward, backward and AdamW on random samples, and its share of the device's peak."""

from typing import Any

import torch

from dynamic_llava.config import SparsityConfig, TrainConfig
from dynamic_llava.costs import training_flops
from dynamic_llava.profile.presets import Preset
from dynamic_llava.profile.report import Column, Report
from dynamic_llava.profile.timing import time_in_turn
from dynamic_llava.profile.workload import BEFORE_IMAGE, IMAGE_TOKEN, build_model, random_ids

ANSWER = 448
"""Learned tokens of a sample; with the image and its prompt about the mixture's mean length."""


def training_report(preset: Preset, device: torch.device, dtype: torch.dtype, peak: float, rounds: int = 3) -> Report:
    """Time whole steps of the paper's recipe (both predictors and the language model learn, vision tower frozen).

    Weights, gradients and AdamW's states are in `dtype`, with gradient checkpointing. Where that does not fit, the
    decoder is halved until it does, and the row says how many layers were run. `peak` is in FLOP/s. Raises
    torch.OutOfMemoryError when a few layers do not fit either.
    """
    layers = preset.shape.decoder.layers
    while True:
        settings = preset.with_layers(layers)
        try:
            seconds, calls = _timed_step(settings, device, dtype, rounds)
            break
        except torch.OutOfMemoryError:
            if layers < 4 * preset.sparse_layer:
                raise
        layers //= 2
        torch.accelerator.empty_cache()
    flops = training_flops(settings.shape, SparsityConfig(), TrainConfig())
    tokens = settings.prompt + ANSWER
    done = flops.of_batch(preset.batch, tokens, preset.batch, preset.batch * ANSWER)
    row = {
        "preset": preset.name,
        "layers": layers,
        "batch": preset.batch,
        "tokens": tokens,
        "seconds": seconds,
        "calls": calls,
        "flops": done,
        "share": done / seconds / peak,
        "tokens_per_second": preset.batch * tokens / seconds,
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
    )
    notes = [
        f"{dtype}, AdamW, gradient checkpointing (its recomputation is no useful work); peak {peak / 1e12:.3f} TFLOP/s."
    ]
    if layers < preset.shape.decoder.layers:
        notes.append(f"{layers} of {preset.shape.decoder.layers} layers: more did not fit into the device's memory.")
    return Report("training", f"A training step, {preset.name}", columns, [row], notes)


def _timed_step(preset: Preset, device: torch.device, dtype: torch.dtype, rounds: int) -> tuple[float, int]:
    model: Any = build_model(preset, device, dtype).train()
    learning = list(model.model.language_model.parameters()) + list(model.lm_head.parameters())
    for parameter in learning:
        parameter.requires_grad_(True)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()  # else the frozen vision tower would run backward
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
    return timing.median, timing.calls
