"""`python -m dynamic_llava.eval compare`: the same questions through several methods, and one table of them.

Answers lie in files as they come, one folder for each model and method (eval/folder.py), so that the same command goes
on where an interrupted one was; a command with more methods computes only theirs. compare.json, and what follows from
it, is written after every task.
"""

import gc
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamic_llava.eval.answering import fitting, prompt_inputs, read_ahead
from dynamic_llava.eval.answers import AnswerLine, read_answers
from dynamic_llava.eval.compare.bootstrap import LEVEL, RESAMPLES, SEED
from dynamic_llava.eval.compare.budgets import EqualBudget
from dynamic_llava.eval.compare.contenders import Contender, Entrant, contenders_of, enter, folder_name
from dynamic_llava.eval.compare.report import comparison_report
from dynamic_llava.eval.compare.results import Outcome, task_results
from dynamic_llava.eval.compare.spelling import read_methods
from dynamic_llava.eval.compare.table import page, panels_of, table_of_cells
from dynamic_llava.eval.efficiency import Clock, interleaved_times
from dynamic_llava.eval.folder import PLACE, identity_of
from dynamic_llava.eval.options import RunOptions
from dynamic_llava.eval.predict import QueryBatch
from dynamic_llava.eval.reading import fields_of, read_json, shown
from dynamic_llava.eval.run import Failure, LoadedModel, attempt, device_name
from dynamic_llava.eval.shard import Shard, joined_processes
from dynamic_llava.eval.tasks import Question, Task, missing_files, task_label
from dynamic_llava.eval.writing import write_json, write_text
from dynamic_llava.files import EXIT_WRITE_FAILED
from dynamic_llava.provenance import environment
from dynamic_llava.viz.curves import draw_quality_against_cost
from dynamic_llava.viz.run_report import REPORT

RESULT, PAGE, CELLS, PICTURE = "compare.json", "compare.md", "compare.csv", "compare.png"
TIMES = "times"
"""Folder of what was measured, by model and task."""
TIMED_TOKENS = 16
"""Decoding steps that times are taken from."""


@dataclass(frozen=True)
class CompareOptions:
    """A comparison as the command line asks for it."""

    run: RunOptions
    """Tasks, data, folder and how to answer; of its models the first."""
    models: tuple[str, ...]
    """Checkpoints; differences are to the dense method on the first."""
    methods: str
    """As spelling.py reads them."""
    equal: str | None = None
    """The budget that every method is given: image-tokens=N or kv-bytes=N."""
    repeats: int = 7
    """Rounds that times are medians of."""
    learned_only: frozenset[str] = frozenset()
    """Of the models those that run no method without learned weights."""

    def __post_init__(self) -> None:
        if twice := sorted({one for one in self.models if self.models.count(one) > 1}):
            raise ValueError(f"models {', '.join(twice)} are named twice; name each once")
        if self.repeats < 2:
            raise ValueError(f"repeats={self.repeats} have no quartiles; give 2 or more")


def compare(options: CompareOptions, *, table: bool = True) -> int:
    """Answer, score, count and time every method on every task; write the table, and print it unless table=False.

    Returns the exit code: 0, 1 where a task failed for a method, or 74 where a file could not be written. Raises
    ValueError and OSError, before anything is computed, for what cannot be compared.
    """
    tasks = options.run.chosen_tasks()
    equal = None if options.equal is None else EqualBudget.read(options.equal)
    entrants, left_out = enter(options.models, read_methods(options.methods), options.learned_only)
    if not any(one.method.is_dense and one.model == options.models[0] for one in entrants):
        raise ValueError("the methods lack a dense one, which every difference is to; add dense to --methods")
    questions = _questions(tasks, options.run)
    with joined_processes() as shard:
        comparison = Comparison(options, shard, tasks, questions, equal, left_out)
        for model in options.models:
            comparison.add([one for one in entrants if one.model == model])
            if comparison.unwritten:
                break
        return comparison.end(table=table)


class Comparison:
    """What is found, task by task, and where it is written."""

    def __init__(
        self,
        options: CompareOptions,
        shard: Shard,
        tasks: Sequence[Task],
        questions: Mapping[str, Sequence[Question]],
        equal: EqualBudget | None,
        left_out: Sequence[str],
    ) -> None:
        self.options, self.shard, self.tasks, self.questions = options, shard, tasks, questions
        self.equal, self.left_out = equal, left_out
        self.outcomes: dict[str, list[Outcome]] = {task_label(task): [] for task in tasks}
        self.found = {task_label(task): task_results(task, ()) for task in tasks}
        self.methods: list[dict[str, Any]] = []
        self.device: str | None = None
        self.environment = environment()
        self.unwritten = False

    def add(self, entrants: Sequence[Entrant]) -> None:
        """Load the checkpoint of these entrants and take all of them through the tasks, task by task."""
        learned = next((one.method for one in entrants if one.method.used_parts), entrants[0].method)
        loaded = LoadedModel.load(entrants[0].model, learned, self.options.run.dtype)
        contenders = contenders_of(entrants, loaded, self.options.run, self.shard, self.equal, self.questions)
        self.device = device_name(loaded.model.device)
        for one in contenders:
            self.methods.append(one.to_json())
            if self.shard.first:
                print(f"{one.entrant.label}: {self.methods[-1]['described']}", flush=True)
        for task in self.tasks:
            self._take(task, contenders)
            if any(self.shard.gather(self.unwritten)):
                self.unwritten = True
                return
        del loaded, contenders
        gc.collect()

    def _take(self, task: Task, contenders: Sequence[Contender]) -> None:
        """Answer one task by each method, then time the methods in turn; write what is known so far."""
        label = task_label(task)
        outcomes = [Outcome(one.entrant, one.evaluation.row(task)) for one in contenders]
        if self.shard.first:
            timed = [
                (one, outcome)
                for one, outcome in zip(contenders, outcomes, strict=True)
                if outcome.row.answers is not None
            ]
            for one, outcome in timed:
                _check_budget(one, outcome, self.equal)
            done = attempt(label, lambda: self._time(label, timed)) if timed else None
            for _, outcome in timed if isinstance(done, Failure) else ():
                outcome.fail(f"times: {done.text}")
            self.outcomes[label] += outcomes
            self.found[label] = task_results(task, self.outcomes[label])
            self._report(label, outcomes)
            self._write()
        self.shard.gather(None)

    def _time(self, label: str, timed: Sequence[tuple[Contender, Outcome]]) -> None:
        """Give each outcome its times: taken now, or by an earlier command that took those of the same methods."""
        batch, (first, outcome) = self.options.run.batch_size, timed[0]
        said = read_answers(outcome.row.answers) if outcome.row.answers is not None else []
        places = [one.metadata[PLACE] for one in said if "prompt_tokens" in one.metadata]
        if not places:
            return
        settings = {
            "methods": {one.entrant.label: one.identity for one, _ in timed},
            "environment": self.environment,
            "device": self.device,
            "batch_size": batch,
            "repeats": self.options.repeats,
            "tokens": TIMED_TOKENS,
            "questions": len(self.questions[label]),
        }
        model = identity_of(first.evaluation.settings["model"])
        path = self.options.run.output_folder / TIMES / f"{folder_name(label, model)}.json"
        times = _earlier(path, settings)
        if times is None:
            contenders = [one for one, _ in timed]
            times = fitting(lambda rows: self._measure(label, contenders, places[:rows]), min(batch, len(places)))
            write_json(path, {"settings": settings, "times": times}, indent=1)
        for one, outcome in timed:
            outcome.times = times[one.entrant.label]

    def _measure(self, label: str, contenders: Sequence[Contender], places: Sequence[int]) -> dict[str, Any]:
        """Return label -> times on the questions at these places, as one batch."""
        model, processor = contenders[0].evaluation.model, contenders[0].evaluation.processor
        asked, _ = next(read_ahead(self.questions[label], places, len(places), processor))
        batch = QueryBatch((), prompt_inputs(processor, asked))
        clocks = [Clock(model, batch, {"method": one.evaluation.method}) for one in contenders]
        taken = interleaved_times(clocks, tokens=TIMED_TOKENS, repeats=self.options.repeats)
        found = zip(contenders, taken, strict=True)
        return {one.entrant.label: {**times.summary(), "speed_batch": len(asked)} for one, times in found}

    def _report(self, label: str, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            row, who = outcome.row, outcome.entrant.label
            value = "no score" if row.score is None else f"{row.score.table_metric} {row.score.value:.4g}"
            self.unwritten = self.unwritten or row.unwritten
            print(f"  {label}, {who}: {f'failed: {row.error}' if row.error else value}", flush=True)

    def results(self) -> dict[str, Any]:
        """Return compare.json."""
        run = self.options.run
        names = ("batch_size", "dtype", "limit", "max_new_tokens", "source", "round_separator")
        every = [outcome for outcomes in self.outcomes.values() for outcome in outcomes]
        batches = {outcome.times.get("speed_batch") for outcome in every} - {None}
        settings = {name: getattr(run, name) for name in names} | {"processes": self.shard.world}
        settings |= {"device": self.device, "repeats": self.options.repeats, "speed_batch": max(batches, default=None)}
        return {
            "models": list(self.options.models),
            "methods": list(self.methods),
            "left_out": list(self.left_out),
            "equal": None if self.equal is None else str(self.equal),
            "bootstrap": {"resamples": RESAMPLES, "seed": SEED, "level": LEVEL},
            "settings": settings,
            "tasks": dict(self.found),
            "environment": self.environment,
        }

    def _write(self, *, whole: bool = False) -> None:
        """Write what is known so far, at the end the picture too.

        A result that cannot be written is printed, and ends the comparison.
        """
        folder, found = self.options.run.output_folder, self.results()
        try:
            write_json(folder / RESULT, found, indent=1)
            write_text(folder / PAGE, page(found))
            write_text(folder / CELLS, table_of_cells(found))
            if whole and any(panels := panels_of(found)):
                draw_quality_against_cost(folder / PICTURE, panels, title=found["equal"] or "")
            if whole:
                comparison_report(folder).write()
        except OSError as error:
            print(f"{page(found)}\nerror: {error}", file=sys.stderr)
            self.unwritten = True

    def end(self, *, table: bool) -> int:
        """Say where the table lies, and print it where it is asked for; return the exit code."""
        failed = [outcome for outcomes in self.outcomes.values() for outcome in outcomes if outcome.row.error]
        if self.shard.first:
            self._write(whole=True)
            print((f"\n{page(self.results())}\n" if table else "") + f"table: {self.options.run.output_folder / PAGE}")
            if not self.unwritten:
                print(f"report: {self.options.run.output_folder / REPORT}")
            for outcome in failed:
                print(
                    f"error: {outcome.row.label}, {outcome.entrant.label}: {outcome.row.error}",
                    file=sys.stderr,
                )
        if any(self.shard.gather(self.unwritten)):
            return EXIT_WRITE_FAILED
        return 1 if any(self.shard.gather(bool(failed))) else 0


def _check_budget(contender: Contender, outcome: Outcome, equal: EqualBudget | None) -> None:
    """Count an equal number of image tokens on the record of every answer; the row says where it is not held."""
    if equal is None or equal.kind != "image-tokens" or contender.fitted is None or outcome.row.answers is None:
        return
    answers = read_answers(outcome.row.answers)
    if others := [one.question_id for one in answers if not _holds(one, equal.amount)]:
        outcome.fail(f"{equal} is not held by the answers to {shown(others)}")


def _holds(answer: AnswerLine, tokens: int) -> bool:
    return all(kept == tokens for kept in answer.metadata.get("image_kept", ()))


def _earlier(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the times that a file holds where they were taken of the same methods, on the same machine and source."""
    if not path.is_file():
        return None
    found = fields_of(read_json(path), {}, str(path))
    same = found.get("settings") == json.loads(json.dumps(settings))
    return found.get("times") if same else None


def _questions(tasks: Sequence[Task], run: RunOptions) -> dict[str, list[Question]]:
    """Return the questions of every task. FileNotFoundError that names every file which is missing."""
    lacking = [
        f"{task_label(task)}: there is no {path}, get it from {get}"
        for task in tasks
        if run.hub(task) is None
        for path, get in missing_files(task, run.data_root)
    ]
    if lacking:
        raise FileNotFoundError("; ".join(lacking))
    return {task_label(task): task.questions(run.data_root, run.hub(task))[: run.limit] for task in tasks}
