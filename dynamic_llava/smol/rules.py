"""Rules on output tokens that all hold the same budget: what is learned, and what a sceptic compares it with.

A budget is one of slots (eval/metrics/slots.py): the share of the output tokens said before it that a token sees, of
all tokens of all answers together; in the layers that may drop some it is the share of the output keys and values that
are held while answers are decoded. Every rule has one number, turned until the budget holds on what is measured.
Shape suffixes: T output tokens that are fed of one answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dynamic_llava.eval.metrics.slots import seen_pairs
from dynamic_llava.methods import Dynamic, Method, OutputTokens
from dynamic_llava.methods.base import OneCut, check_rate_or_none
from dynamic_llava.methods.eviction import check_count
from dynamic_llava.methods.h2o import H2O
from dynamic_llava.methods.knorm import KNorm
from dynamic_llava.methods.tova import TOVA
from dynamic_llava.sparsity.noise import fold_key, uniform_noise

BY_RULE, LEARNED = "control", "learned"
"""What decides: a rule that has learned nothing, or a trained predictor."""


@dataclass(frozen=True)
class LastTokens(OneCut):
    """Keep the first output tokens of each answer, a random share of the others, and the last ones as long as they are.

    Draws depend on (seed, sample key, place of the token) alone. Everything else than output tokens stays.
    """

    name: ClassVar[str] = "last_tokens"
    training_free: ClassVar[bool] = True

    keep_rate: float = 0.0
    """Probability with which an output token stays."""
    window: int = 0
    """Last output tokens that every token sees besides."""
    sinks: int = 0
    """First tokens of each answer that stay."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        check_rate_or_none("keep_rate", self.keep_rate)
        check_count("window", self.window, "number of tokens")
        check_count("sinks", self.sinks, "number of tokens")

    @property
    def drop_delay(self) -> int:
        """The window."""
        return self.window

    def keep_output(self, outputs: OutputTokens, learned: Any) -> Tensor:
        """(T,) bool: sinks and independent draws."""
        return (_draws(self.seed, outputs.key, outputs.rank) < self.keep_rate) | (outputs.place < self.sinks)


def _draws(seed: int, key_T: Tensor, rank_T: Tensor) -> Tensor:
    """(T,) float32: a number in (0, 1) for each token."""
    return uniform_noise(fold_key(seed, key_T), rank_T[:, None], stream=1)[:, 0]


@dataclass(frozen=True)
class Rule:
    """One row of the table: what decides, at which budget."""

    title: str
    """What the row is called; the same at every budget and for every seed."""
    kind: str
    """BY_RULE or LEARNED."""
    budget: float
    """The share that is asked for."""
    method: Method
    """What decides."""
    setting: str
    """The number that was turned, in words."""
    seed: int | None = None
    """Seed of the training."""

    @property
    def key(self) -> str:
        """Return a name for its file."""
        words = "".join(one if one.isalnum() else "_" for one in self.title)
        return f"{words}_{100 * self.budget:g}" + ("" if self.seed is None else f"_seed{self.seed}")


def controls(
    lengths: Sequence[int], budget: float, layer: int, *, window: int, sinks: int, seed: int = 0
) -> tuple[list[Rule], list[str]]:
    """Return the rules that learn nothing at a budget, for answers that feed so many tokens, and those that have none.

    window: the last w of the random share beside it. sinks: first tokens that stay beside a window. Those without a
    number that holds the budget are returned as sentences.
    """
    found, without = [], []

    def add(title: str, method: Method, setting: str) -> None:
        found.append(Rule(title, BY_RULE, budget, method, setting))

    for title, last in (("random", 0), ("random + last w", window)):
        rate = random_rate(lengths, budget, last, seed)
        if rate is None:
            without.append(f"{title}: the last {last} alone are more than {budget:.0%}")
        else:
            add(title, LastTokens(layer, keep_rate=rate, window=last, seed=seed), f"{rate:.3f} of the tokens, w {last}")
    last = widest_window(lengths, budget, sinks)
    if last is None:
        without.append(f"sinks + last w: {sinks} sinks alone are more than {budget:.0%}")
    else:
        add("sinks + last w", LastTokens(layer, window=last, sinks=sinks), f"{sinks} sinks, w {last}")
    half = round(budget / 2, 4)
    add("H2O", H2O(half, half, "outputs", layer), f"rates {half} and {half}")
    add("TOVA", TOVA(budget, 1, "outputs", layer), f"rate {budget}")
    add("KNorm", KNorm(budget, 1, "outputs", layer), f"rate {budget}")
    return found, without


def learned_rule(margins: Sequence[np.ndarray], budget: float, layer: int, window: int, seed: int) -> Rule | None:
    """Return the rule of a trained output predictor at a budget; None where its window alone is more.

    margins: of the fed tokens of every answer, (T,) each.
    """
    threshold = threshold_of(margins, budget, window)
    if threshold is None:
        return None
    method = Dynamic(layer, sparsity="output", output_threshold=threshold, output_window=window)
    return Rule(f"learned, w = {window}", LEARNED, budget, method, f"threshold {threshold:.3f}", seed)


def visible(kept_T: np.ndarray, window: int) -> int:
    """Return how many pairs of a token and an earlier one that it sees there are in an answer; kept_T (T,) bool."""
    return seen_pairs(kept_T.tolist(), window)[0]


def pairs(length: int) -> int:
    """Return how many pairs of a token and an earlier one there are in an answer of so many fed tokens."""
    return length * (length - 1) // 2


def _by_window(lengths: Sequence[int], window: int) -> int:
    return sum(visible(np.zeros(length, dtype=bool), window) for length in lengths)


def random_rate(lengths: Sequence[int], budget: float, window: int, seed: int) -> float | None:
    """Return the share of tokens that makes a budget with a window beside it, by the very draws that will be made.

    The noise key of an answer is its place. None where the window is more.
    """
    drawn = [
        _draws(seed, torch.full((length,), number), torch.arange(length)).double().numpy()
        for number, length in enumerate(lengths)
    ]
    threshold = threshold_of([-one for one in drawn], budget, window)
    return None if threshold is None else min(max(-threshold, 0.0), 1.0)


def widest_window(lengths: Sequence[int], budget: float, sinks: int) -> int | None:
    """Return the widest window that is within a budget beside so many sinks; None where these are more."""

    def seen(window: int) -> int:
        return sum(visible(np.arange(length) < sinks, window) for length in lengths)

    whole, low, high = budget * sum(map(pairs, lengths)), -1, max(lengths)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if seen(middle) <= whole else (low, middle)
    return None if low < 0 else low


def threshold_of(margins: Sequence[np.ndarray], budget: float, window: int) -> float | None:
    """Return the margin above which tokens stay, so that a budget holds; None where the window is more.

    The highest margins stay as long as what their tokens are seen by, beyond the window, is within the budget.
    """
    lengths = [len(one) for one in margins]
    room = budget * sum(map(pairs, lengths)) - _by_window(lengths, window)
    if room < 0:
        return None
    later = [np.arange(length)[::-1] for length in lengths]
    worth = np.concatenate([one - np.minimum(window, one) for one in later])
    values = np.concatenate(margins)
    order = np.argsort(-values, kind="stable")
    count = int(np.searchsorted(np.cumsum(worth[order]), room, side="right"))
    if count >= len(order):
        return float(values.min()) - 1.0
    above = values[order[count - 1]] if count else values[order[0]] + 2.0
    return float(above + values[order[count]]) / 2


def fed_margins(margins: Sequence[Tensor]) -> list[np.ndarray]:
    """Return the margins of the tokens that decoding feeds: all of an answer but its last, which ends it."""
    return [one[:-1].double().numpy() for one in margins]


def count_kept(kept: Sequence[Tensor], window: int) -> list[int]:
    """Return the visible pairs of each answer; kept (T,) bool each."""
    return [visible(one.numpy(), window) for one in kept]
