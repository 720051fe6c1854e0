"""The tiny world's text as token ids: a word-level tokenizer, and the training rows of the base.

The tokenizer knows every word of the questions, the descriptions and the vicuna_v1 prompt. Words carry their leading
space (`▁red`), punctuation stands alone, and a piece of text always starts with a space mark, as with LLaMA's
tokenizer: text may be cut at `<image>` or `</s>` without changing the ids, and decode(encode(text)) == text.

A row is one picture's prompt prefix, then several independent conversations about this picture. Only the base's
training packs like this (disclosed). The conversations of a row do not see one another: the mask is
block-diagonal behind the shared prefix and positions restart there, so each of them is exactly what it would be alone.
In one plain causal sequence answers leak between the turns: the loss falls and single questions stay wrong.

Legend: B rows, N tokens, T targets, R referring tokens, P patches.
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dynamic_llava.processing.prompts import encode_conversation
from dynamic_llava.tiny.world.scenes import (
    BACKGROUNDS,
    COLORS,
    COLUMNS,
    ROWS,
    SHAPES,
    SIZES,
    TOKENS_PER_IMAGE,
    Scene,
    sample_scene,
)
from dynamic_llava.tiny.world.texts import (
    KINDS,
    NUMBERS,
    REQUESTS,
    STYLES,
    ShortQuestion,
    ask,
    describe,
    sample_request,
)

PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"

SPECIAL = (PAD, BOS, EOS, UNK, IMAGE)

_MARK = "\u2581"

_PUNCTUATION = ".,?"

_SHORT_WEIGHT = 3.0

_REPEATED_KINDS = ("count_by", "exist")


def build_tokenizer(prompt_texts: list[str]) -> PreTrainedTokenizerFast:
    """The tokenizer over the world's words and those of `prompt_texts` (system prompt and roles).

    The vocabulary does not depend on any random draw; ids are the special tokens, then punctuation, then sorted words.
    """
    words = _world_words() | _words(" ".join(prompt_texts))
    entries = [*SPECIAL, f"{_MARK}\n", *_PUNCTUATION, *sorted(_MARK + word for word in words)]
    backend = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" +$"), "removed"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Metaspace(replacement=_MARK, prepend_scheme="always"),
            pre_tokenizers.Split(Regex(f"[{_PUNCTUATION}]"), "isolated"),
        ]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(f"{_MARK}\n", "\n"),
            decoders.Replace(_MARK, " "),
            decoders.Fuse(),
            decoders.Replace("\n ", "\n"),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(list(SPECIAL))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, entries.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
        additional_special_tokens=[IMAGE],
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def _words(text: str) -> set[str]:
    return {word for word in re.split(rf"[\s{re.escape(_PUNCTUATION)}]+", text) if word}


def _world_words() -> set[str]:
    """Every attribute word, and the words of the templates as met in 300 fixed scenes (far more than they need)."""
    words = {w for group in (COLORS, SHAPES, SIZES, BACKGROUNDS, ROWS, COLUMNS, NUMBERS, ("Yes", "No")) for w in group}
    words |= _words(" ".join(request for requests in REQUESTS.values() for request in requests))
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = sample_scene(rng)
        for style in STYLES:
            words |= _words(describe(scene, style).text)
        for question in (ask(scene, kind, rng) for kind in KINDS):
            words |= _words(question.text) if question else set()
    return words


@dataclass(frozen=True)
class Segment:
    """One conversation behind the prefix.

    ids: token ids. weight: per token, loss weight as a target (0 = not learned). referents: per token, the objects that
    the token names (empty for most).
    """

    ids: tuple[int, ...]
    weight: tuple[float, ...]
    referents: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class SequenceBatch:
    """One step's input.

    ids, positions: (B, N) int64. visible: (B, 1, N, N) bool. weight: (B, N) float32, weight of the token as a target.
    refer_row, refer_at: (R,) int64, places whose NEXT token names objects; refer_patches: (R, P) float32, where.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    visible: torch.Tensor
    weight: torch.Tensor
    refer_row: torch.Tensor
    refer_at: torch.Tensor
    refer_patches: torch.Tensor


class SegmentWriter:
    """Turns questions and descriptions into segments, by the ordinary conversation encoder cut behind the image."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Finds the prefix that every conversation about one image starts with."""
        self._tokenizer = tokenizer
        self._image_id = tokenizer.convert_tokens_to_ids(IMAGE)
        whole = self._encode([("<image>\n", None)])
        self.prefix = whole[: len(whole) - whole[::-1].index(self._image_id)]
        self._memory: dict[tuple[str, str], tuple[int, ...]] = {}

    def prompt(self, question: str) -> list[int]:
        """Ids of the ordinary single-question prompt, for evaluation."""
        return self._encode([(f"<image>\n{question}", None)])

    def conversation(self, questions: list[ShortQuestion]) -> Segment:
        """One conversation of one or more turns; a single turn is remembered, as most of them repeat."""
        turns = [(q.text, q.answer) for q in questions]
        key = turns[0] if len(turns) == 1 else None
        ids = self._memory.get(key) if key else None
        if ids is None:
            ids = self._cut(self._encode([(f"<image>\n{turns[0][0]}", turns[0][1]), *turns[1:]]))
            if key:
                self._memory[key] = ids
        weight, referents = [0.0] * len(ids), [()] * len(ids)
        eos = self._tokenizer.eos_token_id
        ends = [i for i, token in enumerate(ids) if token == eos]
        for end, question in zip(ends, questions, strict=True):  # every short answer is one word and </s>
            weight[end - 1] = weight[end] = _SHORT_WEIGHT
            referents[end - 1] = question.referents
        return Segment(ids, tuple(weight), tuple(referents))

    def description(self, scene: Scene, style: str, request: str) -> Segment:
        """A request and the reference description, every word that names an object pointing to it."""
        described = describe(scene, style)
        ids = self._cut(self._encode([(f"<image>\n{request}", described.text)]))
        encoded = self._tokenizer(described.text, add_special_tokens=False, return_offsets_mapping=True)
        start = len(ids) - 1 - len(encoded.input_ids)
        referents: list[tuple[int, ...]] = [()] * len(ids)
        for i, (_, end) in enumerate(encoded.offset_mapping):
            for first, last, index in described.spans:
                if first < end <= last:
                    referents[start + i] = (index,)
        weight = (0.0,) * start + (1.0,) * (len(ids) - start)
        return Segment(ids, weight, tuple(referents))

    def _encode(self, turns: list[tuple[str, str | None]]) -> list[int]:
        return encode_conversation(self._tokenizer, turns, TOKENS_PER_IMAGE, self._image_id).input_ids

    def _cut(self, ids: list[int]) -> tuple[int, ...]:
        if ids[: len(self.prefix)] != self.prefix:
            raise ValueError("the conversation does not start with the prefix of a single-image prompt")
        return tuple(ids[len(self.prefix) :])


def sample_row(scene: Scene, writer: SegmentWriter, rng: np.random.Generator, questions: int) -> list[Segment]:
    """One description and about `questions` short questions; every third row joins some of them into genuine turns."""
    asked: dict[str, ShortQuestion] = {}
    for i in range(questions):
        kind = KINDS[i] if i < len(KINDS) else _REPEATED_KINDS[i % len(_REPEATED_KINDS)]
        question = ask(scene, kind, rng)
        if question is not None:
            asked[question.text] = question
    pool = [list(asked.values())[i] for i in rng.permutation(len(asked))]
    segments = [writer.description(scene, *sample_request(rng))]
    if rng.random() < 1 / 3:
        turns = int(rng.integers(2, 4))
        segments.append(writer.conversation(pool[:turns]))
        pool = pool[turns:]
    return segments + [writer.conversation([question]) for question in pool]


def collate(rows: list[list[Segment]], prefix: list[int], patch_object_BP: np.ndarray, pad_id: int) -> SequenceBatch:
    """Joins prefix and segments of every row, with the block-diagonal mask and restarting positions."""
    length = len(prefix) + max(sum(len(s.ids) for s in row) for row in rows)
    ids = np.full((len(rows), length), pad_id, np.int64)
    positions, part = np.zeros_like(ids), np.full_like(ids, -1)
    weight = np.zeros(ids.shape, np.float32)
    refer: list[tuple[int, int, np.ndarray]] = []
    for b, row in enumerate(rows):
        at = len(prefix)
        ids[b, :at], positions[b, :at], part[b, :at] = prefix, np.arange(at), 0
        for number, segment in enumerate(row, start=1):
            span = slice(at, at + len(segment.ids))
            ids[b, span], weight[b, span], part[b, span] = segment.ids, segment.weight, number
            positions[b, span] = np.arange(len(prefix), len(prefix) + len(segment.ids))
            for i, objects in enumerate(segment.referents):
                patches = np.isin(patch_object_BP[b], objects) if objects else None
                if patches is not None and patches.any():
                    refer.append((b, at + i - 1, patches))
            at = span.stop
    part_tensor = torch.from_numpy(part)
    same = (part_tensor[:, None, :] == 0) | (part_tensor[:, None, :] == part_tensor[:, :, None])
    visible = (same & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
    return SequenceBatch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        visible,
        torch.from_numpy(weight),
        torch.tensor([r[0] for r in refer]),
        torch.tensor([r[1] for r in refer]),
        torch.from_numpy(np.stack([r[2] for r in refer]).astype(np.float32)),
    )
