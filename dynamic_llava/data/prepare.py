"""A LLaVA-format file is checked and tokenised once, into an Arrow file in the cache folder that is read memory-mapped.

An Arrow row holds index (place in the JSON file), id, images, input_ids (ONE image token per image), spans (start and
end of each answer, flat, counted with all image tokens) and length (with all image tokens).
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Features, List, Value
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock, Timeout

from dynamic_llava.config import DataConfig, cache_folder
from dynamic_llava.data.chunks import Indexed, map_samples
from dynamic_llava.data.llava_json import LlavaSample, SampleError, is_text_only, parse_sample
from dynamic_llava.files import file_digest, writing
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.processing.prompts import ImageCutError

log = logging.getLogger(__name__)

ARROW_FORMAT = 3
"""Raised whenever the rows' meaning changes, so that no old file is read."""
ROWS, COUNTS = "rows.arrow", "counts.json"
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
REPORTED_ERRORS = 5
"""How many bad samples an error message shows; it counts the others."""


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
    blank_answers: int = 0
    """Answers of used samples that hold no text; they are not learned."""

    def __str__(self) -> str:
        left_out = [f"{self.text_only_skipped} text-only skipped", f"{self.image_would_be_cut} with an image cut"]
        notes = [f"{self.shortened} shortened", f"{self.nothing_learned} without a learned token"]
        notes.append(f"{self.blank_answers} blank answers")
        return f"{self.used} of {self.total} samples ({', '.join(left_out)} left out; {', '.join(notes)})"

    def add(self, other: "SampleCounts") -> None:
        """Add the counts of another part of the file."""
        for count in fields(self):
            setattr(self, count.name, getattr(self, count.name) + getattr(other, count.name))


@dataclass
class Encoded:
    """A chunk of samples: columns of Arrow rows, what became of them, and what is wrong with those that are bad."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in FEATURES})
    counts: SampleCounts = field(default_factory=SampleCounts)
    errors: list[str] = field(default_factory=list)


def prepare(config: DataConfig, processor: DynamicLlavaProcessor) -> Path:
    """Check and tokenise the file unless that was done before; return the folder of the Arrow file and its counts.

    Of several processes that ask at once, one prepares and the others wait for it. The folder appears when all of it
    is written: a preparation that is killed or fails leaves nothing that counts. Raises ValueError that counts the bad
    samples and shows the first of them, and ValueError or FileNotFoundError for a broken or missing file.
    """
    target = cache_folder() / "sft" / _fingerprint(config, processor)
    if target.is_dir():
        return target
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with writing(target), _locked(target):
        if not target.is_dir():
            aside = target.with_suffix(".part")
            shutil.rmtree(aside, ignore_errors=True)  # of a preparation that was killed
            aside.mkdir()
            try:
                counts = _write_rows(aside / ROWS, config, processor)
                (aside / COUNTS).write_text(json.dumps(asdict(counts)), encoding="utf-8")
                aside.rename(target)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return target


def encode_sample(sample: LlavaSample, processor: DynamicLlavaProcessor, max_length: int, encoded: Encoded) -> None:
    """Tokenise one sample into a row of `encoded` and count what became of it."""
    try:
        tokens = processor.encode_conversation(sample.turns, max_length=max_length)
    except ImageCutError:
        encoded.counts.image_would_be_cut += 1
        return
    encoded.counts.used += 1
    encoded.counts.shortened += tokens.shortened
    encoded.counts.nothing_learned += not tokens.output_spans
    encoded.counts.blank_answers += sum(not answer.strip() for _, answer in sample.turns)
    row = {
        "index": sample.index,
        "id": sample.id,
        "images": list(sample.images),
        "input_ids": _collapse(np.array(tokens.input_ids, dtype=np.int32), processor),
        "spans": [edge for span in tokens.output_spans for edge in span],
        "length": len(tokens.input_ids),
    }
    for name, value in row.items():
        encoded.columns[name].append(value)


def _encode_chunk(samples: Indexed, *, config: DataConfig, processor: DynamicLlavaProcessor) -> Encoded:
    encoded = Encoded()
    for index, sample in samples:
        encoded.counts.total += 1
        if config.text_only == "skip" and is_text_only(sample):
            encoded.counts.text_only_skipped += 1
            continue
        try:
            encode_sample(parse_sample(sample, index, config.image_folder), processor, config.max_length, encoded)
        except SampleError as error:
            name = sample.get("id") if isinstance(sample, dict) else None
            encoded.errors.append(f"  index {index}, id {name!r}: {error}")
    return encoded


def _write_rows(file: Path, config: DataConfig, processor: DynamicLlavaProcessor) -> SampleCounts:
    counts, shown, bad = SampleCounts(), list[str](), 0
    encode = partial(_encode_chunk, config=config, processor=processor)
    with ArrowWriter(path=str(file), features=FEATURES) as writer:
        for encoded in map_samples(encode, config, "preparing samples"):
            if isinstance(encoded, ValueError):
                raise encoded
            counts.add(encoded.counts)
            shown += encoded.errors[: REPORTED_ERRORS - len(shown)]
            bad += len(encoded.errors)
            if encoded.counts.used and not bad:
                writer.write_batch(encoded.columns)
        writer.finalize()
    if not counts.total:
        raise ValueError(f"{config.json} holds an empty list; there is nothing to train on")
    if bad:
        more = f"\n  ... and {bad - len(shown)} more" if bad > len(shown) else ""
        raise ValueError(
            f"{config.json}: {bad} of {counts.total} samples cannot be used (`python -m dynamic_llava.data check` "
            "lists every kind):\n" + "\n".join(shown) + more
        )
    return counts


def _collapse(ids: np.ndarray, processor: DynamicLlavaProcessor) -> np.ndarray:
    """Keep one image token of each image: the rest carries no information and would fill the disk."""
    image = ids == processor.image_token_id
    first = image.cumsum() % processor.tokens_per_image == 1 % processor.tokens_per_image
    return ids[~image | first]


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the lock of one prepared file; the system releases it when its holder dies."""
    lock = FileLock(target.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another process is preparing the samples; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fingerprint(config: DataConfig, processor: DynamicLlavaProcessor) -> str:
    """Return a name for everything the Arrow rows depend on."""
    file = Path(config.json)
    if not file.is_file():
        raise FileNotFoundError(f"there is no data file {file}; give a LLaVA-format JSON file")
    parts = (
        ARROW_FORMAT,
        file_digest(file),
        str(Path(config.image_folder).resolve()),
        config.text_only,
        config.max_length,
        processor.tokens_per_image,
        processor.image_token_id,
        processor.tokenizer.backend_tokenizer.to_str(),
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
