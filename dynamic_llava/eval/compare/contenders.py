"""Who takes part in a comparison: every method on every checkpoint that can run it, with the budget it is given."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dynamic_llava.costs import decoder_shape
from dynamic_llava.eval.answering import prompt_inputs, read_ahead
from dynamic_llava.eval.compare.budgets import EqualBudget, Fitted, Probed
from dynamic_llava.eval.compare.spelling import SpelledMethod
from dynamic_llava.eval.efficiency import Counted, mean_kv_bytes
from dynamic_llava.eval.folder import identity_of
from dynamic_llava.eval.identity import method_settings
from dynamic_llava.eval.options import RunOptions
from dynamic_llava.eval.predict import QueryBatch, generate_answers
from dynamic_llava.eval.run import Evaluation, LoadedModel
from dynamic_llava.eval.shard import Shard
from dynamic_llava.eval.tasks import Question
from dynamic_llava.methods import Method, describe_method, import_named, print_method
from dynamic_llava.model import DynamicLlavaConfig
from dynamic_llava.model.loading import check_learned, cuts_of

PROBED = 4
"""First questions with an image of each task that an equal budget is counted on."""


@dataclass(frozen=True)
class Entrant:
    """A method on a checkpoint, before the checkpoint is loaded."""

    model: str
    label: str
    method: Method


@dataclass(frozen=True)
class Contender:
    """A method that runs on a loaded checkpoint."""

    entrant: Entrant
    evaluation: Evaluation
    fitted: Fitted | None
    """What an equal budget has set of it."""

    @property
    def identity(self) -> str:
        """A digest of what its answers depend on."""
        return identity_of(self.evaluation.settings)

    def to_json(self) -> dict[str, Any]:
        """Return who it is, as compare.json says it."""
        method, fitted = self.evaluation.method, self.fitted
        return {
            "model": self.entrant.model,
            "method": self.entrant.label,
            "settings": print_method(method),
            "described": describe_method(method),
            "set": None if fitted is None else fitted.describe(),
            "held": None if fitted is None else fitted.held,
            "identity": self.identity,
        }


def enter(
    models: Sequence[str], methods: Sequence[SpelledMethod], learned_only: Collection[str] = ()
) -> tuple[list[Entrant], list[str]]:
    """Return every method on every checkpoint that can run it, and why others are left out; nothing is loaded.

    The models of `learned_only` run only methods that decide by learned weights. ValueError for a method that is not
    understood, and where none of the checkpoints can run it.
    """
    entrants: list[Entrant] = []
    refused: dict[str, list[str]] = {}
    for one in methods:
        import_named(one.said)
    for model in models:
        config = DynamicLlavaConfig.from_pretrained(model)
        for one in methods:
            method = one.read(config.sparsity)
            if model in learned_only and not method.used_parts:
                continue
            try:
                cuts_of(method, config.text_config.num_hidden_layers)
                check_learned(model, config, method)
            except ValueError as error:
                refused.setdefault(one.label, []).append(f"{one.label} on {model}: {error}")
            else:
                entrants.append(Entrant(model, one.label, method))
    running = {one.label for one in entrants}
    for label, reasons in refused.items():
        if label not in running:
            raise ValueError("; ".join(reasons))
    return entrants, [reason for reasons in refused.values() for reason in reasons]


def contenders_of(
    entrants: Sequence[Entrant],
    loaded: LoadedModel,
    options: RunOptions,
    shard: Shard,
    equal: EqualBudget | None,
    questions: Mapping[str, Sequence[Question]],
) -> list[Contender]:
    """Set up the entrants of one loaded checkpoint, budgets set; the dense one, which keeps everything, has none.

    `questions` are those of each task. ValueError where a method cannot be given the budget.
    """
    probing = None if equal is None else Probing(loaded, _probed(questions), options.batch_size)
    found = []
    for one in entrants:
        fitted = None if equal is None or probing is None or one.method.is_dense else equal.fit(one.method, probing)
        method = one.method if fitted is None else fitted.method
        spelled = print_method(method)
        settings = {"model": loaded.settings, **method_settings(method, loaded.model.config.sparsity)}
        folder = options.output_folder / "answers" / folder_name(one.label, identity_of(settings))
        own = replace(options, model=one.model, method=spelled, output_folder=folder)
        found.append(Contender(one, Evaluation(own, shard, loaded, timed=False), fitted))
    return found


def folder_name(label: str, identity: str) -> str:
    """Return the name of a folder or file: what is in it, and what it depends on."""
    return f"{re.sub(r'[^a-zA-Z0-9_.=,-]+', '_', label)[:80]}-{identity[:8]}"


class Probing:
    """Counts what methods leave of a few prompts, on the record of their prefill."""

    def __init__(self, loaded: LoadedModel, questions: Sequence[Question], batch_size: int) -> None:
        self._loaded = loaded
        self._batches: list[QueryBatch] = []
        for asked, unreadable in read_ahead(questions, range(len(questions)), batch_size, loaded.processor):
            if unreadable:
                raise ValueError("; ".join(unreadable.values()))
            self._batches.append(QueryBatch(tuple(range(len(asked))), prompt_inputs(loaded.processor, asked)))

    def __call__(self, method: Method) -> Probed:
        """Return what the method leaves when the prompts' prefill ends."""
        model, processor = self._loaded.model, self._loaded.processor
        shape, per_image = decoder_shape(model.config), processor.tokens_per_image
        said = [
            one
            for batch in self._batches
            for one in generate_answers(model, processor, [batch], max_new_tokens=1, switches={"method": method})
        ]
        counted = [
            Counted(
                one.prompt_tokens,
                tuple(map(range, map(len, one.image_kept))),
                one.image_seen,
                1,
                0,
                one.heads_hold,
                one.prompt_dropped,
            )
            for one in said
        ]
        images = [len(kept) for one in said for kept in one.image_kept]
        size = mean_kv_bytes(shape, method, counted, per_image, model.dtype.itemsize) if counted else 0.0
        return Probed(tuple(images), size, max((one.prompt_tokens for one in said), default=1))


def _probed(questions: Mapping[str, Sequence[Question]]) -> list[Question]:
    """Return the first questions of each task, those with an image before others."""
    return [
        question
        for asked in questions.values()
        for question in sorted(asked, key=lambda one: one.image is None)[:PROBED]
    ]
