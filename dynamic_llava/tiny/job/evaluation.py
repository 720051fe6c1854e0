"""The tiny world's evaluation: every row of the table on unseen images, from checkpoints to plain numbers."""

import json
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamic_llava.config import SparsityConfig
from dynamic_llava.costs import decoder_shape, llava_shape
from dynamic_llava.eval import predict
from dynamic_llava.eval.efficiency import measure_speed, prefill_costs
from dynamic_llava.eval.metrics.choices import yes_no_scores
from dynamic_llava.methods import Method
from dynamic_llava.model import DynamicLlavaForConditionalGeneration
from dynamic_llava.model.switches import choose_method
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.tiny.job import testset
from dynamic_llava.tiny.job.config import TinyJobConfig
from dynamic_llava.tiny.job.outputs import MeasuredRow, RowFiles, RowOutput
from dynamic_llava.tiny.job.rows import (
    CACHED_SUBSET,
    REFERENCE,
    UNCACHED,
    Row,
    equal_keep_rows,
    first_rows,
    learned_row,
    method_row,
    other_rate,
    window_rows,
)
from dynamic_llava.tiny.job.testset import EXISTENCE, TestSet, accuracy_by_kind, patch_overlap
from dynamic_llava.tiny.world.long import STATEMENTS
from dynamic_llava.tiny.world.texts import parse_attributes

OVERLAP_ROWS = (REFERENCE, "dynamic_image", "fastv", "random_image")
"""Rows whose kept patches are compared with the objects."""
UNTRAINED = "untrained"
"""Key of the untrained-base control."""


@dataclass(frozen=True)
class SeedEvaluation:
    """All rows of one seed: plain numbers for results.json, and the outputs for pictures."""

    rows: list[dict[str, Any]]
    overlap: list[dict[str, Any]]
    agreement: dict[str, float]
    outputs: dict[str, RowOutput]
    seconds: float
    """What measuring the rows has taken, in this process or an earlier one."""

    def write_outputs(self, folder: Path, test: TestSet) -> None:
        """Write every row's answers to <folder>/<row>.jsonl, one query per line, with what was kept."""
        folder.mkdir(parents=True, exist_ok=True)
        for key, output in self.outputs.items():
            pairs = [
                *zip(test.questions, output.answers, strict=False),
                *zip(test.descriptions, output.descriptions, strict=False),
            ]
            with (folder / f"{key}.jsonl").open("w", encoding="utf-8") as file:
                for query, said in pairs:
                    line = {
                        "id": query.id, "image": query.image.name, "kind": query.kind, "answer": query.answer,
                        "text": said.text, "image_kept": said.image_kept[0],
                        "output_kept": [int(kept) for kept in said.output_kept],
                    }  # fmt: skip
                    file.write(json.dumps(line) + "\n")


@dataclass(frozen=True)
class _Inputs:
    """Model inputs, made once and used by every row."""

    questions: list[predict.QueryBatch]
    prompts: list[predict.QueryBatch]
    answers: list[testset.AnswerBatch]

    @classmethod
    def of(cls, processor: DynamicLlavaProcessor, test: TestSet, batch_size: int) -> "_Inputs":
        return cls(
            testset.prompt_batches(processor, test.questions, batch_size),
            testset.prompt_batches(processor, test.descriptions, batch_size),
            testset.answer_batches(processor, test.descriptions, batch_size),
        )


class Evaluator:
    """Holds what the rows share: the checkpoints, the prepared inputs and the settings."""

    def __init__(
        self,
        checkpoints: Mapping[str, Path],
        test: TestSet,
        config: TinyJobConfig,
        say: Callable[[str], None] = print,
        method: Method | None = None,
        files: RowFiles | None = None,
    ) -> None:
        """Load the models and prepare every input once.

        `checkpoints` maps base, control, both and, if trained, image and those of other r_OT to folders. `say` receives
        one line per row. `method`: one more that the dense control is shown under, in a row of its own. `files`: where
        measured rows are kept; those that lie there are not measured again. Raises ValueError when one of the three is
        missing.
        """
        missing = {"base", "control", "both"} - set(checkpoints)
        if missing:
            raise ValueError(f"checkpoints {sorted(missing)} are missing; the table needs base, control and both")
        load = DynamicLlavaForConditionalGeneration.from_pretrained
        self.models = {key: load(str(path)) for key, path in checkpoints.items()}
        self.settings: SparsityConfig = self.models["both"].config.sparsity
        self.processor = DynamicLlavaProcessor.from_pretrained(checkpoints["both"])
        self.test, self.config, self.say, self.method, self.files = test, config, say, method, files
        self.whole = _Inputs.of(self.processor, test, config.batch_size)
        self.subset = _Inputs.of(self.processor, self._subset_of(test), config.batch_size)
        self.timing = testset.prompt_batches(
            self.processor, test.descriptions[: config.timing_batch], config.timing_batch
        )[0]
        self.rows: list[dict[str, Any]] = []
        self.outputs: dict[str, RowOutput] = {}
        self._seconds = 0.0

    def run(self) -> SeedEvaluation:
        """Measure every row and compare what must be equal."""
        uncached = self.config.with_uncached
        for row in first_rows(self.settings, dynamic_image="image" in self.models, uncached=uncached):
            self._add(row)
            if row.key == UNCACHED:
                self._add_cached_subset()
        rates = self.config.more_output_rates
        for rate in rates:
            self._add(learned_row(rate))
        forced = self._metrics(REFERENCE)["keep_output_forced"]
        for row in (*equal_keep_rows(self.settings, forced), *self._window_rows(None)):
            self._add(row)
        for row in (one for rate in rates for one in self._window_rows(rate)):
            self._add(row)
        if self.method is not None:
            self._add(method_row(self.method))
        return SeedEvaluation(self.rows, self._overlap_rows(), self._agreement(), self.outputs, self._seconds)

    def _window_rows(self, rate: float | None) -> list[Row]:
        """Rows at the slots that the learned selection of an r_OT, None: of the main one, has shown."""
        lengths = [int(count) for batch in self.whole.answers for count in batch.inputs["output_mask"].sum(1)]
        learned = REFERENCE if rate is None else f"{REFERENCE}{other_rate(rate)}"
        return window_rows(self.settings, lengths, self._metrics(learned)["slots"], rate)

    def _subset_of(self, test: TestSet) -> TestSet:
        return test.first(self.config.uncached_questions, self.config.uncached_descriptions)

    def _metrics(self, key: str) -> dict[str, float]:
        return next(row for row in self.rows if row["key"] == key)["metrics"]

    def _add(self, row: Row) -> None:
        measured = None if self.files is None else self.files.read(row)
        taken = "measured before" if measured is not None else ""
        if measured is None:
            measured = self._measure(row)
            if self.files is not None:
                self.files.write(row, measured)
        if measured.output is not None:
            self.outputs[row.key] = measured.output
        self._seconds += measured.seconds
        self._record(row.key, row.title, row.note, measured.metrics, taken or f"{measured.seconds:.1f} s")

    def _measure(self, row: Row) -> MeasuredRow:
        begun = time.perf_counter()
        inputs = self.subset if row.subset else self.whole
        metrics, output = self._likelihood(row, inputs), None
        if row.generates:
            output = self._generate(row, inputs)
            metrics |= quality(output, self.test) | self._costs(row, output)
        return MeasuredRow(metrics, output, time.perf_counter() - begun)

    def _record(self, key: str, title: str, note: str, metrics: dict[str, float], how: str) -> None:
        self.rows.append({"key": key, "title": title, "note": note, "metrics": metrics})
        shown = ", ".join(
            f"{name} {scale * metrics[metric]:.{digits}f}"
            for name, metric, scale, digits in (
                ("accuracy", "accuracy/all", 100, 1), ("PPL", "ppl", 1, 3), ("recall", "attribute_recall", 100, 1),
                ("slots", "slots", 100, 1),
            )
            if metric in metrics
        )  # fmt: skip
        self.say(f"  {title:<38} {shown}  ({how})")

    def _likelihood(self, row: Row, inputs: _Inputs) -> dict[str, float]:
        forced = testset.likelihood(
            self.models[row.model], inputs.answers, switches=row.switches, title=f"{row.title}: perplexity"
        )
        return {
            "ppl": testset.perplexity(forced.nll, forced.tokens),
            "keep_image": forced.image_keep_rate,
            "keep_output_forced": forced.output_keep_rate,
            "slots": forced.slots,
            **{f"forced/{name}": share for name, share in forced.stated.items()},
        }

    def _generate(self, row: Row, inputs: _Inputs) -> RowOutput:
        def answer(batches: Sequence[predict.QueryBatch], most: int, what: str) -> list[predict.Prediction]:
            return predict.generate_answers(
                self.models[row.model],
                self.processor,
                batches,
                max_new_tokens=most,
                switches=row.switches,
                use_cache=row.use_cache,
                title=f"{row.title}: {what}",
            )

        return RowOutput(
            self._shared_answers(row) or answer(inputs.questions, self.config.answer_tokens, "questions"),
            answer(inputs.prompts, self.config.description_tokens, "descriptions"),
        )

    def _shared_answers(self, row: Row) -> Sequence[predict.Prediction]:
        """Answers of a row whose output tokens alone are treated otherwise; none where they could differ.

        The first word comes from the prompt, and the token after it from a step that the word itself takes part in,
        whatever was decided about it: with at most two tokens the answers are the same.
        """
        shared = self.outputs[row.answers_of].answers if row.answers_of is not None else ()
        return shared if all(len(answer.tokens) <= 2 for answer in shared) else ()

    def _costs(self, row: Row, output: RowOutput) -> dict[str, float]:
        model = self.models[row.model]
        metrics = prefill_costs(
            decoder_shape(model.config),
            self.settings,
            output.descriptions,
            self.processor.tokens_per_image,
            method=choose_method(self.settings, **row.switches),
            vision=llava_shape(model.config).vision,
        )
        metrics["kv_kib"] = statistics.fmean(said.cache_bytes for said in output.descriptions) / 1024
        metrics["kv_allocated_kib"] = statistics.fmean(said.allocated_bytes for said in output.descriptions) / 1024
        return metrics | measure_speed(
            model,
            self.timing,
            switches=row.switches,
            use_cache=row.use_cache,
            tokens=self.config.timing_tokens,
            repeats=self.config.timing_repeats,
        )

    def _add_cached_subset(self) -> None:
        """The cached row once more, on the subset of the row without a cache: same queries, nothing recomputed."""
        output = self.outputs[REFERENCE].first(self.config.uncached_questions, self.config.uncached_descriptions)
        metrics = quality(output, self.test)
        metrics["ppl"] = self._metrics(UNCACHED)["ppl"]
        note = "the cached model's outputs on the subset of the row above; perplexity is the same masked pass for both"
        self._record(CACHED_SUBSET, "Dynamic I|T, same subset", note, metrics, "nothing computed")

    def _agreement(self) -> dict[str, float]:
        """Shares of equal answers, descriptions and output decisions between the cached and the uncached row."""
        if UNCACHED not in self.outputs:
            return {}
        uncached = self.outputs[UNCACHED]
        cached = self.outputs[REFERENCE].first(len(uncached.answers), len(uncached.descriptions))
        pairs = {
            "answers": list(zip(cached.answers, uncached.answers, strict=True)),
            "descriptions": list(zip(cached.descriptions, uncached.descriptions, strict=True)),
        }
        shares: dict[str, float] = {}
        for name, both in pairs.items():
            shares[name] = len(both)
            shares[f"{name}_equal"] = sum(a.tokens == b.tokens for a, b in both) / len(both)
            shares[f"{name}_decisions_equal"] = sum(
                (a.image_kept, a.output_kept) == (b.image_kept, b.output_kept) for a, b in both
            ) / len(both)
        return shares

    def _overlap_rows(self) -> list[dict[str, Any]]:
        titles = {row["key"]: row["title"] for row in self.rows}
        return [
            {"key": key, "title": titles[key], "note": "", "metrics": self.overlap_of(self.outputs[key].answers)}
            for key in OVERLAP_ROWS
            if key in self.outputs
        ]

    def overlap_of(self, answers: Sequence[predict.Prediction]) -> dict[str, float]:
        """Overlap of kept patches with objects: one answer (the first) per image of the questions."""
        kept: dict[Path, Sequence[int]] = {}
        for query, answer in zip(self.test.questions, answers, strict=True):
            kept.setdefault(query.image, answer.image_kept[0])
        objects = [self.test.object_patches[image] for image in kept]
        return patch_overlap(list(kept.values()), objects, self.processor.tokens_per_image)

    def add_untrained(self, evaluation: SeedEvaluation, checkpoint: Path) -> None:
        """Add the overlap of the untrained-base control's checkpoint: prefill and one token per question."""
        answers = predict.generate_answers(
            DynamicLlavaForConditionalGeneration.from_pretrained(str(checkpoint)),
            self.processor,
            self.whole.questions,
            max_new_tokens=1,
            switches={"sparsity": "both"},
            title="untrained base: kept patches",
        )
        evaluation.outputs[UNTRAINED] = RowOutput(answers, [])
        evaluation.overlap.append(
            {
                "key": UNTRAINED,
                "title": "untrained base, I|T",
                "note": "the same sparse training from a random language model: how much overlap needs no trained base",
                "metrics": self.overlap_of(answers),
            }
        )


def quality(output: RowOutput, test: TestSet) -> dict[str, float]:
    """Scores of the answers and descriptions to a test set's first queries, and the keep rate while describing."""
    questions = test.questions[: len(output.answers)]
    texts = [answer.text for answer in output.answers]
    accuracy = accuracy_by_kind(texts, [q.answer for q in questions], [q.kind for q in questions])
    metrics = {f"accuracy/{kind}": value for kind, value in accuracy.items()}
    f1 = _pope_f1(texts, questions)
    if f1 is not None:
        metrics["pope_f1"] = f1
    described = test.descriptions[: len(output.descriptions)]
    metrics["attribute_recall"] = statistics.fmean(
        len(parse_attributes(said.text) & truth) / len(truth)
        for said, truth in zip(output.descriptions, (test.attributes[q.image] for q in described), strict=True)
    )
    for name, pattern in STATEMENTS.items():
        shares = [_stated(pattern, said.text, q.answer) for said, q in zip(output.descriptions, described, strict=True)]
        if told := [share for share in shares if share is not None]:
            metrics[f"said/{name}"] = statistics.fmean(told)
    kept = [decision for said in output.descriptions for decision in said.output_kept]
    if kept:  # nothing was decided where every description ended with its first token
        metrics["keep_output_generated"] = sum(kept) / len(kept)
    metrics["description_tokens"] = statistics.fmean(len(said.tokens) for said in output.descriptions)
    return metrics


def _stated(pattern: re.Pattern[str], text: str, reference: str) -> float | None:
    """Share of a reference's statements that a text makes, word for word; None where the reference makes none."""
    true, said = ({match[0] for match in pattern.finditer(one)} for one in (reference, text))
    return len(true & said) / len(true) if true else None


def _pope_f1(texts: Sequence[str], questions: Sequence[testset.Query]) -> float | None:
    """Mean F1 over POPE's subsets, as POPE's headline number; None without existence questions."""
    subsets: dict[str, list[tuple[str, str]]] = {}
    for text, question in zip(texts, questions, strict=True):
        if question.kind == EXISTENCE:
            subsets.setdefault(question.subset, []).append((text, question.answer.lower()))
    if not subsets:
        return None
    return statistics.fmean(yes_no_scores(*zip(*pairs, strict=True))["f1"] for pairs in subsets.values())
