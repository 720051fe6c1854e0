"""POPE: is an object in the image? Random, popular and adversarial objects, asked as yes/no questions.

Labels are matched to answers by their order within a category, as POPE's script does, so the answer file keeps the
order of the question file. A question without an answer, an unknown id, another order, or label and question files of
unequal length (POPE's HEAD has 3,000 random questions, LLaVA's file 2,910) would shift that match: each is an error.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from dynamic_llava.eval.answers import AnswerLine, one_per_question
from dynamic_llava.eval.metrics.choices import read_yes_no, says_yes_or_no, yes_no_scores
from dynamic_llava.eval.metrics.tally import Tally
from dynamic_llava.eval.reading import NAME, TEXT, Kind, brief, fields_of, read_json_lines, shown
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

QUESTIONS, IMAGES, LABELS = "pope/llava_pope_test.jsonl", "pope/val2014", "pope/coco"
CATEGORIES = ("adversarial", "popular", "random")
CATEGORY = Kind(f"one of {', '.join(CATEGORIES)}", lambda value: value in CATEGORIES)
COLUMNS = {"question_id": NAME, "question": TEXT, "answer": TEXT, "category": CATEGORY}
"""Columns of the Hugging Face dataset beside the image."""
YES_OR_NO = Kind('"yes" or "no"', lambda value: value in ("yes", "no"))
LABEL_FILES = "https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"


class Pope(Task):
    """POPE. Its number in tables is the mean of the categories' F1, in percent, "yes" being positive."""

    name = "pope"
    title = "POPE"
    groups = (PAPER_TABLE1,)
    max_new_tokens = SHORT_TOKENS
    files = (
        DataFile(QUESTIONS, "questions", LLAVA_EVAL),
        DataFile(LABELS, "labels", LABEL_FILES),
        DataFile(IMAGES, "images", "http://images.cocodataset.org/zips/val2014.zip"),
    )
    hub = HubData("lmms-lab/POPE", "test")
    table_metric = "mean_f1"
    paper = paper_numbers("mean_f1", dense=(85.9, 85.9), image=(85.0, 86.8), both=(85.9, 86.5))
    unreadable_counts_as = '"yes", as POPE\'s script reads them'
    paper_note = "Table 1; Table 2 prints 86.2 for Dynamic-LLaVA-7B I"

    def questions(self, root: Path, hub: HubData | None = None) -> list[Question]:
        """Return the questions of all categories in file order."""
        if hub is None:
            return [question for question, _ in llava_questions(self.path(root, QUESTIONS), Path(root) / IMAGES)]
        table = read_hub(hub, COLUMNS)
        return [
            Question(_hub_id(row), row["question"] + SHORT, table.image(place)) for place, row in enumerate(table.rows)
        ]

    def score(
        self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None, *, part: bool = False
    ) -> Score:
        """Return accuracy, precision, recall, F1 and yes-rate by category (fractions), and their means in percent."""
        ids, labels = self._labels(root) if hub is None else _hub_labels(hub)
        said = one_per_question(answers)
        known = [name for names in ids.values() for name in names]
        if unknown := unknown_answers(self.name, said, known):
            raise ValueError(unknown)
        missing = missing_answers(said, known)
        if missing and (not part or len(missing) == len(known)):
            raise ValueError(
                f"pope: questions without an answer: {shown(missing)}; labels match by order, so `score --part` is "
                "what scores the answers to a part of the questions"
            )
        wanted = {name: label for own in ids for name, label in _matched(own, ids[own], labels[own], list(said))}
        ids = {own: asked for own, names in ids.items() if (asked := [name for name in names if name in said])}
        metrics: dict[str, tuple[float, str]] = {}
        warnings = _absent(ids) + left_out(part, missing, len(known))
        for category, names in ids.items():
            scores = yes_no_scores([said[name].text for name in names], [wanted[name] for name in names])
            warnings += [f"{category}: {name} is 0 because nothing was counted" for name in scores.pop("undefined")]
            metrics |= {f"{name}/{category}": (value, "fraction") for name, value in scores.items()}
        means = {
            f"mean_{name}": (100 * fmean(metrics[f"{name}/{category}"][0] for category in ids), "percent")
            for name in ("f1", "accuracy")
        }
        unread = [(name, one.text) for name, one in said.items() if not says_yes_or_no(one.text)]
        counts = {"questions": len(known), "answered": len(said)}
        tallies = {"mean_f1": _tally(ids, said, wanted)}
        return self.result(means | metrics, counts, unread, warnings, tallies=tallies)

    def _labels(self, root: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """Return category -> ids of its questions, and category -> its labels, both in their files' order."""
        path, folder = self.path(root, QUESTIONS), self.path(root, LABELS)
        ids: dict[str, list[str]] = {}
        for question, line in llava_questions(path, folder):
            category = fields_of(line, {"category": CATEGORY}, f"{path}: question {brief(question.id)}")["category"]
            ids.setdefault(category, []).append(str(question.id))
        return ids, {category: _read_labels(folder / f"coco_pope_{category}.json") for category in ids}


def _tally(ids: Mapping[str, Sequence[str]], said: Mapping[str, AnswerLine], wanted: Mapping[str, str]) -> Tally:
    """Return what the mean F1 is made of: right "yes", and "yes" that is said or due, by category."""
    named = [(category, name) for category, names in ids.items() for name in names]
    yes = [(read_yes_no(said[name].text) == "yes", wanted[name] == "yes") for _, name in named]
    return Tally(
        tuple(name for _, name in named),
        tuple(category for category, _ in named),
        tuple((float(one and other), float(one) + float(other)) for one, other in yes),
        lambda sums, count: 200 * sums[..., 0] / (sums[..., 1] + (sums[..., 1] == 0)),
        right=tuple(one == other for one, other in yes),
    )


def _read_labels(path: Path) -> list[str]:
    """Return the labels of a category's file: JSON lines, in spite of its name."""
    if not path.is_file():
        raise FileNotFoundError(f"pope: labels are missing: there is no {path}; get it from {LABEL_FILES}")
    return [
        fields_of(line, {"label": YES_OR_NO}, f"{path}:{number}")["label"] for number, line in read_json_lines(path)
    ]


def _hub_labels(hub: HubData) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    ids: dict[str, list[str]] = {}
    labels: dict[str, list[str]] = {}
    for number, row in enumerate(read_hub(hub, COLUMNS, image=None).rows):
        label = {"answer": row["answer"].strip().lower()}
        fields_of(label, {"answer": YES_OR_NO}, f"{hub.dataset}, row {number}")
        ids.setdefault(row["category"], []).append(_hub_id(row))
        labels.setdefault(row["category"], []).append(label["answer"])
    return ids, labels


def _hub_id(row: dict[str, object]) -> str:
    """Ids of the dataset begin anew in each category."""
    return f"{row['category']}/{row['question_id']}"


def _matched(category: str, names: list[str], labels: list[str], answered: list[str]) -> Iterable[tuple[str, str]]:
    """Return (id, label) of a category's questions; ValueError where the order of a file would shift the match."""
    if len(names) != len(labels):
        raise ValueError(
            f"pope: {len(names)} {category} questions for {len(labels)} labels in {LABELS}/coco_pope_{category}.json; "
            f"take both files from the revision that LLaVA used: {LABEL_FILES}"
        )
    own, known = set(names), set(answered)
    if [name for name in answered if name in own] != [name for name in names if name in known]:
        raise ValueError(f"pope: the {category} answers are not in the question file's order; labels match by order")
    return zip(names, labels, strict=True)


def _absent(categories: Iterable[str]) -> list[str]:
    absent = [name for name in CATEGORIES if name not in set(categories)]
    return [f"no {', '.join(absent)} questions: the mean is over the other categories"] if absent else []
