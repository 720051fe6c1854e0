"""What a model answers to a batch through generate(), and what was kept of it.

Shape suffixes: B rows of a batch, N tokens of the longest row, L layers, K key heads.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList
from transformers import logging as transformers_logging

from dynamic_llava.methods import Method
from dynamic_llava.model import AdmissionCache, cache_of
from dynamic_llava.model.switches import choose_method
from dynamic_llava.processing import DynamicLlavaProcessor


class NotFiniteLogits(ValueError):
    """A model's logits are NaN or infinite."""


NOT_FINITE = (
    "the model's logits are NaN or infinite, so what it would say means nothing: its weights are (a training that "
    "diverged), or its values leave the range of its data type (float32 and bfloat16 have the widest)"
)


@dataclass(frozen=True)
class QueryBatch:
    """Model inputs of several queries, made once and used by every row."""

    places: tuple[int, ...]
    """Each row's place in the list of queries."""
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class Prediction:
    """The model's answer to one query, and the tokens that stayed."""

    text: str
    tokens: tuple[int, ...]
    """Generated ids up to and including the end token, if it came."""
    image_kept: tuple[tuple[int, ...], ...]
    """Per image the kept tokens' offsets from the sparse layer on, all of them for a dense call."""
    image_seen: tuple[int, ...]
    """Per layer the image tokens that it sees, those of all images together."""
    output_kept: tuple[bool, ...]
    """One decision per generated token before the last (which is never fed back)."""
    prompt_tokens: int
    """Length of the prompt, image tokens included."""
    prompt_dropped: int
    """How many of them are tokens of questions that were dropped."""
    heads_hold: int | None
    """Tokens that the key heads of all layers hold together when the last token is said; None: nothing is evicted."""
    cache_bytes: int
    """Bytes of the row's keys and values in the cache when the batch ended (filled slots); 0 without a cache."""
    allocated_bytes: int
    """The row's share of the cache's storage as it lay in memory, unfilled slots included."""
    window_holds: int = 0
    """Generated tokens that are dropped, and still held by a window when the last token is said."""


@torch.no_grad()
def generate_answers(
    model: Any,
    processor: DynamicLlavaProcessor,
    batches: Sequence[QueryBatch],
    *,
    max_new_tokens: int,
    switches: Mapping[str, Any],
    use_cache: bool = True,
    title: str = "",
) -> list[Prediction]:
    """Greedy answers to every query of the batches, in the order of the queries.

    `switches` are keyword arguments of generate() (sparsity=..., method=..., rates). The model is put into eval mode.
    """
    model.eval()
    method = choose_method(model.config.sparsity, **switches)
    found: dict[int, Prediction] = {}
    for batch in progress(batches, title):
        finite, held = Finite(), Held(model, method) if use_cache and method.evicts else None
        output = model.generate(
            **to_device(batch.inputs, model.device),
            **({} if held is None else {"cache": held.cache}),
            logits_processor=LogitsProcessorList([finite, *([] if held is None else [held])]),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=use_cache,
            return_dict_in_generate=True,
            **switches,
        )
        finite.check()
        read = read_predictions(output, batch, processor, model, held)
        found.update(zip(batch.places, read, strict=True))
    return [found[place] for place in sorted(found)]


class Finite(LogitsProcessor):
    """Looks at the logits of every step and leaves them as they are; the device is asked for the verdict once."""

    def __init__(self) -> None:
        self._all: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the logits (B, V) as they came."""
        finite = torch.isfinite(scores).all()
        self._all = finite if self._all is None else self._all & finite
        return scores

    def check(self) -> None:
        """Raise NotFinite unless all logits so far were finite."""
        if self._all is not None and not bool(self._all):
            raise NotFiniteLogits(NOT_FINITE)


class Held(LogitsProcessor):
    """Counts after each pass what the key heads of a cache hold, for a method that evicts; logits stay as they are."""

    def __init__(self, model: Any, method: Method) -> None:
        layers = model.config.text_config.num_hidden_layers
        self.cache = AdmissionCache.for_method(method, layers, model.config.sparsity.cache_block)
        self._passes: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the logits (B, V) as they came."""
        lengths_BLK = self.cache.head_lengths()
        assert lengths_BLK is not None, "the method evicts"
        self._passes.append(lengths_BLK.sum((1, 2)))
        return scores

    def when_said(self, lengths: Sequence[int]) -> list[int]:
        """Return what all heads of each row held when its last token was said, the lengths[row]-th."""
        by_row = torch.stack(self._passes, 1).tolist()
        return [row[length - 1] for row, length in zip(by_row, lengths, strict=True)]


def progress(items: Iterable[Any], title: str) -> Iterable[Any]:
    """A progress bar on a terminal; none without a title, nor in a log file (each row prints its own line)."""
    return tqdm(items, desc=title, leave=False, ncols=100, disable=None if title else True)


def hide_library_progress() -> None:
    """Switch off transformers' own bars (loading and writing weights); for entry points that show their own."""
    transformers_logging.disable_progress_bar()


def to_device(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a batch's tensors to a device."""
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def seen_in_layers(record: Any, where_BN: Tensor, layers: int) -> Tensor:
    """(B, L) int64: how many of the tokens where_BN (B, N) bool each layer sees; all of them without a record."""
    if record is None:
        return where_BN.sum(1, keepdim=True).expand(-1, layers)
    return record.tokens_per_layer(where_BN)  # type: ignore[no-any-return]


def read_predictions(
    output: Any, batch: QueryBatch, processor: DynamicLlavaProcessor, model: Any, held: Held | None
) -> list[Prediction]:
    """Cut each row of generate()'s output at its end token and pair it with what was kept of it."""
    ends = model.generation_config.eos_token_id
    layers = model.config.text_config.num_hidden_layers
    return [*_read(output, batch, processor, set(ends if isinstance(ends, list) else [ends]), layers, held)]


def _read(
    output: Any,
    batch: QueryBatch,
    processor: DynamicLlavaProcessor,
    ends: set[int],
    layers: int,
    held: Held | None,
) -> Iterator[Prediction]:
    prompt_BN = batch.inputs["input_ids"]
    answers = output.sequences[:, prompt_BN.shape[1] :].tolist()
    image_kept, decisions = _decisions(output.sparsity, prompt_BN, processor)
    dense = output.sparsity is None
    image_BN = prompt_BN == processor.image_token_id if dense else output.sparsity.layout.is_image
    image_seen = seen_in_layers(output.sparsity, image_BN, layers).tolist()
    prompt_tokens = batch.inputs["attention_mask"].sum(1).tolist()
    dropped = [0] * len(answers) if dense else _prompts_dropped(output.sparsity).tolist()
    lengths = [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in answers]
    steps = output.sequences.shape[1] - prompt_BN.shape[1] - 1  # the last token is never fed back
    fed = [prompt + min(length, steps) for prompt, length in zip(prompt_tokens, lengths, strict=True)]
    filled, allocated = _cache_bytes(output, fed)
    heads_hold = [None] * len(lengths) if held is None else held.when_said(lengths)
    window = 0 if dense else output.sparsity.window
    for row, (length, sequence) in enumerate(zip(lengths, answers, strict=True)):
        tokens = tuple(sequence[:length])
        output_kept = (decisions[row] if decisions is not None else (True,) * length)[: length - 1]
        yield Prediction(
            text=processor.decode(tokens).strip(),
            tokens=tokens,
            image_kept=image_kept[row],
            image_seen=tuple(image_seen[row]),
            output_kept=output_kept,
            prompt_tokens=prompt_tokens[row],
            prompt_dropped=dropped[row],
            heads_hold=heads_hold[row],
            cache_bytes=filled[row],
            allocated_bytes=allocated // len(answers),
            window_holds=output_kept[max(0, len(output_kept) - window) :].count(False),
        )


def _prompts_dropped(record: Any) -> Tensor:
    """(B,) int64: the prompt tokens of each row that not all layers see."""
    return (record.layout.prompt & (record.until < record.layers)).sum(1)  # type: ignore[no-any-return]


def _decisions(
    record: Any, prompt_BN: Tensor, processor: DynamicLlavaProcessor
) -> tuple[list[tuple[tuple[int, ...], ...]], list[tuple[bool, ...]] | None]:
    """Kept offsets per row and image, and output decisions per row (None where all stay: a dense call)."""
    if record is None:
        all_kept = tuple(range(processor.tokens_per_image))
        images = (prompt_BN == processor.image_token_id).sum(1) // processor.tokens_per_image
        return [(all_kept,) * count for count in images.tolist()], None
    kept = [tuple(tuple(one.tolist()) for one in row) for row in record.image_indices]
    return kept, [tuple(row.tolist()) for row in record.output_decisions]


def _cache_bytes(output: Any, fed: Sequence[int]) -> tuple[list[int], int]:
    """Bytes of each row's filled slots, and bytes of the whole storage, read from the cache after a generation.

    `fed` holds each row's tokens that went through the model: what a dense cache holds of it besides padding.
    """
    cache, record = cache_of(output), output.sparsity
    if cache is None:
        return [0] * len(fed), 0
    sparse = record is not None
    filled, allocated = [0] * len(fed), 0
    tokens_BL = record.tokens_per_layer() if sparse else None
    for index, layer in enumerate(cache.layers):
        stored = [s.data for s in layer.storages()] if sparse else [layer.keys, layer.values]
        slot = sum(tensor.shape[3] * tensor.element_size() for tensor in stored[:2])  # keys and values of one head
        allocated += sum(tensor.numel() * tensor.element_size() for tensor in stored)
        if not sparse:
            counts = [stored[0].shape[1] * tokens for tokens in fed]
        elif record.head_lengths is not None:
            counts = record.head_lengths[:, index].sum(1).tolist()
        else:
            counts = (stored[0].shape[1] * tokens_BL[:, index]).tolist()
        filled = [size + slot * count for size, count in zip(filled, counts, strict=True)]
    return filled, allocated
