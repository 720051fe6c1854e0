"""Stage 1: the vision tower, a stand-in for CLIP's pre-training.

Crutch, disclosed: the tower is trained with patch-level labels (shape, colour, size, place of the object that owns the
patch, and the kind of ground on CLS). CLIP's weights come from 400 million captions instead. The tower is frozen after.

Legend: B images, P patches, D tower width, L label kinds.
"""

import logging
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import CLIPVisionModel

from dynamic_llava.tiny.base.model import CLIP_MEAN, CLIP_STD
from dynamic_llava.tiny.base.optim import MuonAdamW, cosine_factor
from dynamic_llava.tiny.world.scenes import (
    BACKGROUNDS,
    COLORS,
    IMAGE_SIZE,
    PATCH_SIZE,
    SHAPES,
    SIZES,
    TOKENS_PER_IMAGE,
    Picture,
    Scene,
    sample_pictures,
)

logger = logging.getLogger(__name__)
IGNORE = -100
GROUND_CLASS = 0
LABEL_CLASSES = (1 + len(SHAPES), len(COLORS), len(SIZES))
_PLACE_WEIGHT = 4.0
_GROUND_WEIGHT = 0.1
_BACKGROUND_WEIGHT = 0.3


@dataclass(frozen=True)
class VisionSettings:
    """Settings of stage 1."""

    images: int = 6000
    steps: int = 1600
    batch: int = 48
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    warmup: int = 30
    measured: int = 400
    """Unseen pictures for the accuracies that are reported at the end."""


@dataclass(frozen=True)
class PatchLabels:
    """The truth per patch.

    kinds: (B, P, 3) int64, shape (0 = ground), colour, size; -100 = not scored. place: (B, P, 3) float32, centre and
    radius of the object in units of half a picture and of a patch. owned: (B, P) bool. background: (B,) int64.
    """

    kinds: torch.Tensor
    place: torch.Tensor
    owned: torch.Tensor
    background: torch.Tensor

    def take(self, rows: torch.Tensor) -> "PatchLabels":
        """The rows `rows` of every field."""
        return PatchLabels(self.kinds[rows], self.place[rows], self.owned[rows], self.background[rows])


class _AsConvolution(nn.Module):
    """Stores a convolution's kernel as a matrix, because torch.optim.Muon takes 2-D tensors only."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self._shape = shape

    def forward(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.view(self._shape)

    def right_inverse(self, kernel: torch.Tensor) -> torch.Tensor:
        return kernel.flatten(1)


class PatchHeads(nn.Module):
    """Read-outs of stage 1, thrown away afterwards."""

    def __init__(self, width: int) -> None:
        """`width` is the tower's."""
        super().__init__()
        self.kinds = nn.ModuleList(nn.Linear(width, classes) for classes in LABEL_CLASSES)
        self.place = nn.Linear(width, 3)
        self.background = nn.Linear(width, len(BACKGROUNDS))


def pixel_values(pixels: torch.Tensor) -> torch.Tensor:
    """(B, 64, 64, 3) uint8 to (B, 3, 64, 64) float32 with CLIP's mean and deviation; 64 px squares need no resizing."""
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def tower_features(tower: CLIPVisionModel, pixels: torch.Tensor) -> torch.Tensor:
    """Last layer of the tower, CLS included: (B, 1 + P, D)."""
    hidden = tower(pixel_values(pixels), output_hidden_states=True).hidden_states
    return hidden[-1]


def patch_labels(scenes: list[Scene], pictures: list[Picture]) -> PatchLabels:
    """The truth of every patch. Patches with a sliver of an object (0 < coverage <= 0.1) are not scored."""
    count = len(scenes)
    kinds = np.full((count, TOKENS_PER_IMAGE, 3), IGNORE, np.int64)
    place = np.zeros((count, TOKENS_PER_IMAGE, 3), np.float32)
    owner = np.stack([p.patch_object for p in pictures])
    coverage = np.stack([p.patch_coverage for p in pictures])
    for b, scene in enumerate(scenes):
        objects = scene.objects
        table = np.array([(1 + SHAPES.index(o.shape), COLORS.index(o.color), SIZES.index(o.size)) for o in objects])
        where = np.array([(o.x, o.y, o.radius) for o in objects], np.float32)
        owned = owner[b] >= 0
        kinds[b, coverage[b] == 0, 0] = GROUND_CLASS
        kinds[b, owned] = table[owner[b][owned]]
        place[b, owned] = where[owner[b][owned]]
    half = IMAGE_SIZE / 2
    place = place / np.array([half, half, PATCH_SIZE], np.float32) - 1
    background = torch.tensor([BACKGROUNDS.index(s.background) for s in scenes])
    return PatchLabels(torch.from_numpy(kinds), torch.from_numpy(place), torch.from_numpy(owner >= 0), background)


def train_tower(tower: CLIPVisionModel, settings: VisionSettings, seed: int) -> dict[str, float]:
    """Trains `tower` in place and returns its accuracies on fresh ordinary scenes (see `tower_accuracy`)."""
    scenes, pictures = sample_pictures(settings.images, (seed, 1), dense=True)
    pixels = torch.from_numpy(np.stack([p.pixels for p in pictures]))
    labels = patch_labels(scenes, pictures)
    heads = PatchHeads(tower.config.hidden_size)
    convolution = tower.get_submodule("embeddings.patch_embedding")
    parametrize.register_parametrization(convolution, "weight", _AsConvolution(convolution.weight.shape))
    matrices, others = _split(tower)
    optimizer = MuonAdamW(matrices, [*others, *heads.parameters()], muon_lr=settings.muon_lr, adam_lr=settings.adam_lr)
    rng, start = np.random.default_rng((seed, 2)), time.monotonic()
    tower.train()
    for step in range(settings.steps):
        rows = torch.from_numpy(rng.integers(0, settings.images, settings.batch))
        losses = _losses(tower_features(tower, pixels[rows]), heads, labels.take(rows))
        loss = torch.stack(list(losses.values())).sum()
        optimizer.step(loss, cosine_factor(step, settings.steps, settings.warmup))
        if step % 50 == 49:
            parts = " ".join(f"{k} {v.item():.3f}" for k, v in losses.items())
            logger.info("tower step %d, %.0f s: %s", step + 1, time.monotonic() - start, parts)
    parametrize.remove_parametrizations(convolution, "weight", leave_parametrized=True)
    tower.eval()
    return tower_accuracy(tower, heads, seed, settings.measured)


@torch.no_grad()
def tower_accuracy(tower: CLIPVisionModel, heads: PatchHeads, seed: int, images: int) -> dict[str, float]:
    """Patch accuracy for shape, colour and size on object patches, and for the ground, on unseen ordinary scenes."""
    scenes, pictures = sample_pictures(images, (seed, 3))
    labels = patch_labels(scenes, pictures)
    features = tower_features(tower, torch.from_numpy(np.stack([p.pixels for p in pictures])))[:, 1:]
    guesses = [head(features).argmax(-1) == labels.kinds[..., i] for i, head in enumerate(heads.kinds)]
    result = {
        name: guess[labels.owned].float().mean().item()
        for name, guess in zip(("shape", "color", "size"), guesses, strict=True)
    }
    ground = labels.kinds[..., 0] == GROUND_CLASS
    return {**result, "ground": guesses[0][ground].float().mean().item()}


def _split(tower: CLIPVisionModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices for Muon (position table excluded) and everything else."""
    named = [(n, p) for n, p in tower.named_parameters() if not n.startswith("post_layernorm")]
    matrices = [p for n, p in named if p.dim() == 2 and "position_embedding" not in n]
    chosen = {id(p) for p in matrices}
    return matrices, [p for _, p in named if id(p) not in chosen]


def _losses(features_BPD: torch.Tensor, heads: PatchHeads, labels: PatchLabels) -> dict[str, torch.Tensor]:
    patches, losses = features_BPD[:, 1:], {}
    for i, name in enumerate(("shape", "color", "size")):
        weight = torch.ones(LABEL_CLASSES[i])
        if name == "shape":
            weight[GROUND_CLASS] = _GROUND_WEIGHT  # four of five patches are ground
        scores = heads.kinds[i](patches).flatten(0, 1)
        losses[name] = F.cross_entropy(scores, labels.kinds[..., i].flatten(), weight, ignore_index=IGNORE)
    error = (heads.place(patches) - labels.place).pow(2).mean(-1)
    losses["place"] = _PLACE_WEIGHT * error[labels.owned].mean()
    losses["ground"] = _BACKGROUND_WEIGHT * F.cross_entropy(heads.background(features_BPD[:, 0]), labels.background)
    return losses
