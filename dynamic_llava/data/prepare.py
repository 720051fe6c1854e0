"""A LLaVA-format file is checked and tokenised once, into an Arrow file in the cache folder that is read memory-mapped.

An Arrow row holds index (place in the JSON file), id, images, input_ids (ONE image token per image), spans (start and
end of each answer, flat, counted with all image tokens) and length (with all image tokens). Of each image file the
header is read; what only decoding finds is met in training (`sft.SftDataset`).
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Features, List, Value
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock, Timeout

from dynamic_llava.config import DataConfig, ModelConfig, SparsityConfig, cache_folder
from dynamic_llava.data.chunks import Indexed, map_samples
from dynamic_llava.data.llava_json import (
    BROKEN_KINDS,
    LlavaSample,
    find_problems,
    is_text_only,
    resolve_image,
    sound_sample,
)
from dynamic_llava.engine.learned import added_tokens
from dynamic_llava.files import brief, file_digest, writing
from dynamic_llava.methods import import_named
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.processing.images import check_header
from dynamic_llava.processing.prompts import PLAIN, ImageCutError, RenderingError
from dynamic_llava.projectors import import_projector

log = logging.getLogger(__name__)

ARROW_FORMAT = 4
"""Raised whenever the rows' meaning changes, so that no old file is read."""
ROWS, COUNTS, BROKEN = "rows.arrow", "counts.json", "broken.jsonl"
"""Files of a prepared folder; the last lists the samples that data.broken: skip has left out, one JSON object each."""
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
"""Most bad samples that an error message shows; it counts the others."""


@dataclass
class SampleCounts:
    """Numbers of a file's samples: used, left out by reason, and changed."""

    total: int = 0
    """Samples in the file."""
    used: int = 0
    """Samples that are trained on."""
    text_only_skipped: int = 0
    """Samples without an image, left out by text_only="skip"."""
    image_would_be_cut: int = 0
    """Samples left out because an image does not fit into max_length."""
    broken: int = 0
    """Samples left out by broken="skip": an image is missing, or its file cannot be read."""
    chat_messages: int = 0
    """Used samples that were written as role/content messages."""
    shortened: int = 0
    """Used samples that lost text behind max_length."""
    nothing_learned: int = 0
    """Used samples without any learned token; they contribute 0 to the loss."""
    blank_answers: int = 0
    """Answers of used samples that hold no text; they are not learned."""

    def __str__(self) -> str:
        left_out = [f"{self.text_only_skipped} text-only skipped", f"{self.image_would_be_cut} with an image cut"]
        left_out.append(f"{self.broken} with a broken or missing image")
        notes = [f"{self.shortened} shortened", f"{self.nothing_learned} without a learned token"]
        notes += [f"{self.blank_answers} blank answers", f"{self.chat_messages} written as role/content messages"]
        return f"{self.used} of {self.total} samples ({', '.join(left_out)} left out; {', '.join(notes)})"

    def add(self, other: "SampleCounts") -> None:
        """Add the counts of another part of the file."""
        for count in fields(self):
            setattr(self, count.name, getattr(self, count.name) + getattr(other, count.name))


@dataclass
class Encoded:
    """A chunk of samples: columns of Arrow rows, what became of them, what is wrong with bad ones, which are broken."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in FEATURES})
    counts: SampleCounts = field(default_factory=SampleCounts)
    errors: list[str] = field(default_factory=list)
    broken: list[dict[str, Any]] = field(default_factory=list)
    """Index, id, images and what is wrong with them, of samples that are left out."""
    could_be_skipped: int = 0
    """Errors that are a broken or missing image."""


def prepare(config: DataConfig, processor: DynamicLlavaProcessor) -> Path:
    """Check and tokenise the file unless that was done before; return the folder of the Arrow file and its counts.

    Of several processes that ask at once, one prepares and the others wait for it. The folder appears when all of it
    is written: a preparation that is killed or fails leaves nothing that counts. Rows that were prepared whole serve
    data.broken: skip as well, so a run that begins to skip keeps its order; rows that lack samples are prepared anew
    once the images of one are there. Raises ValueError that counts the bad samples and shows the first of them, and
    ValueError or FileNotFoundError for a broken or missing file.
    """
    processor = as_written(config, processor)
    folder = cache_folder() / "sft"
    target = folder / _fingerprint(replace(config, broken="refuse"), processor)
    if config.broken == "skip" and not target.is_dir():
        target = folder / _fingerprint(config, processor)
    if _serves(target, config):
        return target
    with writing(target):
        folder.mkdir(parents=True, exist_ok=True)
    with writing(target), _locked(target):
        if not _serves(target, config):
            aside = target.with_suffix(".part")
            shutil.rmtree(aside, ignore_errors=True)  # of a preparation that was killed
            aside.mkdir()
            try:
                counts = _write_rows(aside / ROWS, config, processor)
                (aside / COUNTS).write_text(json.dumps(asdict(counts)), encoding="utf-8")
                shutil.rmtree(target, ignore_errors=True)
                aside.rename(target)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return target


def base_processor(config: ModelConfig, sparsity: SparsityConfig) -> DynamicLlavaProcessor:
    """Return the processor of the base that a run starts from, for the projector and the method that the run names."""
    import_projector(config.projector)  # a run's file is its user's word, the base's is not
    import_named(sparsity.method)
    processor = DynamicLlavaProcessor.from_pretrained(config.source)
    processor.make_tokens(config.projector or processor.projector, added_tokens(sparsity))
    return processor


def as_written(config: DataConfig, processor: DynamicLlavaProcessor) -> DynamicLlavaProcessor:
    """Return a processor that writes samples as the data section says; the one that is given stays as it is."""
    if config.template == "chat":
        return processor
    plain = copy(processor)
    plain.prompt_format = PLAIN
    return plain


def encode_sample(sample: LlavaSample, processor: DynamicLlavaProcessor, max_length: int, encoded: Encoded) -> None:
    """Tokenise one sample into a row of `encoded` and count what became of it."""
    try:
        tokens = processor.encode_conversation(sample.turns, max_length, sample.system)
    except ImageCutError:
        encoded.counts.image_would_be_cut += 1
        return
    encoded.counts.used += 1
    encoded.counts.chat_messages += sample.is_chat
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
        problems = find_problems(sample, config.image_folder)
        skipped = [problem for problem in problems if config.broken == "skip" and problem.kind in BROKEN_KINDS]
        fatal = [problem for problem in problems if problem not in skipped]
        name = sample.get("id") if isinstance(sample, dict) else None
        if fatal:
            encoded.errors.append(f"  index {index}, id {brief(name)}: {fatal[0]}")
            encoded.could_be_skipped += fatal[0].kind in BROKEN_KINDS
        elif skipped:
            encoded.counts.broken += 1
            images = list(sound_sample(sample, index).images)
            encoded.broken.append({"index": index, "id": name, "images": images, "why": str(skipped[0])})
        else:
            try:
                encode_sample(sound_sample(sample, index), processor, config.max_length, encoded)
            except RenderingError as error:
                encoded.errors.append(f"  index {index}, id {brief(name)}: {error}")
    return encoded


def _write_rows(file: Path, config: DataConfig, processor: DynamicLlavaProcessor) -> SampleCounts:
    counts, shown, broken = SampleCounts(), list[str](), list[dict[str, Any]]()
    bad = could_be_skipped = 0
    encode = partial(_encode_chunk, config=config, processor=processor)
    with ArrowWriter(path=str(file), features=FEATURES) as writer:
        for encoded in map_samples(encode, config, "preparing samples"):
            if isinstance(encoded, ValueError):
                raise encoded
            counts.add(encoded.counts)
            broken += encoded.broken
            shown += encoded.errors[: REPORTED_ERRORS - len(shown)]
            bad += len(encoded.errors)
            could_be_skipped += encoded.could_be_skipped
            if encoded.counts.used and not bad:
                writer.write_batch(encoded.columns)
        writer.finalize()
    if not counts.total:
        raise ValueError(f"{config.json} holds an empty list; there is nothing to train on")
    if bad:
        more = f"\n  ... and {bad - len(shown)} more" if bad > len(shown) else ""
        if could_be_skipped:
            more += f"\ndata.broken: skip leaves {could_be_skipped} of them, whose image is missing or broken, out"
        raise ValueError(
            f"{config.json}: {bad} of {counts.total} samples cannot be used (`python -m dynamic_llava.data check` "
            "lists every kind):\n" + "\n".join(shown) + more
        )
    write_broken(file.with_name(BROKEN), broken)
    return counts


def read_broken(file: Path) -> list[dict[str, Any]]:
    """Return the samples of a list of broken ones; none when there is no such file. Half a line does not count."""
    if not file.is_file():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):  # the process ended while it was written
            found.append(json.loads(line))
    return found


def write_broken(file: Path, samples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Append broken samples to a list, each once whatever their number; return those that were not in it."""
    listed = {sample["index"] for sample in read_broken(file)}
    new = [sample for sample in samples if sample["index"] not in listed]
    if new:
        with writing(file), file.open("a+b") as lines:
            lines.seek(max(lines.tell() - 1, 0))
            half = lines.read(1) not in (b"", b"\n")  # of a process that ended while it wrote
            text = "".join(json.dumps(sample) + "\n" for sample in new)
            lines.write(b"\n" * half + text.encode())
    return new


def _serves(target: Path, config: DataConfig) -> bool:
    """Whether prepared rows are there, and none was left out for an image that can be read by now."""
    if not target.is_dir():
        return False
    mended = sum(_is_sound(sample, config.image_folder) for sample in read_broken(target / BROKEN))
    if mended:
        log.info("the images of %d samples that were left out can be read now; preparing anew", mended)
    return not mended


def _is_sound(sample: dict[str, Any], image_folder: str) -> bool:
    try:
        for image in sample["images"]:
            check_header(resolve_image(image_folder, image))
    except (ValueError, OSError):
        return False
    return True


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
        config.broken,
        config.max_length,
        processor.tokens_per_image,
        processor.image_token_id,
        processor.tokenizer.backend_tokenizer.to_str(),
        str(processor.prompt_format),
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
