"""Training samples: a LLaVA-format file is checked and tokenised once into an Arrow file, then read memory-mapped.

An Arrow row holds index (place in the JSON file), id, images, input_ids (ONE image token per image), spans (start and
end of each answer, flat, counted with all image tokens) and length (with all image tokens).
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from torch import Tensor
from tqdm import tqdm

from dynamic_llava.config import DataConfig, cache_folder
from dynamic_llava.data.llava_json import LlavaSample, check_samples, is_text_only, read_samples, resolve_image
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.processing.prompts import IGNORED_LABEL, ImageCutError

ARROW_FORMAT = 1
"""Raised whenever the rows' meaning changes, so that no old file is read."""
FEATURES = Features(
    {
        "index": Value("int64"),
        "id": Value("string"),
        "images": List(Value("string")),
        "input_ids": List(Value("int32")),
        "spans": List(Value("int32")),
        "length": Value("int32"),
    }
)


@dataclass
class SampleCounts:
    """What became of the samples of a file."""

    total: int = 0
    """Samples in the file."""
    used: int = 0
    """Samples that are trained on."""
    text_only_skipped: int = 0
    """Samples without an image, left out by text_only="skip"."""
    image_would_be_cut: int = 0
    """Samples left out because an image does not fit into max_length."""
    shortened: int = 0
    """Used samples that lost text behind max_length."""
    nothing_learned: int = 0
    """Used samples without any learned token; they contribute 0 to the loss."""

    def __str__(self) -> str:
        left_out = [f"{self.text_only_skipped} text-only skipped", f"{self.image_would_be_cut} with an image cut"]
        notes = [f"{self.shortened} shortened", f"{self.nothing_learned} without a learned token"]
        return f"{self.used} of {self.total} samples ({', '.join(left_out)} left out; {', '.join(notes)})"


class SftSample(TypedDict):
    """One training sample: input_ids and labels (N,) int64, spans, pixel_values (I, 3, S, S) float32, sample_id."""

    input_ids: Tensor
    labels: Tensor
    spans: list[tuple[int, int]]
    pixel_values: Tensor
    sample_id: int


class SftDataset(torch.utils.data.Dataset[SftSample]):
    """LLaVA-format samples, tokenised once and read from disk; images are decoded when a sample is asked for.

    `counts` says what was left out. `sample_id` is the sample's place in the JSON file: noise and data order depend on
    it, never on the batch. The Arrow file lies in the cache folder under a name made of everything it depends on.
    Raises ValueError or FileNotFoundError for unusable samples (see `llava_json.check_samples`).
    """

    def __init__(self, config: DataConfig, processor: DynamicLlavaProcessor) -> None:
        self.config = config
        self.processor = processor
        rows, counts = prepare(config, processor)
        self.rows = Dataset.from_file(str(rows))
        self.counts = SampleCounts(**json.loads(counts.read_text(encoding="utf-8")))
        self._images: OrderedDict[str, Tensor] = OrderedDict()
        if not len(self.rows):
            raise ValueError(f"{config.json}: no sample is left to train on: {self.counts}")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Return every sample's number of tokens, image tokens included."""
        return list(self.rows["length"])

    def __getitem__(self, number: int) -> SftSample:
        row = self.rows[number]
        input_ids = self._expand(torch.tensor(row["input_ids"], dtype=torch.int64))
        spans = list(zip(row["spans"][::2], row["spans"][1::2], strict=True))
        labels = torch.full_like(input_ids, IGNORED_LABEL)
        for start, end in spans:
            labels[start:end] = input_ids[start:end]
        try:
            pixels = [self._pixels(image) for image in row["images"]]
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{self.config.json}, index {row['index']}, id {row['id']!r}: {error}") from None
        size = self.processor.image_size
        pixel_values = torch.stack(pixels) if pixels else torch.empty(0, 3, size, size)
        return SftSample(
            input_ids=input_ids, labels=labels, spans=spans, pixel_values=pixel_values, sample_id=row["index"]
        )

    def _expand(self, ids: Tensor) -> Tensor:
        repeats = torch.where(ids == self.processor.image_token_id, self.processor.tokens_per_image, 1)
        return ids.repeat_interleave(repeats)

    def _pixels(self, image: str) -> Tensor:
        """Return (3, S, S) of one image, from memory if `cache_images` has kept it."""
        if image in self._images:
            self._images.move_to_end(image)
            return self._images[image]
        pixels = self.processor.preprocess_images([resolve_image(self.config.image_folder, image)])[0]
        if self.config.cache_images:
            self._images[image] = pixels
            if len(self._images) > self.config.cache_images:
                self._images.popitem(last=False)
        return pixels


def prepare(config: DataConfig, processor: DynamicLlavaProcessor) -> tuple[Path, Path]:
    """Check and tokenise the file unless that was done before; return the Arrow file and the file of its counts."""
    target = cache_folder() / "sft" / f"{_fingerprint(config, processor)}.arrow"
    counts_file = target.with_suffix(".json")
    if target.is_file() and counts_file.is_file():
        return target, counts_file
    samples = read_samples(config.json)
    skip = config.text_only == "skip"
    counts = SampleCounts(total=len(samples), text_only_skipped=sum(map(is_text_only, samples)) if skip else 0)
    checked = check_samples(samples, config.json, config.image_folder, skip_text_only=skip)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and moved, so that a half-written file never counts.
    aside = target.with_suffix(f".{os.getpid()}.part")
    try:
        with ArrowWriter(path=str(aside), features=FEATURES) as writer:
            for row in _rows(checked, processor, config.max_length, counts):
                writer.write(row)
            writer.finalize()
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    counts_file.write_text(json.dumps(asdict(counts)), encoding="utf-8")
    return target, counts_file


def _rows(
    samples: Iterable[LlavaSample], processor: DynamicLlavaProcessor, max_length: int, counts: SampleCounts
) -> Iterator[dict[str, Any]]:
    expected = counts.total - counts.text_only_skipped
    for sample in tqdm(samples, desc="preparing samples", total=expected, delay=3, mininterval=1, leave=False):
        try:
            encoded = processor.encode_conversation(sample.turns, max_length=max_length)
        except ImageCutError:
            counts.image_would_be_cut += 1
            continue
        counts.used += 1
        counts.shortened += encoded.shortened
        counts.nothing_learned += not encoded.output_spans
        yield {
            "index": sample.index,
            "id": sample.id,
            "images": list(sample.images),
            "input_ids": _collapse(encoded.input_ids, processor),
            "spans": [edge for span in encoded.output_spans for edge in span],
            "length": len(encoded.input_ids),
        }


def _collapse(ids: list[int], processor: DynamicLlavaProcessor) -> list[int]:
    """Keep one image token of each image: the rest carries no information and would fill the disk."""
    kept, position = [], 0
    while position < len(ids):
        kept.append(ids[position])
        position += processor.tokens_per_image if ids[position] == processor.image_token_id else 1
    return kept


def _fingerprint(config: DataConfig, processor: DynamicLlavaProcessor) -> str:
    """Return a name for everything the Arrow rows depend on."""
    file = Path(config.json)
    if not file.is_file():
        raise FileNotFoundError(f"there is no data file {file}; give a LLaVA-format JSON file")
    state = file.stat()
    parts = (
        ARROW_FORMAT,
        str(file.resolve()),
        state.st_size,
        state.st_mtime_ns,
        str(Path(config.image_folder).resolve()),
        config.text_only,
        config.max_length,
        processor.tokens_per_image,
        processor.image_token_id,
        processor.tokenizer.backend_tokenizer.to_str(),
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
