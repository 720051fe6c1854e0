"""What the tiny world must show: each target as a number with its bounds, and whether the mean over seeds meets it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynamic_llava.config import SparsityConfig
from dynamic_llava.eval.writing import markdown
from dynamic_llava.tiny.job.tables import mean_and_interval

Metrics = Mapping[str, Mapping[str, float]]
"""Row key -> metrics of one seed; "overlap/..." are the overlap rows, "training" the realised rates at its end."""


@dataclass(frozen=True)
class Target:
    """One statement about the mean over seeds."""

    statement: str
    value: Callable[[Metrics], float]
    """Reads the number from one seed's metrics; a KeyError means that a row is missing."""
    least: float | None = None
    most: float | None = None
    strict: bool = False
    """Whether the bounds themselves are excluded."""
    digits: int = 1

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


def _lead(row: str, metric: str, scale: float = 1.0) -> Callable[[Metrics], float]:
    """Dynamic I|T minus another row."""
    return lambda m: scale * (m["dynamic"][metric] - m[row][metric])


def _lag(row: str, metric: str, scale: float = 1.0) -> Callable[[Metrics], float]:
    """Another row minus Dynamic I|T."""
    return lambda m: scale * (m[row][metric] - m["dynamic"][metric])


def _percent(row: str, metric: str) -> Callable[[Metrics], float]:
    return lambda m: 100 * m[row][metric]


def targets(settings: SparsityConfig) -> list[Target]:
    """The targets for the keep rates in `settings`."""
    image, output = 100 * settings.image_keep_rate, 100 * settings.output_keep_rate
    points = "accuracy/all", 100
    return [
        Target("accuracy, dense control minus Dynamic I|T (points)", _lag("control", *points), most=2),
        Target("accuracy, Dynamic I|T minus FastV-like (points)", _lead("fastv", *points), least=6),
        Target("accuracy, Dynamic I|T minus random image (points)", _lead("random_image", *points), least=20),
        Target(
            "description PPL, Dynamic I|T / dense control",
            lambda m: m["dynamic"]["ppl"] / m["control"]["ppl"], most=1.06, digits=3,
        ),
        *(
            Target(f"PPL, {name} output minus learned, equal keep", _lag(row, "ppl"), least=0, strict=True, digits=4)
            for name, row in (("random", "inside_random"), ("alternate", "inside_alternate"))
        ),
        *(
            Target(
                f"attribute recall, learned minus {name} output, equal keep (points)",
                _lead(row, "attribute_recall", 100), least=0, strict=True,
            )
            for name, row in (("random", "inside_random"), ("alternate", "inside_alternate"))
        ),
        Target("image keep rate, end of training (%)", _percent("training", "image"), image - 5, image + 5),
        Target("output keep rate, end of training (%)", _percent("training", "output"), output - 5, output + 5),
        Target("image keep rate, inference (%)", _percent("dynamic", "keep_image"), image - 8, image + 8),
        Target(
            "output keep rate, teacher-forced (%)",
            _percent("dynamic", "keep_output_forced"), output - 8, output + 8,
        ),
        Target(
            "output keep rate, generating (%)",
            _percent("dynamic", "keep_output_generated"), output - 8, output + 8,
        ),
        Target("objects hit by the kept patches (%)", _percent("overlap/dynamic", "objects_hit"), least=97),
    ]  # fmt: skip


def metrics_of(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """One seed's results.json as row key -> metrics."""
    metrics = {row["key"]: row["metrics"] for row in result["rows"]}
    metrics |= {f"overlap/{row['key']}": row["metrics"] for row in result.get("overlap", [])}
    return metrics | {"training": result.get("training", {})}


def target_table(results: Sequence[Mapping[str, Any]], settings: SparsityConfig, *, escape: bool = True) -> str:
    """Markdown table of the targets over the given seeds; a target whose row was not run says so."""
    lines = [["target", "bound", "measured", "verdict"]]
    per_seed = [metrics_of(result) for result in results]
    for target in targets(settings):
        statement = target.statement.replace("|", r"\|") if escape else target.statement
        try:
            mean, half = mean_and_interval([target.value(metrics) for metrics in per_seed])
        except KeyError:
            lines.append([statement, target.bounds(), "-", "not run"])
            continue
        text = f"{mean:.{target.digits}f}" + ("" if half is None else f" ± {half:.{target.digits}f}")
        lines.append([statement, target.bounds(), text, "met" if target.met(mean) else "MISSED"])
    return markdown(lines)
