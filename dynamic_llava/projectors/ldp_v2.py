"""LDP-v2: a perceptron for each patch, the mean of each block, and a depthwise convolution that is added to it.

MobileVLM V2, Chu et al., arXiv:2402.03766; Meituan-AutoML/MobileVLM 688fdec, mobilevlm/model/vision_projector.py.
Shape suffixes: I images, P patches of one image, F feature size, n image tokens, D hidden size.
"""

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from dynamic_llava.projectors.base import BlockProjector, as_map, feature_width


class LdpV2(BlockProjector):
    """One token for each 2 x 2 patches, told its place by those around it."""

    name: ClassVar[str] = "ldp_v2"

    def __init__(self, config: Any, activation: nn.Module) -> None:
        super().__init__(config, activation)
        hidden = config.text_config.hidden_size
        self.mlp = nn.Sequential(nn.Linear(feature_width(config), hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.around = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, features_IPF: Tensor) -> Tensor:
        """Return (I, n, D)."""
        pooled = F.avg_pool2d(as_map(self.mlp(features_IPF)), self.scale)
        tokens_InD: Tensor = (pooled + self.around(pooled)).flatten(2).transpose(1, 2)
        return tokens_InD
