"""`python -m dynamic_llava.eval --model ... --tasks ...`: a model's answers to benchmarks, scored, with their costs.

A task that fails is reported and the others go on; answers lie in files as they come (folder.py), so that the same
command, run again, goes on where it was.
"""

import os
import statistics
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dynamic_llava.costs import decoder_shape, llava_shape
from dynamic_llava.eval.answering import (
    Asked,
    Measuring,
    ModelRun,
    Said,
    WithinMemory,
    answer,
    by_length,
    fitting,
    greedy,
    prompt_inputs,
    read_ahead,
)
from dynamic_llava.eval.answers import AnswerLine, read_answers
from dynamic_llava.eval.efficiency import Counted, mean_kv_bytes, measure_speed, prefill_costs, realised_rate
from dynamic_llava.eval.folder import PLACE, AnswerStore, check_folder, identity_of, write_tables
from dynamic_llava.eval.identity import IMAGE, check_images, method_settings, model_settings, question_settings
from dynamic_llava.eval.options import RunOptions
from dynamic_llava.eval.predict import QueryBatch, hide_library_progress
from dynamic_llava.eval.reading import SHOWN, shown
from dynamic_llava.eval.report import evaluation_report
from dynamic_llava.eval.score import score_table
from dynamic_llava.eval.shard import Shard, joined_processes, own_device
from dynamic_llava.eval.summary import SIZES, Summary, TaskRow, page
from dynamic_llava.eval.tasks import Question, Task, task_label
from dynamic_llava.eval.tasks.base import SKIPPED, naming
from dynamic_llava.eval.tasks.questions import ImageFile
from dynamic_llava.eval.within import method_within_budget
from dynamic_llava.files import EXIT_WRITE_FAILED, WriteError
from dynamic_llava.methods import Method, describe_method, import_named
from dynamic_llava.model import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynamic_llava.model.switches import choose_method
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.provenance import environment

DTYPES = ("auto", "float32", "bfloat16", "float16")
TIMED_TOKENS, TIMED_REPEATS = 16, 3
"""Decoding steps, and repeats of prefill and decoding, that times are taken from."""


@dataclass(frozen=True)
class Failure:
    """Why a task has no row of results."""

    text: str
    unwritten: bool = False
    """Whether the error is that a file could not be written, which ends the run."""


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint on this process's device, set to decode greedily."""

    model: Any
    processor: DynamicLlavaProcessor
    settings: Mapping[str, Any]
    """What answers depend on of it (`model_settings`)."""

    @classmethod
    def load(cls, source: str, method: Method, dtype: str) -> "LoadedModel":
        """Load a checkpoint for a method. Raises ValueError and OSError where that is not possible."""
        hide_library_progress()
        processor = DynamicLlavaProcessor.from_pretrained(source)
        model = DynamicLlavaForConditionalGeneration.load_for(method, source, dtype=dtype)
        model.generation_config = greedy(model, processor)
        model = model.to(own_device()).eval()
        return cls(model, processor, model_settings(model, processor, source))


class Evaluation:
    """One loaded model on its way through the tasks. Raises ValueError and OSError where it cannot be loaded.

    `loaded`: the model of the options, where it is there already; timed=False leaves times to the caller.
    """

    def __init__(
        self, options: RunOptions, shard: Shard, loaded: LoadedModel | None = None, *, timed: bool = True
    ) -> None:
        self.options, self.shard, self.timed = options, shard, timed
        import_named(options.method)
        settings = DynamicLlavaConfig.from_pretrained(options.model).sparsity
        rates = {name: rate for name, rate in options.rates.items() if name != "kv_budget"}
        self.method = choose_method(settings, sparsity=options.sparsity, method=options.method, **rates)
        loaded = loaded or LoadedModel.load(options.model, self.method, options.dtype)
        self.model, self.processor = loaded.model, loaded.processor
        if options.kv_budget is not None:
            tasks = [task for task in options.chosen_tasks() if not options.missing(task)]
            self.method = method_within_budget(options, tasks, self.model, self.processor, self.method)
        self.settings = {"model": loaded.settings, **method_settings(self.method, self.model.config.sparsity)}
        """Settings of model and method that every answer depends on."""

    def row(self, task: Task) -> TaskRow:
        """Return the row of a task; where it failed, in whichever process, the row says why.

        Processes but the first only answer: their rows hold nothing else.
        """
        label = task_label(task)
        done = attempt(label, lambda: self._answer(task, label))
        failures = [one for one in self.shard.gather(done if isinstance(done, Failure) else None) if one is not None]
        if not failures:
            if not self.shard.first:
                return TaskRow(label, task)
            row = attempt(label, lambda: self._finish(task, label, *done))
            if isinstance(row, TaskRow):
                return row
            failures = [row]
        text = "; ".join(dict.fromkeys(one.text for one in failures))
        return TaskRow(label, task, error=text, unwritten=any(one.unwritten for one in failures))

    def _answer(self, task: Task, label: str) -> tuple[AnswerStore, list[Question]]:
        """Answer this process's share of a task's questions that has no answer yet."""
        hub = self.options.hub(task)
        questions = task.questions(self.options.data_root, hub)[: self.options.limit]
        if not task.skips_unreadable:
            _check_image_files(questions)
        run = ModelRun(
            self.model,
            self.processor,
            self.method,
            self.options.batch_size,
            self.options.max_new_tokens or task.max_new_tokens,
        )
        settings = self.settings | {
            "max_new_tokens": run.max_new_tokens,
            "questions": question_settings(questions),
            "task": {"name": label, **(task.settings if isinstance(task, Measuring) else {})},
        }
        folder, name = self.options.output_folder / "answers", label.replace(":", "-")
        store = AnswerStore(folder, name, settings, len(questions), self.shard.rank)
        try:
            self._ask(task, run, questions, store)
        finally:
            store.close()
        return store, questions

    def _ask(self, task: Task, run: ModelRun, questions: Sequence[Question], store: AnswerStore) -> None:
        """Ask what is left, batch by batch. ValueError at the end for images that cannot be read."""
        own = self.shard.take(by_length(questions))
        check_images(store.path, store.done, own, questions)
        left = [place for place in own if place not in store.done]
        respond = WithinMemory(task.measure if isinstance(task, Measuring) else answer, run)
        unreadable: dict[int, str] = {}
        with _bar(task.title, len(own), len(own) - len(left), self.shard) as bar:
            for asked, problems in read_ahead(questions, left, run.batch_size, self.processor):
                said = respond(asked)
                store.append([self._line(store, one, its) for one, its in zip(asked, said, strict=True)])
                unreadable |= problems
                if task.skips_unreadable:
                    passed = [(Asked(i, questions[i], None), Said("", {SKIPPED: why})) for i, why in problems.items()]
                    store.append([self._line(store, one, its) for one, its in passed])
                bar.update(len(asked) + len(problems))
        if unreadable and not task.skips_unreadable:
            raise ValueError(
                f"{len(unreadable)} images cannot be read; the other questions are answered and kept, so mend the "
                f"images and run the command again: {'; '.join(list(unreadable.values())[:SHOWN])}"
            )

    def _line(self, store: AnswerStore, asked: Asked, said: Said) -> AnswerLine:
        question = asked.question
        seen = {} if asked.image_digest is None else {IMAGE: asked.image_digest}
        return AnswerLine(
            question.id,
            said.text,
            prompt=question.logged_prompt,
            answer_id=store.answer_id(asked.place),
            model_id=Path(self.options.model).absolute().name,
            metadata={PLACE: asked.place, **seen, **said.metadata},
            extra={**question.extra, **said.extra},
        )

    def _finish(self, task: Task, label: str, store: AnswerStore, questions: Sequence[Question]) -> TaskRow:
        """Merge the answers, judge them, and count and measure what they cost; what fails of it stands in the row."""
        path = store.merge()
        answers, notes = read_answers(path), []
        if self.options.limit is not None:
            notes.append(f"only the first {len(questions)} questions were asked")
        if empty := [one.question_id for one in answers if not one.text.strip() and SKIPPED not in one.metadata]:
            notes.append(f"empty answers: {shown(empty)} of {len(answers)}")
        if skipped := [one.question_id for one in answers if SKIPPED in one.metadata]:
            notes.append(f"questions whose image cannot be read, left out: {shown(skipped)}")
        judged = attempt(label, lambda: self._judge(task, path, answers))
        costs = attempt(label, lambda: self._costs(task, path, answers, questions))
        errors = [
            f"{what}: {one.text}" for what, one in (("score", judged), ("costs", costs)) if isinstance(one, Failure)
        ]
        unwritten = any(one.unwritten for one in (judged, costs) if isinstance(one, Failure))
        found, costs = ({} if isinstance(one, Failure) else one for one in (judged, costs))
        notes += found.pop("notes", ())
        return TaskRow(
            label, task, **found, costs=costs, answers=path, notes=tuple(notes), error="; ".join(errors),
            unwritten=unwritten,
        )  # fmt: skip

    def _judge(self, task: Task, path: Path, answers: Sequence[AnswerLine]) -> dict[str, Any]:
        """Return a row's score, or else its submission, written; with a limit, notes may say why there is neither."""
        root, hub, limit = self.options.data_root, self.options.hub(task), self.options.limit
        try:
            score = task.score_file(path, root, hub, part=limit is not None)
            if score is not None:
                return {"score": score}
            folder = self.options.output_folder / "submissions" / path.stem
            with naming(path):
                return {"submission": task.submission(answers, root, folder, hub)}
        except ValueError as error:
            if limit is None:
                raise
            return {"notes": (f"the first {limit} questions alone have no score: {error}",)}

    def _costs(
        self, task: Task, path: Path, answers: Sequence[AnswerLine], questions: Sequence[Question]
    ) -> dict[str, float]:
        """Return means over the answers that record what they cost, and times on a batch of the first of them."""
        config, per_image = self.model.config, self.processor.tokens_per_image
        shape = decoder_shape(config)
        counted = {
            one.metadata[PLACE]: Counted.read(one.metadata, self.method, shape.layers, per_image, f"{path}:{one.line}")
            for one in answers
            if "prompt_tokens" in one.metadata
        }
        if not counted:
            return {}
        every = list(counted.values())
        vision = llava_shape(config).vision
        prefill = prefill_costs(shape, config.sparsity, every, per_image, method=self.method, vision=vision)
        with_image = [sum(map(len, one.image_kept)) for one in every if one.image_kept]
        kept = {"image_tokens_kept": statistics.fmean(with_image)} if with_image else {}
        kept |= {} if self.method.is_dense or isinstance(task, Measuring) else realised_rate(every)
        # What heads hold after evictions does not follow from other counts, and the first lines of such runs lack it.
        if not self.method.evicts or all(one.heads_hold is not None for one in every):
            kept["kv_bytes"] = mean_kv_bytes(shape, self.method, every, per_image, self.model.dtype.itemsize)
        places = list(counted)
        speed = (
            fitting(lambda rows: self._speed(questions, places[:rows]), self.options.batch_size) if self.timed else {}
        )
        return {
            **kept,
            "image_tokens_per_layer": prefill["image_tokens_per_layer"],
            "prefill_flop_exact": 1e9 * prefill["prefill_gflop_exact"],
            "prefill_flop_paper": 1e9 * prefill["prefill_gflop_paper"],
            **speed,
        }

    def _speed(self, questions: Sequence[Question], places: Sequence[int]) -> dict[str, float]:
        """Return the times of answering the questions at these places as one batch."""
        timed, _ = next(read_ahead(questions, places, len(places), self.processor))
        speed = measure_speed(
            self.model,
            QueryBatch((), prompt_inputs(self.processor, timed)),
            switches={"method": self.method},
            use_cache=True,
            tokens=TIMED_TOKENS,
            repeats=TIMED_REPEATS,
        )
        return {**speed, "speed_batch": len(timed)}


def evaluate(options: RunOptions) -> int:
    """Evaluate, print each task's result, and write summary.json and table.md after each.

    Rows of earlier commands for the same model and method stay in the tables. Returns the exit code: 0, 1 when a task
    failed, or 74 when a file could not be written: what was computed is printed then, and whole files stay. Raises
    ValueError and OSError, before anything is written, when the model cannot be loaded or the folder holds another's.
    """
    with joined_processes() as shard:
        tasks = options.chosen_tasks()
        missing = {task_label(task): options.missing(task) for task in tasks}
        evaluation = None if all(missing.values()) else Evaluation(options, shard)
        earlier = check_folder(options.output_folder, None if evaluation is None else evaluation.settings)
        described = _described(options, shard, evaluation)
        rows: list[TaskRow] = []
        for task in tasks:
            label = task_label(task)
            if evaluation is None or missing[label]:
                rows.append(TaskRow(label, task, error=missing[label]))
            else:
                rows.append(evaluation.row(task))
            if shard.first:
                print(_report(rows[-1]), flush=True)
                if evaluation is not None or earlier is None:
                    rows[-1] = _written(rows[-1], described, options.output_folder)
            if any(shard.gather(rows[-1].unwritten)):
                break
        if shard.first:
            _say_end(rows, replace(described, rows=tuple(rows)), options.output_folder)
    if any(row.unwritten for row in rows):
        return EXIT_WRITE_FAILED
    return 1 if any(row.error for row in rows) else 0


def _written(row: TaskRow, described: Summary, folder: Path) -> TaskRow:
    """Put a row into the folder's tables; return it, with the reason where that cannot be done."""
    try:
        write_tables(replace(described, rows=(row,)), folder)
    except (WriteError, ValueError) as error:
        return replace(row, error="; ".join(filter(None, (row.error, str(error)))), unwritten=True)
    return row


def _say_end(rows: Sequence[TaskRow], summary: Summary, folder: Path) -> None:
    """Say where the tables lie; print this command's own where they could not be written."""
    failed = [row for row in rows if row.error]
    if any(row.unwritten for row in rows):
        print(f"\n{page(summary.to_json())}")
    else:
        print(f"\ntable: {folder / 'table.md'}; summary: {folder / 'summary.json'}")
        print(f"report: {evaluation_report(folder).write()}")
    for row in failed:
        print(f"{'error' if row.unwritten else 'failed'}: {row.label}: {row.error}", file=sys.stderr)
    if failed:
        names = ", ".join(row.label for row in failed)
        print(f"error: {len(failed)} of {len(rows)} tasks failed: {names}", file=sys.stderr)


def attempt(label: str, step: Callable[[], Any]) -> Any:
    """Return what a step returns, or a Failure; one that is no user's mistake also shows where it happened."""
    try:
        return step()
    except (ValueError, OSError) as error:
        return Failure(str(error), unwritten=isinstance(error, WriteError))
    except Exception as error:  # whatever it is, the other tasks go on, and the exit code tells
        print(f"{label}:", file=sys.stderr)
        traceback.print_exc()
        return Failure(f"{type(error).__name__}: {error}")


def _described(options: RunOptions, shard: Shard, evaluation: Evaluation | None) -> Summary:
    """Return the summary of a run before its first row."""
    settings: dict[str, Any] = {"processes": shard.world, "batch_size": options.batch_size}
    settings |= {name: getattr(options, name) for name in ("limit", "max_new_tokens", "source", "round_separator")}
    settings |= {"datasets": dict(options.datasets) or None, **options.rates}
    if evaluation is None:
        method = None if options.method is None else str(options.method.get("name"))
        sparsity = (options.sparsity or "both") if method is None else None
        return Summary(options.model, sparsity, None, settings, environment(), (), method=method)
    text, device = evaluation.model.config.text_config, evaluation.model.device
    settings |= {"dtype": str(evaluation.model.dtype).removeprefix("torch."), "device": device_name(device)}
    size = SIZES.get((text.hidden_size, text.num_hidden_layers))
    identity = identity_of(evaluation.settings)
    sparsity = evaluation.settings.get("sparsity")
    method = describe_method(evaluation.method) if sparsity is None else None
    return Summary(options.model, sparsity, size, settings, environment(), (), identity, method)


def _report(row: TaskRow) -> str:
    failed = [f"{row.task.title}: failed: {row.error}"] if row.error else []
    if row.answers is None:
        return "\n".join(failed)
    lines = [row.task.title if row.score is None else score_table(row.task, row.score)]
    if row.submission is not None:
        lines.append(f"  no score here; written: {', '.join(map(str, row.submission.files))}")
        lines.append(f"  send to: {row.submission.send_to}")
    return "\n".join([*failed, *lines, *(f"  note: {note}" for note in row.notes), f"  answers: {row.answers}"])


def _check_image_files(questions: Sequence[Question]) -> None:
    """Raise FileNotFoundError before anything is computed when image files are missing; ValueError for unsafe names."""
    images = [one.image for one in questions if isinstance(one.image, ImageFile)]
    missing = [image.name for image in images if not os.path.isfile(image.path())]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(images)} images are not in {images[0].folder}: {shown(missing)}"
        )


def _bar(title: str, total: int, done: int, shard: Shard) -> Any:
    """Return a progress bar with the time left, of the first process; in a log file a line every half minute."""
    interval = 0.5 if sys.stderr.isatty() else 30
    return tqdm(
        total=total, initial=done, desc=title, unit="q", ncols=100, mininterval=interval, disable=not shard.first
    )


def device_name(device: torch.device) -> str:
    """Return what results call a device: its type, and the name of an accelerator."""
    return str(device) if device.type == "cpu" else f"{device.type} {torch.get_device_module(device).getdevice_name()}"
