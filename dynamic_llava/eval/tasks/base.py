"""What every benchmark says about itself: its questions, its files, its score, its submission; no torch here.

A task is one file beside this one and one row in `TASKS`. Its questions come from LLaVA-1.5's folder layout below a
data root (LLaVA's playground/data/eval), or from a Hugging Face dataset (`HubData`); its score from an answer file.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from dynamic_llava.eval.answers import AnswerLine, read_answers
from dynamic_llava.eval.metrics.tally import Tally
from dynamic_llava.eval.reading import shown
from dynamic_llava.eval.tasks.hub import HubData
from dynamic_llava.eval.tasks.questions import Question

SHORT = "\nAnswer the question using a single word or phrase."
"""Suffix of short answers."""
LETTER = "\nAnswer with the option's letter from the given choices directly."
"""Suffix of multiple choice."""
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
"""VizWiz' suffix, before `SHORT`."""

SHORT_TOKENS, LONG_TOKENS = 128, 1024
"""max_new_tokens of LLaVA's two runners: the one with a loader (VQAv2, GQA, ...), and the others."""

PAPER_TABLE1, GENERATION = "paper_table1", "generation"
"""Groups of tasks: the eleven columns of the paper's Table 1; the benchmarks of Table 3."""

UNITS = ("percent", "fraction", "points", "count", "perplexity", "tokens", "TFLOP", "MiB")
"""Units of metrics: 0..100, 0..1, a benchmark's own points, a number of things, and those of costs."""

SKIPPED = "skipped"
"""Field of the metadata of a line without an answer: why its question was passed over."""

LLAVA_EVAL = "LLaVA's eval.zip (https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md)"
"""Where LLaVA's own question files come from."""

PaperNumbers = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Metric -> "7b" | "13b" -> sparsity ("none", "image", "both") -> what the paper prints, in the metric's unit."""


@dataclass(frozen=True)
class Said:
    """The answer to one question, as its answer line is to hold it."""

    text: str
    metadata: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the line, beside the question's own."""


@dataclass(frozen=True)
class DataFile:
    """A file or folder that a task reads, relative to the data root."""

    path: str
    holds: str
    """questions, labels or images."""
    get: str
    """Address or name of the source that has it."""
    split: str | None = None
    """The split that needs it; None when every split does."""


@dataclass(frozen=True)
class Metric:
    """A number and what it is measured in."""

    value: float
    unit: str

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unit {self.unit!r} is not known; choose one of {', '.join(UNITS)}")


@dataclass(frozen=True)
class Score:
    """The score of an answer file: every metric by name, counts of questions and answers, and warnings."""

    task: str
    table_metric: str
    """The metric that the paper's tables print; a name in `metrics`."""
    metrics: Mapping[str, Metric]
    counts: Mapping[str, int]
    """questions, answered, unreadable (its rule reads nothing from them), and what was missing or unknown, by name."""
    warnings: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further content of the benchmark's own result file (ScienceQA's choice by question)."""
    tallies: Mapping[str, Tally] = field(default_factory=dict, repr=False, compare=False)
    """What metrics are made of, unit by unit, by their names; for intervals, and in no file."""

    def __post_init__(self) -> None:
        if self.table_metric not in self.metrics:
            raise ValueError(f"{self.task}: {self.table_metric} is not among {', '.join(self.metrics)}")
        if "unreadable" not in self.counts:
            raise ValueError(f"{self.task}: counts {dict(self.counts)} do not say how many answers were unreadable")

    @property
    def value(self) -> float:
        """The number that the paper's tables print."""
        return self.metrics[self.table_metric].value

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        found = asdict(replace(self, tallies={})) | {"warnings": list(self.warnings)}
        found.pop("tallies")
        return found


@dataclass(frozen=True)
class Submission:
    """Files written for a server or a judge, and where they go."""

    files: tuple[Path, ...]
    send_to: str


class Task(ABC):
    """One benchmark. `split` chooses among `splits`; None is the first, which the paper reports.

    Raises ValueError for a split that the task does not have.
    """

    name: ClassVar[str]
    """Registered name, also of its answer files."""
    title: ClassVar[str]
    """Its name in tables."""
    groups: ClassVar[tuple[str, ...]] = ()
    splits: ClassVar[tuple[str, ...]] = ()
    """Splits that can be asked for as `name:split`; empty when there is one only."""
    max_new_tokens: ClassVar[int]
    files: ClassVar[tuple[DataFile, ...]]
    hub: ClassVar[HubData | None] = None
    """Its Hugging Face dataset, where there is one; `hub_data` gives the one to read."""
    hub_splits: ClassVar[Mapping[str, str]] = {}
    """Split of the task -> split of the dataset, where `hub` does not name the right one."""
    table_metric: ClassVar[str]
    paper: ClassVar[PaperNumbers] = {}
    paper_note: ClassVar[str] = ""
    """Note on the paper's numbers: the table they are taken from, where two tables differ."""
    skips_unreadable: ClassVar[bool] = False
    """Whether a question whose image cannot be read gets a line without an answer that its score leaves out.

    The line's metadata has "skipped", the reason. Otherwise the run ends in an error, the other answers kept.
    """
    unreadable_counts_as: ClassVar[str] = "wrong"
    """Worth of an answer from which the benchmark's rule reads nothing."""
    send_to: ClassVar[str] = ""
    """The server or judge that its submission goes to; empty when there is none."""

    def __init__(self, split: str | None = None) -> None:
        if split is not None and split not in self.splits:
            allowed = f"one of {', '.join(self.splits)}" if self.splits else "none, it has only one"
            raise ValueError(f"task {self.name} has no split {split!r}; give {allowed}")
        self.split = split

    @abstractmethod
    def questions(self, root: Path, hub: HubData | None = None) -> list[Question]:
        """Return its questions in file order, from the layout below `root`, or from a Hugging Face dataset.

        Images are not opened. Raises FileNotFoundError for a missing file and ValueError for broken data; both say
        where.
        """

    @abstractmethod
    def score(
        self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None, *, part: bool = False
    ) -> Score:
        """Return what the answers are worth, against labels below `root` or in a Hugging Face dataset.

        With `part` every number is over the questions that are answered, and the others are left out and reported.
        Otherwise the task's own docstring says what it does about questions without an answer and answers without a
        question. Raises FileNotFoundError for missing labels, ValueError for broken ones and for answers that have no
        score.
        """

    def score_file(self, path: Path, root: Path, hub: HubData | None = None, *, part: bool = False) -> Score | None:
        """Return the score of an answer file, None when it has none here (`can_score`).

        A task that also scores files of another kind (a judge's reviews) overrides this.
        """
        answers = read_answers(path)
        with naming(path):
            return self.score(answers, root, hub, part=part) if self.can_score(answers, root, hub) else None

    def can_score(self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None) -> bool:
        """Return whether these answers have a score here; False where labels are private or a judge is needed."""
        return True

    def submission(
        self, answers: Sequence[AnswerLine], root: Path, folder: Path, hub: HubData | None = None
    ) -> Submission | None:
        """Write the files that `send_to` wants into `folder`; None for a task without a server or judge.

        Raises ValueError for answers that make no complete submission.
        """
        return None

    def used_split(self) -> str | None:
        """The split asked for, or else the first; None for a task with one split only."""
        return self.split or next(iter(self.splits), None)

    def hub_data(self, dataset: str | None = None) -> HubData:
        """Return the Hugging Face rows of its split, from another id or a local folder if `dataset` is given.

        Raises ValueError for a task that has none.
        """
        if self.hub is None:
            raise ValueError(f"task {self.name} has no Hugging Face dataset; it reads {self.files[0].path}")
        split = self.hub_splits.get(self.used_split() or "", self.hub.split)
        return replace(self.hub, dataset=dataset or self.hub.dataset, split=split)

    def needed_files(self) -> list[DataFile]:
        """The files of the layout that its split reads."""
        return [file for file in self.files if file.split in (None, self.used_split())]

    def path(self, root: Path, relative: str) -> Path:
        """Return a file or folder of `files`. FileNotFoundError says where to get it when it is missing."""
        file = next(file for file in self.files if file.path == relative)
        path = Path(root) / relative
        if not path.exists():
            raise FileNotFoundError(
                f"{self.name}: {file.holds} are missing: there is no {path}; get it from {file.get}"
            )
        return path

    def result(
        self,
        metrics: Mapping[str, tuple[float, str]],
        counts: Mapping[str, int],
        unreadable: Iterable[tuple[Any, str]],
        warnings: Iterable[str] = (),
        details: Mapping[str, Any] | None = None,
        tallies: Mapping[str, Tally] | None = None,
    ) -> Score:
        """Return a Score of this task from name -> (value, unit).

        `unreadable` names (question, text) of each answer that the benchmark's rule reads nothing from; they are
        counted, and a warning says which they are.
        """
        named = {name: Metric(value, unit) for name, (value, unit) in metrics.items()}
        unread = list(unreadable)
        warnings = [*warnings]
        if unread:
            empty = sum(not text.strip() for _, text in unread)
            warnings.append(
                f"unreadable answers, counted as {self.unreadable_counts_as}: {shown(name for name, _ in unread)}; "
                f"{empty} of them are empty"
            )
        counts = {**counts, "unreadable": len(unread)}
        return Score(self.name, self.table_metric, named, counts, tuple(warnings), dict(details or {}), tallies or {})


def paper_numbers(
    metric: str,
    *,
    dense: tuple[float | None, float | None] = (None, None),
    image: tuple[float | None, float | None] = (None, None),
    both: tuple[float | None, float | None] = (None, None),
) -> dict[str, dict[str, dict[str, float]]]:
    """Return `PaperNumbers` of one metric from (7B, 13B) pairs of LLaVA-1.5, Dynamic-LLaVA I and I|T; None = none."""
    pairs = {"none": dense, "image": image, "both": both}
    return {
        metric: {
            size: {sparsity: pair[place] for sparsity, pair in pairs.items() if pair[place] is not None}
            for place, size in enumerate(("7b", "13b"))
        }
    }


@contextmanager
def naming(answers: Path) -> Iterator[None]:
    """Say which file of answers has no score or no submission, before the reason."""
    try:
        yield
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise ValueError(f"{answers} is not taken: {error}") from None
