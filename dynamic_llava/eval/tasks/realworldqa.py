"""RealWorldQA: questions about photographs, answered by a letter, a word or a number; the question says which.

An answer is a letter where the label is one of A to D (`read_letter`), and otherwise right when it equals the label,
without case and a final full stop; number words are not mapped. A question without an answer is wrong and counted, an
answer to no question is counted and left out.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dynamic_llava.eval.answers import AnswerLine
from dynamic_llava.eval.metrics.choices import read_letter
from dynamic_llava.eval.metrics.tally import tally_of_means
from dynamic_llava.eval.reading import NAME, PATH, TEXT, fields_of, read_list
from dynamic_llava.eval.tasks.base import PAPER_TABLE1, SHORT_TOKENS, DataFile, Score, Task, paper_numbers
from dynamic_llava.eval.tasks.hub import HubData, read_hub
from dynamic_llava.eval.tasks.questions import ImageFile, Question, meet

DATA, IMAGES = "realworldqa/data.json", "realworldqa/images"
SITE = "https://huggingface.co/datasets/lmms-lab/RealWorldQA (a list of image_path, question, answer; its images)"
LETTERS = ("A", "B", "C", "D")
COLUMNS = {"question": TEXT, "answer": NAME}


class RealWorldQa(Task):
    """RealWorldQA. Its number in tables is the accuracy over all questions."""

    name = "realworldqa"
    title = "RealWorldQA"
    groups = (PAPER_TABLE1,)
    max_new_tokens = SHORT_TOKENS
    files = (DataFile(DATA, "questions and labels", SITE), DataFile(IMAGES, "images", SITE))
    hub = HubData("lmms-lab/RealWorldQA", "test")
    table_metric = "accuracy"
    paper = paper_numbers("accuracy", dense=(53.7, 55.3), both=(57.0, 53.3))
    paper_note = "Table 1"

    def questions(self, root: Path, hub: HubData | None = None) -> list[Question]:
        """Return the questions as they are: each ends with its own instruction. Ids count from 0 in file order."""
        if hub is not None:
            table = read_hub(hub, COLUMNS)
            return [Question(place, row["question"], table.image(place)) for place, row in enumerate(table.rows)]
        folder = Path(root) / IMAGES
        return [
            Question(place, row["question"], ImageFile(folder, row["image_path"]))
            for place, row in enumerate(self._read(root))
        ]

    def score(
        self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None, *, part: bool = False
    ) -> Score:
        """Return the accuracy in percent: over all, and over questions for letters and for other answers."""
        rows = self._read(root) if hub is None else read_hub(hub, COLUMNS, image=None).rows
        records = {str(place): str(row["answer"]) for place, row in enumerate(rows)}
        said, counts, warnings = meet(self.name, answers, records, part)
        unread = [
            (name, said[name].text)
            for name, label in records.items()
            if name in said and not is_readable(said[name].text, label)
        ]
        asked = [name for name in records if name in said or not part]
        right: dict[str, list[bool]] = {}
        for name in asked:
            label = records[name]
            correct = name in said and is_right(said[name].text, label)
            for group in ("accuracy", "accuracy/letter" if label.strip() in LETTERS else "accuracy/other"):
                right.setdefault(group, []).append(correct)
        metrics = {group: (100 * fmean(values), "percent") for group, values in right.items()}
        tallies = {"accuracy": tally_of_means(dict(zip(asked, right["accuracy"], strict=True)), scale=100)}
        return self.result(metrics, counts, unread, warnings, tallies=tallies)

    def _read(self, root: Path) -> list[Mapping[str, Any]]:
        path = self.path(root, DATA)
        rows = read_list(path)
        for place, row in enumerate(rows):
            fields_of(row, {"image_path": PATH} | COLUMNS, f"{path}, question {place}")
        return rows


def is_right(text: str, label: str) -> bool:
    """Return whether an answer is right: the same letter, or the same text without case and a final full stop."""
    if label.strip() in LETTERS:
        return read_letter(text, LETTERS) == label.strip()
    return _plain(text) == _plain(label)


def is_readable(text: str, label: str) -> bool:
    """Return whether an answer says a letter where one is due, or anything at all where a word or number is."""
    return read_letter(text, LETTERS) is not None if label.strip() in LETTERS else bool(_plain(text))


def _plain(text: str) -> str:
    return text.strip().lower().removesuffix(".")
