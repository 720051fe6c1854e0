"""Dialogues about an image as token ids, the way the paper's scripts feed them.

The first question is a prompt (vicuna_v1), its image in front. How later questions are fed is the round separator:

official  `USER:{question}ASSISTANT:`, without spaces, start token, or the `</s>` of the answer before (the default, and
          what the paper's numbers come from)
template  `</s>USER: {question} ASSISTANT:`, what the model was trained on; that `</s>` counts as part of the question.
          A base with a chat template of its own has its own words and end token here
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

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
    """Ids that are fed before the answer, image tokens included; none of them is ever dropped but image tokens."""
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
