"""Dialogues about an image: as token ids, and several of them on one live cache, fed chunk by chunk in ragged rows.

Both are as in the paper's scripts, for a batch.

The first question is a prompt (vicuna_v1), its image in front. How later questions are fed is the round separator:

official  `USER:{question}ASSISTANT:`, without spaces, start token, or the `</s>` of the answer before (the default, and
          what the paper's numbers come from)
template  `</s>USER: {question} ASSISTANT:`, what the model was trained on; that `</s>` counts as part of the question.
          A base with a chat template of its own has its own words and end token here

Shape suffixes: B rows, L layers, N tokens fed so far, Q new tokens of a chunk, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dynamic_llava.eval.predict import NOT_FINITE, NotFiniteLogits, seen_in_layers
from dynamic_llava.methods import Method
from dynamic_llava.model import cache_of
from dynamic_llava.processing.prompts import (
    IMAGE_PLACE,
    VICUNA_V1,
    PromptFormat,
    conversation_prompt,
    encode_prompt,
)

RoundSeparator = Literal["official", "template"]


class EncodedRound(NamedTuple):
    """One question and its reference answer."""

    prompt: list[int]
    """Ids that are fed before the answer, image tokens included."""
    answer: list[int]
    """Ids of the answer and its `</s>`, which is predicted but never fed."""


def encode_dialogue(
    tokenizer: Any,
    rounds: Sequence[Sequence[str]],
    tokens_per_image: int,
    image_token_id: int,
    separator: RoundSeparator = "official",
    form: PromptFormat = VICUNA_V1,
) -> list[EncodedRound]:
    """Encode (question, answer) pairs; the first answer is stripped, later ones stay as they are, as in the scripts.

    Raises ValueError when the tokenizer does not read the end of an answer (`</s>`) as one token, and for the official
    separator between the rounds of a base whose prompts are not vicuna_v1.
    """
    if separator == "official" and len(rounds) > 1 and form != VICUNA_V1:
        raise ValueError(
            "the official separator between rounds is LLaVA-1.5's, and this checkpoint has a chat template of its own; "
            "choose the separator 'template'"
        )
    first = conversation_prompt([(f"{IMAGE_PLACE}\n{rounds[0][0]}", None)], form=form)
    prompts = [encode_prompt(tokenizer, first, tokens_per_image, image_token_id, form)]
    for question, _ in rounds[1:]:
        if separator == "official":
            text = f"USER:{question}ASSISTANT:"
        else:
            text = form.end_token + form.question_opening + form.spoken(question) + form.answer_opening
        prompts.append(_ids(tokenizer, text))
    answers = [rounds[0][1].strip(), *(answer for _, answer in rounds[1:])]
    return [
        EncodedRound(prompt, _answer_ids(tokenizer, form.spoken(answer), form))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _answer_ids(tokenizer: Any, answer: str, form: PromptFormat) -> list[int]:
    ids, end = _ids(tokenizer, answer + form.end), tokenizer.convert_tokens_to_ids(form.end_token)
    if ids[-1] != end or (form == VICUNA_V1 and end != tokenizer.eos_token_id):
        raise ValueError(
            f"{form.end!r} behind an answer becomes token {ids[-1]}, not the end token {tokenizer.eos_token_id}; "
            f"give a tokenizer that knows {form.end_token!r} as its end token"
        )
    return ids


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


class LiveDialogues:
    """The state of B dialogues: their cache, and what was kept of them. Nothing of it is left on the model."""

    def __init__(self, model: Any, pixel_values: Tensor, method: Method, sample_key: Tensor | None = None) -> None:
        """Begin; pixel_values (B, 3, S, S) holds each row's image, whose places lie in the row's first chunk.

        sample_key (B,) int64 are the noise keys of a method that draws; 0 by default.
        """
        self.model, self.method = model, method
        self._key_B = None if sample_key is None else sample_key.to(model.device)
        batch, device = pixel_values.shape[0], model.device
        self._pixels: Tensor | None = pixel_values.to(device, model.dtype)
        self._cache: Any = None
        self._valid_BN = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        self._output_BN = self._valid_BN
        self._ragged = False
        layers = model.config.text_config.num_hidden_layers
        self.image_seen = torch.zeros(batch, layers, dtype=torch.int64, device=device)
        """(B, L) image tokens that each layer sees."""
        self._output_seen = torch.zeros_like(self.image_seen)
        self._text_seen: list[Tensor] = []
        self._held: list[Tensor] = []

    def feed(self, chunks: Sequence[Sequence[int]], *, output: bool) -> Tensor:
        """Feed each row its ids, which may be none; `output` says whether they belong to an answer.

        Returns (B, V) float32 logits behind the last token of each row; those of a row without ids mean nothing.
        """
        width = max(map(len, chunks))
        self._ragged |= any(len(chunk) != width for chunk in chunks)
        device = self._valid_BN.device
        ids_BQ = torch.tensor([[0] * (width - len(chunk)) + list(chunk) for chunk in chunks], device=device)
        lengths_B = torch.tensor([len(chunk) for chunk in chunks], device=device)
        valid_BQ = torch.arange(width, device=device) >= width - lengths_B[:, None]
        self._valid_BN = torch.cat([self._valid_BN, valid_BQ], dim=1)
        self._output_BN = torch.cat([self._output_BN, valid_BQ & output], dim=1)
        position_BN = (self._valid_BN.cumsum(1) - 1).clamp(min=0)  # padding has no position of its own
        result = self.model(
            input_ids=ids_BQ,
            pixel_values=self._pixels,
            attention_mask=self._valid_BN.long() if self._ragged else None,
            output_mask=self._output_BN,
            position_ids=position_BN[:, -width:],
            cache=self._cache,
            use_cache=True,
            method=self.method,
            sample_key=self._key_B,
            logits_to_keep=1,
        )
        self._count(result.sparsity, ids_BQ, valid_BQ, output=output)
        self._cache, self._pixels = cache_of(result), None
        if self.method.evicts:
            held_B = self._cache.head_lengths().sum((1, 2))
            self._held = [*self._held[:1], held_B]
        return result.logits[:, -1].float()

    @property
    def output_seen(self) -> Tensor:
        """(B, L) output tokens that each layer sees; they stay in its cache, unless the method evicts."""
        if not self.method.drop_delay:
            return self._output_seen
        record = self._cache.record  # what the passes have seen in their windows has partly left them since
        return record.tokens_per_layer(record.layout.output)  # type: ignore[no-any-return]

    def heads_hold(self) -> list[tuple[int, int] | None]:
        """Return of each row how many tokens all key heads held after its first chunk, and hold now, where they evict.

        None for a method that evicts nothing: what its cache holds is what its layers see.
        """
        if not self._held:
            return [None] * len(self.image_seen)
        return list(zip(self._held[0].tolist(), self._held[-1].tolist(), strict=True))

    def text_seen(self) -> list[tuple[list[int], list[int]]]:
        """Return of each row, per layer, the text tokens that it sees: of the first prompt, and of all prompts."""
        return list(zip(self._text_seen[0].tolist(), self._text_seen[-1].tolist(), strict=True))

    def _count(self, record: Any, ids_BQ: Tensor, valid_BQ: Tensor, *, output: bool) -> None:
        layers = self.image_seen.shape[1]
        if output:
            self._output_seen += seen_in_layers(record, valid_BQ, layers)
            return
        image_BQ = ids_BQ == self.model.config.image_token_id
        self.image_seen += seen_in_layers(record, image_BQ & valid_BQ, layers)
        text_BL = seen_in_layers(record, ~image_BQ & valid_BQ, layers)
        self._text_seen = [*self._text_seen[:1], text_BL + (self._text_seen[-1] if self._text_seen else 0)]


@torch.no_grad()
def answer_dialogues(
    dialogues: LiveDialogues, prompts: Sequence[Sequence[Sequence[int]]], max_new_tokens: int, ends: set[int]
) -> list[list[list[int]]]:
    """Answer each row's prompts greedily, one round after another, earlier answers of its own staying in the cache.

    Returns ids per row and round, up to and including a token of `ends`, at most `max_new_tokens`. The last token of an
    answer, whichever it is, is never fed. ValueError when logits are not finite.
    """
    said: list[list[list[int]]] = [[] for _ in prompts]
    for number in range(max(map(len, prompts))):
        logits_BV = dialogues.feed([row[number] if number < len(row) else [] for row in prompts], output=False)
        left = [row for row, its in enumerate(prompts) if number < len(its)]
        finite = torch.ones((), dtype=torch.bool, device=logits_BV.device)
        for row in left:
            said[row].append([])
        while left:
            finite &= logits_BV[left].isfinite().all()
            tokens = logits_BV.argmax(-1).tolist()
            for row in left:
                said[row][-1].append(tokens[row])
            left = [row for row in left if tokens[row] not in ends and len(said[row][-1]) < max_new_tokens]
            if left:
                fed = set(left)
                chunks = [[token] if row in fed else [] for row, token in enumerate(tokens)]
                logits_BV = dialogues.feed(chunks, output=True)
        if not bool(finite):
            raise NotFiniteLogits(NOT_FINITE)
    return said
