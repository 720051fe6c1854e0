"""The benchmarks behind one protocol (base.py). A new one is one file and one row here; no torch is imported.

`task_list` is what `--tasks list` prints: each task, its files, which of them are missing, and where to get those.
"""

from pathlib import Path

from dynamic_llava.eval.tasks.base import GENERATION, PAPER_TABLE1, Score, Submission, Task
from dynamic_llava.eval.tasks.chartqa import ChartQa
from dynamic_llava.eval.tasks.cvbench import CvBench2d
from dynamic_llava.eval.tasks.docvqa import DocVqa, InfoVqa
from dynamic_llava.eval.tasks.generation import LvisMulti, LvisSingle, ShareGpt4v
from dynamic_llava.eval.tasks.gqa import Gqa
from dynamic_llava.eval.tasks.hub import HubData
from dynamic_llava.eval.tasks.judged import LlavaBench, MmVet
from dynamic_llava.eval.tasks.mmbench import MmBench
from dynamic_llava.eval.tasks.mme import Mme
from dynamic_llava.eval.tasks.mmstar import MmStar
from dynamic_llava.eval.tasks.mmvp import Mmvp
from dynamic_llava.eval.tasks.ocrbench import OcrBench
from dynamic_llava.eval.tasks.pope import Pope
from dynamic_llava.eval.tasks.questions import Question
from dynamic_llava.eval.tasks.realworldqa import RealWorldQa
from dynamic_llava.eval.tasks.scienceqa import ScienceQa
from dynamic_llava.eval.tasks.seed import Seed
from dynamic_llava.eval.tasks.textvqa import TextVqa
from dynamic_llava.eval.tasks.vizwiz import VizWiz
from dynamic_llava.eval.tasks.vqav2 import VqaV2

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        VqaV2,
        Gqa,
        ScienceQa,
        TextVqa,
        Pope,
        Mme,
        MmBench,
        Seed,
        Mmvp,
        RealWorldQa,
        CvBench2d,
        VizWiz,
        LlavaBench,
        MmVet,
        LvisSingle,
        LvisMulti,
        ShareGpt4v,
        DocVqa,
        InfoVqa,
        ChartQa,
        OcrBench,
        MmStar,
    )
}  # fmt: skip
"""Registered name -> class, in the order of the paper's tables; then those that it does not have."""

GROUPS = ("all", PAPER_TABLE1, GENERATION)
"""Names that stand for several tasks."""


def get_task(name: str) -> Task:
    """Return the task of a name, or of `name:split` (vqav2:val); ValueError for an unknown name or split."""
    short, _, split = name.partition(":")
    if short not in TASKS:
        raise ValueError(
            f"task {name!r} is not known; choose from {', '.join(TASKS)} or the groups {', '.join(GROUPS)}"
        )
    return TASKS[short](split or None)


def get_tasks(names: str) -> list[Task]:
    """Return the tasks of a comma-separated list of names and groups, each once; ValueError for an unknown one."""
    found: dict[tuple[str, str | None], Task] = {}
    for name in filter(None, map(str.strip, names.split(","))):
        if name in GROUPS:
            tasks = [task() for task in TASKS.values() if name == "all" or name in task.groups]
        else:
            tasks = [get_task(name)]
        for task in tasks:
            found.setdefault((task.name, task.used_split()), task)
    if not found:
        raise ValueError(f"no task is named in {names!r}; choose from {', '.join(TASKS)} or {', '.join(GROUPS)}")
    return list(found.values())


def task_label(task: Task) -> str:
    """Return the name that asks for this task: with its split where one was asked for."""
    return task.name if task.split is None else f"{task.name}:{task.split}"


def missing_files(task: Task, root: Path) -> list[tuple[Path, str]]:
    """Return (path, where to get it) of what a task reads below `root` and is not there."""
    needed = [(root / file.path, file.get) for file in task.needed_files()]
    return [(path, get) for path, get in needed if not path.exists()]


def task_list(root: Path) -> str:
    """Return all tasks and splits as text, a line a file."""
    lines = [f"data root: {root}; groups: {', '.join(GROUPS)}"]
    for kind in TASKS.values():
        lines += ["", f"{kind.name}  ({kind.title}{''.join(f', {group}' for group in kind.groups)})"]
        for split in kind.splits or (None,):
            lines += _split_lines(kind(split), root)
        if kind.hub is not None:
            config = f", configuration {kind.hub.config}" if kind.hub.config else ""
            lines.append(f"  or --source hf: {kind.hub.dataset}{config}")
        if kind.send_to:
            lines.append(f"  answers go to: {kind.send_to}")
    return "\n".join(lines)


def _split_lines(task: Task, root: Path) -> list[str]:
    missing = {path for path, _ in missing_files(task, root)}
    state = f"{len(missing)} missing" if missing else "ready"
    lines = [f"  {task_label(task)}: {state}"]
    for file in task.needed_files():
        absent = root / file.path in missing
        lines.append(f"    {'MISSING' if absent else 'found  '}  {file.path}  ({file.holds})")
        lines += [f"             get it from {file.get}"] if absent else []
    return lines


__all__ = [
    "GENERATION",
    "GROUPS",
    "PAPER_TABLE1",
    "TASKS",
    "HubData",
    "Question",
    "Score",
    "Submission",
    "Task",
    "get_task",
    "get_tasks",
    "missing_files",
    "task_label",
    "task_list",
]
