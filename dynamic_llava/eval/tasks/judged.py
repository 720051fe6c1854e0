"""Benchmarks of open questions whose answers a judge reads: MM-Vet and LLaVA-Bench (in the wild).

MM-Vet asks for several capabilities at once and is judged by gpt-4-0613 from a file of answers, in which question 0 is
"v1_0". A question without an answer, or an answer to no question, is an error where the question file is at hand.

LLaVA-Bench (conversation, detail and reasoning) is judged by GPT-4 against its own answers. A file of its reviews is
scored as LLaVA does it: a review whose first line is not two numbers is [-1, -1] and goes into the means like any
other; it is counted and reported. So is a question that is reviewed more than once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from dynamic_llava.eval.answers import AnswerLine, one_per_question, write_answers
from dynamic_llava.eval.reading import NAME, NUMBERS, TEXT, brief, fields_of, optional, read_json_lines, shown
from dynamic_llava.eval.tasks.base import LLAVA_EVAL, LONG_TOKENS, DataFile, Score, Submission, Task, paper_numbers
from dynamic_llava.eval.tasks.hub import HubData, read_hub
from dynamic_llava.eval.tasks.questions import Question, llava_questions, missing_answers, unknown_answers
from dynamic_llava.eval.writing import decodable, write_json


class Judged(Task):
    """A benchmark of open questions, asked without a suffix; its answers have no score before a judge reads them."""

    asked: ClassVar[str]
    """Its question file, JSON lines as LLaVA writes them."""
    images: ClassVar[str]

    def questions(self, root: Path, hub: HubData | None = None) -> list[Question]:
        """Return the questions in file order."""
        if hub is None:
            return [question for question, _ in llava_questions(self.path(root, self.asked), Path(root) / self.images)]
        table = read_hub(hub, {"question_id": NAME, "question": TEXT})
        return [Question(self.hub_id(row), row["question"], table.image(place)) for place, row in enumerate(table.rows)]

    def hub_id(self, row: dict[str, Any]) -> int | str:
        """Return the id that LLaVA's files give to the question of a dataset row."""
        return row["question_id"]

    def can_score(self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None) -> bool:
        """Return False: a judge is needed."""
        return False

    def score(
        self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None, *, part: bool = False
    ) -> Score:
        """Raise ValueError: answers have no score here."""
        raise ValueError(f"{self.name}: answers have no score without a judge; send them to {self.send_to}")

    def complete(self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None) -> list[AnswerLine]:
        """Return the answers in their order. ValueError unless each question has one and no other has.

        Without the question file below `root` only a question answered twice can be told: a judge's file needs none.
        """
        said = one_per_question(answers)
        if hub is not None or (Path(root) / self.asked).is_file():
            known = [str(question.id) for question in self.questions(root, hub)]
            if unknown := unknown_answers(self.name, said, known):
                raise ValueError(unknown)
            if missing := missing_answers(said, known):
                raise ValueError(f"{self.name}: no answer to questions {shown(missing)}; the judge reads all of them")
        return list(said.values())


MMVET_QUESTIONS, MMVET_IMAGES = "mm-vet/llava-mm-vet.jsonl", "mm-vet/images"
PREFIX = "v1_"
"""What the judge's file puts before an id."""


class MmVet(Judged):
    """MM-Vet. Its number in tables is 100 x the mean of the judge's scores in [0, 1]."""

    name = "mmvet"
    title = "MM-Vet"
    max_new_tokens = LONG_TOKENS
    asked, images = MMVET_QUESTIONS, MMVET_IMAGES
    files = (
        DataFile(MMVET_QUESTIONS, "questions", LLAVA_EVAL),
        DataFile(MMVET_IMAGES, "images", "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"),
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

    def submission(
        self, answers: Sequence[AnswerLine], root: Path, folder: Path, hub: HubData | None = None
    ) -> Submission:
        """Write mmvet_results.json: {"v1_0": answer, ...} in the answers' order."""
        results = {f"{PREFIX}{answer.question_id}": answer.text for answer in self.complete(answers, root, hub)}
        return Submission((write_json(folder / "mmvet_results.json", results, indent=2),), self.send_to)


BENCH_QUESTIONS, BENCH_IMAGES = "llava-bench-in-the-wild/questions.jsonl", "llava-bench-in-the-wild/images"
BENCH = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
CATEGORY = "llava_bench_"
"""What reviews put before a category."""
NO_SCORE = (-1.0, -1.0)
"""Scores of a review without two numbers."""
MOST = 1e6
"""A number beyond it is no score: judges give 1 to 10."""
REVIEW = {"question_id": NAME, "category": optional(TEXT), "tuple": optional(NUMBERS), "content": optional(TEXT)}


class LlavaBench(Judged):
    """LLaVA-Bench. Its number in tables is 100 x the mean score of the model / that of GPT-4's own answers."""

    name = "llava_bench"
    title = "LLaVA-Bench (wild)"
    max_new_tokens = LONG_TOKENS
    asked, images = BENCH_QUESTIONS, BENCH_IMAGES
    files = (DataFile(BENCH_QUESTIONS, "questions", BENCH), DataFile(BENCH_IMAGES, "images", BENCH))
    hub = HubData("lmms-lab/llava-bench-in-the-wild", "train")
    table_metric = "relative_score"
    paper = paper_numbers("relative_score", dense=(65.8, 72.5), image=(67.3, 73.4), both=(68.7, 70.1))
    paper_note = "Table 12; judged by gpt-4-0314, GPT-4's answer being the first"
    unreadable_counts_as = "-1 each"
    send_to = (
        "LLaVA's judge, llava/eval/eval_gpt_review_bench.py with gpt-4-0314; then "
        "python -m dynamic_llava.eval score --task llava_bench --answers REVIEWS"
    )

    def score_file(self, path: Path, root: Path, hub: HubData | None = None, *, part: bool = False) -> Score | None:
        """Return the score of a file of reviews; None for a file of answers.

        For all and by category: relative_score (percent), reference_score and model_score (10 x the mean), each rounded
        to one place after means that are rounded to three. Raises ValueError where a line is no review.
        """
        lines = list(read_json_lines(path))
        if not lines:
            raise ValueError(f"{path} holds neither answers nor reviews")
        if not any(name in lines[0][1] for name in ("content", "tuple")):
            return super().score_file(path, root, hub, part=part)
        groups: dict[str, list[tuple[float, float]]] = {"": []}
        pairs = [read_review(line, f"{path}:{number}") for number, line in lines]
        for (_, line), pair in zip(lines, pairs, strict=True):
            groups[""].append(pair)
            if line.get("category") is not None:
                groups.setdefault("/" + line["category"].removeprefix(CATEGORY), []).append(pair)
        metrics: dict[str, tuple[float, str]] = {}
        for group, scores in sorted(groups.items()):
            metrics |= _summary(group, scores, path)
        failed = [
            (line["question_id"], line.get("content") or "")
            for (_, line), pair in zip(lines, pairs, strict=True)
            if pair == NO_SCORE
        ]
        twice = len(lines) - len({str(line["question_id"]) for _, line in lines})
        warnings = [f"further reviews of questions that have one, averaged in: {twice}"] if twice else []
        counts = {"questions": len(lines) - twice, "reviews": len(lines)}
        return self.result(metrics, counts, failed, warnings)

    def submission(
        self, answers: Sequence[AnswerLine], root: Path, folder: Path, hub: HubData | None = None
    ) -> Submission:
        """Write llava_bench_answers.jsonl, the answers as LLaVA's judge reads them."""
        said = [replace(one, text=decodable(one.text)) for one in self.complete(answers, root, hub)]
        return Submission((write_answers(folder / "llava_bench_answers.jsonl", said),), self.send_to)


def read_review(line: Mapping[str, Any], place: str) -> tuple[float, float]:
    """Return (reference's score, model's score) of a review: its "tuple", or else what its "content" begins with.

    ValueError names `place` where there is neither, no question_id, or a tuple that is not two numbers.
    """
    fields_of(line, REVIEW, place)
    if line.get("tuple") is None:
        return scores_in(fields_of(line, {"content": TEXT}, place)["content"])
    pair = line["tuple"]
    if len(pair) != 2 or max(map(abs, pair)) > MOST:
        raise ValueError(f"{place}: 'tuple' is {brief(pair)}; a review holds two numbers there, up to {MOST:g}")
    return float(pair[0]), float(pair[1])


def scores_in(content: str) -> tuple[float, float]:
    """Read the two scores as LLaVA does: the first line, commas as spaces, cut at each single space.

    Anything but exactly two numbers is (-1, -1): so is "7, 9", which has an empty word in its middle.
    """
    words = content.split("\n")[0].replace(",", " ").split(" ")
    try:
        reference, model = map(float, words)
    except ValueError:
        return NO_SCORE
    return (reference, model) if max(abs(reference), abs(model)) <= MOST else NO_SCORE


def _summary(group: str, scores: Sequence[tuple[float, float]], path: Path) -> dict[str, tuple[float, str]]:
    reference, model = (round(fmean(column), 3) for column in zip(*scores, strict=True))
    if reference == 0:
        raise ValueError(f"{path}: the mean of the reference's scores{group and f' of {group[1:]}'} is 0")
    return {
        f"relative_score{group}": (round(100 * model / reference, 1), "percent"),
        f"reference_score{group}": (round(10 * reference, 1), "points"),
        f"model_score{group}": (round(10 * model, 1), "points"),
    }
