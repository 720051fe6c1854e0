"""The test set as inputs of a model, and how likely its reference answers are to it: through processor and forward().

Shape suffixes: B rows of a batch, N tokens of the longest row, V vocabulary.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynamic_llava.data.collate import Collator
from dynamic_llava.data.sft import SftSample
from dynamic_llava.eval.predict import NOT_FINITE, NotFinite, QueryBatch, progress, to_device
from dynamic_llava.processing import DynamicLlavaProcessor


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
    subset: str = ""
    """Part of a kind that is scored by itself (POPE's random, popular and adversarial); "" where there is none."""


@dataclass(frozen=True)
class Likelihood:
    """Teacher-forced sums over a set of answers."""

    nll: float
    tokens: int
    image_keep_rate: float
    output_keep_rate: float


def prompt_batches(processor: DynamicLlavaProcessor, queries: Sequence[Query], batch_size: int) -> list[QueryBatch]:
    """Left-padded prompts in batches of similar length; rows are independent, so the order changes nothing."""
    prompts = [processor.conversation_prompt([(query.question, None)]) for query in queries]
    order = sorted(range(len(queries)), key=lambda i: (len(prompts[i].split()), i))
    batches = []
    for places in _chunks(order, batch_size):
        inputs = processor(
            text=[prompts[i] for i in places], images=[queries[i].image for i in places], padding_side="left"
        )
        inputs["sample_key"] = torch.tensor([queries[i].key for i in places])
        batches.append(QueryBatch(tuple(places), inputs))
    return batches


def answer_batches(processor: DynamicLlavaProcessor, queries: Sequence[Query], batch_size: int) -> list[QueryBatch]:
    """Right-padded questions with their reference answers, labels and output_mask, for teacher-forced passes."""
    collate, batches = Collator(processor), []
    for places in _chunks(list(range(len(queries))), batch_size):
        inputs = collate([_as_sample(processor, queries[i]) for i in places])
        inputs["sample_key"] = inputs.pop("sample_ids")
        batches.append(QueryBatch(tuple(places), inputs))
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
def likelihood(
    model: Any, batches: Sequence[QueryBatch], *, switches: Mapping[str, Any], title: str = ""
) -> Likelihood:
    """Negative log-likelihood of the reference answers, one masked forward pass per batch (docs/method.md, section 5).

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
        if not math.isfinite(nll):
            raise NotFinite(NOT_FINITE)
        if output.sparsity is None:
            continue
        layout, keep_BN = output.sparsity.layout, output.sparsity.keep_mask.bool()
        for name, where_BN in (("image", layout.is_image), ("output", layout.output)):
            kept[name] += float((keep_BN & where_BN).sum())
            seen[name] += int(where_BN.sum())
    rates = {name: kept[name] / seen[name] if seen[name] else 1.0 for name in kept}
    return Likelihood(nll, tokens, rates["image"], rates["output"])


def answer_nll(logits_BNV: Tensor, labels_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of -log p over each row's labelled tokens, and how many there are.

    logits_BNV is float (B, N, V), labels_BN int64 (B, N) with -100 at positions that do not count; position i predicts
    label i + 1. Returns float64 (B,) sums and int64 (B,) counts. ValueError when the shapes disagree.
    """
    if logits_BNV.shape[:2] != labels_BN.shape:
        raise ValueError(
            f"logits of shape {tuple(logits_BNV.shape)} do not belong to labels of shape {tuple(labels_BN.shape)}; "
            "give logits (B, N, V) of every position and labels (B, N)"
        )
    targets = labels_BN[:, 1:]
    counted = targets != -100
    log_probability = torch.log_softmax(logits_BNV[:, :-1].float(), dim=-1)
    picked = log_probability.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    nll = -torch.where(counted, picked, 0.0).sum(dim=1, dtype=torch.float64)
    return nll, counted.sum(dim=1)


def perplexity(nll: float, tokens: int) -> float:
    """exp(mean negative log-likelihood) over all tokens together; ValueError without tokens."""
    if tokens <= 0:
        raise ValueError(f"perplexity over {tokens} tokens is undefined; give at least one labelled token")
    return math.exp(nll / tokens)


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
