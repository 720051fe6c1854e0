"""ScienceQA: multiple choice with and without images; the tables print the accuracy over the questions with one.

Which questions have an image is read from the problem (`img_accuracy`), and, as LLaVA's script does, from `<image>` in
the answer's prompt (`img_accuracy_by_prompt`). The two differ where answers are missing: those are wrong, but have no
prompt. Answers to questions outside the test split are counted and left out, as there.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dynamic_llava.eval.answers import AnswerLine
from dynamic_llava.eval.metrics.choices import SCIENCEQA_LETTERS, read_scienceqa, scienceqa_choice
from dynamic_llava.eval.metrics.tally import tally_of_means
from dynamic_llava.eval.reading import (
    LIST,
    NAME,
    NO_PATH,
    TEXT,
    TEXTS,
    WHOLE,
    Kind,
    brief,
    fields_of,
    optional,
    read_json,
    read_list,
    typed,
)
from dynamic_llava.eval.tasks.base import (
    LETTER,
    LLAVA_EVAL,
    LONG_TOKENS,
    PAPER_TABLE1,
    DataFile,
    Score,
    Task,
    paper_numbers,
)
from dynamic_llava.eval.tasks.hub import HubData, read_hub
from dynamic_llava.eval.tasks.questions import ImageFile, Question, meet, option_lines

QUESTIONS, IMAGES = "scienceqa/llava_test_CQM-A.json", "scienceqa/images/test"
PROBLEMS, SPLITS = "scienceqa/problems.json", "scienceqa/pid_splits.json"
SITE = "https://github.com/lupantech/ScienceQA"
SPLIT = "test"
IMAGE = "<image>"
ITEM = {"id": NAME, "conversations": LIST, "image": NO_PATH}
PICTURED = Kind("a file name, or whether there is an image", lambda value: isinstance(value, str | bool))
PROBLEM = {"choices": TEXTS, "answer": WHOLE, "image": optional(PICTURED)}
HUB_PROBLEM = {"choices": TEXTS, "answer": WHOLE}


class ScienceQa(Task):
    """ScienceQA. Its number in tables is the accuracy over the test questions with an image."""

    name = "scienceqa"
    title = "SciQA (image)"
    groups = (PAPER_TABLE1,)
    max_new_tokens = LONG_TOKENS
    files = (
        DataFile(QUESTIONS, "questions", LLAVA_EVAL),
        DataFile(PROBLEMS, "labels", f"{SITE} (data/scienceqa)"),
        DataFile(SPLITS, "splits", f"{SITE} (data/scienceqa)"),
        DataFile(IMAGES, "images", f"{SITE} (tools/download.sh)"),
    )
    hub = HubData("lmms-lab/ScienceQA", SPLIT, "ScienceQA-FULL")
    table_metric = "img_accuracy"
    paper = paper_numbers("img_accuracy", dense=(66.8, 71.6), image=(69.1, 72.2), both=(68.6, 72.4))
    paper_note = "Table 1, the questions with an image"

    def questions(self, root: Path, hub: HubData | None = None) -> list[Question]:
        """Return the test questions in file order; those without an image are asked as text alone."""
        if hub is not None:
            table = read_hub(hub, {"question": TEXT, "choices": TEXTS, "hint": optional(TEXT)})
            return [
                _question(place, _text(row), table.image(place) if pictured else None)
                for place, (row, pictured) in enumerate(zip(table.rows, table.with_image(), strict=True))
            ]
        path = self.path(root, QUESTIONS)
        items = read_list(path)
        found: dict[str, Question] = {}
        for number, item in enumerate(items):
            place = f"{path}, question {number}"
            first = fields_of(item, ITEM, place)["conversations"][0]
            text = fields_of(first, {"value": TEXT}, f"{place}, first turn")["value"].replace(IMAGE, "").strip()
            if str(item["id"]) in found:
                raise ValueError(f"{place}: question {brief(item['id'])} stands already before it")
            image = ImageFile(Path(root) / IMAGES, item["image"]) if item.get("image") else None
            found[str(item["id"])] = _question(item["id"], text, image)
        return list(found.values())

    def score(
        self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None, *, part: bool = False
    ) -> Score:
        """Return the accuracy in percent over all, over questions with an image, both ways, and by kind of input.

        `details` has the chosen option of each question by id, as LLaVA's script writes it: "results", -1 where none is
        read.
        """
        problems = self._problems(root) if hub is None else _hub_problems(hub)
        said, counts, warnings = meet(self.name, answers, problems, part)
        if part:
            problems = {name: problem for name, problem in problems.items() if name in said}
        chosen = {
            name: scienceqa_choice(said[name].text, len(problem["choices"])) if name in said else -1
            for name, problem in problems.items()
        }
        right = {name: chosen[name] == problem["answer"] for name, problem in problems.items()}
        groups = {
            "accuracy": list(right),
            "img_accuracy": [name for name, problem in problems.items() if problem.get("image")],
            "img_accuracy_by_prompt": [name for name in problems if name in said and IMAGE in said[name].prompt],
            "accuracy/no_image": [name for name, problem in problems.items() if not problem.get("image")],
        }
        metrics = {
            group: (100 * fmean(right[name] for name in names), "percent") for group, names in groups.items() if names
        }
        if not groups["img_accuracy"]:
            metrics["img_accuracy"] = (0.0, "percent")
            warnings.append("no question has an image: img_accuracy is 0 because nothing was counted")
        if len(groups["img_accuracy_by_prompt"]) != len(groups["img_accuracy"]):
            warnings.append(
                f"{len(groups['img_accuracy'])} problems have an image, {IMAGE} stands in the prompt of "
                f"{len(groups['img_accuracy_by_prompt'])} answers; LLaVA's script counts the latter"
            )
        unread = [
            (name, one.text) for name, one in said.items() if name in problems and read_scienceqa(one.text) is None
        ]
        counts["correct"] = sum(right.values())
        pictured = {name: right[name] for name in groups["img_accuracy"]}
        tallies = {"img_accuracy": tally_of_means(pictured, scale=100)} if pictured else {}
        return self.result(metrics, counts, unread, warnings, {"results": chosen}, tallies)

    def _problems(self, root: Path) -> dict[str, Mapping[str, Any]]:
        """Return the problems of the test split by id, in the split's order."""
        path, splits = self.path(root, PROBLEMS), self.path(root, SPLITS)
        problems = read_json(path)
        names = fields_of(read_json(splits), {SPLIT: LIST}, str(splits))[SPLIT]
        for name in names:
            typed(name, NAME, f"{splits}: a question of {SPLIT!r}")
        fields_of(problems, dict.fromkeys(map(str, names), Kind("a problem", lambda value: True)), str(path))
        return {str(name): _checked(problems[str(name)], f"{path}: problem {name}") for name in names}


def _hub_problems(hub: HubData) -> dict[str, Mapping[str, Any]]:
    table = read_hub(hub, HUB_PROBLEM)
    rows = zip(table.rows, table.with_image(), strict=True)
    return {
        str(place): _checked(row | {"image": pictured}, f"{hub.dataset}, row {place}")
        for place, (row, pictured) in enumerate(rows)
    }


def _checked(problem: Any, place: str) -> Mapping[str, Any]:
    fields_of(problem, PROBLEM, place)
    if not 0 <= problem["answer"] < len(problem["choices"]):
        raise ValueError(f"{place}: answer {problem['answer']!r} is none of {len(problem['choices'])} choices")
    return problem


def _question(name: int | str, text: str, image: Any) -> Question:
    return Question(name, text + LETTER, image, prompt=text + LETTER if image is None else f"{IMAGE}\n{text}{LETTER}")


def _text(row: Mapping[str, Any]) -> str:
    hint = f"Context: {row['hint']}\n" if row["hint"] else ""
    return hint + row["question"] + option_lines(dict(zip(SCIENCEQA_LETTERS, row["choices"], strict=False)))
