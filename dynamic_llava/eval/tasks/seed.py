"""SEED-Bench: multiple choice about images (nine types) and videos (three); the paper's number is that of the images.

An answer is right when it equals the label, letter for letter. A question without an answer is wrong and counted; the
videos are scored only when one of theirs is answered. Answers to no question are counted and reported, as LLaVA's
script passes them over. The leaderboard's file holds every question, videos too.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dynamic_llava.eval.answers import AnswerLine, one_per_question
from dynamic_llava.eval.metrics.tally import tally_of_means
from dynamic_llava.eval.reading import LIST, NAME, OBJECT, TEXT, fields_of, optional, read_json, shown, typed
from dynamic_llava.eval.tasks.base import (
    LETTER,
    LLAVA_EVAL,
    PAPER_TABLE1,
    SHORT_TOKENS,
    DataFile,
    Score,
    Submission,
    Task,
    paper_numbers,
)
from dynamic_llava.eval.tasks.hub import HubData, read_hub
from dynamic_llava.eval.tasks.questions import Question, left_out, llava_questions, missing_answers, unknown_answers
from dynamic_llava.eval.writing import write_lines

QUESTIONS, LABELS = "seed_bench/llava-seed-bench.jsonl", "seed_bench/SEED-Bench.json"
FOLDER, IMAGES, FRAMES = "seed_bench", "seed_bench/SEED-Bench-image", "seed_bench/SEED-Bench-video-image"
SEED_SITE = "https://github.com/AILab-CVC/SEED-Bench/blob/main/DATASET.md"
IMAGE = "image"
LETTERS = ("A", "B", "C", "D")
FIELDS = {"question_id": NAME, "answer": TEXT, "data_type": TEXT, "question_type_id": NAME}
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


class Seed(Task):
    """SEED-Bench. Its number in tables is the accuracy over the image questions."""

    name = "seed"
    title = "SEED (image)"
    groups = (PAPER_TABLE1,)
    splits = (IMAGE, "all")
    max_new_tokens = SHORT_TOKENS
    files = (
        DataFile(QUESTIONS, "questions", LLAVA_EVAL),
        DataFile(LABELS, "labels", SEED_SITE),
        DataFile(IMAGES, "images", SEED_SITE),
        DataFile(FRAMES, "video frames", f"{SEED_SITE}, then LLaVA's extract_video_frames.py", "all"),
    )
    hub = HubData("lmms-lab/SEED-Bench", "test")
    table_metric = "accuracy/image"
    paper = paper_numbers("accuracy/image", dense=(66.1, 68.2), image=(64.6, 66.6), both=(65.0, 66.5))
    paper_note = "Table 1; 13B I by its printed difference to LLaVA-1.5, -1.6"
    send_to = "https://huggingface.co/spaces/AILab-CVC/SEED-Bench_Leaderboard"

    def questions(self, root: Path, hub: HubData | None = None) -> list[Question]:
        """Return the questions of the split in file order; a dataset's videos have no frames to ask about."""
        records = self._records(root, hub)
        if hub is None:
            wanted = {_name(row["question_id"]) for row in records if self._takes(row)}
            pairs = llava_questions(self.path(root, QUESTIONS), Path(root) / FOLDER)
            return [question for question, _ in pairs if _name(question.id) in wanted]
        if self.used_split() != IMAGE:
            raise ValueError(f"seed:{self.split} needs LLaVA's layout: {hub.dataset} has whole videos")
        table = read_hub(hub, FIELDS | dict.fromkeys(("question", *CHOICES), TEXT))
        return [
            Question(_name(row["question_id"]), _text(row), table.image(place))
            for place, row in enumerate(table.rows)
            if self._takes(row)
        ]

    def score(
        self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None, *, part: bool = False
    ) -> Score:
        """Return the accuracy in percent by kind of data and by type of question, and over all when videos are in."""
        records = {_name(record["question_id"]): record for record in self._records(root, hub)}
        said = one_per_question(answers, lambda answer: _name(answer.question_id))
        if not any(name in records for name in said):
            raise ValueError(unknown_answers(self.name, said, records))
        kinds = {record["data_type"] for name, record in records.items() if name in said} | {IMAGE}
        asked = {name: record for name, record in records.items() if record["data_type"] in kinds}
        right: dict[str, list[bool]] = {}
        pictured: dict[str, bool] = {}
        for name, record in asked.items():
            if part and name not in said:
                continue
            correct = name in said and said[name].text == record["answer"]
            pictured |= {name: correct} if record["data_type"] == IMAGE else {}
            for group in (record["data_type"], f"type/{record['type']}"):
                right.setdefault(f"accuracy/{group}", []).append(correct)
            if len(kinds) > 1:
                right.setdefault("accuracy/all", []).append(correct)
        missing, unknown = missing_answers(said, asked), unknown_answers(self.name, said, records)
        wrong = missing and not part
        warnings = [f"questions without an answer, counted as wrong: {shown(missing)}"] if wrong else []
        warnings += left_out(part, missing, len(asked))
        counts = {
            "questions": len(asked),
            "answered": len(asked) - len(missing),
            "missing": len(missing),
            "unknown": sum(name not in records for name in said),
        }
        return self.result(
            {group: (100 * fmean(flags), "percent") for group, flags in sorted(right.items())},
            counts,
            [(name, said[name].text) for name in asked if name in said and said[name].text not in LETTERS],
            warnings + ([unknown] if unknown else []),
            tallies={self.table_metric: tally_of_means(pictured, scale=100)} if pictured else {},
        )

    def submission(
        self, answers: Sequence[AnswerLine], root: Path, folder: Path, hub: HubData | None = None
    ) -> Submission:
        """Write seed_upload.jsonl for the leaderboard. ValueError unless every question, videos too, is answered."""
        said = one_per_question(answers, lambda answer: _name(answer.question_id))
        names = [record["question_id"] for record in self._records(root, hub)]
        if missing := missing_answers(said, map(_name, names)):
            raise ValueError(
                f"the leaderboard's file holds every question, also of the videos; missing are {shown(missing)}; "
                "ask them all with the task seed:all"
            )
        rows = [{"question_id": name, "prediction": said[_name(name)].text} for name in names]
        return Submission((write_lines(folder / "seed_upload.jsonl", rows),), self.send_to)

    def _takes(self, record: dict[str, Any]) -> bool:
        return self.used_split() != IMAGE or record["data_type"] == IMAGE

    def _records(self, root: Path, hub: HubData | None) -> list[dict[str, Any]]:
        """Return the labelled questions with "type", the name of their type, in file order."""
        if hub is not None:
            records, types, place = read_hub(hub, FIELDS, image=None).rows, {}, hub.dataset
        else:
            place = str(self.path(root, LABELS))
            content = fields_of(read_json(Path(place)), {"questions": LIST, "question_type": optional(OBJECT)}, place)
            records = content["questions"]
            named = (content.get("question_type") or {}).items()
            types = {typed(number, NAME, f"{place}: question_type {name!r}"): name for name, number in named}
        for number, record in enumerate(records):
            fields_of(record, FIELDS, f"{place}, question {number}")
            record["type"] = types.get(record["question_type_id"], record["question_type_id"])
        if not any(record["data_type"] == IMAGE for record in records):
            raise ValueError(f"{place} holds no questions about images")
        return records


def _name(question: int | str) -> int | str:
    """Return an id as LLaVA joins them: a number where it can be one, so that "101669" meets 101669."""
    try:
        return int(question)
    except ValueError:
        return question


def _text(row: dict[str, Any]) -> str:
    options = "".join(f"\n{letter}. {row[choice]}" for letter, choice in zip("ABCD", CHOICES, strict=True))
    return row["question"] + options + LETTER
