"""Checkpoints on the tiny world's test set, beside the main job: the numbers of one, and accuracy by image budget.

The trained models saw one image keep rate. At other rates learned selection, attention and chance show how each of them
degrades when its budget is changed at inference, by one argument of the call.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynamic_llava.config import SparsityConfig
from dynamic_llava.costs import decoder_shape, llava_shape
from dynamic_llava.eval import predict
from dynamic_llava.eval.efficiency import prefill_costs
from dynamic_llava.eval.identity import method_settings
from dynamic_llava.eval.metrics.seeds import mean_and_interval
from dynamic_llava.eval.writing import write_text
from dynamic_llava.methods import FastV, Method, Random
from dynamic_llava.model import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynamic_llava.model.switches import choose_method
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.provenance import environment
from dynamic_llava.sparsity.decisions import budget
from dynamic_llava.tiny.job import testset
from dynamic_llava.tiny.job.config import TinyJobConfig
from dynamic_llava.tiny.job.evaluation import quality
from dynamic_llava.tiny.job.outputs import RowOutput
from dynamic_llava.tiny.job.testset import TestSet, accuracy_by_kind

DENSE, LEARNED, ATTENTION, CHANCE = "dense control", "Dynamic I|T", "control + FastV-like", "control + random image"
"""The lines of the comparison: what nothing dropped gives, and the three selections."""


def measure(checkpoint: Path, test: TestSet, method: Method) -> dict[str, float]:
    """Return accuracy, perplexity, recall, realised keep rates and costs of a checkpoint, by the main job's names."""
    model = DynamicLlavaForConditionalGeneration.load_for(method, checkpoint)
    processor = DynamicLlavaProcessor.from_pretrained(checkpoint)
    settings, switches = TinyJobConfig(), {"method": method}
    forced = testset.likelihood(
        model,
        testset.answer_batches(processor, test.descriptions, settings.batch_size),
        switches=switches,
        title="perplexity",
    )
    output = RowOutput(
        *(
            predict.generate_answers(
                model,
                processor,
                testset.prompt_batches(processor, queries, settings.batch_size),
                max_new_tokens=most,
                switches=switches,
                title=title,
            )
            for queries, most, title in (
                (test.questions, settings.answer_tokens, "questions"),
                (test.descriptions, settings.description_tokens, "descriptions"),
            )
        )
    )
    costs = prefill_costs(
        decoder_shape(model.config),
        model.config.sparsity,
        output.descriptions,
        processor.tokens_per_image,
        method=method,
        vision=llava_shape(model.config).vision,
    )
    return {
        "ppl": testset.perplexity(forced.nll, forced.tokens),
        "keep_image": forced.image_keep_rate,
        "keep_output_forced": forced.output_keep_rate,
        "slots": forced.slots,
        **quality(output, test),
        **costs,
        "kv_kib": statistics.fmean(said.cache_bytes for said in output.descriptions) / 1024,
    }


def write_measures(checkpoint: Path, test: TestSet, folder: Path, **switches: Any) -> Path:
    """Measure a checkpoint and write <folder>/summary.json, whole or not at all; returns its path.

    `switches` are `sparsity` and `method` as `choose_method` takes them. ValueError, before any weight is read, for a
    method that is not known, or one that decides by weights which the checkpoint lacks.
    """
    config = DynamicLlavaConfig.from_pretrained(checkpoint).sparsity
    method = choose_method(config, **switches)
    summary = {
        "model": str(checkpoint),
        **method_settings(method, config),
        "questions": len(test.questions),
        "descriptions": len(test.descriptions),
        "metrics": measure(checkpoint, test, method),
        "environment": environment(),
    }
    return write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")


def accuracy_by_budget(
    checkpoints: Mapping[str, Path],
    test: TestSet,
    rates: Sequence[float],
    *,
    method: Mapping[str, Any] | None = None,
    batch_size: int = 100,
    max_new_tokens: int = 6,
    say: Callable[[str], None] = print,
) -> dict[str, dict[float, float]]:
    """Measure one seed: line -> keep rate -> exact-match accuracy over the test questions, a fraction.

    `checkpoints` maps control and both to folders; `method` adds a line: the control under that method, which has a
    setting image_keep_rate and learns nothing (else a ValueError). The dense line holds the same value at every rate.
    """
    models = {
        key: DynamicLlavaForConditionalGeneration.from_pretrained(str(checkpoints[key])) for key in ("control", "both")
    }
    settings = models["both"].config.sparsity
    named = {} if method is None else {rate: _at_rate(method, settings, rate) for rate in rates}
    processor = DynamicLlavaProcessor.from_pretrained(checkpoints["both"])
    batches = testset.prompt_batches(processor, test.questions, batch_size)
    layer = settings.sparse_layer

    def accuracy(key: str, switches: Mapping[str, Any], title: str) -> float:
        said = predict.generate_answers(
            models[key], processor, batches, max_new_tokens=max_new_tokens, switches=switches, title=title
        )
        scores = accuracy_by_kind(
            [answer.text for answer in said], [q.answer for q in test.questions], [q.kind for q in test.questions]
        )
        say(f"  {title:<42} accuracy {100 * scores['all']:.1f}")
        return scores["all"]

    dense = accuracy("control", {"sparsity": "none"}, DENSE)
    found: dict[str, dict[float, float]] = {DENSE: dict.fromkeys(rates, dense), LEARNED: {}, ATTENTION: {}, CHANCE: {}}
    for rate in rates:
        methods = {
            ATTENTION: FastV(layer=layer, image_keep_rate=rate),
            CHANCE: Random(layer=layer, image_keep_rate=rate, output_keep_rate=None),
        }
        found[LEARNED][rate] = accuracy("both", {"image_keep_rate": rate}, f"{LEARNED} at {rate:g}")
        if method is not None:
            methods[f"control + {method['name']}"] = named[rate]
        for line, chosen in methods.items():
            found.setdefault(line, {})[rate] = accuracy("control", {"method": chosen}, f"{line} at {rate:g}")
    return found


def _at_rate(method: Mapping[str, Any], settings: SparsityConfig, rate: float) -> Method:
    """Return a method with its image keep rate set."""
    chosen = choose_method(settings, method=method, image_keep_rate=rate)
    if not chosen.training_free:
        raise ValueError(f"method={method!r} learns something, which the dense control has not; name another")
    return chosen


def budget_table(seeds: Sequence[Mapping[str, Mapping[float, float]]], tokens_per_image: int) -> str:
    """Markdown table of the seeds' results: mean accuracy in % ± half-width of the 95 % t-interval."""
    rates = sorted(next(iter(seeds[0].values())))
    head = "| row | " + " | ".join(f"{budget(rate, tokens_per_image)} of {tokens_per_image}" for rate in rates) + " |"
    lines = [head, "|:--" + "|--:" * len(rates) + "|"]
    for line in seeds[0]:
        cells = [_cell([100 * seed[line][rate] for seed in seeds]) for rate in rates]
        lines.append(f"| {line} | ".replace("I|T", "I\\|T") + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_by_budget(seeds: Sequence[Mapping[str, Mapping[float, float]]]) -> dict[str, dict[float, float]]:
    """Mean over seeds of `accuracy_by_budget`."""
    return {
        line: {rate: statistics.fmean(seed[line][rate] for seed in seeds) for rate in rates}
        for line, rates in seeds[0].items()
    }


def _cell(values: Sequence[float]) -> str:
    mean, half = mean_and_interval(values)
    return f"{mean:.1f}" if half is None else f"{mean:.1f} ± {half:.1f}"
