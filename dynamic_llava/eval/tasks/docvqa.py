"""DocVQA and InfoVQA (InfographicVQA): questions about scanned documents and infographics, scored by ANLS.

val    a score here: the mean ANLS over all questions, and by the kinds that the file names; a question without an
       answer is wrong and counted, an answer to no question is counted and left out
test   the answers make the server's file, which holds every question; its labels are private

Both are tasks of the Robust Reading Competition's challenge 17, which gives the files to whoever has an account there.
The prompt is lmms-eval's for both (default of its docvqa and infovqa, 0ad7b14, 471d28d): LLaVA's suffix of short
answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from dynamic_llava.eval.answers import AnswerLine, one_per_question
from dynamic_llava.eval.metrics.documents import anls
from dynamic_llava.eval.metrics.tally import tally_of_means
from dynamic_llava.eval.reading import LIST, NAME, PATH, TEXT, TEXTS, brief, fields_of, optional, read_json, shown
from dynamic_llava.eval.tasks.base import SHORT, SHORT_TOKENS, DataFile, Score, Submission, Task, paper_numbers
from dynamic_llava.eval.tasks.hub import HubData, read_hub
from dynamic_llava.eval.tasks.questions import ImageFile, Question, meet, missing_answers, unknown_answers
from dynamic_llava.eval.writing import write_json

SITE = "https://rrc.cvc.uab.es/?ch=17&com=downloads"
DOC_VAL, DOC_TEST, DOC_IMAGES = "docvqa/val_v1.0_withQT.json", "docvqa/test_v1.0.json", "docvqa/documents"
INFO_VAL, INFO_TEST = "infovqa/infographicsVQA_val_v1.0_withQT.json", "infovqa/infographicsVQA_test_v1.0.json"
INFO_IMAGES = "infovqa/infographicsvqa_images"


class _ReadingCompetition(Task):
    """What the two tasks of the challenge share."""

    splits = ("val", "test")
    max_new_tokens = SHORT_TOKENS
    hub_splits: ClassVar = {"val": "validation", "test": "test"}
    table_metric = "anls"
    paper = paper_numbers("anls")
    paper_note = "not in the paper; ANLS x 100"
    send_to = "https://rrc.cvc.uab.es/?ch=17&com=mymethods"

    asked: ClassVar[Mapping[str, str]]
    """Split -> its question file."""
    images: ClassVar[str]
    """The folder in which the file's names of images are found."""
    image_field: ClassVar[str]
    kinds: ClassVar[str]
    """Field that names the kinds of a question, of which it may have several."""

    def questions(self, root: Path, hub: HubData | None = None) -> list[Question]:
        """Return the questions of the split in file order."""
        if hub is not None:
            table = read_hub(hub, {"questionId": NAME, "question": TEXT})
            return [
                Question(row["questionId"], row["question"] + SHORT, table.image(place))
                for place, row in enumerate(table.rows)
            ]
        folder = Path(root) / self.images
        return [
            Question(row["questionId"], row["question"] + SHORT, ImageFile(folder, row[self.image_field]))
            for row in self._read(root, self.used_split() or "")
        ]

    def can_score(self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None) -> bool:
        """Return whether the answers are val's; the labels of test are the server's."""
        return self.used_split() == "val"

    def score(
        self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None, *, part: bool = False
    ) -> Score:
        """Return the mean ANLS on val x 100: over all, and by kind of question."""
        if hub is not None:
            rows: Sequence[Mapping[str, Any]] = read_hub(hub, {"questionId": NAME, "answers": TEXTS}, image=None).rows
        else:
            rows = self._read(root, "val")
        records = {str(row["questionId"]): row for row in rows}
        said, counts, warnings = meet(self.name, answers, records, part)
        values: dict[str, float] = {}
        groups: dict[str, list[float]] = {}
        for name, record in records.items():
            if name not in said and part:
                continue
            values[name] = anls(said[name].text, record["answers"]) if name in said else 0.0
            for kind in dict.fromkeys(record.get(self.kinds) or ()):
                groups.setdefault(f"anls/{kind}", []).append(values[name])
        found = {"anls": list(values.values())} | {kind: groups[kind] for kind in sorted(groups)}
        metrics = {name: (100 * fmean(own), "percent") for name, own in found.items()}
        unread = [(name, said[name].text) for name in values if name in said and not said[name].text.strip()]
        return self.result(metrics, counts, unread, warnings, tallies={"anls": tally_of_means(values, scale=100)})

    def submission(
        self, answers: Sequence[AnswerLine], root: Path, folder: Path, hub: HubData | None = None
    ) -> Submission:
        """Write the server's file: the answer to every question of test, in file order. ValueError where one lacks."""
        if hub is not None:
            rows: Sequence[Mapping[str, Any]] = read_hub(replace(hub, split="test"), {"questionId": NAME}, None).rows
        else:
            rows = self._read(root, "test")
        said = one_per_question(answers)
        names = [str(row["questionId"]) for row in rows]
        if unknown := unknown_answers(f"{self.name}'s test set", said, names):
            raise ValueError(unknown)
        if missing := missing_answers(said, names):
            raise ValueError(f"{self.name}: no answer to questions {shown(missing)}; the server's file holds all")
        lines = [{"questionId": int(name) if name.isdecimal() else name, "answer": said[name].text} for name in names]
        return Submission((write_json(folder / f"{self.name}_test_upload.json", lines),), self.send_to)

    def _read(self, root: Path, split: str) -> list[dict[str, Any]]:
        """Return the records of a split in file order, checked; those of val have answers."""
        path = self.path(root, self.asked[split])
        records = fields_of(read_json(path), {"data": LIST}, str(path))["data"]
        fields = {"questionId": NAME, "question": TEXT, self.image_field: PATH, self.kinds: optional(TEXTS)}
        known: set[str] = set()
        for number, record in enumerate(records):
            place = f"{path}, question {number}"
            fields_of(record, fields | ({"answers": TEXTS} if split == "val" else {}), place)
            if str(record["questionId"]) in known:
                raise ValueError(f"{place}: questionId {brief(record['questionId'])} occurs twice")
            known.add(str(record["questionId"]))
        return records


class DocVqa(_ReadingCompetition):
    """DocVQA. Its number in tables is the mean ANLS x 100."""

    name = "docvqa"
    title = "DocVQA"
    files = (
        DataFile(DOC_VAL, "questions and labels", f"{SITE} (Task 1, annotations)", "val"),
        DataFile(DOC_TEST, "questions", f"{SITE} (Task 1, annotations)", "test"),
        DataFile(DOC_IMAGES, "images", f"{SITE} (Task 1, the pictures of spdocvqa_images.tar.gz in this folder)"),
    )
    hub = HubData("lmms-lab/DocVQA", "validation", "DocVQA")
    asked: ClassVar = {"val": DOC_VAL, "test": DOC_TEST}
    images = "docvqa"  # the file's names begin with documents/
    image_field, kinds = "image", "question_types"


class InfoVqa(_ReadingCompetition):
    """InfoVQA. Its number in tables is the mean ANLS x 100."""

    name = "infovqa"
    title = "InfoVQA"
    files = (
        DataFile(INFO_VAL, "questions and labels", f"{SITE} (Task 3, annotations)", "val"),
        DataFile(INFO_TEST, "questions", f"{SITE} (Task 3, annotations)", "test"),
        DataFile(INFO_IMAGES, "images", f"{SITE} (Task 3, images)"),
    )
    hub = HubData("lmms-lab/DocVQA", "validation", "InfographicVQA")
    asked: ClassVar = {"val": INFO_VAL, "test": INFO_TEST}
    images = INFO_IMAGES
    image_field, kinds = "image_local_name", "answer_type"
