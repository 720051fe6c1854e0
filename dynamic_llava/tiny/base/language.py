"""Stage 3: the decoder and the projector learn to answer and to describe, from cached features of the frozen tower.

Crutch, disclosed: a grounding loss, which no real LLaVA has. Two heads of one layer are asked to look at the patches of
the object that is named next. Its weight falls linearly to zero well before the end of the training. The attention of
those heads is recomputed from q and k of that one layer, so that every layer keeps its fast attention.

Legend: B rows, N tokens, P patches, D tower width, H grounded heads, E head size, R referring tokens.
"""

import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from dynamic_llava.tiny.base.optim import MuonAdamW, trapezoid_factor
from dynamic_llava.tiny.base.sequences import SegmentWriter, SequenceBatch, collate, sample_row
from dynamic_llava.tiny.world.scenes import TOKENS_PER_IMAGE, Scene

logger = logging.getLogger(__name__)

_FLOOR = 1e-4


@dataclass(frozen=True)
class LanguageSettings:
    """Settings of stage 3."""

    images: int = 12000
    steps: int = 2000
    batch: int = 10
    questions: int = 9
    """Short questions per row, besides one description."""
    muon_lr: float = 0.015
    adam_lr: float = 2e-3
    warmup: int = 30
    decay: int = 900
    """Last steps, over which the learning rates fall linearly."""
    grounding_layer: int = 3
    grounding_heads: int = 2
    grounding_steps: int = 1500
    """Steps over which the weight of the grounding auxiliary falls from 1 to 0."""
    save_every: int = 200


@dataclass(frozen=True)
class CachedWorld:
    """scenes; features (I, P, D) float32, already divided by their deviation; patch_object (I, P)."""

    scenes: list[Scene]
    features: torch.Tensor
    patch_object: np.ndarray


def train_language(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    world: CachedWorld,
    settings: LanguageSettings,
    seed: int,
    checkpoint: Path,
) -> Iterator[int]:
    """Trains `model` in place; yields the step number after each saved checkpoint, for measurements in between.

    A finished run is loaded and yields its last step once more.

    Batches depend on (seed, step) alone, so a run that is resumed from `checkpoint` continues exactly.
    """
    writer = SegmentWriter(tokenizer)
    optimizer = _optimizer(model, settings)
    first = _resume(model, optimizer, checkpoint, settings)
    if first == settings.steps:
        yield first
    start, mean = time.monotonic(), {}
    for step in range(first, settings.steps):
        rng = np.random.default_rng((seed, 30, step))
        chosen = rng.integers(0, len(world.scenes), settings.batch)
        rows = [sample_row(world.scenes[i], writer, rng, settings.questions) for i in chosen]
        batch = collate(rows, writer.prefix, world.patch_object[chosen], tokenizer.pad_token_id)
        grounding = max(0.0, 1 - step / settings.grounding_steps)
        losses = _losses(model, world.features[torch.from_numpy(chosen)], batch, settings, grounding > 0)
        loss = losses["answers"] + grounding * losses.get("grounding", torch.zeros(()))
        optimizer.step(loss, trapezoid_factor(step, settings.steps, settings.warmup, settings.decay))
        for name, value in losses.items():
            mean[name] = 0.97 * mean.get(name, value.item()) + 0.03 * value.item()
        if step % 50 == 49:
            parts = " ".join(f"{name} {value:.4f}" for name, value in mean.items())
            logger.info("base step %d, %.0f s: %s", step + 1, time.monotonic() - start, parts)
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            _save(model, optimizer, checkpoint, settings, step + 1)
            yield step + 1


def _optimizer(model: LlavaForConditionalGeneration, settings: LanguageSettings) -> MuonAdamW:
    """Muon for the decoder's matrices; AdamW for norms, embeddings, head and projector. The tower stays frozen."""
    model.model.vision_tower.requires_grad_(False)
    decoder = model.model.language_model.layers
    matrices = [p for p in decoder.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    return MuonAdamW(matrices, others, muon_lr=settings.muon_lr, adam_lr=settings.adam_lr)


def _losses(
    model: LlavaForConditionalGeneration,
    features_BPD: torch.Tensor,
    batch: SequenceBatch,
    settings: LanguageSettings,
    grounded: bool,
) -> dict[str, torch.Tensor]:
    """Weighted cross-entropy per learned token, and the grounding auxiliary where asked for."""
    decoder = model.model.language_model
    image_start = int((batch.ids[0] == model.config.image_token_id).int().argmax())
    words = decoder.embed_tokens(batch.ids)
    image = model.model.multi_modal_projector(features_BPD)
    embeds = torch.cat([words[:, :image_start], image, words[:, image_start + TOKENS_PER_IMAGE :]], 1)
    with AttentionTap(decoder.layers[settings.grounding_layer].self_attn, settings.grounding_heads) as tap:
        hidden = decoder(
            inputs_embeds=embeds, attention_mask=batch.visible, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        losses = {"answers": _answer_loss(model.lm_head, hidden, batch)}
        if grounded:
            losses["grounding"] = grounding_loss(tap.weights(batch.visible), batch, image_start)
    return losses


def _answer_loss(head: nn.Module, hidden_BND: torch.Tensor, batch: SequenceBatch) -> torch.Tensor:
    """Token n is predicted at n - 1; the first token of a segment is never learned, so blocks do not mix."""
    weight = batch.weight[:, 1:]
    learned = weight > 0
    errors = F.cross_entropy(head(hidden_BND[:, :-1][learned]), batch.ids[:, 1:][learned], reduction="none")
    return (errors * weight[learned]).sum() / weight[learned].sum()


def _save(model: nn.Module, optimizer: MuonAdamW, checkpoint: Path, settings: LanguageSettings, step: int) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "for": asdict(settings)}
    partial = checkpoint.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, checkpoint)


def _resume(model: nn.Module, optimizer: MuonAdamW, checkpoint: Path, settings: LanguageSettings) -> int:
    """Loads `checkpoint` if it exists and returns the step to go on with; other settings than its own are an error."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    if state["for"] != asdict(settings):
        raise ValueError(
            f"{checkpoint} was written with other settings ({state['for']}) than {asdict(settings)}; "
            "use the same settings or another output folder"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    logger.info("resuming at step %d", state["step"])
    return state["step"]


class AttentionTap:
    """While entered, remembers the inputs of one Llama attention module during the last forward pass."""

    def __init__(self, attention: nn.Module, heads: int) -> None:
        """Taps the first `heads` heads of `attention` (a LlamaAttention)."""
        self._attention, self._heads = attention, heads
        self._inputs: dict[str, Any] = {}
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def __enter__(self) -> "AttentionTap":
        """Starts to remember."""

        def remember(_: nn.Module, __: tuple, kwargs: dict[str, Any]) -> None:
            self._inputs = {"hidden": kwargs["hidden_states"], "rotation": kwargs["position_embeddings"]}

        self._handle = self._attention.register_forward_pre_hook(remember, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        """Removes the hook and forgets the inputs."""
        if self._handle is not None:
            self._handle.remove()
        self._inputs = {}

    def weights(self, visible: torch.Tensor) -> torch.Tensor:
        """Softmax attention of the first heads, (B, H, N, N); `visible` is (B, 1, N, N) bool."""
        hidden, (cos, sin) = self._inputs["hidden"], self._inputs["rotation"]
        size = self._attention.head_dim
        query, key = (
            _rotate(nn.functional.linear(hidden, projection.weight[: self._heads * size]), cos, sin, size)
            for projection in (self._attention.q_proj, self._attention.k_proj)
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(size)
        return scores.masked_fill(~visible, -math.inf).softmax(-1)


def grounding_loss(weights_BHNN: torch.Tensor, batch: SequenceBatch, image_start: int) -> torch.Tensor:
    """Mean of -log(attention mass on the patches of what the next token names), over referring tokens and heads."""
    image = weights_BHNN[..., image_start : image_start + TOKENS_PER_IMAGE]
    looked_RHP = image[batch.refer_row, :, batch.refer_at]
    mass_RH = (looked_RHP * batch.refer_patches[:, None]).sum(-1)
    return -(mass_RH + _FLOOR).log().mean()


def _rotate(x_BND: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, size: int) -> torch.Tensor:
    """Splits into heads and applies the rotary position: (B, H, N, E)."""
    x = x_BND.unflatten(-1, (-1, size)).transpose(1, 2)
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
