"""Answers and perplexities of a model through the ordinary pipeline: processor, generate(), forward() with labels.

Shape suffixes: B rows of a batch, N tokens of the longest row.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dynamic_llava.data.collate import Collator
from dynamic_llava.data.sft import SftSample
from dynamic_llava.eval.metrics.perplexity import answer_nll
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.processing.prompts import conversation_prompt


@dataclass(frozen=True)
class Query:
    """One question about one image."""

    id: str
    """Unique in its file."""
    key: int
    """Noise key: fixes the draws of random rows, whatever the batch."""
    image: Path
    question: str
    """The user's text, its <image> included."""
    answer: str
    """The reference answer."""
    kind: str
    """Kind of question; "description" for descriptions."""


@dataclass(frozen=True)
class Batch:
    """Model inputs of several queries, made once and used by every row."""

    places: tuple[int, ...]
    """Where each row's query stands in the list that was asked."""
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class Prediction:
    """What the model answered and which tokens stayed."""

    text: str
    tokens: tuple[int, ...]
    """Generated ids up to and including the end token, if it came."""
    image_kept: tuple[tuple[int, ...], ...]
    """Per image the kept tokens' offsets from the sparse layer on, all of them for a dense call."""
    output_kept: tuple[bool, ...]
    """One decision per generated token before the last (which is never fed back)."""
    prompt_tokens: int
    """Length of the prompt, image tokens included."""


@dataclass(frozen=True)
class Likelihood:
    """Teacher-forced sums over a set of answers."""

    nll: float
    tokens: int
    image_keep_rate: float
    output_keep_rate: float


def prompt_batches(processor: DynamicLlavaProcessor, queries: Sequence[Query], batch_size: int) -> list[Batch]:
    """Left-padded prompts in batches of similar length; rows are independent, so the order changes nothing."""
    prompts = [conversation_prompt([(query.question, None)]) for query in queries]
    order = sorted(range(len(queries)), key=lambda i: (len(prompts[i].split()), i))
    batches = []
    for places in _chunks(order, batch_size):
        inputs = processor(
            text=[prompts[i] for i in places], images=[queries[i].image for i in places], padding_side="left"
        )
        inputs["sample_key"] = torch.tensor([queries[i].key for i in places])
        batches.append(Batch(tuple(places), inputs))
    return batches


def answer_batches(processor: DynamicLlavaProcessor, queries: Sequence[Query], batch_size: int) -> list[Batch]:
    """Right-padded questions with their reference answers, labels and output_mask, for teacher-forced passes."""
    collate, batches = Collator(processor), []
    for places in _chunks(list(range(len(queries))), batch_size):
        inputs = collate([_as_sample(processor, queries[i]) for i in places])
        inputs["sample_key"] = inputs.pop("sample_ids")
        batches.append(Batch(tuple(places), inputs))
    return batches


def _as_sample(processor: DynamicLlavaProcessor, query: Query) -> SftSample:
    encoded = processor.encode_conversation([(query.question, query.answer)])
    return {
        "input_ids": torch.tensor(encoded.input_ids),
        "labels": torch.tensor(encoded.labels),
        "spans": encoded.output_spans,
        "pixel_values": processor.preprocess_images([query.image]),
        "sample_id": query.key,
    }


@torch.no_grad()
def generate_answers(
    model: Any,
    processor: DynamicLlavaProcessor,
    batches: Sequence[Batch],
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
    found: dict[int, Prediction] = {}
    for batch in progress(batches, title):
        output = model.generate(
            **to_device(batch.inputs, model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=use_cache,
            return_dict_in_generate=True,
            **switches,
        )
        found.update(zip(batch.places, _read(output, batch, processor, model.generation_config), strict=True))
    return [found[place] for place in sorted(found)]


@torch.no_grad()
def likelihood(model: Any, batches: Sequence[Batch], *, switches: Mapping[str, Any], title: str = "") -> Likelihood:
    """Negative log-likelihood of the reference answers, one masked forward pass per batch (method.md section 5).

    Keep rates are means over all image tokens and over all output tokens of the answers; 1 for a dense call.
    """
    model.eval()
    nll, tokens = 0.0, 0
    kept = {"image": 0.0, "output": 0.0}
    seen = {"image": 0, "output": 0}
    for batch in progress(batches, title):
        inputs = to_device(batch.inputs, model.device)
        output = model(**inputs, **switches)
        row_nll, row_tokens = answer_nll(output.logits, inputs["labels"])
        nll, tokens = nll + float(row_nll.sum()), tokens + int(row_tokens.sum())
        if output.sparsity is None:
            continue
        layout, keep_BN = output.sparsity.layout, output.sparsity.keep_mask.bool()
        for name, where_BN in (("image", layout.image), ("output", layout.output)):
            kept[name] += float((keep_BN & where_BN).sum())
            seen[name] += int(where_BN.sum())
    rates = {name: kept[name] / seen[name] if seen[name] else 1.0 for name in kept}
    return Likelihood(nll, tokens, rates["image"], rates["output"])


def progress(items: Iterable[Any], title: str) -> Iterable[Any]:
    """A progress bar that stays readable in a log file; none without a title."""
    return tqdm(items, desc=title, leave=False, mininterval=2.0, ncols=100, disable=not title)


def to_device(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a batch's tensors to a device."""
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _read(output: Any, batch: Batch, processor: DynamicLlavaProcessor, generation: Any) -> Iterator[Prediction]:
    """Cut each row of generate()'s output at its end token and pair it with its record."""
    prompt_BN, mask_BN = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    ends = generation.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    record = output.sparsity
    image_indices = None if record is None else record.image_indices
    decisions = None if record is None else record.output_decisions
    for row, sequence in enumerate(output.sequences[:, prompt_BN.shape[1] :].tolist()):
        length = next((i + 1 for i, token in enumerate(sequence) if token in ends), len(sequence))
        tokens = tuple(sequence[:length])
        if record is None:
            images = int((prompt_BN[row] == processor.image_token_id).sum()) // processor.tokens_per_image
            image_kept = (tuple(range(processor.tokens_per_image)),) * images
            output_kept = (True,) * (length - 1)
        else:
            image_kept = tuple(tuple(kept.tolist()) for kept in image_indices[row])
            output_kept = tuple(decisions[row].tolist())[: length - 1]
        text = processor.decode(tokens).strip()
        yield Prediction(text, tokens, image_kept, output_kept, int(mask_BN[row].sum()))


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
