"""Perplexity of reference answers: one masked forward pass for whole dialogues, and the loop that it must equal.

Dropped answer tokens are masked instead of removed, so every token is scored under the decisions that decoding would
have taken. How much faster the one pass is than the loop is measured on an untrained model of a fixed size.
Shape suffixes: B rows, N tokens of the longest row, T output tokens of a row, V vocabulary, L layers.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from dynamic_llava.eval.generation.dialogues import EncodedRound, LiveDialogues
from dynamic_llava.eval.predict import NOT_FINITE, NotFiniteLogits, seen_in_layers
from dynamic_llava.eval.writing import write_text
from dynamic_llava.methods import Dynamic, Method
from dynamic_llava.model import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynamic_llava.provenance import environment

LARGEST = 700.0
"""A mean cross entropy beyond it is no finite perplexity in float64; NaN is not below it."""

HIDDEN, LAYERS, VOCABULARY = 256, 8, 32064

IMAGE_TOKENS, PROMPT_TOKENS, ANSWER_TOKENS = 576, 56, 256

IMAGE_ID, END_ID = 32000, 2

SPREAD = 0.1
"""Standard deviation of the weights: with the usual 0.02 all tokens would be nearly as likely, whatever was dropped."""


@dataclass(frozen=True)
class Scored:
    """The perplexities of one dialogue's answers, and the tokens that the layers saw."""

    perplexities: tuple[float, ...]
    """Per round exp(mean cross entropy over the answer's tokens and its `</s>`)."""
    image_seen: list[int]
    """Per layer the image tokens that it saw."""
    output_seen: list[int]
    """Per layer the fed answer tokens, of all rounds, that it saw."""
    text_seen: tuple[list[int], list[int]]
    """Per layer the text tokens of the first prompt, and of all prompts, that it saw."""
    heads_hold: tuple[int, int] | None = None
    """Tokens that all key heads held after the first prompt, and at the end, where the method evicts."""


@torch.no_grad()
def score_dialogues(
    model: Any,
    rows: Sequence[Sequence[EncodedRound]],
    pixel_values: Tensor,
    method: Method,
    filler: int = 0,
    sample_key: Tensor | None = None,
) -> list[Scored]:
    """Score every round of each row in ONE forward pass over right-padded rows, filled up with the id `filler`.

    pixel_values is (B, 3, S, S), one image a row; sample_key (B,) int64 as in `LiveDialogues`. The head runs only where
    a token is predicted. A method that looks at the question's attention, or decides on questions, is asked round by
    round where an answer before the last feeds no token: in one pass such a question has no end. Under a method that
    evicts, what a token sees depends on the steps before it, so each token is fed by itself.
    """
    model.eval()
    device, layers = model.device, model.config.text_config.num_hidden_layers
    asks = any(cut.reads_question or cut.prompt for cut in method.cuts(layers))
    if method.evicts or (asks and any(len(one.answer) == 1 for row in rows for one in row[:-1])):
        return score_step_by_step(model, rows, pixel_values, method, sample_key)
    fed = [_fed(row) for row in rows]
    width = max(len(ids) for ids, _, _ in fed)
    ids_BN = torch.tensor([ids + [filler] * (width - len(ids)) for ids, _, _ in fed], device=device)
    valid_BN = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _, _ in fed], device=device)
    output_BN = torch.tensor([out + [False] * (width - len(out)) for _, out, _ in fed], device=device)
    result = model.model(
        input_ids=ids_BN,
        pixel_values=pixel_values.to(device, model.dtype),
        attention_mask=valid_BN,
        output_mask=output_BN,
        method=method,
        answers_only=not method.is_dense,
        sample_key=None if sample_key is None else sample_key.to(device),
        use_cache=False,
    )
    image_BN = (ids_BN == model.config.image_token_id) & ~output_BN
    text_BN = valid_BN.bool() & ~image_BN & ~output_BN
    opening_B1 = torch.tensor([[len(row[0].prompt)] for row in rows], device=device)
    first_BN = text_BN & (torch.arange(width, device=device) < opening_B1)
    image_BL, output_BL, first_BL, text_BL = (
        seen_in_layers(result.sparsity, where, layers).tolist() for where in (image_BN, output_BN, first_BN, text_BN)
    )
    scored = []
    for number, (row, (_, _, places)) in enumerate(zip(rows, fed, strict=True)):
        logits_TV = model.lm_head(result.last_hidden_state[number, torch.tensor(places, device=device)]).float()
        labels_T = torch.tensor([token for one in row for token in one.answer], device=device)
        nll_T = torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="none")
        means = [part.double().mean().item() for part in nll_T.split([len(one.answer) for one in row])]
        if not all(mean < LARGEST for mean in means):
            raise NotFiniteLogits(NOT_FINITE)
        texts = first_BL[number], text_BL[number]
        scored.append(Scored(tuple(map(math.exp, means)), image_BL[number], output_BL[number], texts))
    return scored


@torch.no_grad()
def score_step_by_step(
    model: Any,
    rows: Sequence[Sequence[EncodedRound]],
    pixel_values: Tensor,
    method: Method,
    sample_key: Tensor | None = None,
) -> list[Scored]:
    """Score as the paper's scripts do: a call per prompt, then a call per answer token, on one live cache.

    The reference for `score_dialogues`, and what its speed is measured against.
    """
    model.eval()
    live = LiveDialogues(model, pixel_values, method, sample_key)
    nll: list[list[list[Tensor]]] = [[[] for _ in row] for row in rows]
    for number in range(max(map(len, rows))):
        now = [row[number] if number < len(row) else EncodedRound([], []) for row in rows]
        logits_BV = live.feed([one.prompt for one in now], output=False)
        for step in range(max(len(one.answer) for one in now)):
            if step:
                chunks = [one.answer[step - 1 : step] if step < len(one.answer) else [] for one in now]
                logits_BV = live.feed(chunks, output=True)
            labels_B = torch.tensor([one.answer[step] if step < len(one.answer) else 0 for one in now])
            nll_B = torch.nn.functional.cross_entropy(logits_BV, labels_B.to(logits_BV.device), reduction="none")
            for place, one in enumerate(now):
                if step < len(one.answer):
                    nll[place][number].append(nll_B[place])
    counted = live.image_seen.tolist(), live.output_seen.tolist(), live.text_seen(), live.heads_hold()
    seen = zip(*counted, strict=True)
    scored = []
    for row, counts in zip(nll, seen, strict=True):
        means = [torch.stack(one).double().mean().item() for one in row]
        if not all(mean < LARGEST for mean in means):
            raise NotFiniteLogits(NOT_FINITE)
        scored.append(Scored(tuple(map(math.exp, means)), *counts))
    return scored


def _fed(row: Sequence[EncodedRound]) -> tuple[list[int], list[bool], list[int]]:
    """Return the ids that are fed, which of them are output, and the place whose logits predict each answer token."""
    ids: list[int] = []
    output: list[bool] = []
    places: list[int] = []
    for one in row:
        ids += one.prompt + one.answer[:-1]
        output += [False] * len(one.prompt) + [True] * (len(one.answer) - 1)
        places += range(len(ids) - len(one.answer), len(ids))
    return ids, output, places


@dataclass(frozen=True)
class PplSpeed:
    """Seconds and values of the one pass and of the loop, at batch size 1."""

    one_pass_s: float
    loop_s: float
    perplexity: float
    loop_perplexity: float
    seed: int
    repeats: int
    """Times are medians over so many runs, after one to warm up."""
    date: str
    device: str
    environment: dict[str, Any]

    @property
    def ratio(self) -> float:
        """How many times faster the one pass is."""
        return self.loop_s / self.one_pass_s

    @property
    def difference(self) -> float:
        """Difference of the two perplexities, relative to the loop's."""
        return abs(self.perplexity / self.loop_perplexity - 1)

    def describe(self) -> str:
        """Return the measurement as text."""
        return (
            f"hidden {HIDDEN}, {LAYERS} layers, {IMAGE_TOKENS} image tokens, {ANSWER_TOKENS}-token answer, batch 1, "
            f"{self.device}: one pass {1e3 * self.one_pass_s:.0f} ms, loop {1e3 * self.loop_s:.0f} ms, "
            f"{self.ratio:.1f} times faster; perplexities differ by {self.difference:.1e}"
        )


def measure_ppl_speed(seed: int = 0, repeats: int = 5) -> PplSpeed:
    """Time the one pass and the loop by turns on the CPU, vision tower included; ValueError unless repeats >= 1."""
    if repeats < 1:
        raise ValueError(f"repeats={repeats} is not possible; give 1 or more")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DynamicLlavaForConditionalGeneration(_config()).eval()
        words = torch.randint(3, IMAGE_ID, (PROMPT_TOKENS + ANSWER_TOKENS - 1,)).tolist()
        pixels = torch.randn(1, 3, 336, 336)
    prompt = [*words[:4], *[IMAGE_ID] * IMAGE_TOKENS, *words[4:PROMPT_TOKENS]]
    rows = [[EncodedRound(prompt, [*words[PROMPT_TOKENS:], END_ID])]]
    method = Dynamic.from_config(model.config.sparsity)
    scorers = {"one_pass": score_dialogues, "loop": score_step_by_step}
    values = {name: score(model, rows, pixels, method)[0].perplexities[0] for name, score in scorers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    for _ in range(repeats):
        for name, score in scorers.items():
            seconds[name].append(_seconds(lambda score=score: score(model, rows, pixels, method)))
    return PplSpeed(
        one_pass_s=statistics.median(seconds["one_pass"]),
        loop_s=statistics.median(seconds["loop"]),
        perplexity=values["one_pass"],
        loop_perplexity=values["loop"],
        seed=seed,
        repeats=repeats,
        date=date.today().isoformat(),
        device="cpu",
        environment=environment(),
    )


def write_speed(found: PplSpeed, path: Path) -> Path:
    """Write a measurement as JSON and return its path."""
    sizes = {
        "hidden": HIDDEN, "layers": LAYERS, "vocabulary": VOCABULARY, "image_tokens": IMAGE_TOKENS,
        "prompt_tokens": PROMPT_TOKENS, "answer_tokens": ANSWER_TOKENS, "batch": 1, "dtype": "float32",
    }  # fmt: skip
    content = {"sizes": sizes, "ratio": found.ratio, "difference": found.difference, **asdict(found)}
    return write_text(path, json.dumps(content, indent=1) + "\n")


def _seconds(step: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def _config() -> DynamicLlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=336, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        initializer_range=SPREAD,
        tie_word_embeddings=False,
    )
    return DynamicLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_ID,
        initializer_range=SPREAD,
        tie_word_embeddings=False,
    )
