"""The typed file of a sweep: the runs of a table, the benchmarks of its columns, and what the paper prints there."""

from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from dynamic_llava.config import check_finite
from dynamic_llava.eval.tasks import get_task

TINY = "tiny"
"""Task of columns that are measured on the tiny world's test set."""


@dataclass(frozen=True)
class SweepColumn:
    """One column of the table: a metric of a benchmark."""

    header: str = ""
    """Its head; the paper's numbers are given under this name."""
    task: str = ""
    """Benchmark of `python -m dynamic_llava.eval` (gqa, vqav2:val, ...), or `tiny`."""
    metric: str = ""
    """Metric of the benchmark; empty is the one that the paper's tables print."""
    digits: int = 1
    """Digits after the point."""
    scale: float = 1.0
    """Factor from the metric's unit to the printed one (100 prints a share in percent)."""


@dataclass(frozen=True)
class SweepRow:
    """One row: a run that is trained unless it is there, or a checkpoint as it is."""

    title: str = ""
    """Name of the row, in the first column of the table."""
    config: str = ""
    """Configuration file of the run, relative to the sweep's file."""
    overrides: list[str] = field(default_factory=list)
    """Command-line arguments of the run, e.g. ["--sparsity.image-keep-rate", "0.5", "--name", "half"]."""
    model: str = ""
    """Instead of a run: a checkpoint folder or hub name that is evaluated as it is, or `tiny` for the shipped base."""
    sparsity: Literal["trained", "both", "image", "output", "none"] = "trained"
    """What is sparsified in evaluation: what the run was trained with, or this; a `model` counts as trained dense."""
    method: Any = None
    """The method of the evaluation: a name, or {name: ..., setting: ...}; by default the method of the run."""
    paper: dict[str, float] = field(default_factory=dict)
    """The paper's numbers by the column's header."""


@dataclass(frozen=True)
class TinyTestSet:
    """Section `tiny`: the tiny world that the trainings get as their data, and how much of its test set is asked."""

    train_images: int = 5000
    """Scenes of the training split."""
    test_images: int = 800
    """Unseen scenes of the test split."""
    data_seed: int = 0
    """Seed of both splits."""
    questions: int = 700
    """Short questions per row, spread evenly over the kinds."""
    descriptions: int = 64
    """Descriptions per row."""

    def __post_init__(self) -> None:
        for one in fields(self):
            least = 0 if one.name == "data_seed" else 1
            if getattr(self, one.name) < least:
                raise ValueError(f"tiny.{one.name}={getattr(self, one.name)} is not allowed; give {least} or more")


@dataclass(frozen=True)
class SweepConfig:
    """A table to make. Trained runs lie where their own files say, beside every other run.

    Raises ValueError for a row or column that is not whole, and for a number of the paper under an unknown header.
    """

    name: str = ""
    """Name of the table; its files lie in <output_folder>/sweeps/<name>."""
    title: str = ""
    """Heading of the table."""
    note: str = ""
    """Note for readers, below the table."""
    output_folder: str = "runs"
    """Folder of the tables, and of the evaluations of `model` rows."""
    data_root: str = "playground/data/eval"
    """Folder of the benchmarks, as LLaVA lays it out."""
    batch_size: int = 16
    """Questions per batch of an evaluation; the answers do not depend on it."""
    columns: list[SweepColumn] = field(default_factory=list)
    """Columns, in order."""
    rows: list[SweepRow] = field(default_factory=list)
    """Rows, in order; those that name the same run share it."""
    tiny: TinyTestSet | None = None
    """The tiny world, for columns of task `tiny`."""

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name={self.name!r} must be a plain folder name; output_folder says where it lies")
        if not self.rows or not self.columns:
            raise ValueError(f"sweep {self.name} needs at least one row and one column")
        headers = [column.header for column in self.columns]
        titles = [row.title for row in self.rows]
        for what, names in (("header", headers), ("title", titles)):
            if "" in names or len(set(names)) < len(names):
                raise ValueError(f"sweep {self.name}: every {what} must be given, and given once; these are {names}")
        for column in self.columns:
            check_finite(f"column {column.header!r}: ", column)
            self._check_task(column)
        for row in self.rows:
            _check_row(row, headers)
        self._check_world()

    @property
    def folder(self) -> Path:
        """Return the folder of the table's files."""
        return Path(self.output_folder) / "sweeps" / self.name

    def model_folder(self, model: str) -> Path:
        """Return the folder of the evaluations of a `model` row."""
        return Path(self.output_folder) / "models" / Path(model).name

    @property
    def tasks(self) -> list[str]:
        """The benchmarks of the columns, each once, in order."""
        return list(dict.fromkeys(column.task for column in self.columns))

    def _check_world(self) -> None:
        """Refuse a tiny world that no column asks for, and settings of benchmarks where no column is one."""
        if self.tiny is not None and TINY not in self.tasks:
            raise ValueError(
                f"sweep {self.name} has a `tiny` section, on whose data every run would be trained, and no column of "
                "task tiny; leave the section out, or add such a column"
            )
        defaults = {one.name: one.default for one in fields(self)}
        ignored = [name for name in ("data_root", "batch_size") if getattr(self, name) != defaults[name]]
        if ignored and self.tasks == [TINY]:
            raise ValueError(f"sweep {self.name} sets {ignored[0]} for benchmarks, and every column is of task tiny")

    def _check_task(self, column: SweepColumn) -> None:
        if column.task == TINY and (self.tiny is None or not column.metric):
            raise ValueError(f"column {column.header!r} of task tiny needs a metric, and the sweep a `tiny` section")
        if column.task != TINY:
            get_task(column.task)


def _check_row(row: SweepRow, headers: list[str]) -> None:
    if bool(row.config) == bool(row.model):
        raise ValueError(f"row {row.title!r} needs either a config (a run) or a model (a checkpoint as it is)")
    if row.model and row.overrides:
        raise ValueError(f"row {row.title!r} is a checkpoint as it is; overrides belong to a run's config")
    if row.method is not None and row.sparsity != "trained":
        raise ValueError(
            f"row {row.title!r}: sparsity={row.sparsity!r} and method={row.method!r} contradict each other: the first "
            "is Dynamic-LLaVA's; leave one of them out"
        )
    for header in row.paper:
        if header not in headers:
            close = get_close_matches(header, headers, n=1)
            advice = f"did you mean {close[0]!r}?" if close else f"the columns are {', '.join(headers)}"
            raise ValueError(f"row {row.title!r}: paper names {header!r}, which is no column; {advice}")
