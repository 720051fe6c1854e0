"""LLaVA-format data: reading and checking the JSON, tokenised samples on disk, their order, and batches."""

from dynamic_llava.data.collate import Collator
from dynamic_llava.data.llava_json import LlavaSample, read_samples, resolve_image
from dynamic_llava.data.sampling import FILLER, EpochSampler
from dynamic_llava.data.sft import SftDataset, SftSample, Unread, UnreadError

__all__ = [
    "FILLER",
    "Collator",
    "EpochSampler",
    "LlavaSample",
    "SftDataset",
    "SftSample",
    "Unread",
    "UnreadError",
    "read_samples",
    "resolve_image",
]
