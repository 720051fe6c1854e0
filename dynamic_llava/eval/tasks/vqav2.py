"""VQAv2: test-dev and test for the server's file, val for a score here.

test-dev, test   the answers make the server's file, which holds every question of test2015; "" stands for those not
                 answered; an answer to no question of it is an error
val              the score that the server would give to the same file, by its own rules: missing answers are "" there
                 and counted here, an answer to no question of val is an error

The server sees the normalised text. `accuracy_of_text` is what its rules give to the text as the model said it, which
differs where all people gave one and the same answer: the server then compares strings, and "Yes" is not "yes".
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from dynamic_llava.eval.answers import AnswerLine, one_per_question
from dynamic_llava.eval.metrics.tally import tally_of_means
from dynamic_llava.eval.metrics.vqa import normalise, server_accuracy
from dynamic_llava.eval.reading import LIST, NAME, TEXT, WHOLE, fields_of, optional, read_json, shown
from dynamic_llava.eval.tasks.base import (
    LLAVA_EVAL,
    PAPER_TABLE1,
    SHORT,
    SHORT_TOKENS,
    DataFile,
    Score,
    Submission,
    Task,
    paper_numbers,
)
from dynamic_llava.eval.tasks.hub import HubData, read_hub
from dynamic_llava.eval.tasks.questions import (
    ImageFile,
    Question,
    left_out,
    llava_questions,
    missing_answers,
    unknown_answers,
)
from dynamic_llava.eval.writing import write_json

TEST_DEV = "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl"
TEST = "vqav2/llava_vqav2_mscoco_test2015.jsonl"
VAL_QUESTIONS = "vqav2/v2_OpenEnded_mscoco_val2014_questions.json"
VAL_LABELS = "vqav2/v2_mscoco_val2014_annotations.json"
TEST_IMAGES, VAL_IMAGES = "vqav2/test2015", "vqav2/val2014"
VQA_SITE = "https://visualqa.org/download.html"
SERVER = "https://eval.ai/challenge/830"
LABEL = {"question_id": NAME, "answers": optional(LIST), "answer_type": optional(TEXT), "question_type": optional(TEXT)}
ASKED = {"question_id": NAME, "image_id": WHOLE, "question": TEXT}
"""Fields of an annotation (the test sets have no answers), and of a question of val."""

PeoplesAnswers = tuple[list[str], str, str]
"""Human answers, answer type, question type."""


class VqaV2(Task):
    """VQAv2. Its number in tables is the server's accuracy over test-dev."""

    name = "vqav2"
    title = "VQAv2"
    groups = (PAPER_TABLE1,)
    splits = ("test-dev", "test", "val")
    max_new_tokens = SHORT_TOKENS
    files = (
        DataFile(TEST_DEV, "questions", LLAVA_EVAL, "test-dev"),
        DataFile(TEST, "questions of the server's file", LLAVA_EVAL, "test-dev"),
        DataFile(TEST, "questions", LLAVA_EVAL, "test"),
        DataFile(TEST_IMAGES, "images", "http://images.cocodataset.org/zips/test2015.zip", "test-dev"),
        DataFile(TEST_IMAGES, "images", "http://images.cocodataset.org/zips/test2015.zip", "test"),
        DataFile(VAL_QUESTIONS, "questions", VQA_SITE, "val"),
        DataFile(VAL_LABELS, "labels", VQA_SITE, "val"),
        DataFile(VAL_IMAGES, "images", "http://images.cocodataset.org/zips/val2014.zip", "val"),
    )
    hub = HubData("lmms-lab/VQAv2", "testdev")
    hub_splits: ClassVar = {"test": "test", "val": "validation"}
    table_metric = "accuracy"
    paper = paper_numbers("accuracy", dense=(78.5, 80.0), image=(78.0, 79.1), both=(77.9, 78.8))
    paper_note = "Table 1, on test-dev; accuracy on val is another number"
    send_to = f"{SERVER} (phase Test-Dev for the paper's number)"

    def questions(self, root: Path, hub: HubData | None = None) -> list[Question]:
        """Return the questions of the split in file order."""
        if hub is not None:
            table = read_hub(hub, {"question_id": NAME, "question": TEXT})
            return [
                Question(row["question_id"], row["question"] + SHORT, table.image(place))
                for place, row in enumerate(table.rows)
            ]
        if self.used_split() == "val":
            return _val_questions(self.path(root, VAL_QUESTIONS), Path(root) / VAL_IMAGES)
        path = self.path(root, TEST_DEV if self.used_split() == "test-dev" else TEST)
        return [question for question, _ in llava_questions(path, Path(root) / TEST_IMAGES)]

    def can_score(self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None) -> bool:
        """Return whether the answers are val's: by the split, or with none given because test has no such questions."""
        if self.split is not None or hub is not None:
            return self.used_split() == "val"
        if not (Path(root) / VAL_LABELS).is_file():
            return False
        tests = [Path(root) / name for name in (TEST_DEV, TEST) if (Path(root) / name).is_file()]
        known = {str(question.id) for path in tests for question, _ in llava_questions(path, Path(root))}
        return any(answer.key not in known for answer in answers)

    def score(
        self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None, *, part: bool = False
    ) -> Score:
        """Return the server's accuracy on val in percent, rounded to two places as there: all, and by type."""
        records = self._records(root, hub)
        said = one_per_question(answers)
        if unknown := unknown_answers("vqav2's val set", said, records):
            raise ValueError(unknown)
        missing, known = missing_answers(said, records), len(records)
        if part:
            records = {name: records[name] for name in said}
        texts = {name: said[name].text if name in said else "" for name in records}

        def values(of: Callable[[str], str]) -> dict[str, float]:
            return {name: server_accuracy(of(texts[name]), record[0]) for name, record in records.items()}

        submitted, as_said = values(normalise), values(lambda text: text)
        metrics = {"accuracy": _percent(submitted.values()), "accuracy_of_text": _percent(as_said.values())}
        for place, kind in ((1, "answer_type"), (2, "question_type")):
            groups: dict[str, list[float]] = {}
            for name, value in submitted.items():
                groups.setdefault(records[name][place], []).append(value)
            metrics |= {f"accuracy/{kind}/{group}": _percent(groups[group]) for group in sorted(groups)}
        blank = missing and not part
        warnings = [f'questions without an answer, scored as "": {shown(missing)}'] if blank else []
        warnings += left_out(part, missing, known)
        counts = {"questions": known, "answered": len(said), "missing": len(missing)}
        unread = [(name, one.text) for name, one in said.items() if not normalise(one.text)]
        tallies = {"accuracy": tally_of_means(submitted, scale=100)}
        return self.result(metrics, counts, unread, warnings, tallies=tallies)

    def submission(
        self, answers: Sequence[AnswerLine], root: Path, folder: Path, hub: HubData | None = None
    ) -> Submission:
        """Write vqav2_upload.json: every question of test2015, "" where there is no answer."""
        if hub is not None:
            rows = read_hub(replace(hub, split="test"), {"question_id": NAME}, None).rows
            names = [row["question_id"] for row in rows]
        else:
            names = [question.id for question, _ in llava_questions(self.path(root, TEST), Path(root) / TEST_IMAGES)]
        said = one_per_question(answers)
        if unknown := unknown_answers("vqav2's test2015 set", said, map(str, names)):
            raise ValueError(unknown)
        rows = [
            {"question_id": name, "answer": normalise(said[str(name)].text) if str(name) in said else ""}
            for name in names
        ]
        return Submission((write_json(folder / "vqav2_upload.json", rows),), self.send_to)

    def _records(self, root: Path, hub: HubData | None) -> dict[str, PeoplesAnswers]:
        """Return the val questions by id, as text."""
        if hub is not None:
            return {
                str(row["question_id"]): _record(row, f"{hub.dataset}, question {row['question_id']}")
                for row in read_hub(hub, LABEL, image=None).rows
            }
        path = self.path(root, VAL_LABELS)
        records: dict[str, PeoplesAnswers] = {}
        for number, record in enumerate(fields_of(read_json(path), {"annotations": LIST}, str(path))["annotations"]):
            place = f"{path}, annotation {number}"
            name = str(fields_of(record, LABEL, place)["question_id"])
            if name in records:
                raise ValueError(f"{place}: question {name} has an annotation already further up")
            records[name] = _record(record, place)
        return records


def _record(record: dict[str, Any], place: str) -> PeoplesAnswers:
    people = record.get("answers") or ()
    answers = [fields_of(answer, {"answer": TEXT}, f"{place}, answers")["answer"] for answer in people]
    if not answers:
        raise ValueError(f"{place} has no human answers; the test sets have none, val has")
    return answers, str(record.get("answer_type")), str(record.get("question_type"))


def _val_questions(path: Path, folder: Path) -> list[Question]:
    found = []
    for number, line in enumerate(fields_of(read_json(path), {"questions": LIST}, str(path))["questions"]):
        fields_of(line, ASKED, f"{path}, question {number}")
        image = ImageFile(folder, f"COCO_val2014_{line['image_id']:012d}.jpg")
        found.append(Question(line["question_id"], line["question"] + SHORT, image))
    return found


def _percent(values: Iterable[float]) -> tuple[float, str]:
    return round(100 * fmean(values), 2), "percent"
