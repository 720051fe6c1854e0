"""lmms-eval's requests in our words: prompts, settings of a generation, batches, and where an answer ends."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynamic_llava.processing.prompts import IMAGE_PLACE, Turn, conversation_prompt, image_places

MAX_NEW_TOKENS = 1024
"""Longest answer where a task sets none; the default of lmms-eval's own LLaVA model."""
BLANK_LINE = "\n\n"
"""lmms-eval writes it into `until` of every task that sets none: it ends the answers of few-shot prompts."""
DEFAULTS = {"max_new_tokens": MAX_NEW_TOKENS, "num_beams": 1, "repetition_penalty": 1.0}
SAMPLING_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
"""Every value is said: transformers would fill in what the checkpoint's generation_config.json holds."""
KNOWN = {*DEFAULTS, *SAMPLING_DEFAULTS, "do_sample", "until", "image_aspect_ratio"}


@dataclass(frozen=True)
class RequestSettings:
    """How the answers of one batch are generated."""

    settings: Mapping[str, Any]
    """Arguments of transformers' GenerationConfig."""
    stops: tuple[str, ...]
    """An answer ends before the first of these."""


def read_generation(given: Mapping[str, Any]) -> RequestSettings:
    """Translate the `generation_kwargs` of a task; `given` stays as it is (lmms-eval's cache keys are made of it).

    Answers are sampled where the temperature is positive and do_sample is not false, greedy otherwise. The blank line
    is no stop: LLaVA-1.5 ends its answers itself, and the longer ones have paragraphs. `image_aspect_ratio` decides
    nothing, as in lmms-eval's LLaVA: the checkpoint's own "pad" stands above it. Raises ValueError for other settings.
    """
    unknown = sorted(set(given) - KNOWN)
    if unknown:
        raise ValueError(
            f"the task's generation_kwargs hold {unknown}, which this model does not know; it knows {sorted(KNOWN)}"
        )
    said = {name: value for name, value in given.items() if value is not None}
    temperature = said.get("temperature", 1.0 if said.get("do_sample") else 0.0)
    sampled = temperature > 0 and said.get("do_sample", True)
    wanted = DEFAULTS | (SAMPLING_DEFAULTS if sampled else {})
    settings = {name: said.get(name, value) for name, value in wanted.items()}
    return RequestSettings({"do_sample": sampled, **settings}, _stops(said.get("until")))


def cut_answer(text: str, stops: Sequence[str]) -> str:
    """Return `text` up to the first of `stops`, stripped."""
    ends = [text.find(stop) for stop in stops]
    return text[: min((end for end in ends if end >= 0), default=len(text))].strip()


def request_prompt(context: str, images: int, write: Callable[[Sequence[Turn]], str] = conversation_prompt) -> str:
    """Return the prompt of a context; without `<image>` in it, the images come first, on a line of their own.

    write: makes the text of turns; a processor's `conversation_prompt` writes its checkpoint's own.
    Raises ValueError when the context has `<image>` places, but not one for each image.
    """
    places = image_places(context)
    if places and places != images:
        raise ValueError(f"the context has {places} {IMAGE_PLACE} places for {images} images; it needs one per image")
    if images and not places:
        context = f"{' '.join([IMAGE_PLACE] * images)}\n{context}"
    return write([(context, None)])


def plan_batches(requests: Sequence[Any], size: int, settings_at: int = 1) -> list[list[int]]:
    """Return the requests' places in batches of one generation_kwargs and similar length, longest first.

    settings_at: the place of the generation_kwargs among a request's arguments.
    """
    alike: dict[str, list[int]] = defaultdict(list)
    for place, request in enumerate(requests):
        alike[json.dumps(request.args[settings_at], sort_keys=True)].append(place)
    batches = []
    for places in alike.values():
        places.sort(key=lambda place: -len(requests[place].args[0]))
        batches += [places[start : start + size] for start in range(0, len(places), size)]
    return batches


def _stops(until: Any) -> tuple[str, ...]:
    """The stop strings of a task: a string, a list, or nothing, which lmms-eval also writes as [None]."""
    stops = [until] if isinstance(until, str) else [stop for stop in until or () if stop is not None]
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError(f"until={until!r} is neither a string nor a list of strings that are not empty")
    return tuple(stop for stop in stops if stop != BLANK_LINE)
