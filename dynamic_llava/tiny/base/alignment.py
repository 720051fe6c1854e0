"""Stage 2: the projector learns to put every patch near the words that name it; the decoder gets its initial values.

Crutches, disclosed: patch-level words (LLaVA's alignment stage has captions only), unit-scale embeddings with a head
that starts as their multiple, and a "mimetic" start of the attention in layers >= 2. Without them a decoder of this
size does not begin to read the picture within any affordable number of steps.

Legend: I images, P patches, D tower width, W words per patch.
"""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from dynamic_llava.tiny.world.scenes import COLUMNS, GRID, ROWS, TOKENS_PER_IMAGE, Picture, Scene

logger = logging.getLogger(__name__)
_HEAD_SCALE = 0.04
_WEIGHT_STD = 0.04
_MIMETIC_FROM = 2


@dataclass(frozen=True)
class AlignmentSettings:
    """Settings of stage 2."""

    images: int = 4000
    steps: int = 500
    batch: int = 2048
    lr: float = 2e-3


@torch.no_grad()
def initialise_decoder(model: LlavaForConditionalGeneration, seed: int) -> None:
    """Word embeddings N(0, 1), head = 0.04 x embeddings (untied afterwards), mimetic attention from layer 2 on.

    Mimetic (Trockman & Kolter 2023): q and k start as the same rotation, so a token attends to similar ones, and the
    output map starts as half the inverse of the value map.
    """
    random = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings().weight
    embedding.normal_(generator=random)
    model.get_output_embeddings().weight.copy_(_HEAD_SCALE * embedding)
    layers = model.model.language_model.layers
    for number, layer in enumerate(layers):
        for name, weight in layer.named_parameters():
            if weight.dim() == 2:
                closing = name.endswith(("o_proj.weight", "down_proj.weight"))
                weight.normal_(std=_WEIGHT_STD * ((2 * len(layers)) ** -0.5 if closing else 1), generator=random)
        if number >= _MIMETIC_FROM:
            _mimetic(layer.self_attn, random)


def word_targets(
    tokenizer: PreTrainedTokenizerFast, scenes: list[Scene], pictures: list[Picture]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Word ids (I, P, 5) that name each patch, and (I, P) bool: the patch belongs to an object.

    Object patches: colour, shape, size, row, column of the object; ground patches: the ground three times, and the
    patch's own row and column. Without row and column descriptions never learn where things are.
    """

    def word(text: str) -> int:
        return tokenizer(text, add_special_tokens=False).input_ids[0]

    third = [int((i + 0.5) * 3 / GRID) for i in range(GRID)]
    place = np.array([(word(ROWS[third[p // GRID]]), word(COLUMNS[third[p % GRID]])) for p in range(TOKENS_PER_IMAGE)])
    targets = np.empty((len(scenes), TOKENS_PER_IMAGE, 5), np.int64)
    owner = np.stack([p.patch_object for p in pictures])
    ids = {text: word(text) for scene in scenes[:2000] for text in _scene_words(scene)}
    for i, scene in enumerate(scenes):
        names = np.array([[ids[w] for w in (o.color, o.shape, o.size, o.row, o.column)] for o in scene.objects])
        targets[i, :, :3], targets[i, :, 3:] = ids[scene.background], place
        owned = owner[i] >= 0
        targets[i, owned] = names[owner[i][owned]]
    return torch.from_numpy(targets), torch.from_numpy(owner >= 0)


def align_projector(
    model: LlavaForConditionalGeneration,
    features_IPD: torch.Tensor,
    targets_IPW: torch.Tensor,
    owned_IP: torch.Tensor,
    settings: AlignmentSettings,
    seed: int,
) -> float:
    """Regresses projector(feature) onto the mean embedding of the patch's words; returns the last relative error.

    Three of four sampled patches carry an object. The word embeddings stay as they are.
    """
    projector = model.model.multi_modal_projector
    embedding = model.get_input_embeddings().weight.detach()
    features, targets, owned = features_IPD.flatten(0, 1), targets_IPW.flatten(0, 1), owned_IP.flatten()
    objects, ground = owned.nonzero().flatten(), (~owned).nonzero().flatten()
    optimizer = torch.optim.AdamW(projector.parameters(), lr=settings.lr, weight_decay=0.0)
    random = torch.Generator().manual_seed(seed)
    scale = embedding.pow(2).sum(-1).mean()
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = settings.lr * (1 - step / settings.steps)
        quarter = settings.batch // 4
        rows = torch.cat(
            [
                objects[torch.randint(len(objects), (settings.batch - quarter,), generator=random)],
                ground[torch.randint(len(ground), (quarter,), generator=random)],
            ]
        )
        wanted = embedding[targets[rows]].mean(1)
        loss = (projector(features[rows]) - wanted).pow(2).sum(-1).mean() / scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logger.info("alignment: relative error %.4f after %d steps", loss.item(), settings.steps)
    return loss.item()


def _scene_words(scene: Scene) -> list[str]:
    return [scene.background, *(w for o in scene.objects for w in (o.color, o.shape, o.size, o.row, o.column))]


def _mimetic(attention: nn.Module, random: torch.Generator) -> None:
    width = attention.q_proj.weight.shape[0]
    noise = 0.02

    def rotation() -> torch.Tensor:
        return torch.linalg.qr(torch.randn(width, width, generator=random))[0]

    shared, value = rotation(), rotation()
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.copy_(shared + noise * torch.randn(width, width, generator=random))
    attention.v_proj.weight.copy_(value)
    attention.o_proj.weight.copy_(0.5 * value.T)
