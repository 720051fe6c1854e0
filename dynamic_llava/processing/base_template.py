"""How the conversations of a base are written: read from its chat template and its end token, or refused by name.

A template is a program. It is tried out on made-up conversations, and the fixed texts around their questions and
answers become a `PromptFormat`. That is exact only where a template writes every conversation as a beginning of the
longer one, turn by turn; a template that does not is refused, because what a model is trained on would not be what it
is asked with later.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from dynamic_llava.files import brief_text
from dynamic_llava.processing.prompts import (
    END_OF_ANSWER,
    IMAGE_PLACE,
    PLAIN,
    SYSTEM,
    VICUNA_V1,
    PromptFormat,
    RenderingError,
    Turn,
    conversation_prompt,
    encode_conversation,
    encode_prompt,
)

QUESTIONS = ("question zero", "question one", "question two")
ANSWERS = ("answer zero", "answer one", "answer two")
SYSTEM_TEXT = "system text"
_CLOCK = "strftime_now"
_EDIT = "edit chat_template.jinja of the folder, or take the template out where the checkpoint was trained on vicuna_v1"


class _Unfit(ValueError):
    """Why a template cannot be used."""


class Ends(NamedTuple):
    """The token ids at which generation stops, and the file that says so."""

    ids: Collection[int]
    file: str


@dataclass(frozen=True)
class _Template:
    """A jinja template with its tokenizer; `in_parts`: a message's content is a list of parts, or a text."""

    tokenizer: Any
    source: str
    in_parts: bool

    def render(self, turns: Sequence[Turn], system: str | None = None, asks: bool = False) -> str:
        """Return the text of a conversation. Raises _Unfit where the template refuses it."""
        messages = [] if system is None else [self._message("system", system)]
        for question, answer in turns:
            messages.append(self._message("user", question))
            if answer is not None:
                messages.append(self._message("assistant", answer))
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.source, tokenize=False, add_generation_prompt=asks
            )
        except Exception as error:  # a template raises whatever the operations in it raise
            raise _Unfit(f"it cannot be rendered ({type(error).__name__}: {brief_text(error)})") from None

    def _message(self, role: str, text: str) -> dict[str, Any]:
        if not self.in_parts:
            return {"role": role, "content": text}
        parts: list[dict[str, str]] = []
        for number, piece in enumerate(text.split(IMAGE_PLACE)):
            parts += [{"type": "image"}] if number else []
            said = piece.removeprefix("\n") if number else piece
            parts += [{"type": "text", "text": said}] if said or IMAGE_PLACE not in text else []
        return {"role": role, "content": parts}


def find_format(tokenizer: Any, template: str | None, ends: Ends | None = None) -> PromptFormat:
    """Return how conversations are written for a tokenizer and a chat template, which may be None.

    vicuna_v1, exactly, for LLaVA-1.5: an end token `</s>`, and no template or one of the same words, such as
    llava-hf's, which leaves out the system text that LLaVA-1.5 was trained with. Otherwise the template's own.
    ends: where generation stops; None is the tokenizer's end token.
    Raises ValueError where the template is missing or cannot be used, or answers would not end where generation stops.
    """
    if template is None and tokenizer.eos_token != END_OF_ANSWER:
        raise ValueError(
            f"the tokenizer's end token is {tokenizer.eos_token!r} and there is no chat template, so nothing says how "
            f"this base writes a conversation (LLaVA-1.5: vicuna_v1, whose answers end in {END_OF_ANSWER!r}); put the "
            "chat_template.jinja of its training beside the tokenizer"
        )
    form = VICUNA_V1
    if template is not None and template != VICUNA_V1.template:
        try:
            form = _read(tokenizer, template)
        except _Unfit as error:
            raise ValueError(f"the chat template of this base cannot be used: {brief_text(error)}; {_EDIT}") from None
    _check_end(tokenizer, form, ends)
    return form


def check_rendering(tokenizer: Any, form: PromptFormat, turns: Sequence[Turn], system: str | None, text: str) -> None:
    """Raise RenderingError unless a base's own template writes this conversation, whose text is `text`, as others.

    What a template does with certain words, such as leaving out a thought, no made-up conversation shows.
    """
    if form in (VICUNA_V1, PLAIN):
        return
    try:
        written = _Template(tokenizer, form.template, form.in_parts).render(turns, system, turns[-1][1] is None)
    except _Unfit as error:
        raise RenderingError(f"the base's chat template refuses this conversation: {brief_text(error)}") from None
    if turns[-1][1] is not None:
        written = written.removesuffix(form.asks_always)
    elif form.ignores_asking:
        written += form.answer_opening.removeprefix(form.question_closing)
    if written != text:
        raise RenderingError(
            f"the base's chat template writes this conversation in a way of its own, because of words in it: "
            f"{written!r}, where {text!r} would be in line with others; change them, or {_EDIT}"
        )


def _read(tokenizer: Any, source: str) -> PromptFormat:
    """Return the format that a template follows on made-up conversations. Raises _Unfit where it follows none."""
    if _CLOCK in source:
        raise _Unfit(f"it asks for the time ({_CLOCK}), so that a conversation is another one tomorrow; write a date")
    template = _in_style(tokenizer, source)
    asked = template.render([(QUESTIONS[0], None)], asks=True)
    if tokenizer.eos_token == END_OF_ANSWER and _is_vicuna(asked, tokenizer.bos_token or ""):
        return VICUNA_V1
    form = _with_system(template, _split(template, asked))
    spaced = [(f"  {QUESTIONS[0]} \n", f"\n {ANSWERS[0]}  ")]
    if template.render(spaced).removesuffix(form.asks_always) != conversation_prompt(spaced, form=form):
        form = replace(form, strips=True)
    for turns, system in _made_up(form):
        written = template.render(turns, system).removesuffix(form.asks_always)
        if written != conversation_prompt(turns, system, form):
            raise _Unfit(
                f"its text {written!r} is not put together as its shorter conversations are "
                f"({conversation_prompt(turns, system, form)!r})"
            )
    _compare_tokens(tokenizer, form)
    return form


def _in_style(tokenizer: Any, source: str) -> _Template:
    """Return the template with the kind of content that it understands, tried out on a question about an image."""
    wanted, written = f"{IMAGE_PLACE}\n{QUESTIONS[0]}", ""
    for in_parts in (True, False):
        template = _Template(tokenizer, source, in_parts)
        try:
            written = template.render([(wanted, ANSWERS[0])])
        except _Unfit:
            if not in_parts:
                raise
            continue
        if wanted in written and "'type'" not in written:
            return template
    raise _Unfit(f"a question about an image is {wanted!r} in LLaVA, and it writes {written!r}")


def _is_vicuna(asked: str, start: str) -> bool:
    text = asked.removeprefix(start).strip().removeprefix(SYSTEM).strip()
    return re.fullmatch(rf"USER:\s*{QUESTIONS[0]}\s*ASSISTANT:", text) is not None


def _split(template: _Template, asked: str) -> PromptFormat:
    """Return the fixed texts of a conversation of two turns, and of the question that `asked` ends with."""
    said = [QUESTIONS[0], ANSWERS[0], QUESTIONS[1], ANSWERS[1]]
    written = template.render([(said[0], said[1]), (said[2], said[3])])
    pieces = re.split("|".join(map(re.escape, said)), written)
    if re.findall("|".join(map(re.escape, said)), written) != said:
        raise _Unfit(f"it does not write every question and answer once and in order: {written!r}")
    opening, before_answer, between, again, behind = pieces
    if before_answer != again:
        raise _Unfit(f"between question and answer it writes {before_answer!r} once and {again!r} in the next turn")
    plain = template.render([(said[0], None)])
    if not (asked.startswith(opening + said[0]) and plain.startswith(opening + said[0])):
        raise _Unfit(f"a question that waits for its answer is written otherwise: {asked!r} and {plain!r}")
    asking, waiting = asked[len(opening + said[0]) :], plain[len(opening + said[0]) :]
    ignores = asking == waiting  # it knows no add_generation_prompt: what opens an answer is seen at answers alone
    answer_opening = before_answer.rstrip(" ") if ignores else asking
    lead = before_answer[len(answer_opening) :]
    if not before_answer.startswith(answer_opening) or lead.strip() or not answer_opening.startswith(waiting):
        raise _Unfit(
            f"in front of an answer it writes {before_answer!r}, and where add_generation_prompt asks for it {asking!r}"
        )
    end = _end_of(template.tokenizer, behind)
    closing, asks_always = behind[len(end) :], ""
    if ignores and closing and asking.endswith(closing) and not between.startswith(behind):
        closing, asks_always = "", closing
    if not between.startswith(end + closing):
        raise _Unfit(f"behind an answer it writes {behind!r} at the end and {between!r} where the conversation goes on")
    start = template.tokenizer.bos_token or ""
    return PromptFormat(
        opening=opening,
        system_opening=None,
        question_closing=waiting,
        answer_opening=answer_opening,
        answer_lead=lead,
        end=end,
        closing=closing,
        question_opening=between[len(end) :],
        template=template.source,
        in_parts=template.in_parts,
        ignores_asking=ignores,
        asks_always=asks_always,
        start=start if start and opening.startswith(start) else "",
    )


def _end_of(tokenizer: Any, behind: str) -> str:
    """Return the spaces and the special token that `behind`, the text behind an answer, begins with."""
    text = behind.lstrip()
    tokens = [token for token in tokenizer.get_added_vocab() if text.startswith(token)]
    if not tokens:
        raise _Unfit(f"behind an answer it writes {behind!r}, which begins with no special token that would end it")
    return behind[: len(behind) - len(text)] + max(tokens, key=len)


def _with_system(template: _Template, form: PromptFormat) -> PromptFormat:
    try:
        written = template.render([(QUESTIONS[0], ANSWERS[0])], SYSTEM_TEXT)
    except _Unfit:
        return form
    before, found, rest = written.partition(SYSTEM_TEXT)
    between, asked, _ = rest.partition(QUESTIONS[0])
    return replace(form, system_opening=(before, between)) if found and asked else form


def _made_up(form: PromptFormat) -> list[tuple[list[Turn], str | None]]:
    """Return conversations that show whether a format is kept: lengths, images, spaces, and a system text."""
    turns: list[Turn] = list(zip(QUESTIONS, ANSWERS, strict=True))
    seen: list[Turn] = [(f"{IMAGE_PLACE}\n{QUESTIONS[0]}", ANSWERS[0]), *turns[1:]]
    both: list[Turn] = [(f"{IMAGE_PLACE}\n{IMAGE_PLACE}\n{QUESTIONS[0]}", ANSWERS[0])]
    later: list[Turn] = [turns[0], (f"{IMAGE_PLACE}\n{QUESTIONS[1]}", ANSWERS[1])]
    spaced: list[Turn] = [(f"  {QUESTIONS[0]} \n", f"\n {ANSWERS[0]}  "), (f"a  {{b}} {QUESTIONS[1]}", "<c> é \\n")]
    plain = [turns[:1], turns[:2], turns, seen, both, later, spaced]
    systems = [] if form.system_opening is None else [(turns[:2], SYSTEM_TEXT), (seen, SYSTEM_TEXT)]
    return [*((one, None) for one in plain), *systems]


def _compare_tokens(tokenizer: Any, form: PromptFormat) -> None:
    """Raise _Unfit unless the tokens of a prompt are those in front of its answer, and answers end in one token."""
    turns: list[Turn] = list(zip(QUESTIONS, ANSWERS, strict=True))
    encoded = encode_conversation(tokenizer, turns, 1, -1, form=form)
    end = tokenizer.convert_tokens_to_ids(form.end_token)
    for number, (first, last) in enumerate(encoded.output_spans):
        text = conversation_prompt([*turns[:number], (turns[number][0], None)], form=form)
        if encode_prompt(tokenizer, text, 1, -1, form) != encoded.input_ids[:first]:
            raise _Unfit(
                f"the tokens of its prompt {text!r} are not those in front of the answer, because the tokenizer reads "
                "the end of the prompt and the beginning of the answer as one token"
            )
        if encoded.input_ids[last - 1] != end:
            raise _Unfit(f"the tokenizer does not read {form.end!r} behind an answer as the token {form.end_token!r}")


def _check_end(tokenizer: Any, form: PromptFormat, ends: Ends | None) -> None:
    """Raise ValueError unless the end of an answer is one token, at which generation stops."""
    ids = list(tokenizer(form.end_token, add_special_tokens=False).input_ids)
    if len(ids) != 1:
        raise ValueError(
            f"answers end in {form.end_token!r}, which is no token of this tokenizer but {len(ids)} pieces; give the "
            "tokenizer that the base was trained with"
        )
    stops = ends if ends is not None else Ends([tokenizer.eos_token_id], "the tokenizer")
    if ids[0] not in stops.ids:
        raise ValueError(
            f"answers end in {form.end_token!r}, token {ids[0]}, and generation stops at {list(stops.ids)} "
            f"({stops.file}), so no answer would end; add {ids[0]} to eos_token_id in generation_config.json, or give "
            "the tokenizer that the base was trained with"
        )
