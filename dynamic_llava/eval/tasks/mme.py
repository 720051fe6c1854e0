"""MME: two yes/no questions about each image, ten categories of perception and four of cognition.

An answer finds its label by category, file and question, as LLaVA's converter does. A category is worth 100 times its
accuracy over questions plus 100 times that over images (both right); the answers of one image are taken in pairs in
the order of the file. An odd number of them, a second answer to a question, or one to no question is an error.
Questions without an answer are counted, reported and left out; so are whole categories.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dynamic_llava.eval.answers import AnswerLine, one_per_question
from dynamic_llava.eval.metrics.tally import Tally
from dynamic_llava.eval.reading import TEXT, brief, read_text, shown
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
from dynamic_llava.eval.tasks.questions import Question, llava_questions, missing_answers

QUESTIONS, RELEASE = "MME/llava_mme.jsonl", "MME/MME_Benchmark_release_version"
MME_SITE = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
ASK = "Please answer yes or no."
"""How MME ends its questions, after one space, or two."""
OTHER = "other"
"""Reading of an answer that says neither yes nor no."""

LabelKey = tuple[str, str, str]
"""Category, file without ending, question as MME writes it."""


class Mme(Task):
    """MME. Its number in tables is the perception total, of 2000."""

    name = "mme"
    title = "MME"
    groups = (PAPER_TABLE1,)
    max_new_tokens = SHORT_TOKENS
    files = (
        DataFile(QUESTIONS, "questions", LLAVA_EVAL),
        DataFile(RELEASE, "labels and images", MME_SITE),
    )
    hub = HubData("lmms-lab/MME", "test")
    table_metric = "perception"
    paper = paper_numbers("perception", dense=(1510.7, 1531.3), image=(1479.8, 1554.1), both=(1501.0, 1563.3))
    paper_note = "Table 1"

    def questions(self, root: Path, hub: HubData | None = None) -> list[Question]:
        """Return the questions in file order; the two of an image share an id."""
        if hub is None:
            pairs = llava_questions(self.path(root, QUESTIONS), Path(root) / RELEASE, repeated_ids=True)
            return [question for question, _ in pairs]
        table = read_hub(hub, {"question_id": TEXT, "question": TEXT})
        return [
            Question(row["question_id"], row["question"].removesuffix(ASK).strip() + SHORT, table.image(place))
            for place, row in enumerate(table.rows)
        ]

    def score(
        self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None, *, part: bool = False
    ) -> Score:
        """Return the totals and each category in points, and the two accuracies of each category as fractions."""
        labels = dict(_hub_labels(hub) if hub is not None else _release_labels(self.path(root, RELEASE)))
        said = one_per_question(answers, lambda answer: _key(answer, labels))
        read = {key: read_mme(answer.text) for key, answer in said.items()}
        metrics: dict[str, tuple[float, str]] = {}
        halves: list[str] = []
        images: dict[str, list[tuple[bool, bool]]] = {}
        for category in dict.fromkeys(category for category, _, _ in said):
            own = {key: read[key] == labels[key] for key in said if key[0] == category}
            right, odd = _right_by_image(own)
            if odd and not part:
                raise ValueError(
                    f"mme: {category} images with an odd number of answers: {shown(odd)}; each has two questions"
                )
            halves += odd
            images[category] = right
            if not right:
                continue
            accuracy = sum(map(sum, right)) / (2 * len(right))
            both = sum(map(all, right)) / len(right)
            metrics[f"score/{category}"] = (100 * accuracy + 100 * both, "points")
            metrics |= {f"accuracy/{category}": (accuracy, "fraction"), f"accuracy_plus/{category}": (both, "fraction")}
        totals, warnings = _totals(metrics)
        missing = missing_answers(said, labels)
        if missing:
            warnings.append(f"questions without an answer, left out: {shown(missing)}")
        if halves:
            warnings.append(f"images with one of two answers, left out: {shown(halves)}")
        counts = {"questions": len(labels), "answered": len(said), "missing": len(missing)}
        unread = [("/".join(key), said[key].text) for key, word in read.items() if word == OTHER]
        tallies = {"perception": _tally({name: images[name] for name in PERCEPTION if images.get(name)})}
        return self.result(totals | metrics, counts, unread, warnings, tallies=tallies)


def _tally(images: Mapping[str, Sequence[tuple[bool, bool]]]) -> Tally:
    """Return what a total is made of: of each image, by category, its right answers and whether both are."""
    named = [(category, number, right) for category, pairs in images.items() for number, right in enumerate(pairs)]
    return Tally(
        tuple(f"{category}/{number}" for category, number, _ in named),
        tuple(category for category, _, _ in named),
        tuple((float(sum(right)), float(all(right))) for _, _, right in named),
        lambda sums, count: 100 * (sums[..., 0] / 2 + sums[..., 1]) / count,
        over_groups="sum",
        unit="images",
        right=tuple(all(right) for _, _, right in named),
    )


def read_mme(text: str) -> str:
    """Read an answer as "yes", "no" or "other" as MME's script does.

    Lower-cased, "yes" or "no" itself; else "yes", then "no", is looked for in the first four characters ("know" is no).
    """
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), OTHER)


def _key(answer: AnswerLine, labels: Mapping[LabelKey, str]) -> LabelKey:
    """Return the label's key of an answer; ValueError when there is none."""
    category, stem = answer.key.split("/")[0], _stem(answer.key)
    question = answer.prompt
    if SHORT.strip() in question:
        question = question.replace(SHORT.strip(), "").strip()
    forms = [question] if ASK in question else [f"{question} {ASK}", f"{question}  {ASK}"]
    for form in forms:
        if (category, stem, form) in labels:
            return category, stem, form
    raise ValueError(
        f"mme has no question {brief(forms[0])} about {brief(answer.key)} (line {answer.line}); "
        "the answer's question_id is category/image and its prompt the question"
    )


def _stem(path: str) -> str:
    return path.split("/")[-1].split(".")[0]


def _right_by_image(right: Mapping[LabelKey, bool]) -> tuple[list[tuple[bool, bool]], list[str]]:
    """Return for each image whether its two answers are right, and the files with an odd number of answers.

    The answers of one file are taken together in order; the last one of an odd number has no pair.
    """
    files: dict[str, list[bool]] = {}
    for (_, stem, _), correct in right.items():
        files.setdefault(stem, []).append(correct)
    pairs = [pair for flags in files.values() for pair in zip(flags[::2], flags[1::2], strict=False)]
    return pairs, [stem for stem, flags in files.items() if len(flags) % 2]


def _totals(metrics: Mapping[str, tuple[float, str]]) -> tuple[dict[str, tuple[float, str]], list[str]]:
    totals: dict[str, tuple[float, str]] = {}
    warnings = []
    for name, categories in (("perception", PERCEPTION), ("cognition", COGNITION)):
        there = [metrics[f"score/{category}"][0] for category in categories if f"score/{category}" in metrics]
        totals[name] = (sum(there), "points")
        if absent := [category for category in categories if f"score/{category}" not in metrics]:
            warnings.append(f"{name} lacks {', '.join(absent)}: its total is of {200 * len(there)} points only")
    totals["total"] = (totals["perception"][0] + totals["cognition"][0], "points")
    return totals, warnings


def _release_labels(folder: Path) -> Iterator[tuple[LabelKey, str]]:
    """Yield key and label of every question of the release: text files beside the images, or in a folder of their own.

    ValueError names the file and line that holds no question, tab, and yes or no.
    """
    categories = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    if not categories:
        raise ValueError(f"{folder} holds no folder of a category")
    for category in categories:
        texts = category / "questions_answers_YN"
        for path in sorted((texts if texts.is_dir() else category).glob("*.txt")):
            for number, line in enumerate(read_text(path).split("\n"), 1):
                if line.strip():
                    question, _, label = line.strip().partition("\t")
                    yield (category.name, path.stem.split(".")[0], question), _label(label, f"{path}:{number}")


def _hub_labels(hub: HubData) -> Iterator[tuple[LabelKey, str]]:
    rows = read_hub(hub, dict.fromkeys(("question_id", "question", "answer", "category"), TEXT), image=None).rows
    for number, row in enumerate(rows):
        name = row["question_id"]
        key = (name.split("/")[0], _stem(name), row["question"].strip())
        yield key, _label(row["answer"], f"{hub.dataset}, row {number}")


def _label(text: str, place: str) -> str:
    label = text.strip().lower()
    if label not in ("yes", "no"):
        raise ValueError(f"{place}: the label is {brief(text)}; a question, a tab, and Yes or No are due there")
    return label
