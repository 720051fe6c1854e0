"""What a rule costs a model: its predictions of held-out answers beside the dense ones, and its own greedy answers.

Rules that judge each token once are scored in one pass over an answer; those that evict are fed token by token.
Shape suffixes: B rows, N tokens fed, T output tokens of an answer, D hidden size, V vocabulary.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynamic_llava.calibrate.measure import margins_of
from dynamic_llava.config import DataConfig
from dynamic_llava.data import Collator, SftDataset
from dynamic_llava.methods import Dense, Method
from dynamic_llava.model import cache_of
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.smol.rules import count_kept, pairs

AT_ONCE = 256
"""Tokens whose logits are in memory at once."""


class HeldAnswer(NamedTuple):
    """One answer to measure on, as token ids."""

    id: str
    prompt: list[int]
    answer: list[int]
    """Its end token included, which is predicted and never fed."""

    @property
    def fed(self) -> int:
        """Return how many of its tokens decoding feeds."""
        return len(self.answer) - 1


@dataclass(frozen=True)
class Seen:
    """What a model made of the answers under a rule."""

    hidden: list[Tensor]
    """Per answer (T, D) on the CPU: what the head reads to predict each token."""
    visible: list[float]
    """Per answer the pairs of a token and an earlier output token that it sees, in a layer that may drop some."""


@dataclass(frozen=True)
class Reference:
    """The dense model's predictions, kept small: hidden states and the head that reads them."""

    hidden: list[Tensor]
    head: Tensor
    """(V, D)."""
    greedy: list[list[int]]
    """Its own greedy answers."""


def read_held(path: Path, processor: DynamicLlavaProcessor, max_length: int) -> list[HeldAnswer]:
    """Return the answers of held.json. ValueError for one that `max_length` cuts."""
    found = []
    for sample in json.loads(path.read_text(encoding="utf-8")):
        question, answer = (turn["value"] for turn in sample["conversations"])
        encoded = processor.encode_conversation([(question, answer)], None)
        start, end = encoded.output_spans[0]
        if end > max_length:
            raise ValueError(f"{sample['id']} in {path} has {end} tokens; raise data.max_length, which is {max_length}")
        found.append(HeldAnswer(sample["id"], encoded.input_ids[:start], encoded.input_ids[start:end]))
    return found


def margins_on(model: Any, path: Path, processor: DynamicLlavaProcessor, batch: int, max_length: int) -> list[Tensor]:
    """Return the output predictor's margins on every answer of a file, in the file's order, (T,) float32 each."""
    dataset = SftDataset(DataConfig(json=str(path), text_only="sparse", max_length=max_length), processor)
    samples = [dataset[number] for number in range(len(dataset))]
    collate = Collator(processor, model.config.sparsity.output_segments, sparse_text=True)
    batches = [collate(samples[start : start + batch]) for start in range(0, len(samples), batch)]
    return margins_of(model, batches, 0)["output"]


@torch.no_grad()
def see(model: Any, answers: Sequence[HeldAnswer], method: Method, layer: int, batch: int) -> Seen:
    """Feed every answer under a rule; `layer` is the first that may drop something."""
    hidden: list[Tensor] = []
    seen: list[float] = []
    for start in range(0, len(answers), batch):
        part = answers[start : start + batch]
        key_B = torch.arange(start, start + len(part))
        its = _step_by_step(model, part, method, layer) if method.evicts else _one_pass(model, part, method, key_B)
        hidden += its.hidden
        seen += its.visible
    return Seen(hidden, seen)


def _one_pass(model: Any, answers: Sequence[HeldAnswer], method: Method, key_B: Tensor) -> Seen:
    width = max(len(one.prompt) + one.fed for one in answers)
    ids_BN = torch.zeros(len(answers), width, dtype=torch.int64)
    valid_BN, output_BN = torch.zeros_like(ids_BN), torch.zeros_like(ids_BN, dtype=torch.bool)
    for row, one in enumerate(answers):
        begin, end = len(one.prompt), len(one.prompt) + one.fed
        ids_BN[row, :end] = torch.tensor(one.prompt + one.answer[:-1])
        valid_BN[row, :end], output_BN[row, begin:end] = 1, True
    result = model.model(
        input_ids=ids_BN.to(model.device),
        attention_mask=valid_BN.to(model.device),
        output_mask=output_BN.to(model.device),
        method=method,
        answers_only=not method.is_dense,
        sample_key=key_B.to(model.device),
        use_cache=False,
    )
    places = [slice(len(one.prompt) - 1, len(one.prompt) + one.fed) for one in answers]
    hidden = [its[place].cpu() for its, place in zip(result.last_hidden_state, places, strict=True)]
    if method.is_dense:
        return Seen(hidden, [float(pairs(one.fed)) for one in answers])
    kept_BN = result.sparsity.keep_mask.bool().cpu()
    kept = [kept_BN[row, output_BN[row]] for row in range(len(answers))]
    return Seen(hidden, [float(one) for one in count_kept(kept, method.drop_delay)])


def _step_by_step(model: Any, answers: Sequence[HeldAnswer], method: Method, layer: int) -> Seen:
    """Feed as decoding does: the prompts, then one token of each row at a time; a row that has ended is padded."""
    device, batch = model.device, len(answers)
    width = max(len(one.prompt) for one in answers)
    ids_BN = torch.tensor([[0] * (width - len(one.prompt)) + one.prompt for one in answers], device=device)
    lengths_B = torch.tensor([len(one.prompt) for one in answers], device=device)
    valid_BN = torch.arange(width, device=device) >= width - lengths_B[:, None]
    output_BN = torch.zeros_like(valid_BN)
    hidden: list[list[Tensor]] = [[] for _ in answers]
    seen_B, cache = torch.zeros(batch, dtype=torch.float64), None
    for step in range(max(map(len, (one.answer for one in answers)))):
        position_BN = (valid_BN.cumsum(1) - 1).clamp(min=0)
        result = model.model(
            input_ids=ids_BN,
            attention_mask=valid_BN.long(),
            output_mask=output_BN,
            position_ids=position_BN[:, -ids_BN.shape[1] :],
            cache=cache,
            use_cache=True,
            method=method,
        )
        cache = cache_of(result)
        last_BD = result.last_hidden_state[:, -1].cpu()
        held_B = cache.head_lengths()[:, layer:].double().mean((1, 2)).cpu() - lengths_B.cpu()
        for row, one in enumerate(answers):
            if step < len(one.answer):
                hidden[row].append(last_BD[row])
            if step < one.fed:  # so many output tokens have been fed, and the next one sees what is held of them
                seen_B[row] += held_B[row]
        fed = [one.answer[step] if step < one.fed else 0 for one in answers]
        ids_BN = torch.tensor(fed, device=device)[:, None]
        goes_on_B1 = torch.tensor([step < one.fed for one in answers], device=device)[:, None]
        valid_BN, output_BN = torch.cat([valid_BN, goes_on_B1], 1), torch.cat([output_BN, goes_on_B1], 1)
    return Seen([torch.stack(one) for one in hidden], seen_B.tolist())


@torch.no_grad()
def compare(seen: Seen, head_VD: Tensor, reference: Reference, answers: Sequence[HeldAnswer]) -> list[dict[str, float]]:
    """Return what each answer adds: tokens, nll and kl (nats), `same` (the likeliest token is dense's), pairs, visible.

    kl is that of the dense model's prediction to this one's, the sum over the answer's tokens.
    """
    found = []
    for number, one in enumerate(answers):
        labels_T = torch.tensor(one.answer)
        sums = torch.zeros(3, dtype=torch.float64)
        for start in range(0, len(one.answer), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            said_TV = _log_probabilities(seen.hidden[number][part], head_VD)
            dense_TV = _log_probabilities(reference.hidden[number][part], reference.head)
            labels = labels_T[part, None].to(said_TV.device)
            nll = -said_TV.gather(1, labels).double().sum()
            kl = (dense_TV.exp() * (dense_TV - said_TV)).double().sum()
            same = (said_TV.argmax(1) == dense_TV.argmax(1)).double().sum()
            sums += torch.stack([nll, kl, same]).cpu()
        names = dict(zip(("nll", "kl", "same"), sums.tolist(), strict=True))
        found.append({"tokens": len(one.answer), **names, "pairs": pairs(one.fed), "visible": seen.visible[number]})
    return found


def _log_probabilities(hidden_TD: Tensor, head_VD: Tensor) -> Tensor:
    return (hidden_TD.to(head_VD) @ head_VD.T).float().log_softmax(-1)


@torch.no_grad()
def answer_greedily(
    model: Any, processor: DynamicLlavaProcessor, answers: Sequence[HeldAnswer], method: Method, tokens: int
) -> tuple[list[list[int]], float]:
    """Return greedy answers of exactly so many tokens to all prompts, and the seconds of a token, the batch at once."""
    inputs = {name: value.to(model.device) for name, value in processor.pad([one.prompt for one in answers]).items()}
    begun = time.perf_counter()
    out = model.generate(
        **inputs, method=method, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, use_cache=True
    )
    seconds = (time.perf_counter() - begun) / tokens
    return out[:, inputs["input_ids"].shape[1] :].tolist(), seconds


def agreement(said: Sequence[Sequence[int]], dense: Sequence[Sequence[int]]) -> list[float]:
    """Return for each answer the share of the dense one that it begins with, up to the first other token."""
    shares = []
    for own, other in zip(said, dense, strict=True):
        equal = [one == its for one, its in zip(own, other, strict=True)]
        shares.append((equal.index(False) if False in equal else len(equal)) / len(equal))
    return shares


def reference_of(
    model: Any, processor: DynamicLlavaProcessor, answers: Sequence[HeldAnswer], batch: int, tokens: int
) -> Reference:
    """Return the dense model's predictions of the answers, and its own first `tokens` of each."""
    greedy, _ = answer_greedily(model, processor, answers, Dense(), tokens)
    return Reference(see(model, answers, Dense(), 0, batch).hidden, model.lm_head.weight.detach(), greedy)
