"""What a run found, beside what the paper printed: summary.json, and table.md as it follows from it.

Text that a model, a name or a data file wrote stands in code spans on the page: no link, no HTML, no line of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynamic_llava.eval.score import SPARSITIES
from dynamic_llava.eval.tasks import Score, Submission, Task
from dynamic_llava.eval.writing import MISSING, code, markdown

SIZES = {(4096, 32): "7b", (5120, 40): "13b"}
"""(hidden size, layers) of a decoder -> the paper's name of its size."""
UNITS = {
    "image_tokens_kept": "tokens",
    "output_tokens_kept": "share of the generated tokens",
    "image_tokens_per_layer": "tokens",
    "prefill_flop_exact": "FLOP",
    "prefill_flop_paper": "FLOP",
    "kv_bytes": "bytes",
    "prefill_ms": "ms per batch",
    "decode_ms": "ms per token of the batch",
    "speed_batch": "rows",
}
"""Units of the costs, by name."""
TERA, MEBI = 1e12, 2**20
PAPER_COSTS: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "7b": {
        "image_tokens_kept": {"none": 576, "image": 115, "both": 115},
        "prefill_flop_paper": {"none": 10.1e12, "image": 2.5e12, "both": 2.5e12},
    },
    "13b": {
        "image_tokens_kept": {"none": 576, "image": 115, "both": 115},
        "prefill_flop_paper": {"none": 19.6e12, "image": 4.7e12, "both": 4.7e12},
        "prefill_ms": {"none": 124.52, "both": 72.51},
        "decode_ms": {"none": 28.42, "both": 26.85},
    },
}
"""Size -> cost -> sparsity -> what the paper prints: Table 1, and Table 14 for times (one A100, batch 1)."""
OURS = "ours"
HEAD = (
    "benchmark", "metric", OURS, *SPARSITIES.values(), "difference", "tokens/layer", "TFLOP", "Eq. 13", "KV MiB",
    "prefill ms", "decode ms", "unreadable",
)  # fmt: skip


@dataclass(frozen=True)
class TaskRow:
    """One task of a run: its score or submission, or its error."""

    label: str
    """Its name, with the split where one was asked for."""
    task: Task
    score: Score | None = None
    submission: Submission | None = None
    costs: Mapping[str, float] = field(default_factory=dict)
    """By the names in `UNITS`."""
    answers: Path | None = None
    notes: tuple[str, ...] = ()
    """Warnings for a reader: questions passed over, why there is no score."""
    error: str = ""
    """Why it failed; empty when it did not."""
    unwritten: bool = False
    """Whether the error is a file that could not be written."""


@dataclass(frozen=True)
class Summary:
    """A run: which model, how it was asked, and a row for each task."""

    model: str
    sparsity: str | None
    """Which context was sparsified, by Dynamic-LLaVA as the checkpoint's settings have it; None for another method."""
    size: str | None
    """The paper's name of the model's size; None for another."""
    settings: Mapping[str, Any]
    """Settings of the run: dtype, batch size, limits."""
    environment: Mapping[str, Any]
    rows: Sequence[TaskRow]
    identity: str = ""
    """A digest of what all answers depend on: model and method; empty when no model was loaded."""
    method: str | None = None
    """The method in one line, where `sparsity` does not say it."""

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {
            "model": self.model,
            "sparsity": self.sparsity,
            "method": self.method,
            "size": self.size,
            "identity": self.identity,
            "settings": dict(self.settings),
            "environment": dict(self.environment),
            "tasks": {row.label: self._task(row) for row in self.rows},
        }

    def _task(self, row: TaskRow) -> dict[str, Any]:
        score, submission, task = row.score, row.submission, row.task
        shown = [task.table_metric, *(name for name in task.paper if name != task.table_metric)]
        shown = shown[:1] if score is None else [name for name in shown if name in score.metrics]
        paper = {name: dict(self._paper(task, name)) for name in task.paper}
        differences = {} if score is None else {name: self._difference(task, score, name) for name in shown}
        found: dict[str, Any] = {
            "title": task.title,
            "metric": task.table_metric,
            "value": None if score is None else score.value,
            "unit": None if score is None else score.metrics[score.table_metric].unit,
            "metrics": {} if score is None else score.to_json()["metrics"],
            "shown": shown,
            "counts": {} if score is None else dict(score.counts),
            "paper": {name: numbers for name, numbers in paper.items() if numbers},
            "paper_note": task.paper_note,
            "difference": differences.get(task.table_metric),
            "differences": {name: value for name, value in differences.items() if value is not None},
            "efficiency": {name: {"value": value, "unit": UNITS[name]} for name, value in row.costs.items()},
            "warnings": [*row.notes, *(() if score is None else score.warnings)],
            "answers": None if row.answers is None else str(row.answers),
            "error": row.error or None,
            "settings": dict(self.settings),
        }
        for name, numbers in PAPER_COSTS.get(self.size or "", {}).items():
            found["efficiency"].setdefault(name, {"value": None, "unit": UNITS[name]})["paper"] = dict(numbers)
        if submission is not None:
            found["submission"] = {"files": [str(path) for path in submission.files], "send_to": submission.send_to}
        return found

    def _paper(self, task: Task, metric: str) -> Mapping[str, float]:
        """Return sparsity -> the paper's number for this size; none for another split than the paper's."""
        if task.used_split() != next(iter(task.splits), None):
            return {}
        return task.paper.get(metric, {}).get(self.size or "", {})

    def _difference(self, task: Task, score: Score, metric: str) -> float | None:
        """Return ours less the paper's for the same size and sparsity; None where it prints none, and with a limit."""
        paper = self._paper(task, metric).get(self.sparsity or "")
        if paper is None or self.settings.get("limit") is not None:
            return None
        return score.metrics[metric].value - paper


def page(summary: Mapping[str, Any]) -> str:
    """Return table.md of a summary.json: scores and costs beside the paper's, then what to know about each task."""
    tasks: Mapping[str, Mapping[str, Any]] = summary["tasks"]
    lines = [f"# {code(summary['model'])}, {named(summary)}", "", *_listed(summary["settings"]), ""]
    table = [line for row in tasks.values() for line in _lines(row)]
    head = [f"ours, {named(summary)}" if text == OURS and summary.get("method") else text for text in HEAD]
    lines += [markdown([[_cell(text) for text in line] for line in (head, *table)]), ""]
    lines += [
        "Means over the answers: image tokens that a layer sees; a prefill's FLOP by real module shapes, and by "
        "the paper's Eq. 13 on image tokens alone; the filled key-value cache when an answer ends. Times: medians "
        "on a batch of the task's first questions, of a prefill (images included) and of a decoding step. Unreadable: "
        "answers from which the benchmark's rule reads nothing.",
        "",
    ]
    lines += _paper_costs(summary["size"])
    lines += [f"- **{label}**: {text}" for label, row in tasks.items() for text in _remarks(row, summary["settings"])]
    return "\n".join([*lines, "", *_listed(summary["environment"])]) + "\n"


def _listed(values: Mapping[str, Any]) -> list[str]:
    return [", ".join(f"{name} {code(value)}" for name, value in values.items() if value is not None)]


def named(summary: Mapping[str, Any]) -> str:
    """Return what decided in a run, as tables name it, from its summary.json."""
    if summary.get("method"):
        return f"method {code(summary['method'])}"
    return SPARSITIES.get(summary["sparsity"]) or f"sparsity {code(summary['sparsity'])}"


def _lines(row: Mapping[str, Any]) -> list[list[str]]:
    """Return a table line for each metric that the paper prints, or one without a number."""
    lines = []
    for name in row["shown"]:
        metric, paper = row["metrics"].get(name), row["paper"].get(name, {})
        unit = "" if metric is None else metric["unit"]
        difference, first = row["differences"].get(name), name == row["shown"][0]
        lines.append([
            row["title"] if first else "",
            name + (f", {unit}" if unit else ""),
            MISSING if metric is None else _number(metric["value"], unit),
            *(_number(paper[sparsity], unit) if sparsity in paper else MISSING for sparsity in SPARSITIES),
            MISSING if difference is None else f"{difference:+.{_digits(unit)}f}",
            *(_costs(row["efficiency"]) if first else [""] * 6),
            str(row["counts"].get("unreadable", MISSING)) if first else "",
        ])  # fmt: skip
    return lines


def _paper_costs(size: str | None) -> list[str]:
    if size is None:
        return []
    costs = PAPER_COSTS[size]
    lines = [["paper", "image tokens kept", "TFLOP, Eq. 13", "prefill ms", "decode ms"]]
    for sparsity, title in SPARSITIES.items():
        cells = [costs.get(name, {}).get(sparsity) for name in ("image_tokens_kept", "prefill_ms", "decode_ms")]
        tera = f"{costs['prefill_flop_paper'][sparsity] / TERA:.1f}"
        kept, *times = (MISSING if cell is None else f"{cell:g}" for cell in cells)
        lines.append([_cell(f"{title}, {size.upper()}"), kept, tera, *times])
    return [markdown(lines), "", "Tables 1 and 14 of the paper; its times are one A100's at batch 1.", ""]


def _remarks(row: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know about a task; also how it was asked, where its command had other settings."""
    remarks = [f"failed: {code(row['error'])}"] if row["error"] else []
    if submission := row.get("submission"):
        remarks.append(f"no score here; send {code(', '.join(submission['files']))} to {submission['send_to']}")
    remarks += map(code, row["warnings"])
    share = row["efficiency"].get("output_tokens_kept", {}).get("value")
    if share is not None and {"output_keep_rate", "kv_budget"} & row["settings"].keys():
        remarks.append(f"{share:.1%} of the generated tokens were kept")
    own = {name: value for name, value in row["settings"].items() if value != settings.get(name)}
    remarks += [f"asked with {code(', '.join(f'{name} {value}' for name, value in own.items()))}"] if own else []
    return [*remarks, f"paper: {row['paper_note']}"] if row["paper_note"] else remarks


def _costs(costs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    columns = (
        ("image_tokens_per_layer", 1, 4), ("prefill_flop_exact", TERA, 3), ("prefill_flop_paper", TERA, 3),
        ("kv_bytes", MEBI, 4), ("prefill_ms", 1, 4), ("decode_ms", 1, 3),
    )  # fmt: skip
    values = [(costs.get(name, {}).get("value"), scale, digits) for name, scale, digits in columns]
    return [MISSING if value is None else f"{value / scale:.{digits}g}" for value, scale, digits in values]


def _digits(unit: str) -> int:
    return {"fraction": 4, "perplexity": 2, "TFLOP": 3}.get(unit, 1)


def _number(value: float, unit: str) -> str:
    return f"{value:.{_digits(unit)}f}"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
