"""The training objective: cross entropy of the labelled tokens plus the losses of the method itself (Eq. 10)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynamic_llava.config import SparsityConfig
from dynamic_llava.engine.record import SparsityRecord
from dynamic_llava.methods import Method


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


def method_losses(
    method: Method,
    record: SparsityRecord,
    settings: SparsityConfig,
    samples: Mapping[str, Tensor] | Tensor | int | None,
) -> dict[str, Tensor]:
    """Return the losses of the method itself by name, () float32 each.

    `samples` is what each is divided by: counts by name, one count for all, or by default the batch's own samples.
    """
    counted = method.loss_samples(record.layout, record.sparsified_output, settings)
    if samples is None:
        samples = {name: where_B.sum().clamp(min=1) for name, where_B in counted.items()}
    if not isinstance(samples, Mapping):
        samples = dict.fromkeys(counted, torch.as_tensor(samples, device=record.keep_mask.device))
    return method.losses(record, samples, settings)


def total_loss(lm_loss: Tensor, terms: Mapping[str, Tensor], method: Method, settings: SparsityConfig) -> Tensor:
    """Return what is minimised: the language model's loss and the method's own, weighted (Eq. 10); () float32."""
    return lm_loss + method.loss_weight(settings) * sum(terms.values()) if terms else lm_loss
