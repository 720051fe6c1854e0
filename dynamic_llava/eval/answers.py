"""Answer files: LLaVA's JSON lines, one answer a line, written as they come and read back checked; no torch here.

{"question_id": 1, "prompt": "...", "text": "No", "answer_id": "...", "model_id": "...", "metadata": {}} and, for some
tasks, further fields (`extra`), e.g. MMBench's round_id, options and option_char.
"""

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

from dynamic_llava.eval.reading import brief, read_json_lines
from dynamic_llava.eval.writing import write_text

FIELDS = ("question_id", "prompt", "text", "answer_id", "model_id", "metadata")
"""Fields of a line that have a place of their own in `AnswerLine`; all others are `extra`."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class AnswerLine:
    """One line of an answer file."""

    question_id: int | str
    """Id of the question as the question file writes it; its kind (int or str) is kept."""
    text: str
    """The model's text, special tokens skipped, stripped; scorers never strip it again."""
    prompt: str = ""
    """The question with its suffix, without the conversation template (`Question.logged_prompt`)."""
    answer_id: str = ""
    """A short unique name of this answer."""
    model_id: str = ""
    """Name of the model that gave the answer."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Facts that the runner keeps beside the answer: decisions, costs."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the line (`Question.extra`)."""
    line: int = 0
    """Line in the file it was read from, counted from 1; 0 for an answer that was not read."""

    @property
    def key(self) -> str:
        """The id as text, so that 7 in one file meets "7" in another."""
        return str(self.question_id)


def answer_line(answer: AnswerLine) -> str:
    """Return the JSON line of an answer, line end included.

    Raises ValueError when `extra` names one of the fields that every line has.
    """
    if taken := sorted(set(answer.extra) & set(FIELDS)):
        raise ValueError(f"extra fields {taken} of question {answer.question_id!r} are fields of every answer line")
    line = {name: getattr(answer, name) for name in FIELDS} | dict(answer.extra)
    return json.dumps(line) + "\n"


def append_answers(file: TextIO, answers: Iterable[AnswerLine]) -> None:
    """Write answers to an open file in one piece and flush it, so that a killed process loses no whole batch."""
    file.write("".join(map(answer_line, answers)))
    file.flush()


def write_answers(path: str | Path, answers: Iterable[AnswerLine]) -> Path:
    """Write an answer file, whole or not at all, and return its path."""
    return write_text(Path(path), "".join(map(answer_line, answers)))


def read_answers(path: str | Path) -> list[AnswerLine]:
    """Return the answers of a file in its order; empty lines are passed over.

    Raises FileNotFoundError when there is no such file, and ValueError that names file and line for a line that is no
    JSON object, has no id (int or str), no text, or a field of the wrong kind, and for a file without answers.
    Whether an id may occur twice is the task's to say (`one_per_question`).
    """
    answers = [parse_answer(line, f"{path}:{number}", number) for number, line in read_json_lines(path)]
    if not answers:
        raise ValueError(f"{path} holds no answers")
    return answers


def parse_answer(line: Mapping[str, Any], place: str, number: int = 0) -> AnswerLine:
    """Return the answer that a decoded line holds; `place` names the line in the ValueError for a wrong one."""
    question = line.get("question_id")
    if not isinstance(question, int | str) or isinstance(question, bool):
        raise ValueError(
            f"{place}: question_id is {brief(question)}; an answer line names its question by a number or text"
        )
    for name, kind in (("text", str), ("prompt", str), ("metadata", dict)):
        if name == "text" and name not in line:
            raise ValueError(f"{place}: the answer to question {brief(question)} has no 'text'")
        if name in line and not isinstance(line[name], kind):
            raise ValueError(f"{place}: {name!r} is {brief(line[name])}; an answer line holds a {kind.__name__} there")
    return AnswerLine(
        question,
        line["text"],
        prompt=line.get("prompt", ""),
        answer_id=str(line.get("answer_id", "")),
        model_id=str(line.get("model_id", "")),
        metadata=line.get("metadata", {}),
        extra={name: value for name, value in line.items() if name not in FIELDS},
        line=number,
    )


def one_per_question(
    answers: Sequence[AnswerLine], key: Callable[[AnswerLine], Key] = lambda answer: answer.key
) -> dict[Key, AnswerLine]:
    """Return key -> answer in the answers' order; `key` says what makes a question one (its id as text by default).

    Raises ValueError when a question is answered twice: a file that was merged or resumed wrongly has no score.
    """
    found: dict[Key, AnswerLine] = {}
    for answer in answers:
        name = key(answer)
        if name in found:
            raise ValueError(
                f"question {brief(name)} is answered twice, in lines {found[name].line} and {answer.line}; "
                "keep one answer to each question"
            )
        found[name] = answer
    return found
