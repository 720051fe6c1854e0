"""Short-answer accuracy against the image budget: learned selection, attention and chance at several keep rates.

The trained models saw one keep rate; the others show how each selection degrades when its budget is changed at
inference, by one argument of the call.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynamic_llava.config import SparsityConfig
from dynamic_llava.eval import predict
from dynamic_llava.methods import FastV, Method, Random
from dynamic_llava.model import DynamicLlavaForConditionalGeneration
from dynamic_llava.model.switches import choose_method
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.sparsity.decisions import budget
from dynamic_llava.tiny.job import asking
from dynamic_llava.tiny.job.scores import accuracy_by_kind
from dynamic_llava.tiny.job.tables import mean_and_interval
from dynamic_llava.tiny.job.testset import TestSet

DENSE, LEARNED, ATTENTION, CHANCE = "dense control", "Dynamic I|T", "control + FastV-like", "control + random image"
"""The lines of the comparison: what nothing dropped gives, and the three selections."""


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
    batches = asking.prompt_batches(processor, test.questions, batch_size)
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
