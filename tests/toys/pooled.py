"""A toy of the kind projector: the mean of each 2 x 2 patches, then one linear map."""

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from dynamic_llava.projectors import Grid, Projector, feature_width


class Pooled(Projector):
    """A quarter as many tokens as patches."""

    name: ClassVar[str] = "pooled"

    def __init__(self, config: Any, activation: nn.Module) -> None:
        super().__init__(config, activation)
        self.map = nn.Linear(feature_width(config), config.text_config.hidden_size)

    @classmethod
    def tokens(cls, grid: Grid, class_token: bool = False) -> int:
        """Return one for each 2 x 2 patches."""
        if class_token or grid[0] % 2 or grid[1] % 2:
            raise ValueError(f"'pooled' takes an even number of patches a side, and no class token; got {grid}")
        return grid[0] * grid[1] // 4

    def forward(self, features_IPF: Tensor) -> Tensor:
        """Return (I, P / 4, D)."""
        side = int(features_IPF.shape[1] ** 0.5)
        grid = features_IPF.transpose(1, 2).unflatten(2, (side, side))
        return self.map(F.avg_pool2d(grid, 2).flatten(2).transpose(1, 2))
