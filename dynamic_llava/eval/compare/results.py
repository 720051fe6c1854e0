"""What each method came to on each task, as compare.json holds it, with intervals and fronts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dynamic_llava.eval.compare.bootstrap import paired_intervals
from dynamic_llava.eval.compare.contenders import Entrant
from dynamic_llava.eval.compare.split import Split
from dynamic_llava.eval.compare.table import COSTS, LOWER_IS_BETTER, fronts
from dynamic_llava.eval.metrics.tally import Tally
from dynamic_llava.eval.summary import TaskRow
from dynamic_llava.eval.tasks import Score, Task, task_label
from dynamic_llava.methods import Downsample


@dataclass
class Outcome:
    """What one method came to on one task."""

    entrant: Entrant
    row: TaskRow
    times: Mapping[str, float] = field(default_factory=dict)

    def fail(self, text: str) -> None:
        """Add to what went wrong."""
        self.row = replace(self.row, error="; ".join(filter(None, (self.row.error, text))))


def task_results(task: Task, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return what compare.json holds of a task: its metrics, and a row for each method in the order of the command."""
    scores = [outcome.row.score for outcome in outcomes]
    first = next((outcome for outcome in outcomes if outcome.entrant.method.is_dense), None)
    reference = None if first is None else first.row.score
    kept = {name: None for score in scores if score is not None for name in score.tallies}
    names = list(kept) or [task.table_metric]
    metrics: list[dict[str, Any]] = [{} for _ in outcomes]
    warnings = []
    for name in names:
        having = [place for place, score in enumerate(scores) if score is not None and name in score.metrics]
        base = None if reference is None else reference.tallies.get(name)
        found = {} if base is None else _intervals(task, name, base, scores)
        for place in having:
            metrics[place][name] = _metric(scores[place], reference, name, found.get(place))
        if base is not None:
            warnings.append(f"{name}: intervals are over {len(base.names)} {base.unit}")
        elif having:
            warnings.append(f"{name} has no interval: it is not made of single questions here")
    rows = [_row_of(outcome, its, first) for outcome, its in zip(outcomes, metrics, strict=True)]
    on = fronts(rows, names[0])
    for place, row in enumerate(rows):
        row["front"] = [cost for cost in COSTS if place in on[cost]]
    found = {"title": task.title, "shown": names, "rows": rows, "warnings": warnings}
    return {**found, "split": _split(outcomes, rows, names[0])}


def _split(outcomes: Sequence[Outcome], rows: Sequence[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """Give each row its right answers in the groups that the dense and the downsampling row make; return the groups.

    None where no downsampling method runs on the reference's checkpoint, or the benchmark knows no right and wrong.
    """
    methods = [one.entrant.method for one in outcomes]
    tallies = [None if one.row.score is None else one.row.score.tallies.get(metric) for one in outcomes]
    dense = next((at for at, method in enumerate(methods) if method.is_dense), None)
    small = [at for at, method in enumerate(methods) if isinstance(method, Downsample)]
    small = [at for at in small if dense is not None and rows[at]["model"] == rows[dense]["model"]]
    if dense is None or not small:
        return None
    base, downsampled = tallies[dense], tallies[small[0]]
    split = None if base is None or downsampled is None else Split.of(base, downsampled)
    if split is None:
        return None
    for row, tally in zip(rows, tallies, strict=True):
        row["groups"] = split.right_of(tally)
    return split.to_json(rows[dense]["method"], rows[small[0]]["method"])


def _intervals(task: Task, name: str, base: Tally, scores: Sequence[Score | None]) -> dict[int, Any]:
    """Return for each score, by its place, the interval of a metric's difference; None where there is none."""
    tallies = {place: one.tallies[name] for place, one in enumerate(scores) if one is not None and name in one.tallies}
    found = paired_intervals(base, list(tallies.values()), name=f"{task_label(task)}/{name}")
    return dict(zip(tallies, found, strict=True))


def _row_of(outcome: Outcome, metrics: dict[str, Any], reference: Outcome | None) -> dict[str, Any]:
    row, score = outcome.row, outcome.row.score
    return {
        "model": outcome.entrant.model,
        "reference": outcome is reference,
        "method": outcome.entrant.label,
        "metrics": metrics,
        "counts": {} if score is None else dict(score.counts),
        "costs": dict(row.costs),
        "times": dict(outcome.times),
        "groups": {},
        "answers": None if row.answers is None else str(row.answers),
        "error": row.error or None,
        "warnings": [*row.notes, *(() if score is None else score.warnings)],
    }


def _metric(score: Any, reference: Any, name: str, interval: tuple[float, float] | None) -> dict[str, Any]:
    metric = score.metrics[name]
    there = reference is not None and name in reference.metrics
    return {
        "value": metric.value,
        "unit": metric.unit,
        "lower_is_better": metric.unit in LOWER_IS_BETTER,
        "difference": metric.value - reference.metrics[name].value if there else None,
        "low": None if interval is None else interval[0],
        "high": None if interval is None else interval[1],
    }
