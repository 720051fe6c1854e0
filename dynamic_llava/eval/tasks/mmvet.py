"""MM-Vet: open questions that need several capabilities, judged by gpt-4-0613 from a file of answers.

The judge's file names question 0 "v1_0". A question without an answer, or an answer to no question, is an error where
the question file is at hand.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynamic_llava.eval.answers import Answer
from dynamic_llava.eval.tasks.base import LLAVA_EVAL, LONG_TOKENS, DataFile, Submission, paper_numbers
from dynamic_llava.eval.tasks.hub import HubData
from dynamic_llava.eval.tasks.judged import Judged
from dynamic_llava.eval.writing import write_json

QUESTIONS, IMAGES = "mm-vet/llava-mm-vet.jsonl", "mm-vet/images"
PREFIX = "v1_"
"""What the judge's file puts before an id."""


class MmVet(Judged):
    """MM-Vet. Its number in tables is 100 x the mean of the judge's scores in [0, 1]."""

    name = "mmvet"
    title = "MM-Vet"
    max_new_tokens = LONG_TOKENS
    asked, images = QUESTIONS, IMAGES
    files = (
        DataFile(QUESTIONS, "questions", LLAVA_EVAL),
        DataFile(IMAGES, "images", "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"),
    )
    hub = HubData("lmms-lab/MMVet", "test")
    table_metric = "gpt4_score"
    paper = paper_numbers("gpt4_score", dense=(31.7, 36.6), image=(29.5, 37.3), both=(32.2, 34.6))
    paper_note = "Table 12; Table 2 prints 31.1 for LLaVA-1.5-7B"
    send_to = "MM-Vet's judge, gpt-4-0613 (https://github.com/yuweihao/MM-Vet, its notebook or online evaluator)"

    def hub_id(self, row: dict[str, Any]) -> int | str:
        """Return 0 for "v1_0"."""
        name = str(row["question_id"]).removeprefix(PREFIX)
        return int(name) if name.isdecimal() else name

    def submission(self, answers: Sequence[Answer], root: Path, folder: Path, hub: HubData | None = None) -> Submission:
        """Write mmvet_results.json: {"v1_0": answer, ...} in the answers' order."""
        results = {f"{PREFIX}{answer.question_id}": answer.text for answer in self.complete(answers, root, hub)}
        return Submission((write_json(folder / "mmvet_results.json", results, indent=2),), self.send_to)
