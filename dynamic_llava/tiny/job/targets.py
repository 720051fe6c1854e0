"""The tiny world's targets: numbers with bounds that it must show; the mean over seeds meets them or not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynamic_llava.config import SparsityConfig
from dynamic_llava.eval.metrics.seeds import mean_and_interval
from dynamic_llava.eval.writing import MISSING, markdown
from dynamic_llava.tiny.job.rows import other_rate

WINDOWS = {"sinks": "sinks + window", "recent": "random + window"}
"""Beginning of a row's key, behind "inside_" -> the rule that it drops output tokens by."""

STATED = {"late counts, forced": "forced/count", "relations, forced": "forced/relation"}
"""What targets say of the long descriptions -> metric."""

Metrics = Mapping[str, Mapping[str, float]]
"""Row key -> metrics of one seed; "overlap/..." are the overlap rows, "training" the realised rates at its end."""


@dataclass(frozen=True)
class MeanTarget:
    """One target: a statement about the mean over seeds, and its bounds."""

    statement: str
    value: Callable[[Metrics], float]
    """Reads the number from one seed's metrics; a KeyError means that a row is missing."""
    least: float | None = None
    most: float | None = None
    strict: bool = False
    """Whether a mean that equals a bound misses the target."""
    digits: int = 1
    by_interval: bool = False
    """Whether the interval over seeds decides: a mean whose interval holds a bound is undecided."""

    def verdict(self, mean: float, half: float | None) -> str:
        """Return met, MISSED, or undecided; of one seed, which has no interval, the mean decides."""
        if not self.by_interval or half is None:
            return "met" if self.met(mean) else "MISSED"
        ends = {self.met(mean - half), self.met(mean + half)}
        return "undecided" if len(ends) > 1 else "met" if ends == {True} else "MISSED"

    def met(self, mean: float) -> bool:
        """Whether `mean` lies within the bounds."""
        if self.strict and mean in (self.least, self.most):
            return False
        return (self.least is None or mean >= self.least) and (self.most is None or mean <= self.most)

    def bounds(self) -> str:
        """The bounds in words."""
        low, high = (None if v is None else f"{v:g}" for v in (self.least, self.most))
        if low is not None and high is not None:
            return f"{low} to {high}"
        if low is not None:
            return f"above {low}" if self.strict else f"at least {low}"
        return f"below {high}" if self.strict else f"at most {high}"


def _lead(row: str, metric: str, scale: float = 1.0, learned: str = "dynamic") -> Callable[[Metrics], float]:
    """Dynamic I|T minus another row."""
    return lambda m: scale * (m[learned][metric] - m[row][metric])


def _lag(row: str, metric: str, scale: float = 1.0, learned: str = "dynamic") -> Callable[[Metrics], float]:
    """Another row minus Dynamic I|T."""
    return lambda m: scale * (m[row][metric] - m[learned][metric])


def _percent(row: str, metric: str) -> Callable[[Metrics], float]:
    return lambda m: 100 * m[row][metric]


def targets(settings: SparsityConfig, rates: Sequence[float] = (), *, long: bool = False) -> list[MeanTarget]:
    """The targets for the keep rates in `settings` and Dynamic I|T at the further r_OT `rates`.

    The bounds on short answers are those of the default world; the long one has some on its statements instead.
    """
    points = "accuracy/all", 100
    short = [
        MeanTarget("accuracy, dense control minus Dynamic I|T (points)", _lag("control", *points), most=2),
        MeanTarget("accuracy, Dynamic I|T minus FastV-like (points)", _lead("fastv", *points), least=6),
        MeanTarget("accuracy, Dynamic I|T minus random image (points)", _lead("random_image", *points), least=20),
        MeanTarget("objects hit by the kept patches (%)", _percent("overlap/dynamic", "objects_hit"), least=97),
    ]
    blind = [
        MeanTarget(
            "description PPL, Dynamic I|T / dense control",
            lambda m: m["dynamic"]["ppl"] / m["control"]["ppl"], most=1.06, digits=3,
        ),
        *(
            MeanTarget(
                f"PPL, {name} output minus learned, equal keep", _lag(row, "ppl"), least=0, strict=True, digits=4
            )
            for name, row in (("random", "inside_random"), ("alternate", "inside_alternate"))
        ),
        *(
            MeanTarget(
                f"attribute recall, learned minus {name} output, equal keep (points)",
                _lead(row, "attribute_recall", 100), least=0, strict=True,
            )
            for name, row in (("random", "inside_random"), ("alternate", "inside_alternate"))
        ),
    ]  # fmt: skip
    windows = _window_targets(settings.output_keep_rate, "", long)
    windows += [target for rate in rates for target in _window_targets(rate, other_rate(rate), long)]
    return [*(() if long else short), *blind, *windows, *_keep_targets(settings, rates)]


def _keep_targets(settings: SparsityConfig, rates: Sequence[float]) -> list[MeanTarget]:
    image, output = 100 * settings.image_keep_rate, 100 * settings.output_keep_rate
    others = [
        MeanTarget(
            f"output keep rate, teacher-forced, r_OT {rate:g} (%)",
            _percent(f"dynamic{other_rate(rate)}", "keep_output_forced"), 100 * rate - 8, 100 * rate + 8,
        )
        for rate in rates
    ]  # fmt: skip
    return [
        MeanTarget("image keep rate, end of training (%)", _percent("training", "image"), image - 5, image + 5),
        MeanTarget("output keep rate, end of training (%)", _percent("training", "output"), output - 5, output + 5),
        MeanTarget("image keep rate, inference (%)", _percent("dynamic", "keep_image"), image - 8, image + 8),
        MeanTarget(
            "output keep rate, teacher-forced (%)",
            _percent("dynamic", "keep_output_forced"), output - 8, output + 8,
        ),
        MeanTarget(
            "output keep rate, generating (%)",
            _percent("dynamic", "keep_output_generated"), output - 8, output + 8,
        ),
        *others,
    ]  # fmt: skip


def _window_targets(rate: float, suffix: str, long: bool) -> list[MeanTarget]:
    """What learned admission must show to be worth having: more than simple rules show at equal slots, with certainty.

    `suffix`: of the keys of the rows at this r_OT. What is teacher-forced and what is generated may disagree, so both
    are judged.
    """
    above: dict[str, Any] = {"least": 0, "strict": True, "by_interval": True}
    told = STATED if long else {"attribute recall": "attribute_recall"}
    found = []
    for key, rule in WINDOWS.items():
        row, learned, at = f"inside_{key}{suffix}", f"dynamic{suffix}", f"equal slots, r_OT {rate:g}"
        found.append(MeanTarget(f"PPL, {rule} minus learned, {at}", _lag(row, "ppl", 1, learned), digits=4, **above))
        found += [
            MeanTarget(f"{name}, learned minus {rule}, {at} (points)", _lead(row, metric, 100, learned), **above)
            for name, metric in told.items()
        ]
    return found


def rates_of(result: Mapping[str, Any]) -> list[float]:
    """The further r_OT of a seed's results, from the keys of its rows."""
    keys = [row["key"].removeprefix("dynamic_") for row in result["rows"] if row["key"].startswith("dynamic_")]
    return [float(key) / 100 for key in keys if key.replace(".", "").isdigit()]


def metrics_of(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """One seed's results.json as row key -> metrics."""
    metrics = {row["key"]: row["metrics"] for row in result["rows"]}
    metrics |= {f"overlap/{row['key']}": row["metrics"] for row in result.get("overlap", [])}
    return metrics | {"training": result.get("training", {})}


def judged(
    results: Sequence[Mapping[str, Any]], settings: SparsityConfig
) -> list[tuple[MeanTarget, tuple[float, float | None] | None, str]]:
    """Return each target with its mean over the given seeds, the half-width of its interval, and the verdict.

    A target whose row was not run has no mean, and says so.
    """
    found: list[tuple[MeanTarget, tuple[float, float | None] | None, str]] = []
    per_seed = [metrics_of(result) for result in results]
    for target in targets(settings, rates_of(results[0]), long=results[0].get("world") == "long"):
        try:
            mean, half = mean_and_interval([target.value(metrics) for metrics in per_seed])
        except KeyError:
            found.append((target, None, "not run"))
            continue
        found.append((target, (mean, half), target.verdict(mean, half)))
    return found


def target_table(results: Sequence[Mapping[str, Any]], settings: SparsityConfig) -> str:
    """Markdown table of the targets over the given seeds."""
    lines = [["target", "bound", "measured", "verdict"]]
    for target, measured, verdict in judged(results, settings):
        text = MISSING
        if measured is not None:
            mean, half = measured
            text = f"{mean:.{target.digits}f}" + ("" if half is None else f" ± {half:.{target.digits}f}")
        lines.append([target.statement.replace("|", r"\|"), target.bounds(), text, verdict])
    return markdown(lines)
