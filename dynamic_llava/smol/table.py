"""The table: every rule at every budget, row by row into files, and what follows from them.

A row's file holds sums for each answer, so that means, intervals and pictures are made anew of what is there.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamic_llava.eval.compare.bootstrap import LEVEL, RESAMPLES, SEED, paired_intervals
from dynamic_llava.eval.metrics.tally import Tally
from dynamic_llava.eval.writing import MISSING, markdown
from dynamic_llava.smol.rules import BY_RULE, LEARNED

DENSE = "dense"
HEAD = (
    "rule", "budget", "slots", "KiB", "perplexity", "to dense, nats", "KL, nats", "same word", "greedy", "ms a token",
)  # fmt: skip
LEGEND = (
    "Held-out answers are the dense model's own, to requests about subjects that no predictor was trained on. Budget: "
    "the share of earlier output tokens that a token may see, in the layers that may drop some; slots: what it was, of "
    "all tokens together (the same share of keys and values while answers are decoded). KiB: keys and values of "
    "output tokens that an answer holds, in all layers, the mean over its steps. To dense: difference of the mean "
    "negative log-likelihood of a token, in brackets the {level:.0%} interval of a paired bootstrap over answers "
    "({resamples:,} draws, seed {seed}). KL: from the dense prediction to this one, the mean over tokens. Same word: "
    "share of tokens at which the likeliest word is the dense one. Greedy: how much of the first {continuation} tokens "
    "of the dense greedy answer comes before the first other word. Ms a token: of {answers} greedy answers at once, as "
    "they were taken, one after another. Learned rows are means over {seeds} trainings, with the smallest and the "
    "largest perplexity."
)
SNAPKV = (
    "SnapKV has no row: it compresses prompts, and holds every output token. Nor have these, whose smallest setting is "
    "more than the budget: "
)


@dataclass(frozen=True)
class Line:
    """A rule at a budget, over all seeds of its training."""

    title: str
    kind: str
    budget: float
    rows: tuple[Mapping[str, Any], ...]
    """What the files of its seeds hold."""

    def mean(self, name: str, of: str) -> float:
        """Return the mean over seeds of a sum over answers, divided by another."""
        return statistics.fmean(_sum(row, name) / _sum(row, of) for row in self.rows)

    @property
    def agreement(self) -> float:
        """Return the mean share of the dense greedy answer that this one begins with."""
        return statistics.fmean(one["agreement"] for row in self.rows for one in row["answers"])

    @property
    def nll(self) -> float:
        """Return the mean negative log-likelihood of a token."""
        return self.mean("nll", "tokens")

    @property
    def perplexities(self) -> list[float]:
        """Return that of each seed."""
        return [math.exp(_sum(row, "nll") / _sum(row, "tokens")) for row in self.rows]

    def tally(self) -> Tally:
        """Return what its negative log-likelihood is made of, answer by answer, the mean over seeds."""
        answers = list(zip(*(row["answers"] for row in self.rows), strict=True))
        numbers = tuple((statistics.fmean(one["nll"] for one in its), float(its[0]["tokens"])) for its in answers)
        names = tuple(one["id"] for one in self.rows[0]["answers"])
        return Tally(names, ("",) * len(names), numbers, lambda sums, _: sums[..., 0] / sums[..., 1], unit="answers")


def _sum(row: Mapping[str, Any], name: str) -> float:
    return math.fsum(one[name] for one in row["answers"])


def lines_of(rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Return the rows of a table, those of one rule and budget joined: dense first, budgets falling, controls first."""
    joined: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        joined.setdefault((row["title"], row["kind"], row["budget"]), []).append(row)
    order = {DENSE: 0, BY_RULE: 1, LEARNED: 2}
    found = [Line(*key, tuple(its)) for key, its in joined.items()]
    return sorted(found, key=lambda line: (-line.budget, order[line.kind]))  # stable: rules in the order of the rows


def intervals(lines: Sequence[Line], reference: Line, name: str) -> list[tuple[float, float]]:
    """Return for each line the interval of its mean negative log-likelihood's difference to the reference."""
    found = paired_intervals(reference.tally(), [line.tally() for line in lines], name=name)
    return [one for one in found if one is not None]


def table(result: Mapping[str, Any]) -> str:
    """Return the table as markdown, with its legend and what it says of learned rows."""
    lines = lines_of(result["rows"])
    dense = lines[0]
    cells = [list(HEAD)]
    for line, (low, high) in zip(lines, intervals(lines, dense, "dense"), strict=True):
        cells.append(_cells(line, dense, (low, high), result))
    settings = result["settings"]
    legend = LEGEND.format(
        level=LEVEL, resamples=RESAMPLES, seed=SEED, continuation=settings["continuation"],
        answers=len(dense.rows[0]["answers"]), seeds=settings["seeds"],
    )  # fmt: skip
    without = SNAPKV + "; ".join(result["without"]) + "." if result["without"] else SNAPKV.split(" Nor")[0]
    return "\n\n".join([markdown(cells), legend, without, "\n".join(f"- {one}" for one in verdicts(lines))])


def _cells(line: Line, dense: Line, interval: tuple[float, float], result: Mapping[str, Any]) -> list[str]:
    perplexities = line.perplexities
    spread = f" ({min(perplexities):.3f}..{max(perplexities):.3f})" if len(perplexities) > 1 else ""
    difference = MISSING if line is dense else f"{line.nll - dense.nll:+.4f} [{interval[0]:+.4f}, {interval[1]:+.4f}]"
    return [
        line.title,
        MISSING if line is dense else f"{100 * line.budget:g} %",
        f"{100 * line.mean('visible', 'pairs'):.1f} %",
        f"{held_bytes(line, result) / 1024:.0f}",
        f"{math.exp(line.nll):.3f}{spread}",
        difference,
        f"{line.mean('kl', 'tokens'):.4f}",
        f"{100 * line.mean('same', 'tokens'):.1f} %",
        f"{100 * line.agreement:.0f} %",
        f"{1000 * statistics.fmean(row['seconds_per_token'] for row in line.rows):.0f}",
    ]


def held_bytes(line: Line, result: Mapping[str, Any]) -> float:
    """Return the bytes of output keys and values that an answer holds, the mean over its steps, in all layers."""
    layers, sparse = result["model"]["layers"], result["model"]["layers"] - result["model"]["sparse_layer"]
    answers = [one for row in line.rows for one in row["answers"]]
    steps = sum(one["tokens"] - 1 for one in answers)
    whole, held = (math.fsum(one[name] for one in answers) / max(steps, 1) for name in ("pairs", "visible"))
    return result["model"]["token_bytes_per_layer"] * ((layers - sparse) * whole + sparse * held)


def verdicts(lines: Sequence[Line]) -> list[str]:
    """Return one sentence for each budget and learned rule: whether it beats the best control."""
    said = []
    for budget in sorted({line.budget for line in lines if line.kind == LEARNED}, reverse=True):
        rules = [line for line in lines if line.kind == BY_RULE and line.budget == budget]
        if not rules:
            continue
        best = min(rules, key=lambda line: line.nll)
        learned = [line for line in lines if line.kind == LEARNED and line.budget == budget]
        for line, (low, high) in zip(learned, intervals(learned, best, best.title), strict=True):
            word = "wins against" if high < 0 else "loses against" if low > 0 else "ties with"
            said.append(
                f"At {100 * budget:g} %: {line.title} {word} the best control, {best.title}: "
                f"{line.nll - best.nll:+.4f} nats [{low:+.4f}, {high:+.4f}]."
            )
    return said


def panels(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what `viz.draw_quality_against_cost` draws: likelihood and divergence over what is held."""
    lines = lines_of(result["rows"])
    dense = lines[0]
    spreads = intervals(lines, dense, "dense")
    shown = []
    for quality, value, interval_of in (
        ("nats a token more than dense", lambda line: line.nll - dense.nll, lambda place: spreads[place]),
        ("KL from dense, nats a token", lambda line: line.mean("kl", "tokens"), lambda place: None),
    ):
        points = [
            {
                "name": line.title,
                "cost": 100 * line.mean("visible", "pairs"),
                "quality": value(line),
                "difference": value(line),
                "interval": interval_of(place),
                "front": False,
            }
            for place, line in enumerate(lines)
            if line is not dense
        ]
        shown.append(
            {
                "title": quality, "cost": "output keys and values held, %", "quality": quality,
                "lower_is_better": True, "points": points,
            }
        )  # fmt: skip
    return shown


def read_row(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return the row that a file holds, if it was made of the same settings and weights; None otherwise."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found if found.get("fingerprint") == fingerprint else None
