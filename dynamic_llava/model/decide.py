"""One decision per token, on the hidden states that enter the sparse layer: hard at inference, sampled in training.

Shape suffixes: B rows, N tokens, I images, n tokens of one image, T output tokens of the batch, D hidden size.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dynamic_llava.config import SparsityConfig
from dynamic_llava.layout import TokenLayout
from dynamic_llava.methods import Choice, Draw, Evidence, ImageTokens, Method, OutputTokens
from dynamic_llava.model.plan import Plan
from dynamic_llava.sparsity.noise import fold_key

HOOKS = {"keep_image": "sample", "keep_output": "sample_output"}
"""What a method defines to decide at inference, and to sample the same decision in training."""


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

    `learned` holds the method's own weights. question_row_BN is the row of `model.attention.AttentionRow` for a cut
    that sees it. Prompt tokens always stay. ValueError for a method that merges tokens.
    """
    method, layout, past = plan.method, plan.layout, past or Past()
    keep_BN = layout.valid.clone()
    if bool(layout.is_image.any()):
        images = _images(plan, hidden_BND, question_row_BN, past)
        keep_BN = layout.scatter_images(_kept(method, method.keep_image(plan.cut, images, learned)), keep_BN)
    if plan.cut.output and bool(layout.output.any()):
        keep_T = method.keep_output(_outputs(plan, hidden_BND, past), learned)
        keep_BN = keep_BN.masked_scatter(layout.output, keep_T)
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


def samples(method: Method) -> bool:
    """Whether the method samples its decisions in training mode, with a gradient; others decide as at inference."""
    return any(_definer(method, sample) is not Method for sample in HOOKS.values())


def check_training(method: Method) -> None:
    """Raise ValueError for a method that may have learned something that training would leave without a gradient.

    Each decision must be the engine's default, or be sampled by a class that knows how it is taken at inference, or be
    declared as free of anything to learn.
    """
    if all(_trains(method, keep, sample) for keep, sample in HOOKS.items()):
        return
    own = type(method).__name__
    raise ValueError(
        f"method {method.name!r} ({own}) cannot be used in training mode: its hooks decide by 0 or 1, so nothing that "
        f"it learned would have a gradient. If {own} has nothing to learn, set `training_free: ClassVar[bool] = True` "
        f"in the class {own}; if it has, define `sample` beside keep_image and `sample_output` beside keep_output, or "
        "decide in your own training loop and give the decisions as keep_mask, whose gradient is exact "
        "(dynamic_llava.sparsity.gumbel_keep makes such a mask), or call model.eval()"
    )


def _trains(method: Method, keep: str, sample: str) -> bool:
    decides, draws = _definer(method, keep), _definer(method, sample)
    if draws is not Method:
        return issubclass(draws, decides)
    fixed = method.training_free and issubclass(_definer(method, "training_free"), decides)
    return decides is Method or fixed


def _definer(method: Method, name: str) -> type:
    """Return the class that defines an attribute of the method."""
    return next(one for one in type(method).__mro__ if name in vars(one))


def decided_outputs(layout: TokenLayout, settings: SparsityConfig) -> Tensor:
    """(B, N) bool: the output tokens that training decides on, those of answers of `output_min_length` tokens."""
    return layout.output & (layout.answer_lengths() >= settings.output_min_length)


def sampled_keep_mask(
    plan: Plan, learned: Any, hidden_BND: Tensor, question_row_BN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Let the method sample the keep mask of a training pass; arguments as of `hard_keep_mask`.

    Returns M (B, N) float32 and the (B, N) bool output tokens that were decided about. Each hook is called once
    whatever the batch holds, so that every rank of a distributed run gathers, and has a gradient for, all parameters.
    """
    method, layout = plan.method, plan.layout
    draw = Draw(tau=plan.tau, settings=plan.settings)
    any_image = bool(layout.is_image.any())
    images = _images(plan, hidden_BND, question_row_BN, Past()) if any_image else _no_image(plan, hidden_BND)
    keep_In = _kept(method, method.sample(plan.cut, images, learned, draw))
    keep_BN = layout.valid.float()
    keep_BN = layout.scatter_images(keep_In, keep_BN) if any_image else keep_BN + 0.0 * keep_In.float().sum()
    decided_BN = decided_outputs(layout, plan.settings)
    if not plan.cut.output:
        return keep_BN, torch.zeros_like(decided_BN)
    if not bool(layout.output.any()):
        first_1 = torch.zeros(1, dtype=torch.int64, device=hidden_BND.device)
        outputs = OutputTokens(hidden=hidden_BND[:1, 0], rank=first_1, key=plan.sample_key[:1])
        keep_T = method.sample_output(outputs, learned, replace(draw, answer=first_1, place=first_1))
        return keep_BN + 0.0 * keep_T.float().sum(), decided_BN
    answer_T, place_T = layout.answer_places()
    outputs = _outputs(plan, hidden_BND, Past())
    keep_T = method.sample_output(outputs, learned, replace(draw, answer=answer_T, place=place_T))
    sampled_BN = keep_BN.masked_scatter(layout.output, keep_T.to(keep_BN.dtype))
    return torch.where(decided_BN, sampled_BN, keep_BN), decided_BN


def _images(plan: Plan, hidden_BND: Tensor, question_row_BN: Tensor | None, past: Past) -> ImageTokens:
    layout = plan.layout
    seen: dict[Evidence, Tensor] = {}
    if question_row_BN is not None:
        seen["question_row"] = layout.gather_images(question_row_BN)
    place_I, rows_I = layout.images_before(), layout.image_rows()
    if past.images is not None:
        place_I = place_I + past.images[rows_I]
    return ImageTokens(
        hidden=layout.gather_images(hidden_BND),
        valid=layout.image_valid,
        key=fold_key(plan.sample_key[rows_I], place_I),
        seen=seen,
    )


def _no_image(plan: Plan, hidden_BND: Tensor) -> ImageTokens:
    """Return the first row as if it were an image, for a method that has to be asked although there is none."""
    row_1ND = hidden_BND[:1]
    return ImageTokens(
        hidden=row_1ND,
        valid=torch.ones(row_1ND.shape[:2], dtype=torch.bool, device=row_1ND.device),
        key=plan.sample_key[:1],
        seen={evidence: torch.zeros_like(row_1ND[..., 0]) for evidence in plan.cut.sees},
    )


def _outputs(plan: Plan, hidden_BND: Tensor, past: Past) -> OutputTokens:
    layout = plan.layout
    rank_BN = layout.output_rank() if past.outputs is None else layout.output_rank() + past.outputs[:, None]
    return OutputTokens(
        hidden=hidden_BND[layout.output],
        rank=rank_BN[layout.output],
        key=plan.sample_key[:, None].expand_as(rank_BN)[layout.output],
    )


def _kept(method: Method, answer: Tensor | Choice) -> Tensor:
    if isinstance(answer, Tensor):
        return answer
    if answer.into is not None or answer.weight is not None:
        raise ValueError(
            f"method {method.name!r} merges image tokens, which the engine does not do: let keep_image return a keep "
            "mask, or a Choice without `into` and `weight`"
        )
    return answer.keep
