"""What a row costs: image tokens per layer, prefill FLOPs, bytes in the cache, measured milliseconds."""

import statistics
import time
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dynamic_llava.config import SparsityConfig
from dynamic_llava.costs import (
    DecoderShape,
    average_tokens,
    flops_paper,
    kv_bytes,
    prefill_flops,
)
from dynamic_llava.eval.predict import QueryBatch, to_device
from dynamic_llava.methods import Method, Mixed
from dynamic_llava.model.learned import learned_costs


class Prefilled(Protocol):
    """What the costs of a prefill follow from; a `Prediction` is one."""

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt, image tokens included."""

    @property
    def image_kept(self) -> Sequence[Sized]:
        """The kept tokens of each image."""


@dataclass(frozen=True)
class Counted:
    """A prompt and its answer as counts, which an answer line records."""

    prompt_tokens: int
    image_kept: tuple[range, ...]
    output_tokens: int
    """Generated tokens, the end token included."""
    output_kept: int
    """Those kept of all but the last, which is never fed back."""


def sparse_layer(method: Method, layers: int) -> int:
    """Return the layer from which on a method's decision holds; 0 for a method that decides nowhere.

    ValueError for a method of several cuts: counts of an answer line hold for two groups of layers.
    """
    cuts = method.cuts(layers)
    if len(cuts) > 1:
        raise ValueError(f"method {method.name!r} decides at {len(cuts)} layers; its costs cannot be counted")
    return cuts[0].layer if cuts else 0


def judging_flops(settings: SparsityConfig, hidden: int, tokens: int, method: Method) -> int:
    """Return the FLOPs by which what a method has learned judges an image of so many tokens.

    A method that leaves images to another costs what that one costs.
    """
    deciding = method.image_by if isinstance(method, Mixed) else method
    learned = {} if deciding is None else learned_costs(settings, hidden, deciding)
    return sum(part.judging(tokens) for part in learned.values() if part.learns and part.judges_images)


def prefill_costs(
    shape: DecoderShape,
    settings: SparsityConfig,
    predictions: Sequence[Prefilled],
    tokens_per_image: int,
    *,
    method: Method,
) -> dict[str, float]:
    """Average image tokens per layer and prefill FLOPs of the prompts that were answered, means over the rows.

    `prefill_gflop_exact` counts the real module shapes on the whole prompt (causal attention, the head on one token,
    and what `method` has learned to judge images by); `prefill_gflop_paper` is Eq. 13 on the image tokens alone.
    """
    layer = sparse_layer(method, shape.layers)
    judging = judging_flops(settings, shape.hidden, tokens_per_image, method)
    average, exact, paper = [], [], []
    for prediction in predictions:
        images = len(prediction.image_kept)
        total, kept = images * tokens_per_image, sum(len(one) for one in prediction.image_kept)
        text = prediction.prompt_tokens - total
        average.append(average_tokens(total, kept, shape.layers, layer))
        paper.append(flops_paper(total, shape.hidden, shape.layers, kept=kept, sparse_layer=layer))
        exact.append(prefill_flops(text + total, shape, kept=text + kept, sparse_layer=layer) + images * judging)
    return {
        "image_tokens_per_layer": statistics.fmean(average),
        "prefill_gflop_exact": statistics.fmean(exact) / 1e9,
        "prefill_gflop_paper": statistics.fmean(paper) / 1e9,
    }


def mean_kv_bytes(
    shape: DecoderShape,
    method: Method,
    answers: Sequence[Counted],
    tokens_per_image: int,
    bytes_per_value: int,
) -> float:
    """Return the mean over answers of the keys and values that a cache holds of each when its last token is said."""
    sizes, layer = [], sparse_layer(method, shape.layers)
    for said in answers:
        fed = said.prompt_tokens + said.output_tokens - 1
        dropped = sum(tokens_per_image - len(kept) for kept in said.image_kept)
        dropped += said.output_tokens - 1 - said.output_kept
        sizes.append(
            kv_bytes(
                shape,
                fed,
                kept=fed - dropped,
                sparse_layer=layer,
                bytes_per_value=bytes_per_value,
            )
        )
    return statistics.fmean(sizes)


@torch.no_grad()
def measure_speed(
    model: Any,
    batch: QueryBatch,
    *,
    switches: Mapping[str, Any],
    use_cache: bool,
    tokens: int,
    repeats: int,
) -> dict[str, float]:
    """Milliseconds of one prefill of the batch (images included), and per further decoded token of the whole batch.

    Medians over `repeats` after one warm-up; decoding is the time of 1 + `tokens` new tokens less that of one.
    """
    model.eval()
    inputs = to_device(batch.inputs, model.device)

    def seconds(count: int) -> float:
        begun = time.perf_counter()
        model.generate(
            **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=use_cache, **switches
        )
        return time.perf_counter() - begun

    seconds(2)
    first = [seconds(1) for _ in range(repeats)]
    whole = [seconds(1 + tokens) for _ in range(repeats)]
    prefill = statistics.median(first)
    return {"prefill_ms": 1e3 * prefill, "decode_ms": 1e3 * (statistics.median(whole) - prefill) / tokens}
