"""One of two checkouts that `against.py` compares: makes a call when its turn comes, and says how long that took.

It is run as text in the folder of either checkout, so it uses nothing of this package but names that every version has:
the public ones, and the arguments of forward and generate().
Standard input: one line of JSON with what is called and its sizes, then one line per turn. Standard output: one line of
JSON per turn, seconds by the clock and of the processor, and what came out. It ends when standard input does.
Shape suffixes: B rows, N tokens, n image tokens of one image, D hidden size.
"""

import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, StoppingCriteria

IMAGE_TOKEN, FIRST_WORD = 3, 4
BEFORE_IMAGE = 1
"""Prompt tokens before the image's."""
ANSWER = 64
"""Tokens of an answer that is trained on."""


class Turns:
    """Waits for its turn, and says what it took."""

    def __init__(self) -> None:
        self.lines = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever else is printed goes with the errors
        self.begun = 0.0, 0.0

    def wait(self) -> None:
        """Return when the turn has come, at the end of standard input never."""
        if not sys.stdin.readline():
            raise SystemExit
        self.begun = time.perf_counter(), time.process_time()

    def end(self, said: Any) -> None:
        """Write the seconds since the turn has come, and what came out."""
        seconds, processor = time.perf_counter() - self.begun[0], time.process_time() - self.begun[1]
        self.lines.write(json.dumps([seconds, processor, said]) + "\n")
        self.lines.flush()


class TurnPerToken(StoppingCriteria):
    """Ends no generation, and lets the next token wait for its turn."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return (B,) bool: no row has ended."""
        self.turns.end(input_ids[:, -1].tolist())
        self.turns.wait()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def build_model(sizes: dict[str, Any]) -> Any:
    """Return a model whose weights follow from their names, so that they are the same in every checkout."""
    import dynamic_llava

    side = sizes["vision"]["patch_size"] * round(sizes["image_tokens"] ** 0.5)
    config = dynamic_llava.DynamicLlavaConfig(
        vision_config=CLIPVisionConfig(image_size=side, **sizes["vision"]),
        text_config=LlamaConfig(max_position_embeddings=4096, tie_word_embeddings=False, **sizes["decoder"]),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=sizes["image_tokens"],
        tie_word_embeddings=False,
        sparsity=sizes["sparsity"],
    )
    model = dynamic_llava.DynamicLlavaForConditionalGeneration(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def random_ids(sizes: dict[str, Any], tokens: int) -> torch.Tensor:
    """Return (B, N) int64 ids of words with one image each."""
    ids_BN = torch.randint(FIRST_WORD, sizes["decoder"]["vocab_size"], (sizes["batch"], tokens))
    ids_BN[:, BEFORE_IMAGE : BEFORE_IMAGE + sizes["image_tokens"]] = IMAGE_TOKEN
    return ids_BN


def generate(model: Any, sizes: dict[str, Any], turns: Turns) -> None:
    """Take a turn for every token of one generate(); the first one has the prefill and, where asked for, compiling."""
    ids_BN = random_ids(sizes, sizes["prompt"])
    features_BnD = 0.02 * torch.randn(sizes["batch"], sizes["image_tokens"], sizes["decoder"]["hidden_size"])
    turns.wait()
    model.generate(
        input_ids=ids_BN,
        attention_mask=torch.ones_like(ids_BN),
        image_features=features_BnD,
        max_new_tokens=sizes["turns"],
        do_sample=False,
        compile=sizes["compile"],
        stopping_criteria=[TurnPerToken(turns)],
    )


def prefill(model: Any, sizes: dict[str, Any]) -> Callable[[], Any]:
    """Return a call that runs prompts whose projected images are given."""
    ids_BN = random_ids(sizes, sizes["prompt"])
    features_BnD = 0.02 * torch.randn(sizes["batch"], sizes["image_tokens"], sizes["decoder"]["hidden_size"])

    @torch.no_grad()
    def call() -> Any:
        given = {"input_ids": ids_BN, "attention_mask": torch.ones_like(ids_BN), "image_features": features_BnD}
        return model(**given, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()

    return call


def training(model: Any, sizes: dict[str, Any]) -> Callable[[], Any]:
    """Return a call that computes the gradients of the language model, predictors included; images are encoded."""
    model.train()
    for part in (model.model.language_model, model.lm_head):
        part.requires_grad_(True)
    ids_BN = random_ids(sizes, sizes["prompt"] + ANSWER)
    labels_BN = ids_BN.clone()
    labels_BN[:, : sizes["prompt"]] = -100
    side = model.config.vision_config.image_size
    pixels, keys_B = torch.randn(sizes["batch"], 3, side, side), torch.arange(sizes["batch"])

    def call() -> Any:
        loss = model(input_ids=ids_BN, pixel_values=pixels, labels=labels_BN, sample_key=keys_B).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        return round(loss.item(), 4)

    return call


def main() -> None:
    """Build what is asked for and take turns until there are no more."""
    turns, sizes = Turns(), json.loads(sys.stdin.readline())
    import dynamic_llava

    found = Path(dynamic_llava.__file__).resolve().parents[1]
    if found != Path.cwd().resolve():
        raise RuntimeError(f"the package was imported from {found}, not from {Path.cwd()}")
    torch.manual_seed(0)
    model = build_model(sizes)
    if sizes["call"] == "generate":
        generate(model, sizes, turns)
        return
    call = {"prefill": prefill, "training": training}[sizes["call"]](model, sizes)
    while True:
        turns.wait()
        turns.end(call())
