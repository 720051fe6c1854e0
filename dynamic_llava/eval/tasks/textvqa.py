"""TextVQA, validation, with the reference OCR tokens that LLaVA puts into the question.

An answer finds its question by image id and the question text in its prompt. Accuracy is the mean over the answers
that were given, as in LLaVA's script; questions without an answer are counted and reported. An answer to no question,
a prompt of unknown form, or a question without exactly ten human answers is an error.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dynamic_llava.eval.answers import AnswerLine
from dynamic_llava.eval.metrics.tally import tally_of_means
from dynamic_llava.eval.metrics.vqa import normalise, normalised_accuracy
from dynamic_llava.eval.reading import LIST, NAME, TEXT, TEXTS, Kind, brief, fields_of, read_json, shown
from dynamic_llava.eval.tasks.base import (
    LLAVA_EVAL,
    PAPER_TABLE1,
    SHORT,
    SHORT_TOKENS,
    DataFile,
    Score,
    Task,
    paper_numbers,
)
from dynamic_llava.eval.tasks.hub import HubData, read_hub
from dynamic_llava.eval.tasks.questions import Question, llava_questions

QUESTIONS, IMAGES = "textvqa/llava_textvqa_val_v051_ocr.jsonl", "textvqa/train_images"
LABELS = "textvqa/TextVQA_0.5.1_val.json"
TEXTVQA_SITE = "https://textvqa.org/dataset/"
OCR = "Reference OCR token: "
PEOPLE = 10
"""Human answers that every question has."""

RECORD = {"image_id": NAME, "question": TEXT, "answers": TEXTS}
TOKENS = Kind("a list of texts", lambda value: value == [] or TEXTS.fits(value))

QuestionKey = tuple[str, str]
"""Image id and lower-cased question."""


class TextVqa(Task):
    """TextVQA. Its number in tables is the soft accuracy over the validation questions."""

    name = "textvqa"
    title = "TextVQA"
    groups = (PAPER_TABLE1,)
    max_new_tokens = SHORT_TOKENS
    files = (
        DataFile(QUESTIONS, "questions", LLAVA_EVAL),
        DataFile(LABELS, "labels", TEXTVQA_SITE),
        DataFile(IMAGES, "images", f"{TEXTVQA_SITE} (train_val_images.zip)"),
    )
    hub = HubData("lmms-lab/textvqa", "validation")
    table_metric = "accuracy"
    paper = paper_numbers("accuracy", dense=(58.2, 61.3), image=(57.0, 59.5), both=(56.5, 59.6))
    paper_note = "Table 1; with OCR tokens in the question"

    def questions(self, root: Path, hub: HubData | None = None) -> list[Question]:
        """Return the questions in file order; an id names the image and may occur more than once."""
        if hub is None:
            pairs = llava_questions(self.path(root, QUESTIONS), Path(root) / IMAGES, repeated_ids=True)
            return [question for question, _ in pairs]
        table = read_hub(hub, {"image_id": NAME, "question": TEXT, "ocr_tokens": TOKENS})
        return [
            Question(row["image_id"], _text(row["question"], row["ocr_tokens"]), table.image(place))
            for place, row in enumerate(table.rows)
        ]

    def score(
        self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None, *, part: bool = False
    ) -> Score:
        """Return the soft accuracy in percent, as M4C's evaluator and LLaVA's script count it."""
        records = self._records(root, hub)
        people = {_key(record["image_id"], record["question"]): record["answers"] for record in records}
        copies = Counter(_key(record["image_id"], record["question"]) for record in records)
        keys = [_answer_key(answer) for answer in answers]
        if unknown := [key for key in keys if key not in people]:
            raise ValueError(f"textvqa has no questions {shown(unknown)}; are the answers of another split or task?")
        if twice := [key for key, number in Counter(keys).items() if number > copies[key]]:
            raise ValueError(f"textvqa: questions answered more than once: {shown(twice)}; keep one answer to each")
        values = [normalised_accuracy(answer.text, people[key]) for answer, key in zip(answers, keys, strict=True)]
        missing = len(records) - len(values)
        warnings = [f"{missing} questions have no answer; the accuracy is over the others"] if missing else []
        counts = {"questions": len(records), "answered": len(values), "missing": missing}
        unread = [(answer.question_id, answer.text) for answer in answers if not normalise(answer.text)]
        metrics, tallies = (
            {"accuracy": (100 * fmean(values), "percent")},
            {"accuracy": tally_of_means(values, scale=100)},
        )
        return self.result(metrics, counts, unread, warnings, tallies=tallies)

    def _records(self, root: Path, hub: HubData | None) -> Sequence[dict[str, Any]]:
        if hub is not None:
            records, place = read_hub(hub, RECORD, image=None).rows, hub.dataset
        else:
            place = str(self.path(root, LABELS))
            records = fields_of(read_json(Path(place)), {"data": LIST}, place)["data"]
        for number, record in enumerate(records):
            fields_of(record, RECORD, f"{place}, record {number}")
            if len(record["answers"]) != PEOPLE:
                raise ValueError(f"{place}, record {number}: {len(record['answers'])} human answers; {PEOPLE} are due")
        return records


def question_in(prompt: str) -> str:
    """Return the question, lower-cased, that a prompt of one of LLaVA's forms holds.

    Three lines with the OCR line second (or first), two lines without one, or "OCR tokens: ... Question: ... Short
    answer:". ValueError for any other form.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        if found:
            return found.group(1).lower()
    elif OCR in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith(OCR.rstrip()) else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise ValueError(f"textvqa: no question can be read from the prompt {brief(prompt)}; it has none of LLaVA's forms")


def _text(question: str, tokens: Sequence[str]) -> str:
    return f"{question.capitalize()}\n{OCR}{', '.join(tokens)}{SHORT}"


def _key(image: str, question: str) -> QuestionKey:
    return str(image), question.lower()


def _answer_key(answer: AnswerLine) -> QuestionKey:
    try:
        return answer.key, question_in(answer.prompt)
    except ValueError as error:
        raise ValueError(f"line {answer.line}, question {brief(answer.question_id)}: {error}") from None
