"""C-Abstractor: convolutions, a mean over blocks of patches, convolutions again, and a perceptron.

Honeybee, Cha et al., arXiv:2312.06742; khanrc/honeybee 68a8d84, honeybee/projectors/projectors.py and
configs/model_config/c-abs.yaml; its blocks are RegNet's, arXiv:2003.13678, as timm's RegStage builds them without
further settings: depthwise, with squeeze and excitation by a quarter of the width.
Learned places are added to the features first. A width of 1024 is the tower's here, as it is for LLaVA-1.5.
Shape suffixes: I images, P patches of one image, F feature size, n image tokens, D hidden size.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamic_llava.projectors.base import BlockProjector, as_map, feature_width, grid_of

DEPTH = 3


class CAbstractor(BlockProjector):
    """One token for each 2 x 2 patches, which has seen those around them too."""

    name: ClassVar[str] = "c_abstractor"

    def __init__(self, config: Any, activation: nn.Module) -> None:
        super().__init__(config, activation)
        rows, columns = grid_of(config)
        features, width, hidden = (
            feature_width(config),
            config.vision_config.hidden_size,
            config.text_config.hidden_size,
        )
        self.places = nn.Parameter(torch.empty(rows * columns, features))
        self.before = nn.Sequential(*(_Block(features if number == 0 else width, width) for number in range(DEPTH)))
        self.after = nn.Sequential(*(_Block(width, width) for _ in range(DEPTH)))
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.initialise()

    def initialise(self) -> None:
        """Draw the places."""
        nn.init.trunc_normal_(self.places, std=0.02)

    def forward(self, features_IPF: Tensor) -> Tensor:
        """Return (I, n, D)."""
        fine = self.before(as_map(features_IPF + self.places))
        coarse = self.after(F.avg_pool2d(fine, self.scale))
        tokens_InD: Tensor = self.mlp(coarse.flatten(2).transpose(1, 2))
        return tokens_InD


class _Block(nn.Module):
    """RegNet's bottleneck, as wide as its ends: 1 x 1, depthwise 3 x 3, squeeze and excitation, 1 x 1; a shortcut."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        squeezed = max(1, round(width / 4))
        self.into = _Convolution(width, out)
        self.across = _Convolution(out, out, kernel_size=3, padding=1, groups=out)
        self.squeeze, self.excite = nn.Conv2d(out, squeezed, 1), nn.Conv2d(squeezed, out, 1)
        self.back = _Convolution(out, out)
        self.shortcut = nn.Identity() if width == out else _Convolution(width, out)

    def forward(self, patches: Tensor) -> Tensor:
        changed = F.silu(self.across(F.silu(self.into(patches))))
        mean = changed.mean((2, 3), keepdim=True)
        changed = changed * self.excite(F.silu(self.squeeze(mean))).sigmoid()
        return F.silu(self.back(changed) + self.shortcut(patches))


class _Convolution(nn.Module):
    """A convolution without biases, and a norm over the numbers of each patch."""

    def __init__(self, width: int, out: int, kernel_size: int = 1, padding: int = 0, groups: int = 1) -> None:
        super().__init__()
        self.map = nn.Conv2d(width, out, kernel_size, padding=padding, groups=groups, bias=False)
        self.norm = nn.LayerNorm(out)

    def forward(self, patches: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.map(patches).permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)
