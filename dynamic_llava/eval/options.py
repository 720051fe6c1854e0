"""What `python -m dynamic_llava.eval --model ... --tasks ...` is asked for; no torch here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dynamic_llava.config import SparsityMode
from dynamic_llava.config.checks import check_one_rate
from dynamic_llava.eval.tasks import TASKS, HubData, Task, get_tasks, missing_files
from dynamic_llava.eval.tasks.generation import GenerationTask


@dataclass(frozen=True)
class RunOptions:
    """One evaluation as the command line asks for it; ValueError where it is not possible."""

    model: str
    """Checkpoint folder or hub name."""
    tasks: str
    """Names and groups, comma-separated."""
    data_root: Path
    """LLaVA's playground/data/eval."""
    output_folder: Path
    sparsity: SparsityMode | None = None
    """Short for this setting of Dynamic-LLaVA; None is both, unless `method` says otherwise."""
    method: Mapping[str, Any] | None = None
    """The method, as methods/registry.py reads it; None is Dynamic-LLaVA with the checkpoint's settings."""
    image_keep_rate: float | None = None
    """Share of each image's tokens that is kept; None is the checkpoint's, or the method's own."""
    output_keep_rate: float | None = None
    """Share of output tokens that is kept; None is what the method's own settings keep."""
    kv_budget: str | None = None
    """Bytes that keys and values of every answer may fill when it ends, such as 512MiB; chooses output_keep_rate."""
    batch_size: int = 16
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights; auto is the checkpoint's."""
    limit: int | None = None
    """First questions of each task only."""
    max_new_tokens: int | None = None
    """Longest answer; None is each task's own."""
    source: Literal["layout", "hf"] = "layout"
    """Read LLaVA's layout below data_root, or each task's Hugging Face dataset."""
    datasets: Mapping[str, str] = field(default_factory=dict)
    """Task -> dataset id or local folder to read instead, whatever `source` says."""
    round_separator: Literal["official", "template"] | None = None
    """How questions after the first are fed, for tasks of several rounds only; None is each task's own."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "limit", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is not possible; give 1 or more")
        check_one_rate(self.output_keep_rate, self.kv_budget)
        named = {task.name for task in get_tasks(self.tasks)}
        if unknown := sorted(set(self.datasets) - named):
            raise ValueError(f"a dataset is given for {unknown}, which --tasks does not name; it names {sorted(named)}")

        several = [task.name for task in TASKS.values() if issubclass(task, GenerationTask) and task.several]
        if self.round_separator is not None and named.isdisjoint(several):
            raise ValueError(
                f"a round separator is given, but --tasks names no task of several rounds ({', '.join(several)})"
            )

    def chosen_tasks(self) -> list[Task]:
        """Return the tasks that `tasks` names, set up as these options say."""
        tasks = get_tasks(self.tasks)
        for task in tasks:
            if isinstance(task, GenerationTask) and task.several and self.round_separator is not None:
                task.round_separator = self.round_separator
        return tasks

    @property
    def rates(self) -> dict[str, float | str]:
        """Return what was asked of the keep rates, by the options' names."""
        names = ("image_keep_rate", "output_keep_rate", "kv_budget")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def missing(self, task: Task) -> str:
        """Say which files of the layout a task lacks; empty when it has them, or is read from a dataset."""
        if self.source == "hf" or task.name in self.datasets:
            return ""
        missing = missing_files(task, self.data_root)
        return "; ".join(f"there is no {path}, get it from {get}" for path, get in missing)

    def hub(self, task: Task) -> HubData | None:
        """Return the dataset that a task is read from; None for the layout. ValueError for a task that has none."""
        if task.name in self.datasets or self.source == "hf":
            return task.hub_data(self.datasets.get(task.name))
        return None
