"""Honest measurement of the base: ordinary single-question prompts and greedy descriptions on unseen pictures."""

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from dynamic_llava.tiny.base.sequences import SegmentWriter
from dynamic_llava.tiny.base.vision import pixel_values
from dynamic_llava.tiny.world.descriptions import attribute_recall, describe, sample_request, scene_attributes
from dynamic_llava.tiny.world.questions import KINDS, Question, ask
from dynamic_llava.tiny.world.scenes import Picture, Scene

_BATCH = 50


def sample_questions(scenes: list[Scene], per_kind: int, seed: tuple[int, ...]) -> list[tuple[int, Question]]:
    """`per_kind` questions of every kind, each with the index of its scene (scenes are visited in turn).

    Raises ValueError where the scenes do not give that many.
    """
    rng, found = np.random.default_rng(seed), []
    for kind in KINDS:
        asked = ((i % len(scenes), ask(scenes[i % len(scenes)], kind, rng)) for i in range(20 * per_kind))
        kept = [(i, question) for i, question in asked if question is not None][:per_kind]
        if len(kept) < per_kind:
            raise ValueError(f"only {len(kept)} of {per_kind} questions of kind {kind!r}; give more scenes")
        found += kept
    return found


@torch.no_grad()
def question_accuracy(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pictures: list[Picture],
    questions: list[tuple[int, Question]],
) -> dict[str, float]:
    """Share of questions whose greedy answer is right, word and </s>, by kind and over all."""
    writer, right = SegmentWriter(tokenizer), {kind: [] for kind in KINDS}
    prompts = [writer.prompt(question.text) for _, question in questions]
    order = sorted(range(len(questions)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        pixels = torch.from_numpy(np.stack([pictures[questions[i][0]].pixels for i in chosen]))
        output = model.generate(
            **_left_padded([prompts[i] for i in chosen], tokenizer.pad_token_id),
            pixel_values=pixel_values(pixels),
            max_new_tokens=4,
            do_sample=False,
        )
        longest = max(len(prompts[i]) for i in chosen)
        for i, text in zip(chosen, tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True), strict=True):
            question = questions[i][1]
            right[question.kind].append(text.strip() == question.answer)
    result = {kind: float(np.mean(values)) for kind, values in right.items()}
    return {**result, "all": float(np.mean([value for values in right.values() for value in values]))}


@torch.no_grad()
def description_scores(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    scenes: list[Scene],
    pictures: list[Picture],
    seed: int,
) -> dict[str, float]:
    """Attribute recall and share of word-for-word reference texts among greedy descriptions, one per picture."""
    writer, rng = SegmentWriter(tokenizer), np.random.default_rng(seed)
    requests = [sample_request(rng) for _ in scenes]
    recall, exact = [], []
    for start in range(0, len(scenes), _BATCH):
        rows = range(start, min(start + _BATCH, len(scenes)))
        pixels = torch.from_numpy(np.stack([pictures[i].pixels for i in rows]))
        inputs = _left_padded([writer.prompt(requests[i][1]) for i in rows], tokenizer.pad_token_id)
        output = model.generate(**inputs, pixel_values=pixel_values(pixels), max_new_tokens=110, do_sample=False)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(rows, texts, strict=True):
            recall.append(attribute_recall(text, scene_attributes(scenes[i])))
            exact.append(text == describe(scenes[i], requests[i][0]).text)
    return {"attribute_recall": float(np.mean(recall)), "exact": float(np.mean(exact))}


def _left_padded(prompts: list[list[int]], pad_id: int) -> dict[str, torch.Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}
