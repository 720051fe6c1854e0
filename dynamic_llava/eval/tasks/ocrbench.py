"""OCRBench: 1,000 questions about text in images: recognition, scenes, documents, forms, handwritten formulas.

An answer that holds one of the labels is right (`holds_answer`). The number that papers print is how many of the 1,000
are right, `final_score` here; the table's is the same in percent, which also holds for a part. A question without an
answer is wrong and counted, an answer to no question is counted and left out. Questions are asked as they are, as in
the owner's example.py and in lmms-eval.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dynamic_llava.eval.answers import AnswerLine
from dynamic_llava.eval.metrics.documents import holds_answer
from dynamic_llava.eval.metrics.tally import tally_of_means
from dynamic_llava.eval.reading import PATH, TEXT, Kind, fields_of, read_list
from dynamic_llava.eval.tasks.base import SHORT_TOKENS, DataFile, Score, Task, paper_numbers
from dynamic_llava.eval.tasks.hub import HubData, read_hub
from dynamic_llava.eval.tasks.questions import ImageFile, Question, meet

DATA, IMAGES = "ocrbench/OCRBench.json", "ocrbench/OCRBench_Images"
SITE = "https://github.com/Yuliang-Liu/MultimodalOCR/tree/main/OCRBench"
FORMULAS = "HME100k"
"""The source of handwritten formulas, whose case counts and whose spaces do not."""
RECOGNITION = "Text Recognition"
RECOGNISED = {
    f"{kind} Recognition"
    for kind in ("Regular Text", "Irregular Text", "Artistic Text", "Handwriting", "Digit String", "Non-Semantic Text")
}
"""The types of questions that make up the component text recognition; the other types are components themselves."""


def _answers(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


LABELS = Kind(
    "a text, or a list of texts, none of them blank",
    lambda value: bool(_answers(value)) and all(TEXT.fits(one) and one.strip() for one in _answers(value)),
)
ROW = {"dataset_name": TEXT, "type": TEXT, "question": TEXT, "answers": LABELS, "image_path": PATH}
COLUMNS = {"dataset": TEXT, "question_type": TEXT, "question": TEXT, "answer": LABELS}
"""Fields of a question in the owner's file, and columns of the dataset."""


class OcrBench(Task):
    """OCRBench. Its number in tables is the accuracy over all questions; ten times that is its final score."""

    name = "ocrbench"
    title = "OCRBench"
    max_new_tokens = SHORT_TOKENS
    files = (
        DataFile(DATA, "questions and labels", f"{SITE} (json_files/OCRBench.json)"),
        DataFile(IMAGES, "images", f"{SITE} (README.md, OCRBench Images)"),
    )
    hub = HubData("echo840/OCRBench", "test")
    table_metric = "accuracy"
    paper = paper_numbers("accuracy")
    paper_note = "not in the paper"

    def questions(self, root: Path, hub: HubData | None = None) -> list[Question]:
        """Return the questions as they are. Ids count from 0 in file order: the file's own occur more than once."""
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
        """Return the accuracy in percent: over all, by type, and of text recognition; and how many are right."""
        if hub is None:
            rows = [(row["dataset_name"], row["type"], _answers(row["answers"])) for row in self._read(root)]
        else:
            table = read_hub(hub, COLUMNS, image=None)
            rows = [(row["dataset"], row["question_type"], _answers(row["answer"])) for row in table.rows]
        records = {str(place): row for place, row in enumerate(rows)}
        said, counts, warnings = meet(self.name, answers, records, part)
        right: dict[str, bool] = {}
        groups: dict[str, list[bool]] = {}
        for name, (source, kind, labels) in records.items():
            if name not in said and part:
                continue
            right[name] = name in said and holds_answer(said[name].text, labels, formula=source == FORMULAS)
            for group in (RECOGNITION, kind) if kind in RECOGNISED else (kind,):
                groups.setdefault(f"accuracy/{group}", []).append(right[name])
        found = {"accuracy": list(right.values())} | {group: groups[group] for group in sorted(groups)}
        metrics: dict[str, tuple[float, str]] = {name: (100 * fmean(own), "percent") for name, own in found.items()}
        metrics["final_score"] = (sum(right.values()), "points")
        unread = [(name, said[name].text) for name in right if name in said and not said[name].text.strip()]
        return self.result(metrics, counts, unread, warnings, tallies={"accuracy": tally_of_means(right, scale=100)})

    def _read(self, root: Path) -> list[Mapping[str, Any]]:
        path = self.path(root, DATA)
        rows = read_list(path)
        for place, row in enumerate(rows):
            fields_of(row, ROW, f"{path}, question {place}")
        return rows
