"""Distillation: a sparse pass is drawn to what the same weights predict without sparsity (train.distill).

The teacher is the model of this very step, passed a second time: dense, without gradient, in evaluation mode. With a
frozen language model that is the original model. Where the language model learns too (LoRA, full), the teacher learns
with it and gets no gradient: the loss then measures only what dropping changes at the current weights, and the language
model's loss alone keeps these to the data.
Shape suffixes: B rows, N tokens, y learned tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dynamic_llava.config import DistillConfig
from dynamic_llava.methods import Dense, Method
from dynamic_llava.model.images import features_of

PART = 2**22
"""Logits of which the divergence is computed at a time: what it needs in float32 is made for them alone."""
_OF_TOKENS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "output_mask", "image_mask")


def check_distillation(distill: DistillConfig | None, method: Method, layers: int) -> None:
    """Raise ValueError where a pass is to distil from another, and has none, or none of the same image tokens."""
    if distill is None:
        return
    if method.is_dense:
        raise ValueError(
            f"distill draws a sparse pass to the dense one, and method {method.name!r} drops nothing: both would be "
            "the same; leave distill out (train.distill), or let something be sparse"
        )
    if any(cut.picture_side is not None for cut in method.cuts(layers)):
        raise ValueError(
            f"distill compares two passes over the same image tokens, and method {method.name!r} makes them of a "
            "smaller picture; leave distill out (train.distill), or use a method that is shown the whole picture"
        )


@torch.no_grad()
def dense_logits(
    model: Any, inputs: Mapping[str, Any], images: BaseModelOutputWithPooling | None, where_BN: Tensor
) -> Tensor:
    """Return (y, V): what the weights of `model` predict without sparsity at the tokens of where_BN (B, N) bool.

    `inputs` are the arguments of the sparse pass, `images` those that it has encoded: the vision tower runs once. No
    logits are made of other tokens. The head is called once whatever the batch holds, as ZeRO-3 needs.
    """
    given = {name: inputs[name] for name in _OF_TOKENS}
    given["image_features"] = None if images is None else list(features_of(images))
    with _evaluating(model):
        outputs = model.model(**given, method=Dense(), use_cache=False, return_dict=True)
        logits_yV: Tensor = model.lm_head(outputs.last_hidden_state[where_BN.to(outputs.last_hidden_state.device)])
    return logits_yV


def distillation_loss(
    student_yV: Tensor, teacher_yV: Tensor, temperature: float, count: Tensor | int | None = None
) -> Tensor:
    """Return temperature^2 KL(teacher || student) of the softened distributions, summed and divided by `count`; ().

    `count` is the number of learned tokens to divide by (the global batch), by default those given; none give 0. The
    gradient reaches the student alone. Computed in float32, of float64 logits in float64.
    """
    total: Tensor = _Divergence.apply(student_yV, teacher_yV, temperature)
    count = max(len(student_yV), 1) if count is None else count
    return temperature**2 * total / torch.as_tensor(count, device=total.device)


class _Divergence(torch.autograd.Function):
    """Sum over tokens of KL(p || q), p of the teacher and q of the student, softened.

    With z the student's logits, d KL / dz = (q - p) / temperature, which the forward pass makes at once: of all words
    one tensor is kept, in the logits' format, where autograd would keep two in float32. With d = log q - log p the sum
    is that of p (exp(d) - 1 - d), whose terms are not negative: p (-d) alone would be off by the rounding of both
    normalisations, which may be more than what a model that drops little is from itself.
    """

    @staticmethod
    def forward(ctx: Any, student_yV: Tensor, teacher_yV: Tensor, temperature: float) -> Tensor:
        wide = torch.float64 if student_yV.dtype == torch.float64 else torch.float32
        total, gradient_yV = torch.zeros((), dtype=wide, device=student_yV.device), torch.empty_like(student_yV)
        rows = _rows(student_yV)
        for student, teacher, gradient in zip(
            student_yV.split(rows), teacher_yV.split(rows), gradient_yV.split(rows), strict=True
        ):
            log_q = (student.to(wide) / temperature).log_softmax(-1)
            log_p = (teacher.to(log_q) / temperature).log_softmax(-1)
            p, q, d = log_p.exp(), log_q.exp(), log_q.sub_(log_p)
            gradient.copy_((q - p) / temperature)
            total += (torch.where(d < 1, p * d.expm1(), q - p) - p * d).sum()
        ctx.save_for_backward(gradient_yV)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None]:
        (gradient_yV,) = ctx.saved_tensors
        scaled_yV = torch.empty_like(gradient_yV)
        rows = _rows(gradient_yV)
        for gradient, scaled in zip(gradient_yV.split(rows), scaled_yV.split(rows), strict=True):
            scaled.copy_(gradient.to(above.dtype) * above)  # `above` is not to be rounded to half precision
        return scaled_yV, None, None


def _rows(logits_yV: Tensor) -> int:
    return max(1, PART // logits_yV.shape[-1])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch every module to evaluation mode, and afterwards each back to what it was."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
