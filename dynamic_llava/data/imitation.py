"""A generated stand-in for LLaVA's 665K mixture: its size, sources, turns and lengths, without its content.

The samples of each source are counted as in the published llava_v1_5_mix665k.json; turns and words are rough estimates
of ours. Words are made of syllables and drawn by Zipf's law; pictures are coloured clouds with photographic file sizes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

from dynamic_llava.config import DataConfig
from dynamic_llava.processing import DynamicLlavaProcessor

WORDS = 60_000
"""Different words; Zipf's law makes most of them rare."""
TEXT_WORDS = 2_000_000
"""Words of the running text that questions and answers are cut from."""
VOCABULARY = 32_000
"""Entries of the tokenizer, as many as LLaMA's."""


@dataclass(frozen=True)
class Source:
    """One part of the mixture: its share is `samples` of all sources' samples; ranges are inclusive."""

    samples: int
    folder: str
    turns: tuple[int, int]
    question_words: tuple[int, int]
    answer_words: tuple[int, int]


SOURCES = (
    Source(57_000, "coco/train2017", (2, 6), (6, 16), (10, 50)),  # LLaVA-Instruct: conversations
    Source(23_712, "coco/train2017", (1, 1), (6, 14), (70, 130)),  # detailed descriptions
    Source(77_000, "coco/train2017", (1, 1), (8, 22), (70, 160)),  # complex reasoning
    Source(40_688, "", (1, 8), (10, 120), (60, 350)),  # ShareGPT, text only
    Source(82_783, "coco/train2017", (3, 9), (5, 16), (1, 2)),  # VQAv2
    Source(72_140, "gqa/images", (6, 20), (6, 20), (1, 1)),  # GQA
    Source(8_998, "coco/train2017", (1, 1), (8, 18), (1, 3)),  # OKVQA
    Source(80_000, "ocr_vqa/images", (4, 6), (5, 15), (1, 9)),  # OCR-VQA
    Source(66_160, "coco/train2017", (1, 2), (20, 45), (1, 1)),  # A-OKVQA
    Source(21_953, "textvqa/train_images", (1, 1), (25, 60), (8, 16)),  # TextCaps
    Source(48_447, "coco/train2017", (3, 14), (8, 20), (2, 8)),  # RefCOCO
    Source(86_417, "vg/VG_100K", (4, 16), (8, 18), (3, 8)),  # Visual Genome
)
SIZES = ((640, 480), (640, 426), (480, 640), (500, 375), (500, 333), (333, 500), (1024, 768), (640, 640))
"""Width and height of the pictures."""


def write_mixture(folder: Path, samples: int, pictures: int, seed: int) -> DataConfig:
    """Write `samples` samples over `pictures` different pictures, and a tokenizer; return where they are.

    The folder then holds mixture.json, images/ and processor/, which serves as `model.base` for everything about data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    words = _running_text(rng)
    names = _write_pictures(folder / "images", pictures, rng)
    _write_processor(folder / "processor", words)
    shares = np.array([source.samples for source in SOURCES], dtype=float)
    kinds = rng.choice(len(SOURCES), size=samples, p=shares / shares.sum())
    with (folder / "mixture.json").open("w", encoding="utf-8") as file:
        for number, kind in enumerate(tqdm(kinds, desc="writing samples", delay=3, mininterval=30, leave=False)):
            file.write((",\n" if number else "[") + json.dumps(_sample(number, SOURCES[kind], words, names, rng)))
        file.write("]\n")
    return DataConfig(json=str(folder / "mixture.json"), image_folder=str(folder / "images"))


def load_processor(folder: Path) -> DynamicLlavaProcessor:
    """Return the processor that `write_mixture` wrote: 336 x 336 pixels, 576 tokens per image."""
    return DynamicLlavaProcessor.from_pretrained(folder / "processor")


def _running_text(rng: np.random.Generator) -> list[str]:
    syllables = [consonant + vowel for consonant in "bcdfghklmnprstvwz" for vowel in ("a", "e", "i", "o", "u", "ea")]
    lengths = rng.integers(1, 5, WORDS)
    lexicon = ["".join(rng.choice(syllables, size)) for size in lengths]
    ranks = 1 / np.arange(1, WORDS + 1)
    return [lexicon[number] for number in rng.choice(WORDS, TEXT_WORDS, p=ranks / ranks.sum())]


def _sample(
    number: int, source: Source, words: list[str], names: dict[str, list[str]], rng: np.random.Generator
) -> dict[str, Any]:
    turns = int(rng.integers(source.turns[0], source.turns[1] + 1))
    lengths = np.empty((turns, 2), dtype=int)
    lengths[:, 0] = rng.integers(source.question_words[0], source.question_words[1] + 1, turns)
    lengths[:, 1] = rng.integers(source.answer_words[0], source.answer_words[1] + 1, turns)
    place = int(rng.integers(0, len(words) - lengths.sum()))
    messages = []
    for sender, count in zip(("human", "gpt") * turns, lengths.ravel().tolist(), strict=True):
        messages.append({"from": sender, "value": " ".join(words[place : place + count])})
        place += count
    sample: dict[str, Any] = {"id": f"{number:09d}", "conversations": messages}
    if source.folder:
        messages[0]["value"] = f"<image>\n{messages[0]['value']}"
        sample["image"] = names[source.folder][int(rng.integers(len(names[source.folder])))]
    return sample


def _write_pictures(folder: Path, pictures: int, rng: np.random.Generator) -> dict[str, list[str]]:
    """Write the pictures; return their names by the source's folder. Every folder shows all of them (hard links)."""
    folders = sorted({source.folder for source in SOURCES if source.folder})
    names: dict[str, list[str]] = {name: [] for name in folders}
    for number in range(pictures):
        first = folder / folders[0] / f"{number:012d}.jpg"
        first.parent.mkdir(parents=True, exist_ok=True)
        _picture(rng, SIZES[number % len(SIZES)]).save(first, quality=90)
        for name in folders:
            path = folder / name / first.name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path != first:
                path.unlink(missing_ok=True)
                path.hardlink_to(first)
            names[name].append(f"{name}/{first.name}")
    return names


def _picture(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    clouds = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    return Image.blend(clouds, grain.filter(ImageFilter.GaussianBlur(1)), 0.25)


def _write_processor(folder: Path, words: list[str]) -> None:
    """Train a byte-fallback BPE tokenizer in the manner of LLaMA's and write it with LLaVA-1.5's image sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=specials, show_progress=False)
    texts = (" ".join(words[start : start + 1000]) for start in range(0, len(words), 1000))
    backend.train_from_iterator(texts, trainer)
    backend.pre_tokenizer = None  # as LLaMA's: whole texts are merged, not words
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken("<image>", special=True)])
    backend.save(str(folder / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{name}_token": text for name, text in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))},
        },
        "processor_config.json": {"patch_size": 14, "vision_feature_select_strategy": "default"},
        "preprocessor_config.json": {"crop_size": {"height": 336, "width": 336}},
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2), encoding="utf-8")


def shares() -> Iterator[tuple[str, int]]:
    """Yield each image folder of the mixture ("text only" without) and its samples."""
    totals: dict[str, int] = {}
    for source in SOURCES:
        name = source.folder.split("/")[0] or "text only"
        totals[name] = totals.get(name, 0) + source.samples
    yield from totals.items()
