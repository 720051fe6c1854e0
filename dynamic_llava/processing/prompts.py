"""Conversations as text and token ids, with LLaVA's label masking; LLaVA-1.5's own are vicuna_v1.

The text is LLaVA's `conv_vicuna_v1` (SeparatorStyle.TWO, sep " ", sep2 "</s>"):
`{system} USER: {question} ASSISTANT: {answer}</s>USER: {question} ASSISTANT: {answer}</s>`.
Only the answers and the `</s>` behind each of them are learned (LLaVA's `preprocess_v1`). A base that brings a chat
template of its own has another `PromptFormat` (`base_template.py`), and the same rules.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""System text of vicuna_v1."""
IMAGE_PLACE = "<image>"
"""Marks in a text where an image's tokens go."""
END_OF_ANSWER = "</s>"
"""Closes every answer; learned together with it."""
WORD_START = "\u2581"
"""SentencePiece's mark of a space in front of a word; written in a text, it is a space."""
IGNORED_LABEL = -100
"""Label of every token that is not learned."""

_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}
{{- '' if loop.first else '\\n' -}}
{{- '@IMAGE@' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] == 'system' -%}
{{- text(messages[0]['content']) + ' ' -}}{%- set spoken = messages[1:] -%}
{%- else -%}
{{- "@SYSTEM@ " -}}{%- set spoken = messages -%}
{%- endif -%}
{%- for message in spoken -%}
{{- 'USER: ' + text(message['content']) + ' ' if message['role'] == 'user' -}}
{{- 'ASSISTANT: ' + text(message['content']) + '@END@' if message['role'] == 'assistant' -}}
{%- endfor -%}
{{- 'ASSISTANT:' if add_generation_prompt -}}
"""
CHAT_TEMPLATE = _TEMPLATE.replace("@IMAGE@", IMAGE_PLACE).replace("@SYSTEM@", SYSTEM).replace("@END@", END_OF_ANSWER)
"""The same text as a jinja template, for tools that read chat_template.jinja; this package itself does not use it."""


@dataclass(frozen=True)
class PromptFormat:
    """The fixed texts around questions and answers, which make a conversation:

        opening question answer_opening | answer_lead answer end | question_opening question answer_opening ...

    Every text is a beginning of every longer conversation's, turn by turn. The answer with `answer_lead` and `end` is
    what is learned.
    """

    opening: str
    """In front of the first question, where no system text is given."""
    system_opening: tuple[str, str] | None
    """The same around a given system text; None where the format has no place for one."""
    question_closing: str
    """Behind a question that nobody is asked to answer; `answer_opening` begins with it."""
    answer_opening: str
    """Behind a question that is to be answered."""
    answer_lead: str
    """Spaces in front of an answer that belong to it."""
    end: str
    """Behind an answer: spaces, if any, and the end token."""
    closing: str
    """Behind the end token of the last answer; `question_opening` begins with it."""
    question_opening: str
    """Between the end token of an answer and the next question."""
    template: str
    """The same as a jinja template (chat_template.jinja)."""
    strips: bool = False
    """Whether spaces and line breaks around system text, questions and answers are left out."""
    start: str = ""
    """The start token, where the format itself writes it at the front of `opening`."""
    in_parts: bool = True
    """Whether the template reads a message's content as a list of parts, or as one text."""
    ignores_asking: bool = False
    """Whether the template knows no add_generation_prompt."""
    asks_always: str = ""
    """What the template writes behind the last answer to ask for another one, whether it should or not; left out."""
    captions: bool = False
    """Whether a conversation is one image and its caption: of the question nothing is written but the image."""

    @property
    def end_token(self) -> str:
        """Return the token that ends an answer."""
        return self.end.strip()

    def begin(self, system: str | None) -> str:
        """Return what stands in front of the first question. ValueError where there is no place for a system text."""
        if system is None:
            return self.opening
        if self.system_opening is None:
            raise RenderingError(
                "this checkpoint's chat template has no place for a system message; put it into the first question"
            )
        before, after = self.system_opening
        return before + self.spoken(system) + after

    def asked(self, turns: Sequence["Turn"], system: str | None) -> Sequence["Turn"]:
        """Return the turns as they are written. RenderingError where captions are and this is none."""
        if not self.captions:
            return turns
        if len(turns) != 1 or image_places(turns[0][0]) != 1 or system is not None:
            raise RenderingError(
                f"the plain template writes one image and its caption, and this conversation has {len(turns)} turns, "
                f"{sum(image_places(question) for question, _ in turns)} images and "
                f"{'no' if system is None else 'a'} system text; leave it out, or train on conversations"
            )
        return [(IMAGE_PLACE, turns[0][1])]

    def spoken(self, text: str) -> str:
        """Return a question, an answer or a system text as it stands in the conversation."""
        return text.strip() if self.strips else text


VICUNA_V1 = PromptFormat(
    opening=f"{SYSTEM} USER: ",
    system_opening=("", " USER: "),
    question_closing=" ",
    answer_opening=" ASSISTANT:",
    answer_lead=" ",
    end=END_OF_ANSWER,
    closing="",
    question_opening="USER: ",
    template=CHAT_TEMPLATE,
)
"""LLaVA-1.5's own format."""

PLAIN = PromptFormat("", None, "", "", "", end="\n", closing="", question_opening="", template="", captions=True)
"""What LLaVA's first stage trains on, its `plain` version: the image, the caption, a line break; no end token."""

Turn = tuple[str, str | None]
"""A question and its answer; None asks for the answer (only in the last turn)."""


class EncodedConversation(NamedTuple):
    """Token ids, labels and answers of one conversation.

    `input_ids` and `labels` are int lists of one length N, image tokens included; `labels` is -100 except at answers.
    `output_spans` has one half-open token range (start, end) per learned answer, its `</s>` included.
    `shortened` says whether tokens were cut off at the end.
    """

    input_ids: list[int]
    labels: list[int]
    output_spans: list[tuple[int, int]]
    shortened: bool = False

    def answer_mask(self, length: int) -> list[int]:
        """Return 1 at the tokens of answers and their end tokens, 0 at the others of the first `length`."""
        learned = {place for start, end in self.output_spans for place in range(start, end)}
        return [int(place in learned) for place in range(length)]


class RenderingError(ValueError):
    """A base's chat template writes a conversation otherwise than its `PromptFormat` says, because of words in it."""


class ImageCutError(ValueError):
    """A length limit falls into or before an image: the sample cannot be shortened without losing image tokens."""


def conversation_prompt(turns: Sequence[Turn], system: str | None = None, form: PromptFormat = VICUNA_V1) -> str:
    """Return the text of `turns`; it asks for an answer (vicuna_v1: ends in `ASSISTANT:`) when the last one is None.

    system: None is the format's own. Raises ValueError when there is no turn, when an answer other than the last is
    None, and for a system text that the format has no place for.
    """
    return _text(turns, system, form)[0]


def image_places(text: str) -> int:
    """Return how many images `text` asks for."""
    return text.count(IMAGE_PLACE)


def encode_prompt(
    tokenizer: Any,
    text: str,
    tokens_per_image: int,
    image_token_id: int,
    form: PromptFormat = VICUNA_V1,
    add_start: bool = True,
) -> list[int]:
    """Return the token ids of a finished prompt text, each `<image>` as `tokens_per_image` times `image_token_id`.

    The pieces between images are tokenised separately and the start token comes once, as in LLaVA's
    `tokenizer_image_token`; tokenised in one go, a tokenizer with `legacy=False` would lose a word-start piece.
    add_start: False adds no start token to a text that does not write one itself.
    """
    return _encode(tokenizer, text, tokens_per_image, image_token_id, form.start, add_start)[0]


def encode_conversation(
    tokenizer: Any,
    turns: Sequence[Turn],
    tokens_per_image: int,
    image_token_id: int,
    *,
    max_length: int | None = None,
    system: str | None = None,
    form: PromptFormat = VICUNA_V1,
) -> EncodedConversation:
    """Tokenise a conversation for training; labels are learned in every answer (LLaVA's `preprocess_v1`).

    `tokenizer` is a fast transformers tokenizer (character offsets are needed to place the labels). An answer without
    text is not learned, so that nobody is taught to say nothing (LLaVA ignores its whole sample). A sequence longer
    than `max_length` is cut at its end; the labels and spans behind the cut go with it. Raises ImageCutError when an
    image does not lie wholly before the cut, and ValueError when an answer holds `<image>`.
    """
    text, answers = _text(turns, system, form)
    ids, starts = _encode(tokenizer, text, tokens_per_image, image_token_id, form.start)
    labels = [IGNORED_LABEL] * len(ids)
    spans = []
    places = np.array(starts)
    for start, end in answers:
        learned = np.flatnonzero((places >= start) & (places < end))
        if learned.size:
            first, last = int(learned[0]), int(learned[-1]) + 1
            spans.append((first, last))
            labels[first:last] = ids[first:last]
    if max_length is None or len(ids) <= max_length:
        return EncodedConversation(ids, labels, spans)
    if image_token_id in ids[max_length:]:
        raise ImageCutError(
            f"the conversation has {len(ids)} tokens and an image would be cut at max_length={max_length}; "
            "raise max_length or leave the sample out"
        )
    spans = [(start, min(end, max_length)) for start, end in spans if start < max_length]
    return EncodedConversation(ids[:max_length], labels[:max_length], spans, shortened=True)


def _text(turns: Sequence[Turn], system: str | None, form: PromptFormat) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation's text and the character range of every answer with its end token, blank ones apart."""
    if not turns:
        raise ValueError("a conversation needs at least one (question, answer) turn; none was given")
    text, answers = "", []
    turns = form.asked(turns, system)
    for index, (question, answer) in enumerate(turns):
        text += form.question_opening if index else form.begin(system)
        text += form.spoken(question) + form.answer_opening
        if answer is None:
            if index != len(turns) - 1:
                raise ValueError(f"turn {index} of {len(turns)} has no answer; only the last answer may be None")
            return text, answers
        if IMAGE_PLACE in answer:
            raise ValueError(f"the answer of turn {index} holds {IMAGE_PLACE!r}; images belong into questions")
        begin = len(text)
        text += form.answer_lead + form.spoken(answer) + form.end
        if answer.strip():
            answers.append((begin, len(text)))
    return text + form.closing, answers


def _encode(
    tokenizer: Any, text: str, tokens_per_image: int, image_token_id: int, start: str, add_start: bool = True
) -> tuple[list[int], list[int]]:
    """Return token ids and, for each, the character of `text` where it starts (-1 for image and start tokens)."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets, which place the labels; "
            "load the fast tokenizer (a folder with tokenizer.json, or transformers' PreTrainedTokenizerFast)"
        )
    ids, starts = [], []
    first = tokenizer("").input_ids[:1]
    if add_start and tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]:
        ids, starts = list(first), [-1]
    offset = 0
    if start and text.startswith(start):  # the text writes the start token itself, and it comes once all the same
        ids, starts, offset = [tokenizer.convert_tokens_to_ids(start)], [-1], len(start)
    for number, piece in enumerate(text[offset:].split(IMAGE_PLACE)):
        if number:
            ids += [image_token_id] * tokens_per_image
            starts += [-1] * tokens_per_image
        if piece:
            doubled = _swallowed_spaces(tokenizer, piece)
            try:
                encoded = tokenizer(
                    _insert_spaces(piece, doubled), add_special_tokens=False, return_offsets_mapping=True
                )
            except TypeError as error:  # the tokenizers library says no more of half a surrogate pair
                raise ValueError(f"a text cannot be encoded ({error}): {piece[:200]!r}; correct its letters") from None
            ids += encoded.input_ids
            shifts = np.array(doubled) + np.arange(len(doubled))  # where the inserted spaces lie now
            starts += [offset + place - int((shifts < place).sum()) for place, _ in encoded.offset_mapping]
        offset += len(piece) + len(IMAGE_PLACE)
    return ids, starts


def _swallowed_spaces(tokenizer: Any, piece: str) -> list[int]:
    """Return the places of `piece` where text begins with a space that this tokenizer would take for its word-start.

    SentencePiece, which LLaVA uses, begins a text with a word-start of its own, whatever follows. transformers 5
    imitates it by a Metaspace, which leaves it out before a space; the space is doubled there to get both. With
    legacy=True ("always") a text begins behind every special token too, with legacy=False ("first") only at the front.
    """
    scheme = getattr(tokenizer.backend_tokenizer.pre_tokenizer, "prepend_scheme", "never")
    if scheme == "never":
        return []
    ends = {0}
    if scheme == "always":
        for token in tokenizer.get_added_vocab():
            ends.update(found.end() for found in re.finditer(re.escape(token), piece))
    return sorted(end for end in ends if piece.startswith((" ", WORD_START), end))


def _insert_spaces(piece: str, places: list[int]) -> str:
    bounds = [0, *places, len(piece)]
    return " ".join(piece[start:end] for start, end in pairwise(bounds))
