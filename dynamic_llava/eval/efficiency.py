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
    VisionShape,
    flops_paper,
    kv_bytes,
    prefill_flops,
)
from dynamic_llava.engine.learned import learned_costs
from dynamic_llava.eval.predict import QueryBatch, to_device
from dynamic_llava.eval.reading import WHOLE, Kind, fields_of, optional
from dynamic_llava.methods import Method, Mixed


class Prefilled(Protocol):
    """A prompt whose prefill is costed, by the tokens that its layers see; a `Prediction` is one."""

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt, image tokens included."""

    @property
    def prompt_dropped(self) -> int:
        """How many of them are tokens of questions that were dropped."""

    @property
    def image_kept(self) -> Sequence[Sized]:
        """The tokens of each image that are kept to the end."""

    @property
    def image_seen(self) -> Sequence[int]:
        """Per layer the image tokens that it sees, those of all images together."""


def _is_count(value: Any) -> bool:
    return WHOLE.fits(value) and 0 <= value < 2**31


COUNT = Kind("a number of tokens", _is_count)
COUNTS = Kind("a list of numbers of tokens", lambda value: isinstance(value, list) and all(map(_is_count, value)))
RECORDED = {
    "prompt_tokens": COUNT, "image_kept": COUNTS, "image_seen": optional(COUNTS), "output_tokens": COUNT,
    "output_kept": COUNT, "heads_hold": optional(COUNT), "prompt_dropped": optional(COUNT),
    "window_holds": optional(COUNT),
}  # fmt: skip
"""What the metadata of an answer line says of its costs."""


@dataclass(frozen=True)
class Counted:
    """A prompt and its answer as counts, which an answer line records."""

    prompt_tokens: int
    image_kept: tuple[range, ...]
    image_seen: tuple[int, ...]
    output_tokens: int
    """Generated tokens, the end token included."""
    output_kept: int
    """Generated tokens that are kept; the last one, which is never fed back, does not count."""
    heads_hold: int | None = None
    """Tokens that the key heads of all layers hold together at the end, where a method evicts."""
    prompt_dropped: int = 0
    """Tokens of questions that were dropped."""
    window_holds: int = 0
    """Generated tokens that are dropped, and still held by a window at the end."""

    @classmethod
    def read(
        cls, facts: Mapping[str, Any], method: Method, layers: int, tokens_per_image: int, place: str
    ) -> "Counted":
        """Return what an answer line records; `place` names the line in the ValueError for facts that cannot be so.

        Lines of earlier versions lack `image_seen`; they are all of methods with one cut.
        """
        fields_of(facts, RECORDED, f"{place}: metadata")
        kept, seen = facts["image_kept"], facts.get("image_seen")
        if seen is not None and len(seen) != layers:
            raise ValueError(
                f"{place}: metadata: 'image_seen' has {len(seen)} counts and the model {layers} layers; remove "
                "the line and run the command again"
            )
        if seen is None:
            below = next((cut.layer for cut in method.cuts(layers)), layers)
            seen = [len(kept) * tokens_per_image] * below + [sum(kept)] * (layers - below)
        images = tuple(map(range, kept))
        counts = facts["output_tokens"], facts["output_kept"], facts.get("heads_hold")
        beside = facts.get("prompt_dropped") or 0, facts.get("window_holds") or 0
        return cls(facts["prompt_tokens"], images, tuple(seen), *counts, *beside)


def realised_rate(counted: Sequence[Counted]) -> dict[str, float]:
    """Return the share of all generated tokens that is kept, last ones left out: nothing is decided about them."""
    fed = sum(one.output_tokens - 1 for one in counted)
    return {"output_tokens_kept": sum(one.output_kept for one in counted) / fed} if fed else {}


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
    vision: VisionShape,
) -> dict[str, float]:
    """Average image tokens per layer and prefill FLOPs of the prompts that were answered, means over the rows.

    A layer's tokens are those that it computes: where dropped ones are computed on (VoCo-LLaMA), all of them.
    `prefill_gflop_exact` counts the real module shapes on the whole prompt (causal attention, the head on one token,
    and what `method` judges by: its weights, and attention that it is shown, that of the tower `vision` among it; where
    the question's is shown, all text of a prompt counts as its question);
    `prefill_gflop_paper` is Eq. 13 on the image tokens alone. A predictor of prompt tokens is taken to judge all text.
    """
    judging = judging_flops(settings, shape.hidden, tokens_per_image, method)
    judging += method.tower_flops(shape.layers, vision)
    asking = sum(
        part.judging(1)
        for part in learned_costs(settings, shape.hidden, method).values()
        if part.learns and part.judges_prompts
    )
    average, exact, paper = [], [], []
    for prediction in predictions:
        images = len(prediction.image_kept)
        text = prediction.prompt_tokens - images * tokens_per_image
        seen = computed_tokens(prediction.image_seen, images * tokens_per_image, method)
        average.append(statistics.fmean(seen))
        paper.append(flops_paper(seen, shape.hidden, shape.layers))
        entering = [its + tokens for its, tokens in zip(_text_seen(text, prediction, method, shape), seen, strict=True)]
        evidence = method.evidence_flops(entering, shape, causal=True, question=text)
        exact.append(prefill_flops(entering, shape) + evidence + images * judging + text * asking)
    return {
        "image_tokens_per_layer": statistics.fmean(average),
        "prefill_gflop_exact": statistics.fmean(exact) / 1e9,
        "prefill_gflop_paper": statistics.fmean(paper) / 1e9,
    }


def computed_tokens(seen: Sequence[int], given: int, method: Method) -> Sequence[int]:
    """Return how many tokens each layer computes in a prefill of so many, of which it stores those that are `seen`."""
    return [given] * len(seen) if any(cut.within_image for cut in method.cuts(len(seen))) else seen


def mean_kv_bytes(
    shape: DecoderShape,
    method: Method,
    answers: Sequence[Counted],
    tokens_per_image: int,
    bytes_per_value: int,
) -> float:
    """Return the mean over answers of the keys and values that a cache holds of each when its last token is said."""
    sizes = []
    below = next((cut.layer for cut in method.cuts(shape.layers) if cut.output), shape.layers)
    for said in answers:
        if said.heads_hold is not None:
            sizes.append(said.heads_hold * 2 * shape.head_width * bytes_per_value)
            continue
        text, fed = said.prompt_tokens - len(said.image_kept) * tokens_per_image, said.output_tokens - 1
        output = [fed] * below + [said.output_kept + said.window_holds] * (shape.layers - below)
        texts = _text_seen(text, said, method, shape)
        tokens = [words + image + its for words, image, its in zip(texts, said.image_seen, output, strict=True)]
        sizes.append(kv_bytes(shape, tokens, bytes_per_value=bytes_per_value))
    return statistics.fmean(sizes)


def _text_seen(text: int, said: Prefilled, method: Method, shape: DecoderShape) -> list[int]:
    """Return how many of a prompt's `text` tokens each layer sees."""
    below = next((cut.layer for cut in method.cuts(shape.layers) if cut.prompt), shape.layers)
    return [text] * below + [text - said.prompt_dropped] * (shape.layers - below)


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
    clock = Clock(model, batch, switches, use_cache)
    clock.seconds(2)
    first = [clock.seconds(1) for _ in range(repeats)]
    whole = [clock.seconds(1 + tokens) for _ in range(repeats)]
    prefill = statistics.median(first)
    return {"prefill_ms": 1e3 * prefill, "decode_ms": 1e3 * (statistics.median(whole) - prefill) / tokens}


class Clock:
    """Times generations of one batch under one method."""

    def __init__(self, model: Any, batch: QueryBatch, switches: Mapping[str, Any], use_cache: bool = True) -> None:
        self._model, self._switches, self._use_cache = model.eval(), switches, use_cache
        self._inputs = to_device(batch.inputs, model.device)

    @torch.no_grad()
    def seconds(self, count: int) -> float:
        """Return the seconds of a prefill, images included, and of `count` new tokens, the first of which it gives."""
        more = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "use_cache": self._use_cache}
        begun = time.perf_counter()
        self._model.generate(**self._inputs, **more, **self._switches)
        return time.perf_counter() - begun


@dataclass(frozen=True)
class Times:
    """Repeated times of one method, in milliseconds, in the order in which they were taken."""

    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    """Of each further token of the whole batch."""

    def summary(self) -> dict[str, float]:
        """Return medians and quartiles, as columns of a table."""
        found: dict[str, float] = {}
        for name, values in (("prefill_ms", self.prefill), ("decode_ms", self.decode)):
            low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
            found |= {name: middle, f"{name}_low": low, f"{name}_high": high}
        return found


def interleaved_times(clocks: Sequence[Clock], *, tokens: int, repeats: int) -> list[Times]:
    """Return the times of each clock, taken in turn, `repeats` rounds after a warm-up of each.

    Each round begins with the next clock, so that none is always behind the same one. What slows the machine for a
    while then slows all of them. A round's decoding is its 1 + `tokens` new tokens less its one.
    """
    if repeats < 2:
        raise ValueError(f"repeats={repeats} have no quartiles; give 2 or more")
    taken: list[tuple[list[float], list[float]]] = [([], []) for _ in clocks]
    for clock in clocks:
        clock.seconds(2)
    for repeat in range(repeats):
        for turn in range(len(clocks)):
            place = (repeat + turn) % len(clocks)
            first, whole = clocks[place].seconds(1), clocks[place].seconds(1 + tokens)
            taken[place][0].append(1e3 * first)
            taken[place][1].append(1e3 * (whole - first) / tokens)
    return [Times(tuple(prefill), tuple(decode)) for prefill, decode in taken]
