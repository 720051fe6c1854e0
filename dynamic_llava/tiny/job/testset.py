"""The tiny world's test split: its queries, a model's inputs of them, and what answers and kept patches are worth.

The truth about objects is for evaluation alone. How likely the reference answers are to a model is asked through
processor and forward().
Shape suffixes: B rows of a batch, N tokens of the longest row, V vocabulary.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynamic_llava.data.llava_json import parse_sample, read_samples, resolve_image
from dynamic_llava.data.sft import Collator, SftSample
from dynamic_llava.eval.metrics.slots import slots
from dynamic_llava.eval.predict import NOT_FINITE, NotFiniteLogits, QueryBatch, progress, to_device
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.tiny.world.dataset import load_truth
from dynamic_llava.tiny.world.long import STATEMENTS
from dynamic_llava.tiny.world.texts import scene_attributes

DESCRIPTION = "description"
"""Kind of the queries that ask for a description."""

EXISTENCE = "exist"
"""Kind of the yes/no questions."""


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
class TestSet:
    """Unseen images with questions, descriptions and the truth about their objects."""

    __test__ = False  # the name begins like a test class of pytest

    questions: Sequence[Query]
    descriptions: Sequence[Query]
    attributes: Mapping[Path, frozenset[tuple[str, str, str]]]
    """(size, colour, shape) of each image's objects."""
    object_patches: Mapping[Path, Sequence[Sequence[int]]]
    """Per image, per object, the numbers of the patches it covers."""

    def first(self, questions: int, descriptions: int) -> "TestSet":
        """The first queries of each kind, with the same truth."""
        return replace(self, questions=self.questions[:questions], descriptions=self.descriptions[:descriptions])


def read_test_set(folder: Path, questions: int, descriptions: int) -> TestSet:
    """Read `questions` and `descriptions` queries of a built world's test.json.

    Questions come in an order whose every first part holds the kinds, and POPE's subsets and answers, in the same
    proportions as the file. Raises ValueError when the file holds fewer than asked for.
    """
    found: dict[str, list[tuple[Hashable, Query]]] = {"questions": [], DESCRIPTION: []}
    for index, sample in enumerate(read_samples(folder / "test.json")):
        query = _query(sample, index, folder)
        group = (query.kind, query.subset, query.answer if query.kind == EXISTENCE else "")
        found[DESCRIPTION if query.kind == DESCRIPTION else "questions"].append((group, query))
    for name, wanted in (("questions", questions), (DESCRIPTION, descriptions)):
        if len(found[name]) < wanted:
            raise ValueError(
                f"{wanted} {name} were asked for and {folder / 'test.json'} holds {len(found[name])}; "
                "ask for fewer, or raise tiny.test_images"
            )
    truth = {resolve_image(folder, name): entry for name, entry in load_truth(folder).items()}
    asked = _evenly(found["questions"])[:questions]
    described = [query for _, query in found[DESCRIPTION]][:descriptions]
    images = {query.image for query in (*asked, *described)}
    return TestSet(
        asked,
        described,
        {image: frozenset(scene_attributes(truth[image].scene)) for image in images},
        {image: _patches(truth[image]) for image in images},
    )


def _query(sample: dict[str, Any], index: int, folder: Path) -> Query:
    parsed = parse_sample(sample, index, folder)
    question, answer = parsed.turns[0]
    if answer is None or len(parsed.turns) > 1:
        raise ValueError(f"test sample {index} must hold one question and its answer")
    image = resolve_image(folder, parsed.images[0])
    return Query(parsed.id, index, image, question, answer, sample["kind"], sample.get("pope", ""))


def _evenly(groups: Sequence[tuple[Hashable, Query]]) -> list[Query]:
    """Interleave the groups in proportion to their sizes, each in its own order."""
    members: dict[Hashable, list[Query]] = defaultdict(list)
    for group, query in groups:
        members[group].append(query)
    placed = [((i + 0.5) / len(queries), query) for queries in members.values() for i, query in enumerate(queries)]
    return [query for _, query in sorted(placed, key=lambda pair: (pair[0], pair[1].key))]


def _patches(truth: Any) -> list[list[int]]:
    owners = list(enumerate(truth.patch_object))
    return [[patch for patch, owner in owners if owner == number] for number in range(len(truth.scene.objects))]


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


@dataclass(frozen=True)
class AnswerBatch(QueryBatch):
    """Questions with their reference answers."""

    stated: Mapping[str, Tensor] = field(default_factory=dict)
    """Name of a statement -> (B, N) bool: the answers' words that tell it (`STATEMENTS`)."""


def answer_batches(processor: DynamicLlavaProcessor, queries: Sequence[Query], batch_size: int) -> list[AnswerBatch]:
    """Right-padded questions with their reference answers, labels and output_mask, for teacher-forced passes."""
    collate, batches = Collator(processor), []
    for places in _chunks(list(range(len(queries))), batch_size):
        samples = [_as_sample(processor, queries[i]) for i in places]
        inputs = collate(samples)
        inputs["sample_key"] = inputs.pop("sample_ids")
        stated = {name: torch.zeros_like(inputs["output_mask"]) for name in STATEMENTS}
        for row, (place, sample) in enumerate(zip(places, samples, strict=True)):
            for name, words in _stated_words(processor, queries[place].answer).items():
                stated[name][row, [sample["spans"][-1][0] + word for word in words]] = True
        batches.append(AnswerBatch(tuple(places), inputs, stated))
    return batches


def _stated_words(processor: DynamicLlavaProcessor, answer: str) -> dict[str, list[int]]:
    """Places, among an answer's tokens, of the words that tell its statements."""
    ends = [
        end
        for _, end in processor.tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
    ]
    found = {}
    for name, pattern in STATEMENTS.items():
        told = [match.span(group) for match in pattern.finditer(answer) for group in range(1, pattern.groups + 1)]
        found[name] = [place for place, end in enumerate(ends) if any(start < end <= last for start, last in told)]
    return found


def _as_sample(processor: DynamicLlavaProcessor, query: Query) -> SftSample:
    encoded = processor.encode_conversation([(query.question, query.answer)])
    return {
        "input_ids": torch.tensor(encoded.input_ids),
        "labels": torch.tensor(encoded.labels),
        "spans": encoded.output_spans,
        "pixel_values": processor.preprocess_images([query.image]),
        "sample_id": query.key,
    }


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@dataclass(frozen=True)
class Likelihood:
    """Teacher-forced sums over a set of answers."""

    nll: float
    tokens: int
    image_keep_rate: float
    output_keep_rate: float
    slots: float
    """Share of the answers' past tokens that their tokens see (eval/metrics/slots.py)."""
    stated: Mapping[str, float]
    """Of the words that tell statements, by the statement's name, the share that is the likeliest word in its place."""


@torch.no_grad()
def likelihood(
    model: Any, batches: Sequence[AnswerBatch], *, switches: Mapping[str, Any], title: str = ""
) -> Likelihood:
    """Negative log-likelihood of the reference answers, one masked forward pass per batch (docs/method.md, section 5).

    Keep rates are means over all image tokens and over all output tokens of the answers; 1 for a dense call.
    """
    model.eval()
    nll, tokens, window = 0.0, 0, 0
    kept = {"image": 0.0, "output": 0.0}
    seen = {"image": 0, "output": 0}
    decided: list[list[bool]] = []
    right, told = defaultdict(int), defaultdict(int)
    for batch in progress(batches, title):
        inputs = to_device(batch.inputs, model.device)
        output = model(**inputs, **switches)
        row_nll, row_tokens = answer_nll(output.logits, inputs["labels"])
        nll, tokens = nll + float(row_nll.sum()), tokens + int(row_tokens.sum())
        if not math.isfinite(nll):
            raise NotFiniteLogits(NOT_FINITE)
        hit_BN = output.logits[:, :-1].argmax(-1) == inputs["labels"][:, 1:]
        for name, stated_BN in to_device(batch.stated, model.device).items():
            right[name] += int((hit_BN & stated_BN[:, 1:]).sum())
            told[name] += int(stated_BN.sum())
        if output.sparsity is None:
            continue
        layout, keep_BN = output.sparsity.layout, output.sparsity.keep_mask.bool()
        for name, where_BN in (("image", layout.is_image), ("output", layout.output)):
            kept[name] += float((keep_BN & where_BN).sum())
            seen[name] += int(where_BN.sum())
        decided += [keep_N[output_N].tolist() for keep_N, output_N in zip(keep_BN, layout.output, strict=True)]
        window = output.sparsity.window
    rates = {name: kept[name] / seen[name] if seen[name] else 1.0 for name in kept}
    stated = {name: right[name] / count for name, count in told.items() if count}
    return Likelihood(nll, tokens, rates["image"], rates["output"], slots(decided, window), stated)


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
    """Return exp(mean negative log-likelihood) over all tokens together; ValueError without tokens."""
    if tokens <= 0:
        raise ValueError(f"perplexity over {tokens} tokens is undefined; give at least one labelled token")
    return math.exp(nll / tokens)


def normalise_answer(text: str) -> str:
    """Lower-case, cut at the first full stop and collapse white space: "Blue .\\n" becomes "blue"."""
    return " ".join(text.lower().split(".", 1)[0].split())


def accuracy_by_kind(answers: Sequence[str], truths: Sequence[str], kinds: Sequence[str]) -> dict[str, float]:
    """Share of right answers (0..1) for each kind in alphabetical order, then over all questions as "all".

    The three sequences belong together by position; ValueError when their lengths differ or they are empty.
    """
    if not len(answers) == len(truths) == len(kinds):
        raise ValueError(
            f"{len(answers)} answers, {len(truths)} truths and {len(kinds)} kinds were given; "
            "they belong together one by one, so give equally many"
        )
    if not answers:
        raise ValueError("no answers were given; accuracy needs at least one question")
    right: dict[str, list[bool]] = defaultdict(list)
    for answer, truth, kind in zip(answers, truths, kinds, strict=True):
        right[kind].append(normalise_answer(answer) == normalise_answer(truth))
    scores = {kind: sum(right[kind]) / len(right[kind]) for kind in sorted(right)}
    scores["all"] = sum(sum(values) for values in right.values()) / len(answers)
    return scores


def patch_overlap(
    kept: Sequence[Collection[int]], objects: Sequence[Sequence[Collection[int]]], patches: int
) -> dict[str, float]:
    """Overlap of kept patches with object patches over all images together, each a share (0..1).

    kept[i] are the kept patch numbers of image i, objects[i][j] the patch numbers of its object j, `patches` the number
    of patches per image. Returns precision (kept patches that carry an object), recall (object patches kept), iou,
    objects_hit (objects of which at least one patch is kept), object_share (share of patches that carry an object: the
    precision of a random choice) and kept_share. ValueError when the lengths differ or there is no object at all.
    """
    if len(kept) != len(objects) or not kept:
        raise ValueError(f"kept patches of {len(kept)} images, objects of {len(objects)}; give both for each image")
    chosen = covered = both = hit = total = 0
    for kept_patches, image_objects in zip(kept, objects, strict=True):
        kept_set = set(kept_patches)
        object_set = {patch for one in image_objects for patch in one}
        chosen, covered = chosen + len(kept_set), covered + len(object_set)
        both += len(kept_set & object_set)
        hit += sum(bool(kept_set & set(one)) for one in image_objects)
        total += len(image_objects)
    if not total or not covered:
        raise ValueError("no image has an object patch; overlap with objects is undefined")
    return {
        "precision": both / chosen if chosen else 0.0,
        "recall": both / covered,
        "iou": both / (chosen + covered - both),
        "objects_hit": hit / total,
        "object_share": covered / (patches * len(kept)),
        "kept_share": chosen / (patches * len(kept)),
    }
