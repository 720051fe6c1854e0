"""All that is wrong or odd in a dataset, found before a day of training is spent on it; nothing stops the search."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np

from dynamic_llava.config import DataConfig, SparsityConfig
from dynamic_llava.data.chunks import Indexed, map_samples
from dynamic_llava.data.llava_json import (
    BAD_FIELD,
    BAD_PLACES,
    BAD_ROLE,
    BROKEN_KINDS,
    MISSING,
    OUTSIDE,
    UNREADABLE,
    find_problems,
    is_text_only,
    sound_sample,
)
from dynamic_llava.data.prepare import as_written
from dynamic_llava.files import brief
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.processing.images import check_header, load_image
from dynamic_llava.processing.prompts import EncodedConversation, ImageCutError, RenderingError

ImageCheck = Literal["decode", "stat"]

BROKEN_FILE, EMPTY = "broken file", "nothing to train on"
BLANK, CUT, SHORTENED, UNLEARNED = "blank answer", "image would be cut", "text behind max_length", "nothing to learn"
TEXT_ONLY, REPEATED, CHAT_MESSAGES = "text-only", "repeated id", "role/content messages"
RENDERED = "chat template has a way of its own"

ERRORS = (BROKEN_FILE, EMPTY, BAD_FIELD, BAD_ROLE, BAD_PLACES, OUTSIDE, MISSING, UNREADABLE, RENDERED)
"""Kinds that make training fail; with data.broken: skip those of BROKEN_KINDS are left out instead."""
WARNINGS = (BLANK, CUT, SHORTENED, UNLEARNED)
"""Kinds that training copes with, but loses something by."""
NOTES = (TEXT_ONLY, REPEATED, CHAT_MESSAGES)
"""Kinds that are no fault."""
_TEXT_ALONE = {"skip": "left out", "dense": "trained on without sparsity", "sparse": "trained on, its answer sparse"}


@dataclass
class Findings:
    """Findings in some samples of a file, by kind, and the lengths of the samples that would be trained on."""

    shown: int
    """Examples that are kept of each kind."""
    total: int = 0
    """Samples."""
    counts: dict[str, int] = field(default_factory=dict)
    """Number of findings of each kind."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first of each kind: place, id and what is wrong."""
    lengths: dict[str, list[int]] = field(default_factory=lambda: {"tokens": [], "output tokens": [], "images": []})
    """Per sample: tokens (images included), tokens of each answer that may be sparsified, images."""
    ids: list[str] = field(default_factory=list)

    def note(self, kind: str, index: int, name: Any, why: object) -> None:
        """Count one finding and keep it if it is among the first."""
        self._count(kind, [f"index {index}, id {brief(name)}: {why}"])

    def add(self, other: "Findings") -> None:
        """Add what was found in the samples that follow."""
        self.total += other.total
        for kind, count in other.counts.items():
            self._count(kind, other.examples[kind], count)
        for name, values in other.lengths.items():
            self.lengths[name] += values

    def _count(self, kind: str, examples: list[str], count: int = 1) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + count
        kept = self.examples.setdefault(kind, [])
        kept += examples[: self.shown - len(kept)]


@dataclass(frozen=True)
class CheckReport:
    """The outcome of a check; `str` is the page that is printed."""

    findings: Findings
    file: str
    output_min_length: int
    skips_broken: bool = False
    """Whether training leaves samples with a broken or missing image out (data.broken: skip)."""

    @property
    def sections(self) -> dict[str, tuple[str, ...]]:
        """Return the kinds of findings by what they mean for training."""
        skipped = BROKEN_KINDS if self.skips_broken else ()
        return {
            "training would fail": tuple(kind for kind in ERRORS if kind not in skipped),
            "training would leave out": skipped,
            "training would lose something": WARNINGS,
            "worth knowing": NOTES,
        }

    @property
    def errors(self) -> int:
        """Return how many findings would make training fail."""
        return self._count("training would fail")

    @property
    def warnings(self) -> int:
        """Return how many findings training would lose something by."""
        return self._count("training would leave out") + self._count("training would lose something")

    def __str__(self) -> str:
        used = len(self.findings.lengths["tokens"])
        lines = [f"{self.file}: {self.findings.total:,} samples, {used:,} can be trained on"]
        for title, kinds in self.sections.items():
            met = [kind for kind in kinds if kind in self.findings.counts]
            lines += ["", f"{title}:"] if met else []
            for kind in met:
                lines.append(f"  {kind}: {self.findings.counts[kind]:,}")
                lines += [f"    {example}" for example in self.findings.examples[kind]]
        if used:
            lines += ["", *_table(self.findings.lengths), *self._short_answers()]
        verdict = f"training would fail ({self.errors:,} errors)" if self.errors else "training can start"
        if not self.skips_broken and any(kind in self.findings.counts for kind in BROKEN_KINDS):
            verdict += "; data.broken: skip would leave out the samples whose image is missing or unreadable"
        return "\n".join([*lines, "", verdict])

    def _count(self, section: str) -> int:
        return sum(self.findings.counts.get(kind, 0) for kind in self.sections[section])

    def _short_answers(self) -> Iterator[str]:
        lengths = np.array(self.findings.lengths["output tokens"])
        if len(lengths):
            short = (lengths < self.output_min_length).mean()
            yield f"{short:.1%} of the answers are below LEN_OT = {self.output_min_length}: training leaves them dense"


def check(
    config: DataConfig,
    processor: DynamicLlavaProcessor,
    sparsity: SparsityConfig,
    *,
    images: ImageCheck = "decode",
    examples: int = 3,
) -> CheckReport:
    """Check a dataset as training would meet it, in worker processes; bad data are findings, never exceptions.

    `images` says whether each image is decoded, or only its header read as preparation does; `examples` how many of
    each kind are kept. Raises FileNotFoundError when there is no such JSON file or image folder.
    """
    findings, seen = Findings(examples), set[str]()
    processor = as_written(config, processor)
    look = partial(
        _check_chunk, config=config, processor=processor, sparsity=sparsity, images=images, examples=examples
    )
    for part in map_samples(look, config, "checking samples"):
        if isinstance(part, ValueError):
            findings.note(BROKEN_FILE, findings.total, None, part)
            continue
        for place, name in enumerate(part.ids, start=findings.total):
            if name in seen:
                part.note(REPEATED, place, name, "an earlier sample has it, too")
            seen.add(name)
        findings.add(part)
    if not findings.lengths["tokens"]:
        findings.note(EMPTY, 0, None, "no sample of the file can be trained on")
    return CheckReport(findings, config.json, sparsity.output_min_length, config.broken == "skip")


def _check_chunk(
    samples: Indexed,
    *,
    config: DataConfig,
    processor: DynamicLlavaProcessor,
    sparsity: SparsityConfig,
    images: ImageCheck,
    examples: int,
) -> Findings:
    findings = Findings(examples)
    for index, sample in samples:
        findings.total += 1
        name = sample.get("id", index) if isinstance(sample, dict) else index
        findings.ids.append(str(name))
        if is_text_only(sample):
            left_out = config.text_only == "skip"
            findings.note(TEXT_ONLY, index, name, _TEXT_ALONE[config.text_only])
            if left_out:
                continue
        problems = find_problems(sample, config.image_folder, load_image if images == "decode" else check_header)
        for problem in problems:
            findings.note(problem.kind, index, name, problem)
        if not problems:
            _look_at_tokens(findings, sample, index, name, config, processor, sparsity)
    return findings


def _look_at_tokens(
    findings: Findings,
    raw: Any,
    index: int,
    name: Any,
    config: DataConfig,
    processor: DynamicLlavaProcessor,
    sparsity: SparsityConfig,
) -> None:
    sample = sound_sample(raw, index)
    if sample.is_chat:
        findings.note(CHAT_MESSAGES, index, name, "read as 'from' and 'value' are")
    blank = [number for number, (_, answer) in enumerate(sample.turns) if not (answer or "").strip()]
    if blank:
        findings.note(BLANK, index, name, f"answer {blank[0]} of {len(sample.turns)} holds no text; it is not learned")
    try:
        tokens = processor.encode_conversation(sample.turns, config.max_length, sample.system)
    except ImageCutError as error:
        findings.note(CUT, index, name, error)
        return
    except RenderingError as error:
        findings.note(RENDERED, index, name, error)
        return
    if tokens.shortened:
        findings.note(SHORTENED, index, name, f"what follows the first {config.max_length} tokens is cut off")
    if not tokens.output_spans:
        findings.note(UNLEARNED, index, name, "no token of an answer is left; the sample adds 0 to the loss")
    findings.lengths["tokens"].append(len(tokens.input_ids))
    findings.lengths["images"].append(len(sample.images))
    if sample.images or config.text_only == "sparse":
        findings.lengths["output tokens"] += _output_lengths(tokens, sparsity)


def _output_lengths(tokens: EncodedConversation, sparsity: SparsityConfig) -> list[int]:
    spans = tokens.output_spans if sparsity.output_segments == "all" else tokens.output_spans[-1:]
    return [end - start for start, end in spans]


def _table(lengths: dict[str, list[int]]) -> list[str]:
    rows = [f"{'per sample or answer':22}{'min':>8}{'median':>8}{'mean':>8}{'95 %':>8}{'max':>8}"]
    for name, values in lengths.items():
        if values:
            low, middle, high, top = np.percentile(values, [0, 50, 95, 100])
            rows.append(f"{name:22}{low:8.0f}{middle:8.0f}{np.mean(values):8.1f}{high:8.0f}{top:8.0f}")
    return rows
