"""Dialogues about an image as token ids, the way the paper's scripts feed them.

The first question is a vicuna_v1 prompt, its image in front. How later questions are fed is the round separator:

official  `USER:{question}ASSISTANT:`, without spaces, start token, or the `</s>` of the answer before (the default, and
          what the paper's numbers come from)
template  `</s>USER: {question} ASSISTANT:`, what the model was trained on; that `</s>` counts as part of the question
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from dynamic_llava.processing.prompts import END_OF_ANSWER, IMAGE_PLACE, conversation_prompt, encode_prompt

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
) -> list[EncodedRound]:
    """Encode (question, answer) pairs; the first answer is stripped, later ones stay as they are, as in the scripts.

    Raises ValueError when the tokenizer does not read `</s>` behind an answer as its end token.
    """
    first = conversation_prompt([(f"{IMAGE_PLACE}\n{rounds[0][0]}", None)])
    prompts = [encode_prompt(tokenizer, first, tokens_per_image, image_token_id)]
    for question, _ in rounds[1:]:
        if separator == "official":
            text = f"USER:{question}ASSISTANT:"
        else:
            text = f"{END_OF_ANSWER}USER: {question} ASSISTANT:"
        prompts.append(_ids(tokenizer, text))
    answers = [rounds[0][1].strip(), *(answer for _, answer in rounds[1:])]
    return [
        EncodedRound(prompt, _answer_ids(tokenizer, answer)) for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _answer_ids(tokenizer: Any, answer: str) -> list[int]:
    ids = _ids(tokenizer, answer + END_OF_ANSWER)
    if ids[-1] != tokenizer.eos_token_id:
        raise ValueError(
            f"{END_OF_ANSWER!r} behind an answer becomes token {ids[-1]}, not the end token {tokenizer.eos_token_id}; "
            f"give a tokenizer that knows {END_OF_ANSWER!r} as its end token"
        )
    return ids


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)
