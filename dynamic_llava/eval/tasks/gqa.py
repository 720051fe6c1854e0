"""GQA: questions about scenes, testdev balanced.

Predictions lose trailing full stops and case, nothing else, and must equal the answer. A balanced question without a
prediction is an error, as in GQA's script; answers to questions that the file does not have, or that are not
balanced, are counted and left out, also as there.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from dynamic_llava.eval.answers import AnswerLine, one_per_question
from dynamic_llava.eval.metrics.tally import tally_of_means
from dynamic_llava.eval.reading import FLAG, OBJECT, TEXT, fields_of, optional, read_json, shown, typed
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
from dynamic_llava.eval.tasks.questions import Question, left_out, llava_questions, missing_answers, unknown_answers

QUESTIONS, IMAGES = "gqa/llava_gqa_testdev_balanced.jsonl", "gqa/data/images"
LABELS = "gqa/data/testdev_balanced_questions.json"
GQA_SITE = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
OPEN = "query"
"""Structural type of the questions that are not answered by yes, no, or one of the things named."""
RECORD = {"answer": TEXT, "isBalanced": optional(FLAG), "types": optional(OBJECT)}
TYPES = {"structural": optional(TEXT), "semantic": optional(TEXT)}
"""Fields of a labelled question, and those of its types."""


class Gqa(Task):
    """GQA. Its number in tables is the accuracy over the balanced questions."""

    name = "gqa"
    title = "GQA"
    groups = (PAPER_TABLE1,)
    max_new_tokens = SHORT_TOKENS
    files = (
        DataFile(QUESTIONS, "questions", LLAVA_EVAL),
        DataFile(LABELS, "labels", f"{GQA_SITE} (questions1.2.zip)"),
        DataFile(IMAGES, "images", f"{GQA_SITE} (images.zip)"),
    )
    hub = HubData("lmms-lab/GQA", "testdev", "testdev_balanced_instructions")
    table_metric = "accuracy"
    paper = paper_numbers("accuracy", dense=(62.0, 63.3), image=(61.4, 62.7), both=(61.3, 62.5))
    paper_note = "Table 1"

    def questions(self, root: Path, hub: HubData | None = None) -> list[Question]:
        """Return the questions in file order."""
        if hub is None:
            return [question for question, _ in llava_questions(self.path(root, QUESTIONS), Path(root) / IMAGES)]
        rows = read_hub(hub, {"id": TEXT, "imageId": TEXT, "question": TEXT}, image=None).rows
        images = read_hub(replace(hub, config=str(hub.config).replace("_instructions", "_images")), {"id": TEXT})
        places = {row["id"]: place for place, row in enumerate(images.rows)}
        if unknown := [row["imageId"] for row in rows if row["imageId"] not in places]:
            raise ValueError(f"{hub.dataset} has no images {shown(unknown)} that its questions name")
        return [Question(row["id"], row["question"] + SHORT, images.image(places[row["imageId"]])) for row in rows]

    def score(
        self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None, *, part: bool = False
    ) -> Score:
        """Return the accuracy in percent: over all, binary and open questions, and by structural and semantic type."""
        records = dict(self._records(root, hub))
        balanced = {name: record for name, record in records.items() if record.get("isBalanced") is not False}
        said = one_per_question(answers)
        missing = missing_answers(said, balanced)
        if missing and (not part or len(missing) == len(balanced)):
            raise ValueError(
                f"gqa: questions without an answer: {shown(missing)}; GQA's script wants them all, `score --part` "
                "scores those that are answered"
            )
        asked = {name: record for name, record in balanced.items() if name in said}
        right: dict[str, list[bool]] = {"accuracy": []}
        for name, record in asked.items():
            correct = read_gqa(said[name].text) == record["answer"]
            for group in ("accuracy", *_groups(record.get("types") or {})):
                right.setdefault(group, []).append(correct)
        outside = [name for name in said if name not in balanced]
        counts = {"questions": len(balanced), "answered": len(asked), "unknown": len(outside)}
        warnings = [unknown_answers("gqa's balanced set", said, balanced)] if outside else []
        return self.result(
            {group: (100 * fmean(flags), "percent") for group, flags in sorted(right.items())},
            counts,
            [(name, said[name].text) for name in asked if not read_gqa(said[name].text).strip()],
            warnings + left_out(part, missing, len(balanced)),
            tallies={"accuracy": tally_of_means(dict(zip(asked, right["accuracy"], strict=True)), scale=100)},
        )

    def _records(self, root: Path, hub: HubData | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if hub is not None:
            rows = read_hub(hub, {"id": TEXT, **RECORD}, image=None).rows
            named, place = ((row["id"], row) for row in rows), hub.dataset
        else:
            path = self.path(root, LABELS)
            named, place = typed(read_json(path), OBJECT, str(path)).items(), str(path)
        for name, record in named:
            fields_of(record, RECORD, f"{place}: question {name}")
            fields_of(record.get("types") or {}, TYPES, f"{place}: question {name}, types")
            yield name, record


def read_gqa(text: str) -> str:
    """Return the prediction that GQA compares: trailing full stops and case gone, all else as it was said."""
    return text.rstrip(".").lower()


def _groups(types: Mapping[str, str | None]) -> list[str]:
    structural = types.get("structural")
    groups = [f"{kind}/{types[kind]}" for kind in ("structural", "semantic") if types.get(kind)]
    return groups if structural is None else ["open" if structural == OPEN else "binary", *groups]
