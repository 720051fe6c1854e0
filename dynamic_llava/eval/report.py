"""The report of an evaluation, from its folder: the scores beside the paper's, the first answers of each task."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynamic_llava.eval.folder import ANSWERS, SUMMARY, TABLE
from dynamic_llava.viz.page import facts, folded, table
from dynamic_llava.viz.run_report import RunReport, flat_facts

SHOWN_ANSWERS = 6
"""Answers of each task that the page shows."""
LONGEST_TEXT = 1200
"""Characters of a question or an answer that it shows."""


def evaluation_report(folder: Path) -> RunReport:
    """Return the report of an evaluation's output folder."""
    report = RunReport(folder, "Evaluation")
    found = report.object(SUMMARY)
    report.add("In short", SUMMARY, lambda: facts(_in_short(found)))
    report.add("Numbers", SUMMARY, lambda: facts(flat_facts(found.get("metrics", {}))))
    report.add_markdown("Scores and costs", TABLE)
    for path in sorted((folder / ANSWERS).glob("*.jsonl")):
        name = path.relative_to(folder).as_posix()
        report.add(f"Answers: {path.stem}", name, lambda name=name: _answers(report, name))
    report.add_environment(SUMMARY, found.get("environment"))
    return report


def _in_short(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = {"model": "model", "sparsity": "sparsified", "method": "method", "size": "the paper's size"}
    pairs = [(said, str(found[name])) for name, said in names.items() if found.get(name)]
    return pairs + flat_facts(found.get("settings", {}), empty=False)


def _answers(report: RunReport, name: str) -> list[str]:
    rows = [
        (line["question_id"], _short(line.get("prompt", "")), _short(line["text"]), _kept(line.get("metadata", {})))
        for line in report.lines(name, SHOWN_ANSWERS)
    ]
    head = ("question", "asked", "answer", "kept")
    return folded(f"the first {len(rows)} ({name})", [table(head, rows, texts=True)]) if rows else []


def _short(text: Any) -> str:
    whole = str(text)
    return whole if len(whole) <= LONGEST_TEXT else f"{whole[:LONGEST_TEXT]} …"


def _kept(found: Mapping[str, Any]) -> str:
    """Say what was kept of an answer's images and of itself, where its line knows."""
    said = []
    if found.get("image_kept"):
        said.append(f"{', '.join(map(str, found['image_kept']))} image tokens")
    if "output_kept" in found and "output_tokens" in found:
        said.append(f"{found['output_kept']} of {found['output_tokens']} output tokens")
    return "; ".join(said)
