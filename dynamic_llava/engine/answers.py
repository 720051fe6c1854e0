"""What a method's hooks may answer, and what is said where they answer something else.

Shape suffixes: I images, n image tokens of the longest.
"""

from typing import Any

import torch
from torch import Tensor

from dynamic_llava.methods import Choice, Method

IMAGES = "images, tokens of the longest"
OUTPUTS = "output tokens"
PROMPTS = "tokens of questions"


def check_answer(
    method: Method, hook: str, answer: Any, shape: tuple[int, ...], axes: str, *, sampled: bool = False
) -> None:
    """Raise ValueError unless a hook has answered with bool, or in training (`sampled`) with floats, of `shape`.

    No host read, so that a step may be compiled. `axes` says what the dimensions are.
    """
    allowed = "bool or float" if sampled else "bool"
    _check(method, f"answered {hook} with", answer, shape, axes, allowed)


def check_image_answer(method: Method, hook: str, answer: Any, valid_In: Tensor, *, sampled: bool = False) -> None:
    """Raise ValueError unless a hook has answered about images with a mask (I, n), or a Choice that can be made."""
    if not isinstance(answer, Choice):
        return check_answer(method, hook, answer, valid_In.shape, IMAGES, sampled=sampled)
    check_answer(method, hook, answer.keep, valid_In.shape, IMAGES, sampled=sampled)
    if answer.weight is not None:
        _check(method, f"answered {hook} with the weight", answer.weight, valid_In.shape, IMAGES, "float")
        _check_finite(method, f"answered {hook} with the weight", answer.weight[valid_In])
    if answer.shares is not None:
        shape = (*valid_In.shape, valid_In.shape[1])
        _check(method, f"answered {hook} with shares", answer.shares, shape, f"{IMAGES}, the same", "float")
        both_Inn = valid_In[:, :, None] & valid_In[:, None]
        _check_finite(method, f"answered {hook} with shares", answer.shares[both_Inn])
    if answer.into is None:
        return None
    _check(method, f"answered {hook} with heirs", answer.into, valid_In.shape, IMAGES, "int64")
    keep_In = (answer.keep > 0.5 if answer.keep.is_floating_point() else answer.keep) & valid_In
    inside_In = (answer.into >= 0) & (answer.into < valid_In.shape[1])
    heir_In = keep_In.gather(1, answer.into.clamp(0, valid_In.shape[1] - 1)) & inside_In
    if bool((valid_In & ~keep_In & ~heir_In).any()):
        raise ValueError(
            f"method {method.name!r} answered {hook} with an heir that is no kept token of the image; let `into` hold, "
            "for each dropped token, the index of a kept one"
        )
    return None


def _check_finite(method: Method, what: str, answer: Tensor) -> None:
    if not bool(torch.isfinite(answer).all()):
        raise ValueError(
            f"method {method.name!r} {what} that is not finite at real tokens; tokens merged by it would be lost"
        )


def _check(method: Method, what: str, answer: Any, shape: tuple[int, ...], axes: str, allowed: str) -> None:
    fits = isinstance(answer, Tensor) and answer.shape == shape
    if fits and allowed.startswith("bool") and answer.dtype == torch.bool:
        return
    if fits and allowed.endswith("float") and answer.is_floating_point():
        return
    if fits and allowed == "int64" and answer.dtype == torch.int64:
        return
    given = f"{answer.dtype} of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else repr(answer)[:60]
    raise ValueError(f"method {method.name!r} {what} {given}; let it return {allowed} of shape {tuple(shape)} ({axes})")
