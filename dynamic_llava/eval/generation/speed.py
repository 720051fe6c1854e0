"""How much faster perplexity in one pass is than the cached loop, on an untrained model of a fixed size."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from dynamic_llava.eval.generation.dialogues import EncodedRound
from dynamic_llava.eval.generation.teacher_forcing import score_dialogues, score_step_by_step
from dynamic_llava.eval.writing import write_text
from dynamic_llava.methods import Dynamic
from dynamic_llava.model import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynamic_llava.provenance import environment

HIDDEN, LAYERS, VOCABULARY = 256, 8, 32064
IMAGE_TOKENS, PROMPT_TOKENS, ANSWER_TOKENS = 576, 56, 256
IMAGE_ID, END_ID = 32000, 2
SPREAD = 0.1
"""Standard deviation of the weights: with the usual 0.02 all tokens would be nearly as likely, whatever was dropped."""


@dataclass(frozen=True)
class PplSpeed:
    """Seconds and values of both ways, at batch size 1."""

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
        """Of the two perplexities, relative to the loop's."""
        return abs(self.perplexity / self.loop_perplexity - 1)

    def describe(self) -> str:
        """Return the measurement as text."""
        return (
            f"hidden {HIDDEN}, {LAYERS} layers, {IMAGE_TOKENS} image tokens, {ANSWER_TOKENS}-token answer, batch 1, "
            f"{self.device}: one pass {1e3 * self.one_pass_s:.0f} ms, loop {1e3 * self.loop_s:.0f} ms, "
            f"{self.ratio:.1f} times faster; perplexities differ by {self.difference:.1e}"
        )


def measure_ppl_speed(seed: int = 0, repeats: int = 5) -> PplSpeed:
    """Time both ways by turns on the CPU, vision tower included; ValueError unless repeats >= 1."""
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
    ways = {"one_pass": score_dialogues, "loop": score_step_by_step}
    values = {name: way(model, rows, pixels, method)[0].perplexities[0] for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            seconds[name].append(_seconds(lambda way=way: way(model, rows, pixels, method)))
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
