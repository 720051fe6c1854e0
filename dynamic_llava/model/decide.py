"""One decision per token, on the hidden states that enter the sparse layer: hard at inference, sampled in training.

Shape suffixes: B rows, N tokens, I images, n tokens of one image, T output tokens of the batch, A answers, a tokens of
the longest answer, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor

from dynamic_llava.config import SparsityConfig
from dynamic_llava.layout import TokenLayout
from dynamic_llava.methods import Choice, Dynamic, Evidence, ImageTokens, Method, OutputTokens
from dynamic_llava.model.plan import Plan
from dynamic_llava.sparsity.noise import fold_key, gumbel_noise
from dynamic_llava.sparsity.relaxations import RELAXATIONS

HOOKS = ("keep_image", "keep_output")


@dataclass(frozen=True)
class Past:
    """What a row has seen before this chunk, so that a token gets the same draw on every path; None without."""

    images: Tensor | None = None
    """(B,) int64: images seen."""
    outputs: Tensor | None = None
    """(B,) int64: output tokens seen."""


def check_question(method: Method, late_BN: Tensor) -> None:
    """Raise ValueError if a method that reads the question's attention has to decide on images behind the question.

    late_BN (B, N) bool marks those image tokens: on a live cache any, elsewhere those behind the first output token.
    """
    if bool(late_BN.any()):
        raise ValueError(
            f"method {method.name!r} reads the attention of the first question's last token, so it cannot decide on an "
            "image of a later turn; give all images in the first turn, or start a new cache with the whole "
            "conversation as the prompt, earlier answers left out of output_mask"
        )


def hard_keep_mask(
    plan: Plan, learned: Any, hidden_BND: Tensor, question_row_BN: Tensor | None = None, past: Past | None = None
) -> Tensor:
    """Decide at inference (Eq. 5, 11); returns (B, N) bool, True at kept tokens and False at padding.

    `learned` holds the method's own weights. question_row_BN is the row of `model.attention.attention_row` for a cut
    that sees it. Prompt tokens always stay. ValueError for a method that merges tokens.
    """
    method, layout, sample_key_B, past = plan.method, plan.layout, plan.sample_key, past or Past()
    keep_BN = layout.valid.clone()
    if bool(layout.image.any()):
        hidden_InD = layout.gather_images(hidden_BND)
        seen: dict[Evidence, Tensor] = {}
        if question_row_BN is not None:
            seen["question_row"] = layout.gather_images(question_row_BN)
        images = ImageTokens(
            hidden=hidden_InD,
            valid=torch.ones(hidden_InD.shape[:2], dtype=torch.bool, device=hidden_InD.device),
            key=_image_keys(layout, sample_key_B, past.images),
            seen=seen,
        )
        keep_BN = layout.scatter_images(_kept(method, method.keep_image(plan.cut, images, learned)), keep_BN)
    if plan.cut.output and bool(layout.output.any()):
        rank_BN = layout.output_rank() if past.outputs is None else layout.output_rank() + past.outputs[:, None]
        outputs = OutputTokens(
            hidden=hidden_BND[layout.output],
            rank=rank_BN[layout.output],
            key=sample_key_B[:, None].expand_as(rank_BN)[layout.output],
        )
        keep_BN = keep_BN.masked_scatter(layout.output, method.keep_output(outputs, learned))
    return keep_BN


def admit_token(plan: Plan, learned: Any, hidden_B1D: Tensor, seen_B: Tensor) -> Tensor:
    """Decide on the single new token of each row (Eq. 6), the seen_B-th of its output; returns (B,) bool. No host read.

    A method without a decision on output tokens admits every token.
    """
    valid_B, output_B = plan.layout.valid[:, 0], plan.layout.output[:, 0]
    if not plan.cut.output:
        return valid_B
    outputs = OutputTokens(hidden=hidden_B1D[:, 0], rank=seen_B, key=plan.sample_key)
    return (plan.method.keep_output(outputs, learned) | ~output_B) & valid_B


def _kept(method: Method, answer: Tensor | Choice) -> Tensor:
    if isinstance(answer, Tensor):
        return answer
    if answer.into is not None or answer.weight is not None:
        raise ValueError(
            f"method {method.name!r} merges image tokens, which the engine does not do: let keep_image return a keep "
            "mask, or a Choice without `into` and `weight`"
        )
    return answer.keep


def is_trainable(method: Method) -> TypeGuard[Dynamic]:
    """Whether the method samples its decisions in training mode, with a gradient; others decide as at inference."""
    return isinstance(method, Dynamic) and all(_definer(method, hook) is Dynamic for hook in HOOKS)


def check_training(method: Method) -> None:
    """Raise ValueError for a method that may have learned something that training would leave without a gradient."""
    declared = _definer(method, "training_free")
    fixed = method.training_free and all(issubclass(declared, _definer(method, hook)) for hook in HOOKS)
    if fixed or is_trainable(method):
        return
    own = type(method).__name__
    raise ValueError(
        f"method {method.name!r} ({own}) cannot be used in training mode: its hooks decide by 0 or 1, so nothing that "
        f"it learned would have a gradient. If {own} has nothing to learn, set `training_free: ClassVar[bool] = True` "
        f"in the class {own}; if it has, decide in your own training loop and give the decisions as keep_mask, whose "
        "gradient is exact (dynamic_llava.sparsity.gumbel_keep makes such a mask), or call model.eval()"
    )


def _definer(method: Method, name: str) -> type:
    """Return the class that defines an attribute of the method."""
    return next(one for one in type(method).__mro__ if name in vars(one))


def sampled_keep_mask(
    method: Dynamic,
    config: SparsityConfig,
    learned: Any,
    hidden_BND: Tensor,
    layout: TokenLayout,
    sample_key_B: Tensor,
    tau: float,
    output_keep_rate: float,
) -> tuple[Tensor, Tensor]:
    """Draw the training keep mask with the configured relaxation (Sec. 3.3.3: Gumbel-Softmax, straight-through).

    Images are decided about one by one, output tokens answer by answer, at the rates r_I of the method and r_OT.
    Returns M (B, N) float32 and the (B, N) bool output tokens that were decided about: answers of at least
    `output_min_length` tokens. Each predictor is called once whatever the batch holds, so that every rank of a
    distributed run gathers, and has a gradient for, all parameters.
    """
    relax = partial(RELAXATIONS[config.relaxation], tau=tau)
    keep_BN = layout.valid.float()
    if method.sparsifies_image:
        if bool(layout.image.any()):
            relax_images = partial(relax, keep_rate=method.image_keep_rate)
            keep_In = _sample_images(relax_images, learned, hidden_BND, layout, sample_key_B)
            keep_BN = layout.scatter_images(keep_In, keep_BN)
        else:
            keep_BN = keep_BN + 0.0 * learned.image_predictor(hidden_BND[:1]).float().sum()
    decided_BN = layout.output & (layout.answer_lengths() >= config.output_min_length)
    if not method.sparsifies_output:
        return keep_BN, torch.zeros_like(decided_BN)
    if not bool(layout.output.any()):
        return keep_BN + 0.0 * learned.output_predictor(hidden_BND[:1, 0]).float().sum(), decided_BN
    relax_outputs = partial(relax, keep_rate=output_keep_rate)
    keep_T = _sample_outputs(relax_outputs, learned, hidden_BND, layout, sample_key_B)
    sampled_BN = keep_BN.masked_scatter(layout.output, keep_T.to(keep_BN.dtype))
    return torch.where(decided_BN, sampled_BN, keep_BN), decided_BN


def _sample_images(
    relax: Callable[..., Tensor], learned: Any, hidden_BND: Tensor, layout: TokenLayout, sample_key_B: Tensor
) -> Tensor:
    logits_In2 = learned.image_predictor(layout.gather_images(hidden_BND))
    place_n = torch.arange(layout.tokens_per_image, device=hidden_BND.device)
    noise_In2 = gumbel_noise(_image_keys(layout, sample_key_B, None), place_n)
    return relax(logits_In2, noise_In2, valid_SN=torch.ones_like(logits_In2[..., 0], dtype=torch.bool))


def _sample_outputs(
    relax: Callable[..., Tensor], learned: Any, hidden_BND: Tensor, layout: TokenLayout, sample_key_B: Tensor
) -> Tensor:
    logits_T2 = learned.output_predictor(hidden_BND[layout.output])
    noise_T2 = gumbel_noise(fold_key(sample_key_B, -1), layout.output_rank())[layout.output]
    place = layout.answer_places()
    answers, longest = (int(index_T.max()) + 1 for index_T in place)

    def by_answer(values_T: Tensor) -> Tensor:
        """Gather (T, ...) into (A, a, ...), one row per answer, filled up with zeros."""
        return values_T.new_zeros(answers, longest, *values_T.shape[1:]).index_put(place, values_T)

    valid_Aa = by_answer(torch.ones_like(logits_T2[..., 0], dtype=torch.bool))
    return relax(by_answer(logits_T2), by_answer(noise_T2), valid_SN=valid_Aa)[place]


def _image_keys(layout: TokenLayout, sample_key_B: Tensor, seen_B: Tensor | None) -> Tensor:
    place_I = layout.images_before()
    rows_I = layout.image_rows()
    if seen_B is not None:
        place_I = place_I + seen_B[rows_I]
    return fold_key(sample_key_B[rows_I], place_I)
