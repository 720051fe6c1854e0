"""Equal budgets: each method's own knob is turned until the record of a prefill shows the budget.

A method says which settings its knob is (`Method.knobs`). Nothing is reckoned from a rate: what a setting leaves is
counted on the model's record of the first questions, so that it holds for any method that has a knob. The more a knob
is turned up, the more must stay.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, get_args

from dynamic_llava.methods import Method, describe_method
from dynamic_llava.methods.base import BudgetKind

STEPS = 10_000
"""A rate is a whole number of these parts: four digits, as far as shares are exact."""


@dataclass(frozen=True)
class Probed:
    """What the record of a prefill shows, over all prompts that were tried."""

    image_tokens: tuple[int, ...]
    """Tokens of each image that the last layer sees."""
    kv_bytes: float
    """Mean of the bytes that keys and values of a prompt fill."""
    longest: int
    """Tokens of the longest prompt."""


Probe = Callable[[Method], Probed]
"""What a method leaves of the prompts that are tried."""


@dataclass(frozen=True)
class Fitted:
    """A method whose knob was turned to a budget."""

    method: Method
    turned: Mapping[str, tuple[Any, float]]
    """Setting -> its value before and now."""
    held: float
    """What it leaves of the prompts that were tried."""

    def describe(self) -> str:
        """Say what was set."""
        words = {name: f"{old:g}" if _is_number(old) else str(old) for name, (old, _) in self.turned.items()}
        return ", ".join(f"{name} {words[name]} -> {now:g}" for name, (_, now) in self.turned.items())


@dataclass(frozen=True)
class EqualBudget:
    """As many tokens of each image, or bytes of a prompt's keys and values, for every method."""

    kind: BudgetKind
    amount: int

    @classmethod
    def read(cls, text: str) -> "EqualBudget":
        """Read "image-tokens=144" or "kv-bytes=1000000"."""
        kind, _, amount = text.partition("=")
        if kind not in get_args(BudgetKind) or not amount.isdecimal() or not int(amount):
            kinds = " or ".join(f"{kind}=NUMBER" for kind in get_args(BudgetKind))
            raise ValueError(f"equal budget {text!r} is not understood; give {kinds}, a whole number above 0")
        return cls(kind, int(amount))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.kind}={self.amount}"

    def fit(self, method: Method, probe: Probe) -> Fitted:
        """Turn a method's knob to the budget.

        image-tokens: each image has exactly so many left. kv-bytes: the most that do not exceed it. ValueError where a
        method has no knob for it, or where it is outside of what its knob can do.
        """
        names = method.knobs(self.kind)
        before = {name: held_setting(method, name) for name in names}
        if not names:
            raise ValueError(
                f"{describe_method(method)} has no setting that {self.kind} are kept by, so it cannot be given "
                f"{self}; leave it out, use another budget, or let its class say it (Method.knobs, docs/comparing.md)"
            )
        whole = all(isinstance(value, int) for value in before.values())
        top = probe(method).longest if whole else STEPS

        @cache
        def counted(step: int) -> tuple[float, float]:
            """Least and most of the budget that any image, or all prompts together, hold at this turn of the knob."""
            held = probe(turn(method, before, step if whole else step / STEPS))
            if self.kind == "kv-bytes":
                return held.kv_bytes, held.kv_bytes
            if not held.image_tokens:
                raise ValueError(f"{self} needs questions with an image, and the first ones of these tasks have none")
            return min(held.image_tokens), max(held.image_tokens)

        least, most = counted(1)[0], counted(top)[1]
        if not least <= self.amount <= most:
            raise ValueError(
                f"{describe_method(method)} cannot be given {self}: its {' and '.join(names)} can leave {least:.0f} to "
                f"{most:.0f} here; choose an amount between them, or leave the method out"
            )
        step = self._step(lambda one: counted(one)[1], top)
        if self.kind == "image-tokens" and set(counted(step)) != {self.amount}:
            near = sorted({*counted(max(step - 1, 1)), *counted(step)})
            raise ValueError(
                f"{describe_method(method)} cannot be given exactly {self}: the nearest that its {' and '.join(names)} "
                f"can leave are {', '.join(f'{one:.0f}' for one in near)}; choose one of them, or leave the method out"
            )
        fitted = turn(method, before, step if whole else step / STEPS)
        now = {name: held_setting(fitted, name) for name in names}
        return Fitted(fitted, {name: (before[name], now[name]) for name in names}, counted(step)[1])

    def _step(self, counted: Callable[[int], float], top: int) -> int:
        """Return the lowest turn that reaches the tokens, or the highest that does not exceed the bytes."""
        reached = (
            (lambda one: counted(one) >= self.amount)
            if self.kind == "image-tokens"
            else (lambda one: counted(one) > self.amount)
        )
        low, high = 0, top + 1  # no turn up to `low` reaches it; all from `high` on do
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(middle) else (middle, high)
        return high if self.kind == "image-tokens" else low


def turn(method: Method, knobs: Mapping[str, Any], total: float) -> Method:
    """Return the method with the settings of a knob adding up to `total`, in the proportion that they have.

    A setting that names a rule instead of a number, as one that adapts to the image, gets an equal part.
    """
    whole = sum(knobs.values()) if all(map(_is_number, knobs.values())) else 0
    for name, value in knobs.items():
        part = value / whole if whole else 1 / len(knobs)
        turned = math.floor(total * part) if isinstance(value, int) else round(total * part, 6)
        method = _with(method, name.split("."), turned)
    return method


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def held_setting(method: Method, path: str) -> Any:
    """Return a setting by its name, or that of an inner method by its dotted one."""
    value: Any = method
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _with(method: Method, path: Sequence[str], value: float) -> Method:
    name, *inner = path
    return replace(method, **{name: _with(getattr(method, name), inner, value) if inner else value})
