"""The training objective: cross entropy of the labelled tokens plus the keep-rate regularisers (Eq. 10)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamic_llava.config import SparsityConfig
from dynamic_llava.methods import Dynamic, Method
from dynamic_llava.model.outputs import SparsityRecord
from dynamic_llava.sparsity.losses import keep_rate_loss


def language_model_loss(logits_BNV: Tensor, labels_BN: Tensor, tokens: Tensor | int | None = None) -> Tensor:
    """Cross entropy of predicting each labelled token from the position before it; () float32.

    `tokens` is the number of labelled tokens to divide by (the global batch), by default those of this batch. A batch
    without labelled tokens gives 0, not NaN.
    """
    targets = labels_BN[:, 1:].to(logits_BNV.device)
    flat = logits_BNV[:, :-1].flatten(0, 1).float()
    total = F.cross_entropy(flat, targets.flatten(), ignore_index=-100, reduction="sum")
    if tokens is None:
        tokens = (targets != -100).sum().clamp(min=1)
    return total / tokens


def regularisers(
    record: SparsityRecord,
    method: Method,
    config: SparsityConfig,
    output_keep_rate: float | None = None,
    samples: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """Image and output keep-rate terms of Eq. 10, () float32 each; a context that is not sparsified costs 0.

    `samples` is the number of samples to divide by (the global batch), by default by `keep_rate_reduction`.
    """
    mask = record.keep_mask.float()
    nothing = torch.zeros((), device=mask.device)
    if not isinstance(method, Dynamic):
        return nothing, nothing
    options = {
        "reduction": config.keep_rate_reduction,
        "distance": config.keep_rate_distance,
        "denominator": samples,
    }
    image, output = nothing, nothing
    if method.sparsifies_image:
        image = keep_rate_loss(mask, record.layout.image, method.image_keep_rate, **options)
    if method.sparsifies_output:
        target = config.output_keep_rate if output_keep_rate is None else output_keep_rate
        output = keep_rate_loss(mask, record.sparsified_output, target, **options)
    return image, output
