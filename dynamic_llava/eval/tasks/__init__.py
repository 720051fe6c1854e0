"""The benchmarks behind one protocol (base.py). A new one is one file and one row here; no torch is imported."""

from dynamic_llava.eval.tasks.base import GENERATION, PAPER_TABLE1, Question, Score, Submission, Task
from dynamic_llava.eval.tasks.cvbench import CvBench2d
from dynamic_llava.eval.tasks.generation import LvisMulti, LvisSingle, ShareGpt4v
from dynamic_llava.eval.tasks.gqa import Gqa
from dynamic_llava.eval.tasks.hub import HubData
from dynamic_llava.eval.tasks.llava_bench import LlavaBench
from dynamic_llava.eval.tasks.mmbench import MmBench
from dynamic_llava.eval.tasks.mme import Mme
from dynamic_llava.eval.tasks.mmvet import MmVet
from dynamic_llava.eval.tasks.mmvp import Mmvp
from dynamic_llava.eval.tasks.pope import Pope
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
    )
}  # fmt: skip
"""Registered name -> class, in the order of the paper's tables."""

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
]
