"""Samples become a batch: right padding, and the mask of output tokens. Shapes: B samples, N tokens, I images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dynamic_llava.data.sft import SftSample
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.processing.prompts import IGNORED_LABEL


@dataclass(frozen=True)
class Collator:
    """Pads samples on the right and marks their output tokens.

    `output_segments`: whether the last answer of a conversation counts as output, or all of them. A sample without an
    image stays dense: none of its tokens is marked, while the other samples of its batch stay sparse.
    """

    processor: DynamicLlavaProcessor
    output_segments: Literal["last", "all"] = "last"

    def __call__(self, samples: Sequence[SftSample]) -> dict[str, Any]:
        """Return the tensors of one batch.

        input_ids, attention_mask and labels (B, N) int64; output_mask (B, N) bool; sample_ids (B,) int64; pixel_values
        (I, 3, S, S) float32 in row order, absent when no sample of the batch has an image. `unread` (a list of
        `sft.Unread`) is there only where fillers have taken the places of samples whose image could not be decoded.
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
        if not len(sample["pixel_values"]):
            return []
        return sample["spans"] if self.output_segments == "all" else sample["spans"][-1:]
