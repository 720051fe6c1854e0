"""The training objective: cross entropy of the labelled tokens plus the keep-rate regularisers (Eq. 10)."""

from typing import Any

import torch
from torch import Tensor, nn

from dynamic_llava.config import SparsityConfig
from dynamic_llava.methods import Dynamic, Method
from dynamic_llava.model.outputs import SparsityRecord
from dynamic_llava.sparsity.losses import keep_rate_loss


def language_model_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Cross entropy of predicting each labelled token from the position before it; () float32.

    The model's `loss_function`, with the arguments of transformers': logits (B, N, V), labels (B, N) int64, or
    shift_labels (B, N), what each token shall predict. num_items_in_batch is the number of labelled tokens to divide by
    (the global batch), by default those of this batch. A batch without any gives 0, not NaN.
    """
    targets = nn.functional.pad(labels, (0, 1), value=ignore_index)[:, 1:] if shift_labels is None else shift_labels
    targets = targets.to(logits.device).flatten()
    total = nn.functional.cross_entropy(
        logits.float().flatten(0, -2), targets, ignore_index=ignore_index, reduction="sum"
    )
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum().clamp(min=1)
    return total / torch.as_tensor(num_items_in_batch, device=total.device)


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
