"""Initial weights of new predictors."""

import math

from torch import nn
from transformers import initialization as init


def initialize_predictor(predictor: nn.Module) -> None:
    """Give every linear layer torch's own default (uniform in 1 / sqrt(fan-in)), and layer norms ones and zeros.

    transformers would draw N(0, 0.02): through four narrow layers that leaves logits too small to learn from in the few
    hundred steps of a short run. Weights that came from a checkpoint are left alone (transformers' `initialization`).
    """
    for module in predictor.modules():
        if isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
