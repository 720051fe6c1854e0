"""LLaVA-1.5's projector: two linear maps with an activation between, token by token."""

from typing import Any, ClassVar

from torch import Tensor, nn

from dynamic_llava.projectors.base import Grid, Projector, feature_width


class Mlp(Projector):
    """One token for each patch, and one for the class token; the tensors of transformers' LlavaMultiModalProjector."""

    name: ClassVar[str] = "mlp"
    per_patch: ClassVar[bool] = True

    def __init__(self, config: Any, activation: nn.Module) -> None:
        super().__init__(config, activation)
        hidden, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(feature_width(config), hidden, bias=bias)
        self.act = activation
        self.linear_2 = nn.Linear(hidden, hidden, bias=bias)

    @classmethod
    def tokens(cls, grid: Grid, class_token: bool = False) -> int:
        """Return the number of patches, and one more with the class token."""
        return grid[0] * grid[1] + class_token

    def forward(self, features_IPF: Tensor) -> Tensor:
        """Return (I, P, D) of (I, P, F)."""
        tokens: Tensor = self.linear_2(self.act(self.linear_1(features_IPF)))
        return tokens
