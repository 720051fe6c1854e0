"""What the data costs at the size of LLaVA's mixture: preparation, start of a process, throughput; measured.

The mixture is a generated stand-in: LLaVA's size, sources, turns and lengths, without its content. The samples of each
source are counted as in the published llava_v1_5_mix665k.json; turns and words are rough estimates of ours. Words are
made of syllables and drawn by Zipf's law; pictures are coloured clouds with photographic file sizes.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from dynamic_llava.config import DataConfig
from dynamic_llava.data.chunks import worker_count
from dynamic_llava.data.llava_json import resolve_image
from dynamic_llava.data.sampling import EpochSampler, padding_share
from dynamic_llava.data.sft import Collator, SftDataset
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.processing.images import load_image
from dynamic_llava.provenance import environment

BATCH, STEP = 8, 64
"""Samples of a batch and of an optimizer step: the paper's, on eight processes."""
WORDS = 60_000
"""Different words; Zipf's law makes most of them rare."""
TEXT_WORDS = 2_000_000
"""Words of the running text that questions and answers are cut from."""
VOCABULARY = 32_000
"""Entries of the tokenizer, as many as LLaMA's."""


def measure_and_write(folder: Path, sizes: dict[str, int], output: Path, command: str) -> str:
    """Generate a mixture in `folder`, which is replaced, measure it, write `output`.md and .json; return the page.

    sizes: samples, pictures, throughput_samples, workers (0: one per core) and seed. ValueError for a size below 1.
    """
    for name in ("samples", "pictures", "throughput_samples"):
        if sizes[name] < 1:
            raise ValueError(f"{name}={sizes[name]} must be 1 or more")
    folder, workers, seed = folder.resolve(), worker_count(sizes["workers"]), sizes["seed"]
    shutil.rmtree(folder, ignore_errors=True)
    os.environ["DYNAMIC_LLAVA_CACHE"] = str(folder / "cache")  # nothing in it is prepared yet
    data = write_mixture(folder, sizes["samples"], sizes["pictures"], seed)
    numbers = measure(folder, data, sizes["throughput_samples"], workers, seed)
    about = {**environment(), "seed": seed, "date": date.today().isoformat()}
    output.parent.mkdir(parents=True, exist_ok=True)
    results = {"command": command, "environment": about, **numbers}
    output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    text = page(numbers, command, about)
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def measure(folder: Path, data: DataConfig, samples: int, workers: int, seed: int) -> dict[str, Any]:
    """Prepare and measure the mixture that `write_mixture` wrote into `folder`; throughput over `samples`.

    The first start prepares, in a process of its own, the second only reads: what every process of a run does from then
    on. Nothing is prepared yet when the cache folder is fresh. Returns the numbers of `docs/results/data.json`.
    """
    config = folder / "mixture.yaml"
    values = {
        "model": {"base": str(folder / "processor")},
        "data": {"json": data.json, "image_folder": data.image_folder, "workers": workers},
        "train": {"batch_size": BATCH, "group_by_length": True},
    }
    config.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    prepared, started = first_batch(config), first_batch(config)
    dataset = SftDataset(data, load_processor(folder))
    lengths = dataset.lengths
    numbers: dict[str, Any] = {
        "json_bytes": Path(data.json).stat().st_size,
        "samples": dataset.counts.total,
        "used": len(dataset),
        "tokens_mean": float(lengths.mean()),
        "prepare_and_first_batch_seconds": prepared["seconds"],
        "prepare_peak_bytes": prepared["peak_resident_bytes"],
        "start_seconds": started["seconds"],
        "start_peak_bytes": started["peak_resident_bytes"],
        "workers": workers,
    }
    for name, grouped in (("random", None), ("grouped", lengths)):
        order = np.fromiter(EpochSampler(len(dataset), STEP, seed, lambda: 0, grouped), dtype=np.int64)
        numbers[f"padding_share_{name}"] = padding_share(lengths, order, BATCH)
    return {**numbers, "samples_per_second": throughput(dataset, samples, workers, seed), "throughput_samples": samples}


def first_batch(config: Path) -> dict[str, Any]:
    """Run `python -m dynamic_llava.data first-batch` in a fresh process; `seconds` are from its start to its answer."""
    command = [sys.executable, "-m", "dynamic_llava.data", "first-batch", str(config)]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}; its message is above")
    return {**json.loads(line), "seconds": seconds}


def throughput(dataset: SftDataset, samples: int, workers: int, seed: int) -> dict[str, float]:
    """Return samples per second of the whole pipeline and of its beginnings, each over the same `samples` samples.

    read: the image files' bytes; decode: to RGB pixels; batches: all that training waits for (rows, pixels for the
    vision tower, labels, padding). File contents are in the page cache after the first round, which is not counted.
    """
    order = list(EpochSampler(len(dataset), 1, seed, lambda: 0))[:samples]
    chosen = Subset(dataset, order)
    stages: dict[str, Any] = {"read": _Files(dataset, order, False), "decode": _Files(dataset, order, True)}
    loaders: dict[str, Iterable[Any]] = {
        name: DataLoader(stage, BATCH, num_workers=workers, collate_fn=sum) for name, stage in stages.items()
    }
    loaders["batches"] = DataLoader(chosen, BATCH, num_workers=workers, collate_fn=Collator(dataset.processor))
    for _ in loaders["read"]:
        pass
    rates = {}
    for name, loader in loaders.items():
        began = time.perf_counter()
        for _ in loader:
            pass
        rates[name] = len(order) / (time.perf_counter() - began)
    return rates


class _Files(Dataset[int]):
    """The image files of some samples alone: the bytes read, or the pixels decoded, of each."""

    def __init__(self, dataset: SftDataset, order: list[int], decode: bool) -> None:
        self.folder, self.rows, self.decode = dataset.config.image_folder, dataset.rows.select(order), decode

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> int:
        paths = [resolve_image(self.folder, image) for image in self.rows[number]["images"]]
        if self.decode:
            return sum(np.asarray(load_image(path)).size for path in paths)
        return sum(len(path.read_bytes()) for path in paths)


def page(numbers: dict[str, Any], command: str, about: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    rate, gib = numbers["samples_per_second"], 2**30
    rows = {
        "JSON file": f"{numbers['json_bytes'] / 1e9:.2f} GB, {numbers['samples']:,} samples",
        "trained on (others are text-only)": f"{numbers['used']:,} samples, {numbers['tokens_mean']:.0f} tokens each",
        "prepared once, first batch included": f"{numbers['prepare_and_first_batch_seconds']:.0f} s "
        f"in {numbers['workers']} processes; {numbers['prepare_peak_bytes'] / gib:.2f} GiB in the one that writes",
        "from then on: start of a process to its first batch": f"**{numbers['start_seconds']:.1f} s** (goal: 30)",
        "memory of that process at its peak": f"**{numbers['start_peak_bytes'] / gib:.2f} GiB** (goal: 2)",
        "reading the image files": f"{rate['read']:.0f} samples/s",
        "reading and decoding them": f"{rate['decode']:.0f} samples/s",
        "whole pipeline: rows, decoding, 336 x 336 pixels, labels, padding": f"**{rate['batches']:.0f} samples/s**",
        "whole pipeline / reading and decoding": f"{rate['batches'] / rate['decode']:.2f}",
        f"padding in batches of {BATCH}, random order": f"{numbers['padding_share_random']:.1%}",
        f"padding in batches of {BATCH}, train.group_by_length": f"{numbers['padding_share_grouped']:.1%}",
    }
    versions = ", ".join(f"{name} {value}" for name, value in about.items())
    return "\n".join(
        [
            "# Data at the size of LLaVA's 665K mixture",
            "",
            "Measured on a generated file: sources, turns and lengths resemble llava_v1_5_mix665k.json, words and "
            "pictures are made up, and the",
            "tokenizer is a BPE of 32,000 entries trained on these words, merging whole texts as LLaMA's does. Few "
            "different pictures are shown many times,",
            "so that files come from memory: a disk or a network adds its own time.",
            "",
            "| what | measured |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            f"Throughput over {numbers['throughput_samples']:,} samples with {numbers['workers']} worker processes, "
            f"batches of {BATCH}. Memory counts mapped pages of the Arrow file.",
            "Padding is the share of a batch's tokens behind its shorter samples; steps have "
            f"{STEP} samples. The numbers: [data.json](data.json).",
            "",
            f"Command: `{command}`. {versions}.",
            "",
        ]
    )


@dataclass(frozen=True)
class MixtureSource:
    """One part of the mixture: its share is `samples` of all sources' samples; ranges are inclusive."""

    samples: int
    folder: str
    turns: tuple[int, int]
    question_words: tuple[int, int]
    answer_words: tuple[int, int]


SOURCES = (
    MixtureSource(57_000, "coco/train2017", (2, 6), (6, 16), (10, 50)),  # LLaVA-Instruct: conversations
    MixtureSource(23_712, "coco/train2017", (1, 1), (6, 14), (70, 130)),  # detailed descriptions
    MixtureSource(77_000, "coco/train2017", (1, 1), (8, 22), (70, 160)),  # complex reasoning
    MixtureSource(40_688, "", (1, 8), (10, 120), (60, 350)),  # ShareGPT, text only
    MixtureSource(82_783, "coco/train2017", (3, 9), (5, 16), (1, 2)),  # VQAv2
    MixtureSource(72_140, "gqa/images", (6, 20), (6, 20), (1, 1)),  # GQA
    MixtureSource(8_998, "coco/train2017", (1, 1), (8, 18), (1, 3)),  # OKVQA
    MixtureSource(80_000, "ocr_vqa/images", (4, 6), (5, 15), (1, 9)),  # OCR-VQA
    MixtureSource(66_160, "coco/train2017", (1, 2), (20, 45), (1, 1)),  # A-OKVQA
    MixtureSource(21_953, "textvqa/train_images", (1, 1), (25, 60), (8, 16)),  # TextCaps
    MixtureSource(48_447, "coco/train2017", (3, 14), (8, 20), (2, 8)),  # RefCOCO
    MixtureSource(86_417, "vg/VG_100K", (4, 16), (8, 18), (3, 8)),  # Visual Genome
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
    number: int, source: MixtureSource, words: list[str], names: dict[str, list[str]], rng: np.random.Generator
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
