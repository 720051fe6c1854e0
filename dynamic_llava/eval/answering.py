"""Questions in, answers out: greedy, in batches of similar length, images read ahead while the model works.

A row's answer does not depend on its batch: in float32 the same file comes out at every batch size and in every order.
(In half precision the order of sums within a batch can turn a tie between two tokens.)
"""

import gc
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from transformers import BatchFeature, GenerationConfig

from dynamic_llava.eval.identity import image_digest
from dynamic_llava.eval.predict import NotFiniteLogits, Prediction, QueryBatch, generate_answers
from dynamic_llava.eval.reading import brief, shown
from dynamic_llava.eval.tasks import Question
from dynamic_llava.eval.tasks.base import Said
from dynamic_llava.methods import Method
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.processing.prompts import IMAGE_PLACE

Value = TypeVar("Value")
READERS, BATCHES_AHEAD = 4, 2
"""Threads that read images, and how many batches they are ahead of the model."""


@dataclass(frozen=True)
class ModelRun:
    """A model that answers, and how."""

    model: Any
    processor: DynamicLlavaProcessor
    method: Method
    batch_size: int
    max_new_tokens: int


@dataclass(frozen=True)
class Asked:
    """A question on its way into the model."""

    place: int
    """Its number, from 0, in the order in which the task gives them."""
    question: Question
    pixels: Tensor | None = field(default=None, repr=False)
    """(1, 3, S, S) float32; None for a question of text alone."""
    image_digest: str | None = None
    """Digest of the image as it was read."""


@runtime_checkable
class Measuring(Protocol):
    """A task that asks the model in its own way: several turns, perplexity. Its score reads what it put into lines."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings that the task's answer lines depend on, beside model, questions and max_new_tokens; JSON-able."""

    def measure(self, run: ModelRun, asked: Sequence[Asked]) -> list[Said]:
        """Return what goes into the answer line of each question of a batch, in order."""


class WithinMemory:
    """Asks batches of questions; one that does not fit into memory is halved, and the later ones with it.

    Answers do not depend on their batch, so nothing else changes. ValueError when a single question does not fit.
    """

    def __init__(self, respond: Callable[[ModelRun, Sequence[Asked]], list[Said]], run: ModelRun) -> None:
        self._respond, self._run = respond, run
        self.rows = run.batch_size
        """Number of questions in a batch; halved each time that memory runs out."""

    def __call__(self, asked: Sequence[Asked]) -> list[Said]:
        """Return what is said to each question, in order."""
        said: list[Said] = []
        while len(said) < len(asked):
            part = asked[len(said) : len(said) + self.rows]
            try:
                said += self._respond(self._run, part)
            except NotFiniteLogits as error:
                raise ValueError(f"questions {shown(one.question.id for one in part)}: {error}") from None
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                self._halve(part, str(error) or type(error).__name__)
        return said

    def _halve(self, part: Sequence[Asked], reason: str) -> None:
        if len(part) == 1:
            raise ValueError(
                f"question {brief(part[0].question.id)} alone does not fit into memory "
                f"({reason.splitlines()[0][:200]}); free some, give --dtype bfloat16, or a smaller --max-new-tokens"
            )
        self.rows = _halved(len(part))


def fitting(measure: Callable[[int], Value], rows: int) -> Value:
    """Return measure(rows), of half as many rows for as long as memory runs out; its error when one does not fit."""
    while True:
        try:
            return measure(rows)
        except (RuntimeError, MemoryError) as error:
            if rows == 1 or not _is_out_of_memory(error):
                raise
        rows = _halved(rows)


def _halved(rows: int) -> int:
    """Free what can be freed, say that so many rows were too many, and return half of them."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    print(
        f"out of memory at {rows} questions at once; going on with {rows // 2}, which changes no answer in float32",
        file=sys.stderr,
    )
    return rows // 2


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on an accelerator or for the CPU's allocator, whose error is a plain RuntimeError."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def greedy(model: Any, processor: DynamicLlavaProcessor) -> GenerationConfig:
    """Return one greedy beam with the checkpoint's end token, whatever else its generation_config.json asks for."""
    own = model.generation_config
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=processor.pad_token_id,
    )


def by_length(questions: Sequence[Question]) -> list[int]:
    """Return the questions' places by length, longest first: what does not fit into memory fails at once."""
    return sorted(range(len(questions)), key=lambda i: (questions[i].image is None, -len(questions[i].text), i))


def read_ahead(
    questions: Sequence[Question], places: Sequence[int], batch_size: int, processor: DynamicLlavaProcessor
) -> Iterator[tuple[list[Asked], dict[int, str]]]:
    """Yield the questions at `places` in batches, with their images; and place -> why an image cannot be read."""
    batches = [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
    with ThreadPoolExecutor(READERS) as pool:
        ahead: deque[list[tuple[int, Future[Asked]]]] = deque()
        for batch in [*batches, *[()] * BATCHES_AHEAD]:
            ahead.append([(place, pool.submit(_read, place, questions[place], processor)) for place in batch])
            if len(ahead) > BATCHES_AHEAD:
                yield _collect(questions, ahead.popleft())


def prompt_inputs(processor: DynamicLlavaProcessor, asked: Sequence[Asked]) -> BatchFeature:
    """Return left-padded prompts, the image first where there is one, and all images (I, 3, S, S)."""
    rows = [processor.encode_prompt(prompt_of(processor, one.question.text, one.pixels is not None)) for one in asked]
    pixels = [one.pixels for one in asked if one.pixels is not None]
    return BatchFeature(processor.pad(rows) | ({"pixel_values": torch.cat(pixels)} if pixels else {}))


def answer(run: ModelRun, asked: Sequence[Asked]) -> list[Said]:
    """Return the greedy answer to each question of a batch, stripped, and what was kept of it."""
    inputs = prompt_inputs(run.processor, asked)
    # Methods that draw do so by the question, whatever its batch.
    inputs["sample_key"] = torch.tensor([one.place for one in asked])
    predictions = generate_answers(
        run.model,
        run.processor,
        [QueryBatch(tuple(range(len(asked))), inputs)],
        max_new_tokens=run.max_new_tokens,
        switches={"method": run.method},
    )
    return [Said(prediction.text, facts(prediction)) for prediction in predictions]


def facts(prediction: Prediction) -> dict[str, Any]:
    """Return what answer lines record of a prediction; nothing of it depends on the rest of the batch.

    The last token is never fed back, so nothing is decided about it: `output_kept` counts those before. What key heads
    hold is recorded where a method evicts, and what a window holds where there is one, for neither follows from the
    other counts, and prompt tokens that were dropped where there are some.
    """
    held = {} if prediction.heads_hold is None else {"heads_hold": prediction.heads_hold}
    held |= {"prompt_dropped": prediction.prompt_dropped} if prediction.prompt_dropped else {}
    held |= {"window_holds": prediction.window_holds} if prediction.window_holds else {}
    return {
        "prompt_tokens": prediction.prompt_tokens,
        "image_kept": [len(kept) for kept in prediction.image_kept],
        "image_seen": list(prediction.image_seen),
        "output_tokens": len(prediction.tokens),
        "output_kept": sum(prediction.output_kept),
        **held,
        "tokens": list(prediction.tokens),
    }


def prompt_of(processor: DynamicLlavaProcessor, text: str, pictured: bool) -> str:
    """Return the prompt of a question; an image comes first, wherever the question's text may put it."""
    if IMAGE_PLACE in text:
        text = text.replace(IMAGE_PLACE, "").strip()
    return processor.conversation_prompt([(f"{IMAGE_PLACE}\n{text}" if pictured else text, None)])


def _read(place: int, question: Question, processor: DynamicLlavaProcessor) -> Asked:
    if question.image is None:
        return Asked(place, question)
    digest = image_digest(question)
    return Asked(place, question, processor.preprocess_images([question.image.load()]), digest)


def _collect(
    questions: Sequence[Question], waiting: Sequence[tuple[int, "Future[Asked]"]]
) -> tuple[list[Asked], dict[int, str]]:
    asked, unreadable = [], {}
    for place, future in waiting:
        try:
            asked.append(future.result())
        except (OSError, ValueError) as error:
            unreadable[place] = f"question {brief(questions[place].id)}: {error}"
    return asked, unreadable
