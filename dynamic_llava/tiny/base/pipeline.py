"""All stages of the base's training in order, measured on unseen pictures, and what is written down of the result."""

import dataclasses
import json
import logging
import platform
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from dynamic_llava.config import SHIPPED
from dynamic_llava.files import give_usual_modes
from dynamic_llava.processing.prompts import SYSTEM
from dynamic_llava.tiny.base.alignment import (
    AlignmentSettings,
    align_projector,
    initialise_decoder,
    word_targets,
)
from dynamic_llava.tiny.base.language import CachedWorld, LanguageSettings, train_language
from dynamic_llava.tiny.base.model import build_tiny_llava, build_tower, export, folded, tiny_config
from dynamic_llava.tiny.base.sequences import IMAGE, SegmentWriter, build_tokenizer
from dynamic_llava.tiny.base.vision import VisionSettings, pixel_values, tower_features, train_tower
from dynamic_llava.tiny.world.scenes import Picture, Scene, sample_pictures
from dynamic_llava.tiny.world.texts import (
    KINDS,
    ShortQuestion,
    ask,
    attribute_recall,
    describe,
    sample_request,
    scene_attributes,
)

logger = logging.getLogger(__name__)

_CRUTCHES = (
    "patch-level labels for the vision tower",
    "projector aligned to the words that name each patch",
    "unit-scale word embeddings, head = 0.04 x embeddings, mimetic attention from layer 2 on at the start",
    "grounding loss on two heads of one layer, fading to zero",
    "several conversations per row behind a block-diagonal mask with restarting positions",
)

_BATCH = 50


@dataclass(frozen=True)
class BaseConfig:
    """Everything that configs/tiny_base.yaml says."""

    output: str = "runs/tiny_base"
    """Folder of the run: stage files, log and export/. A run that finds its own files there goes on from them."""
    seed: int = 0
    """Seed of scenes, initial values and batches."""
    threads: int = 2
    """CPU threads of torch, set by the entry point."""
    install: bool = False
    """Also replace the weights inside the package by every export."""
    questions_per_kind: int = 400
    """Unseen short questions per kind that the finished base is measured on; interim measurements take an eighth."""
    descriptions: int = 152
    """Unseen pictures that the finished base describes; interim measurements take an eighth."""
    vision: VisionSettings = field(default_factory=VisionSettings)
    alignment: AlignmentSettings = field(default_factory=AlignmentSettings)
    language: LanguageSettings = field(default_factory=LanguageSettings)


def train_base(config: BaseConfig) -> dict[str, Any]:
    """Runs all stages, exports the base and returns its provenance (accuracies included)."""
    folder, started = Path(config.output), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer([SYSTEM, "USER: ASSISTANT:"])
    model = build_tiny_llava(
        tiny_config(
            len(tokenizer),
            tokenizer.pad_token_id,
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.convert_tokens_to_ids(IMAGE),
        ),
        config.seed,
    )
    tower_scores = _tower_stage(model, config, folder)
    scenes, pictures = sample_pictures(config.language.images, (config.seed, 4))
    features = _cache_features(model.model.vision_tower, pictures)
    scale = features.std().item()
    features /= scale
    logger.info("cached %d pictures, feature deviation %.3f", len(pictures), scale)
    _alignment_stage(model, tokenizer, scenes, pictures, features, config)
    world = CachedWorld(scenes, features, np.stack([p.patch_object for p in pictures]))
    log = folder / "training_log.jsonl"
    provenance: dict[str, Any] = {}
    steps = config.language.steps
    for step in train_language(model, tokenizer, world, config.language, config.seed, folder / "language.pt"):
        final = step == steps
        shipped = folded(model, scale)
        scores = {"tower": tower_scores, **_measure(shipped, tokenizer, config, thorough=final)}
        _append(log, {"step": step, "seconds": round(time.monotonic() - started), **scores})
        logger.info("step %d of %d: %s", step, steps, json.dumps(scores))
        provenance = _provenance(config, step, scale, scores)
        for target in [folder / "export", *([SHIPPED["tiny"]] if config.install else [])]:
            export(shipped, tokenizer, target, provenance, log)
    return provenance


def _tower_stage(model: LlavaForConditionalGeneration, config: BaseConfig, folder: Path) -> dict[str, float]:
    """Trains the tower, or takes tower.safetensors from the output folder; returns its patch accuracies."""
    weights, scores = folder / "tower.safetensors", folder / "tower.json"
    if not scores.exists():
        tower = build_tower(model.config, config.seed)
        torch.manual_seed(config.seed)
        result = train_tower(tower, config.vision, config.seed)
        save_file({name: value.contiguous() for name, value in tower.state_dict().items()}, weights)
        give_usual_modes(weights)
        scores.write_text(json.dumps(result), encoding="utf-8")
    model.model.vision_tower.load_state_dict(load_file(weights))
    model.model.vision_tower.eval()
    return json.loads(scores.read_text(encoding="utf-8"))


@torch.no_grad()
def _cache_features(tower: CLIPVisionModel, pictures: list[Picture], batch: int = 200) -> torch.Tensor:
    """(I, P, D) float32: last layer of the tower without CLS."""
    parts = [np.stack([p.pixels for p in pictures[i : i + batch]]) for i in range(0, len(pictures), batch)]
    return torch.cat([tower_features(tower, torch.from_numpy(part))[:, 1:] for part in parts])


def _alignment_stage(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    scenes: list[Scene],
    pictures: list[Picture],
    features: torch.Tensor,
    config: BaseConfig,
) -> None:
    """Initial values of the decoder and the aligned projector; seconds, so it is redone when a run is resumed."""
    initialise_decoder(model, config.seed)
    count = config.alignment.images
    targets, owned = word_targets(tokenizer, scenes[:count], pictures[:count])
    align_projector(model, features[:count], targets, owned, config.alignment, config.seed)


def _measure(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, config: BaseConfig, *, thorough: bool
) -> dict[str, Any]:
    """Accuracy by kind and description scores on pictures that no stage has seen."""
    share = 1 if thorough else 8
    per_kind, described = (max(1, count // share) for count in (config.questions_per_kind, config.descriptions))
    scenes, pictures = sample_pictures(max(per_kind * 3 // 2, described), (config.seed, 5))
    questions = sample_questions(scenes, per_kind, (config.seed, 6))
    return {
        "short_answers": question_accuracy(model, tokenizer, pictures, questions),
        "descriptions": description_scores(model, tokenizer, scenes[:described], pictures[:described], config.seed),
    }


def _provenance(config: BaseConfig, step: int, scale: float, scores: dict[str, Any]) -> dict[str, Any]:
    return {
        "made_by": "python -m dynamic_llava.tiny.train_base configs/tiny_base.yaml",
        "config": dataclasses.asdict(config),
        "language_steps_done": step,
        "storage_dtype": "float32",
        "folded_feature_scale": scale,
        "unseen_data_scores": scores,
        "crutches": list(_CRUTCHES),
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
    }


def _commit() -> str:
    """Current commit of the source tree, or 'unknown' outside a git checkout (say, an installed package)."""
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def _append(log: Path, entry: dict[str, Any]) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def sample_questions(scenes: list[Scene], per_kind: int, seed: tuple[int, ...]) -> list[tuple[int, ShortQuestion]]:
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
    questions: list[tuple[int, ShortQuestion]],
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
