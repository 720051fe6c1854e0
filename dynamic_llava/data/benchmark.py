"""What the data costs at the size of LLaVA's mixture: preparation, start of a process, throughput; measured."""

import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Subset

from dynamic_llava.config import DataConfig
from dynamic_llava.data.collate import Collator
from dynamic_llava.data.imitation import load_processor
from dynamic_llava.data.llava_json import resolve_image
from dynamic_llava.data.sampling import EpochSampler, padding_share
from dynamic_llava.data.sft import SftDataset
from dynamic_llava.processing.images import load_image

BATCH, STEP = 8, 64
"""Samples of a batch and of an optimizer step: the paper's, on eight processes."""


def measure(folder: Path, data: DataConfig, samples: int, workers: int, seed: int) -> dict[str, Any]:
    """Prepare and measure the mixture that `imitation.write_mixture` wrote into `folder`; throughput over `samples`.

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


def page(numbers: dict[str, Any], command: str, environment: dict[str, Any]) -> str:
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
    versions = ", ".join(f"{name} {value}" for name, value in environment.items())
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
