"""Training samples and their batches: read memory-mapped from the Arrow file that `prepare` writes.

Images are decoded when a sample is asked for. A batch is padded on the right and holds the mask of output tokens.
Shapes: B samples, N tokens, I images.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from dynamic_llava.config import DataConfig
from dynamic_llava.data.llava_json import resolve_image
from dynamic_llava.data.prepare import BROKEN, COUNTS, ROWS, SampleCounts, prepare, read_broken
from dynamic_llava.data.sampling import FILLER
from dynamic_llava.files import brief
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.processing.prompts import IGNORED_LABEL


class Unread(NamedTuple):
    """A sample whose image could not be decoded: its place in the JSON file, its id, its images, and why."""

    index: int
    id: str
    images: list[str]
    why: str


class UnreadError(ValueError):
    """A sample whose image cannot be decoded; `unread` says which."""

    def __init__(self, message: str, unread: Unread) -> None:
        super().__init__(message)
        self.unread = unread


class SftSample(TypedDict):
    """One training sample: input_ids and labels (N,) int64, spans, pixel_values (I, 3, S, S) float32, sample_id.

    `unread` is None, or what the sample would be whose place a filler has taken.
    """

    input_ids: Tensor
    labels: Tensor
    spans: list[tuple[int, int]]
    pixel_values: Tensor
    sample_id: int
    unread: Unread | None


class SftDataset(torch.utils.data.Dataset[SftSample]):
    """LLaVA-format samples, tokenised once and read from disk; images are decoded when a sample is asked for.

    `counts` says what was left out, and `broken` which samples for their images. `sample_id` is the sample's place in
    the JSON file: noise and data order depend on it, never on the batch. The index FILLER gives a sample that teaches
    nothing, for `sampling.EpochSampler`. Raises ValueError or FileNotFoundError for unusable samples (see
    `prepare.prepare`), and UnreadError when a sample is asked for whose image cannot be decoded.
    """

    def __init__(self, config: DataConfig, processor: DynamicLlavaProcessor) -> None:
        self.config = config
        self.processor = processor
        folder = prepare(config, processor)
        self.rows = Dataset.from_file(str(folder / ROWS))
        self.counts = SampleCounts(**json.loads((folder / COUNTS).read_text(encoding="utf-8")))
        self.broken = read_broken(folder / BROKEN)
        self._images: OrderedDict[str, Tensor] = OrderedDict()
        if not len(self.rows):
            raise ValueError(f"{config.json}: no sample is left to train on: {self.counts}")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """Return every sample's number of tokens (samples,), image tokens included; read from disk."""
        return self.rows.select_columns("length").with_format("numpy")[:]["length"]

    def image_names(self) -> list[str]:
        """Return the images of all samples, each once, as the data file names them; read from disk."""
        return self.rows.data.column("images").combine_chunks().flatten().unique().to_pylist()  # type: ignore[no-any-return]

    def __getitem__(self, number: int) -> SftSample:
        if number == FILLER:
            return self._filler()
        row = self.rows[number]
        input_ids = self._expand(torch.tensor(row["input_ids"], dtype=torch.int64))
        spans = list(zip(row["spans"][::2], row["spans"][1::2], strict=True))
        labels = torch.full_like(input_ids, IGNORED_LABEL)
        for start, end in spans:
            labels[start:end] = input_ids[start:end]
        try:
            pixels = [self._pixels(image) for image in row["images"]]
        except (ValueError, OSError) as error:
            unread = Unread(row["index"], row["id"], row["images"], str(error))
            raise UnreadError(
                f"{self.config.json}, index {row['index']}, id {brief(row['id'])}: {error}", unread
            ) from None
        size = self.processor.image_size
        pixel_values = torch.stack(pixels) if pixels else torch.empty(0, 3, size, size)
        return SftSample(
            input_ids=input_ids,
            labels=labels,
            spans=spans,
            pixel_values=pixel_values,
            sample_id=row["index"],
            unread=None,
        )

    def __getitems__(self, numbers: Sequence[int]) -> list[SftSample]:
        """Return the samples of a batch, as a DataLoader asks for them; an unreadable one is a filler that says so.

        Its place in the order stays its own: no other sample is repeated for it, and none moves. What becomes of it is
        decided where the batch is used, for an exception of a worker process would arrive there inside a traceback.
        """
        return [self._sample_or_filler(number) for number in numbers]

    def _sample_or_filler(self, number: int) -> SftSample:
        try:
            return self[number]
        except UnreadError as error:
            return self._filler(error.unread)

    def _filler(self, unread: Unread | None = None) -> SftSample:
        size = self.processor.image_size
        input_ids = torch.full((2,), self.processor.pad_token_id)  # two, so that there is a next token to ignore
        return SftSample(
            input_ids=input_ids,
            labels=torch.full_like(input_ids, IGNORED_LABEL),
            spans=[],
            pixel_values=torch.empty(0, 3, size, size),
            sample_id=FILLER,
            unread=unread,
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


@dataclass(frozen=True)
class Collator:
    """Pads samples on the right and marks their output tokens.

    `output_segments`: whether the last answer of a conversation counts as output, or all of them. `sparse_text`:
    whether that holds without an image too. Else such a sample stays dense: none of its tokens is marked, while the
    other samples of its batch stay sparse.
    """

    processor: DynamicLlavaProcessor
    output_segments: Literal["last", "all"] = "last"
    sparse_text: bool = False

    def __call__(self, samples: Sequence[SftSample]) -> dict[str, Any]:
        """Return the tensors of one batch.

        input_ids, attention_mask and labels (B, N) int64; output_mask (B, N) bool; sample_ids (B,) int64; pixel_values
        (I, 3, S, S) float32 in row order, absent when no sample of the batch has an image. `unread` (a list of
        `Unread`) is there only where fillers have taken the places of samples whose image could not be decoded.
        """
        batch = self.processor.pad([sample["input_ids"].tolist() for sample in samples], padding_side="right")
        labels = torch.full_like(batch["input_ids"], IGNORED_LABEL)
        output_mask = torch.zeros_like(labels, dtype=torch.bool)
        for row, sample in enumerate(samples):
            labels[row, : len(sample["labels"])] = sample["labels"]
            for start, end in self._output_spans(sample):
                output_mask[row, start:end] = True
        batch.update(labels=labels, output_mask=output_mask)
        batch["sample_ids"] = torch.tensor([sample["sample_id"] for sample in samples], dtype=torch.int64)
        if any(len(sample["pixel_values"]) for sample in samples):
            batch["pixel_values"] = torch.cat([sample["pixel_values"] for sample in samples])
        unread = [sample["unread"] for sample in samples if sample.get("unread") is not None]
        return {**batch, "unread": unread} if unread else batch

    def _output_spans(self, sample: SftSample) -> list[tuple[int, int]]:
        if not len(sample["pixel_values"]) and not self.sparse_text:
            return []
        return sample["spans"] if self.output_segments == "all" else sample["spans"][-1:]
