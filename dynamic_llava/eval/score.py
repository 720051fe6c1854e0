"""`python -m dynamic_llava.eval score`: what an answer file is worth, without a model and without importing torch.

Where the labels are private, or a judge is needed, the file for the server or the judge is written instead.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from dynamic_llava.eval.answers import read_answers
from dynamic_llava.eval.tasks import TASKS, HubData, Score, Submission, Task, get_task
from dynamic_llava.eval.tasks.base import naming
from dynamic_llava.eval.writing import write_text

DATA_ROOT = Path("playground/data/eval")
"""Where LLaVA keeps its evaluation data."""
SPARSITIES = {"none": "LLaVA-1.5", "image": "Dynamic-LLaVA I", "both": "Dynamic-LLaVA I|T"}
"""Sparsity -> what the paper calls the model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the `score` command."""
    parser.add_argument(
        "--task", required=True, help=f"one of {', '.join(TASKS)}; a split follows a colon, e.g. vqav2:val"
    )
    parser.add_argument("--answers", type=Path, required=True, help="answer file, JSON lines as LLaVA writes them")
    parser.add_argument("--data-root", type=Path, default=DATA_ROOT, help="folder as LLaVA's playground/data/eval")
    parser.add_argument("--dataset", help="take labels from a Hugging Face dataset instead: an id or a local folder")
    parser.add_argument(
        "--part", action="store_true", help="score the questions that are answered, not all of them (after --limit)"
    )
    parser.add_argument("--json", type=Path, help="write every metric with its unit, counts and warnings here")
    parser.add_argument(
        "--submission-dir",
        type=Path,
        help="also write the server's file here; without a score here it is written in any case, beside the answers",
    )


def run(given: argparse.Namespace) -> None:
    """Score what the command line names, print it, write what it asks for. Raises what the task's `score` raises."""
    task = get_task(given.task)
    hub = task.hub_data(given.dataset) if given.dataset is not None else None
    score = task.score_file(given.answers, given.data_root, hub, part=given.part)
    submission = None
    if score is None or given.submission_dir is not None:
        submission = _submit(task, given, hub)
    if score is not None:
        print(score_table(task, score))
    if submission is not None:
        print(f"written: {', '.join(map(str, submission.files))}\nsend to: {submission.send_to}")
    if given.json is not None:
        write_text(given.json, json.dumps(as_json(task, score, submission), indent=1) + "\n")
        print(f"metrics: {given.json}")


def score_table(task: Task, score: Score) -> str:
    """Return a score as text: a line a metric, what was counted, the paper's numbers, and the warnings."""
    width = max(map(len, score.metrics))
    lines, paper = [f"{task.title}"], task.paper.get(score.table_metric, {})
    for name, metric in score.metrics.items():
        mark = "  <- the paper's" if name == score.table_metric and any(paper.values()) else ""
        value = f"{metric.value:.4f}" if metric.unit == "fraction" else f"{metric.value:.2f}"
        lines.append(f"  {printable(name):<{width}}  {value:>9} {metric.unit}{mark}")
    lines.append("  " + ", ".join(f"{name} {number}" for name, number in score.counts.items()))
    for size, numbers in paper.items():
        shown = ", ".join(f"{SPARSITIES[sparsity]} {number}" for sparsity, number in numbers.items())
        lines += [f"  paper, {size}: {shown}"] if shown else []
    lines += [f"  paper: {task.paper_note}"] if task.paper_note else []
    return "\n".join([*lines, *(f"  warning: {warning}" for warning in score.warnings)])


def printable(text: str) -> str:
    """Return a text of a data file for a terminal: what would move its cursor or colour it is shown as an escape."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def as_json(task: Task, score: Score | None, submission: Submission | None) -> dict[str, Any]:
    """Return a score, or the lack of one, and the files written for a server, as a JSON object."""
    found = {"task": task.name, "metrics": {}} if score is None else score.to_json()
    if submission is not None:
        found["submission"] = {"files": [str(path) for path in submission.files], "send_to": submission.send_to}
    return found


def _submit(task: Task, given: argparse.Namespace, hub: HubData | None) -> Submission:
    folder = given.submission_dir or given.answers.parent
    answers = read_answers(given.answers)
    with naming(given.answers):
        submission = task.submission(answers, given.data_root, folder, hub)
    if submission is None:
        raise ValueError(f"task {task.name} has no server or judge to write a file for; leave out --submission-dir")
    return submission
