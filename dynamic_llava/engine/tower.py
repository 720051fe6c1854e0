"""What a cut before the language model is shown of the vision tower, read while the tower runs.

A CLIP tower's attention is called by the name that `engine/attention.py` gives it, so the queries and keys of the one
layer that is read are taken on the way: no layer has to return its attention weights, none runs another kernel.
Shape suffixes: I images, P patches of one image and the class token before them, n image tokens, F feature size of one
layer, H query heads, d head size.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynamic_llava.methods import QUESTION_EVIDENCE, Cut, Evidence


class TowerReading:
    """What is read in attention layers of the tower; what is not asked for is not computed."""

    def __init__(self, asked: Mapping[nn.Module, frozenset[Evidence]]) -> None:
        """Read what is asked for of each attention layer; all layers of the tower are handed this object."""
        self._asked = asked
        self.seen: dict[Evidence, Tensor] = {}
        """The evidence, one entry for each patch; empty until the layer has run."""

    @torch.no_grad()
    def read(self, module: nn.Module, query: Tensor, key: Tensor, scaling: float) -> None:
        """Take what is asked for from queries and keys (I, H, P, d), the class token's first."""
        asked = self._asked.get(module, frozenset())
        for name in asked & {"received", "early_received"}:
            self.seen[name] = _received(query, key, scaling)[:, 1:]
        for name in asked & {"class_row", "early_class_row"}:
            scores_IHP = (query[:, :, :1] @ key.transpose(2, 3))[:, :, 0].float() * scaling
            self.seen[name] = scores_IHP.softmax(-1).mean(1)[:, 1:]
        if "tower_keys" in asked:
            self.seen["tower_keys"] = key[:, :, 1:].mean(1)
        if asked & {"joint_class_row", "joint_tower_keys"}:
            key_IPF = key.transpose(1, 2).flatten(2)
        if "joint_class_row" in asked:
            scores_IP = (key_IPF.float() @ query[:, :, 0].flatten(1)[..., None].float())[..., 0]
            self.seen["joint_class_row"] = (scores_IP * key_IPF.shape[2] ** -0.5).softmax(-1)[:, 1:]
        if "joint_tower_keys" in asked:
            self.seen["joint_tower_keys"] = key_IPF[:, 1:]


def _received(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """(I, P) float32: the attention that each token receives, the mean over heads and queries; one head at a time."""
    heads = range(query.shape[1])
    means = [((query[:, one] @ key[:, one].transpose(1, 2)).float() * scaling).softmax(-1).mean(1) for one in heads]
    return torch.stack(means).mean(0)


class EncodedImages(Sequence[Tensor]):
    """Projected features, (n, D) of each image, and what the vision tower says of them.

    Given as `image_features`, they let a method decide that reads the tower, if they were encoded for its cut. No list:
    accelerate rebuilds lists that pass its hooks, and would lose what comes along.
    """

    def __init__(self, features: Iterable[Tensor], seen: Mapping[Evidence, Tensor], cut: Cut) -> None:
        self._features, self.seen, self.cut = list(features), seen, cut

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, place: Any) -> Any:
        return self._features[place]

    def serves(self, cut: Cut) -> bool:
        """Whether everything that a cut is shown was read, in its layer of the tower, of a picture of its size."""
        wanted = (cut.sees - QUESTION_EVIDENCE) | ({"tower"} if cut.before_projector else set())
        names = ("tower_layer", "early_depth", "picture_side", "text_tower")
        return wanted <= set(self.seen) and all(getattr(cut, name) == getattr(self.cut, name) for name in names)

    def chosen(self, order: Sequence[int]) -> "EncodedImages":
        """Return the images of these numbers, in this order."""
        seen = {name: values[list(order)] for name, values in self.seen.items()}
        return EncodedImages([self[number] for number in order], seen, self.cut)
