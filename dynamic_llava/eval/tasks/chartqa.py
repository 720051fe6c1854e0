"""ChartQA, test: questions about charts that people wrote, and such that were made of summaries; relaxed accuracy.

A question without an answer is wrong and counted, an answer to no question is counted and left out. The prompt is
lmms-eval's (default of its chartqa, 0dc9a47): LLaVA's suffix of short answers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dynamic_llava.eval.answers import AnswerLine
from dynamic_llava.eval.metrics.documents import is_relaxed_right
from dynamic_llava.eval.metrics.tally import tally_of_means
from dynamic_llava.eval.reading import NAME, PATH, TEXT, fields_of, read_list
from dynamic_llava.eval.tasks.base import SHORT, SHORT_TOKENS, DataFile, Score, Task, paper_numbers
from dynamic_llava.eval.tasks.hub import HubData, read_hub
from dynamic_llava.eval.tasks.questions import ImageFile, Question, meet

HALVES = {"human": "chartqa/test_human.json", "augmented": "chartqa/test_augmented.json"}
"""Who asked -> the file of those questions, in the order in which they are asked."""
IMAGES = "chartqa/png"
CLONE = "`git clone https://github.com/vis-nlp/ChartQA`, its folder 'ChartQA Dataset/test' as chartqa"
ROW = {"imgname": PATH, "query": TEXT, "label": NAME}
COLUMNS = {"type": TEXT, "question": TEXT, "answer": NAME}
"""Fields of a question in the owner's files, and columns of the dataset."""


class ChartQa(Task):
    """ChartQA. Its number in tables is the relaxed accuracy over all test questions, of which each half has 1,250."""

    name = "chartqa"
    title = "ChartQA"
    max_new_tokens = SHORT_TOKENS
    files = (
        *(DataFile(path, f"{half} questions and labels", CLONE) for half, path in HALVES.items()),
        DataFile(IMAGES, "images", CLONE),
    )
    hub = HubData("lmms-lab/ChartQA", "test")
    table_metric = "relaxed_accuracy"
    paper = paper_numbers("relaxed_accuracy")
    paper_note = "not in the paper"

    def questions(self, root: Path, hub: HubData | None = None) -> list[Question]:
        """Return the questions in file order, those of people first. Ids count from 0."""
        if hub is not None:
            table = read_hub(hub, COLUMNS)
            return [
                Question(place, row["question"] + SHORT, table.image(place)) for place, row in enumerate(table.rows)
            ]
        folder = Path(root) / IMAGES
        return [
            Question(place, row["query"] + SHORT, ImageFile(folder, row["imgname"]))
            for place, (_, row) in enumerate(self._read(root))
        ]

    def score(
        self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None, *, part: bool = False
    ) -> Score:
        """Return the relaxed accuracy in percent: over all, and over the questions of either half."""
        if hub is None:
            labels = [(half, str(row["label"])) for half, row in self._read(root)]
        else:
            rows = read_hub(hub, COLUMNS, image=None).rows
            labels = [(row["type"].removesuffix("_test"), str(row["answer"])) for row in rows]
        records = {str(place): record for place, record in enumerate(labels)}
        said, counts, warnings = meet(self.name, answers, records, part)
        right: dict[str, bool] = {}
        groups: dict[str, list[bool]] = {}
        for name, (half, label) in records.items():
            if name not in said and part:
                continue
            right[name] = name in said and is_relaxed_right(said[name].text, label)
            groups.setdefault(f"relaxed_accuracy/{half}", []).append(right[name])
        found = {"relaxed_accuracy": list(right.values())} | groups
        metrics = {name: (100 * fmean(own), "percent") for name, own in found.items()}
        unread = [(name, said[name].text) for name in right if name in said and not said[name].text.strip()]
        tallies = {"relaxed_accuracy": tally_of_means(right, scale=100)}
        return self.result(metrics, counts, unread, warnings, tallies=tallies)

    def _read(self, root: Path) -> list[tuple[str, Mapping[str, Any]]]:
        """Return (half, question) in file order, checked."""
        found: list[tuple[str, Mapping[str, Any]]] = []
        for half, name in HALVES.items():
            path = self.path(root, name)
            for place, row in enumerate(read_list(path)):
                found.append((half, fields_of(row, ROW, f"{path}, question {place}")))
        return found
