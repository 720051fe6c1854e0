"""VizWiz-VQA: test for the server's file, val for a score here.

Both want an answer to every question: one that is missing, or an answer to no question, is an error. Questions are
numbered by their place in the file from 0, as in LLaVA's; the names of the Hugging Face dataset are known as well.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from dynamic_llava.eval.answers import AnswerLine, one_per_question
from dynamic_llava.eval.metrics.tally import tally_of_means
from dynamic_llava.eval.metrics.vqa import normalise, normalised_accuracy
from dynamic_llava.eval.reading import LIST, NAME, PATH, TEXT, TEXTS, brief, fields_of, optional, read_list, shown
from dynamic_llava.eval.tasks.base import (
    LLAVA_EVAL,
    SHORT,
    SHORT_TOKENS,
    UNANSWERABLE,
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

TEST, TEST_IMAGES = "vizwiz/llava_test.jsonl", "vizwiz/test"
VAL, VAL_IMAGES = "vizwiz/val.json", "vizwiz/val"
RECORD = {"image": PATH, "question": TEXT, "answers": LIST, "answer_type": optional(TEXT)}
COLUMNS = {"question_id": NAME, "answers": TEXTS, "category": optional(TEXT)}
"""Fields of a question of val, and columns of the dataset that it is scored by."""
VIZWIZ_SITE = "https://vizwiz.org/tasks-and-datasets/vqa/"


class VizWiz(Task):
    """VizWiz. Its number in tables is the server's accuracy over test."""

    name = "vizwiz"
    title = "VizWiz"
    splits = ("test", "val")
    max_new_tokens = SHORT_TOKENS
    files = (
        DataFile(TEST, "questions", LLAVA_EVAL, "test"),
        DataFile(TEST_IMAGES, "images", f"{VIZWIZ_SITE} (test.zip)", "test"),
        DataFile(VAL, "questions and labels", f"{VIZWIZ_SITE} (Annotations.zip)", "val"),
        DataFile(VAL_IMAGES, "images", f"{VIZWIZ_SITE} (val.zip)", "val"),
    )
    hub = HubData("lmms-lab/VizWiz-VQA", "test")
    hub_splits: ClassVar = {"val": "val"}
    table_metric = "accuracy"
    paper = paper_numbers("accuracy", dense=(50.0, 53.6), image=(50.2, 53.3), both=(51.2, 53.0))
    paper_note = "Tables 2 and 12, on test; accuracy on val is another number"
    send_to = "https://eval.ai/challenge/2185"

    def questions(self, root: Path, hub: HubData | None = None) -> list[Question]:
        """Return the questions of the split in file order."""
        if hub is not None:
            table = read_hub(hub, {"question_id": NAME, "question": TEXT})
            return [
                Question(row["question_id"], _text(row["question"]), table.image(place))
                for place, row in enumerate(table.rows)
            ]
        if self.used_split() == "val":
            return [
                Question(number, _text(record["question"]), ImageFile(Path(root) / VAL_IMAGES, record["image"]))
                for number, record in enumerate(self._val(root))
            ]
        return [question for question, _ in self._test(root)]

    def can_score(self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None) -> bool:
        """Return whether the answers are val's: by the split, or with none given because their prompts are not test's.

        Ids cannot tell: both sets count from 0.
        """
        if self.split is not None or hub is not None:
            return self.used_split() == "val"
        if not (Path(root) / VAL).is_file():
            return False
        if not (Path(root) / TEST).is_file():
            return True
        prompts = {str(question.id): question.text for question, _ in self._test(root)}
        return any(answer.prompt != prompts.get(answer.key) for answer in answers)

    def score(
        self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None, *, part: bool = False
    ) -> Score:
        """Return the soft accuracy on val in percent, `normalise` on both sides: all, and by kind of answer."""
        if hub is not None:
            rows = read_hub(hub, COLUMNS, image=None).rows
            people = [list(row["answers"]) for row in rows]
            kinds = [row["category"] for row in rows]
            names = [{str(row["question_id"])} for row in rows]
        else:
            records = self._val(root)
            people = [[person["answer"] for person in record["answers"]] for record in records]
            kinds = [record.get("answer_type") for record in records]
            names = [{str(place), Path(record["image"]).stem} for place, record in enumerate(records)]
        said = self._matched(answers, names, part)
        values = {place: normalised_accuracy(answer.text, people[place]) for place, answer in said.items()}
        groups: dict[str, list[float]] = {}
        for place, value in values.items():
            groups.setdefault(str(kinds[place]), []).append(value)
        metrics = {"accuracy": (100 * fmean(values.values()), "percent")}
        metrics |= {f"accuracy/{kind}": (100 * fmean(groups[kind]), "percent") for kind in sorted(groups)}
        missing = missing_answers(said, range(len(names)))
        counts = {"questions": len(names), "answered": len(said)}
        unread = [(one.question_id, one.text) for one in said.values() if not normalise(one.text)]
        tallies = {"accuracy": tally_of_means({str(place): value for place, value in values.items()}, scale=100)}
        return self.result(metrics, counts, unread, left_out(part, missing, len(names)), tallies=tallies)

    def submission(
        self, answers: Sequence[AnswerLine], root: Path, folder: Path, hub: HubData | None = None
    ) -> Submission:
        """Write vizwiz_upload.json: image and normalised answer of every test question, in file order."""
        if hub is not None:
            names = [str(row["question_id"]) for row in read_hub(hub, {"question_id": NAME}, image=None).rows]
            images = [f"{name}.jpg" for name in names]
        else:
            lines = [line for _, line in self._test(root)]
            names = [str(line["question_id"]) for line in lines]
            images = [line["image"] for line in lines]
        said = self._matched(answers, [{name} for name in names], part=False)
        rows = [{"image": image, "answer": normalise(said[place].text)} for place, image in enumerate(images)]
        return Submission((write_json(folder / "vizwiz_upload.json", rows),), self.send_to)

    def _matched(self, answers: Sequence[AnswerLine], names: Sequence[set[str]], part: bool) -> dict[int, AnswerLine]:
        """Return place -> answer in question order; `names` are each question's.

        ValueError for an answer to no question, and unless each question has one, or with `part` any.
        """
        place = {name: number for number, own in enumerate(names) for name in own}
        said = one_per_question(answers, lambda answer: place.get(answer.key, answer.key))
        if unknown := unknown_answers("vizwiz", said, range(len(names))):
            raise ValueError(unknown)
        missing = missing_answers(said, range(len(names)))
        if missing and (not part or not said):
            raise ValueError(
                f"vizwiz: no answer to questions {shown(missing)} (by place in the file); all are due, or with "
                "`score --part` those that were asked"
            )
        return {number: said[number] for number in range(len(names)) if number in said}

    def _test(self, root: Path) -> list[tuple[Question, dict[str, Any]]]:
        path = self.path(root, TEST)
        pairs = llava_questions(path, Path(root) / TEST_IMAGES)
        for question, line in pairs:
            fields_of(line, {"image": TEXT}, f"{path}: question {brief(question.id)}")
        return pairs

    def _val(self, root: Path) -> list[dict[str, Any]]:
        path = self.path(root, VAL)
        records = read_list(path)
        for number, record in enumerate(records):
            fields_of(record, RECORD, f"{path}, question {number}")
            for person in record["answers"]:
                fields_of(person, {"answer": TEXT}, f"{path}, question {number}, answers")
        return records


def _text(question: str) -> str:
    return question.capitalize() + UNANSWERABLE + SHORT
