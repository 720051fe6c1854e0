"""What multiple-choice tasks share: how options are listed, and how answers meet the questions they belong to."""

from collections.abc import Collection, Mapping, Sequence

from dynamic_llava.eval.answers import Answer, one_per_question
from dynamic_llava.eval.reading import shown
from dynamic_llava.eval.tasks.base import left_out
from dynamic_llava.eval.tasks.files import missing_answers, unknown_answers


def option_lines(options: Mapping[str, str]) -> str:
    """Return options as LLaVA-1.5 was taught to read them, each on a line of its own: "\\nA. Open\\nB. Closed"."""
    return "".join(f"\n{letter}. {text}" for letter, text in options.items())


def meet(
    task: str, answers: Sequence[Answer], known: Collection[str], part: bool = False
) -> tuple[dict[str, Answer], dict[str, int], list[str]]:
    """Return the answers by id, what is counted, and what is warned of; `known` are the ids of the questions, as text.

    Questions without an answer are wrong and counted, or with `part` left out; answers without a question are counted
    and left out. Raises ValueError for a question answered twice, and when no answer has a question.
    """
    said = one_per_question(answers)
    missing, unknown = missing_answers(said, known), unknown_answers(task, said, known)
    answered = len(known) - len(missing)
    if not answered:
        raise ValueError(unknown or f"{task}: there are no answers")
    wrong = missing and not part
    warnings = [f"questions without an answer, counted as wrong: {shown(missing)}"] if wrong else []
    warnings += left_out(part, missing, len(known))
    counts = {"questions": len(known), "answered": answered, "missing": len(missing), "unknown": len(said) - answered}
    return said, counts, warnings + ([unknown] if unknown else [])
