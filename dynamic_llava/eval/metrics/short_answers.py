"""Exact-match accuracy of short answers, by kind of question (standard library only)."""

from collections import defaultdict
from collections.abc import Sequence


def normalise_answer(text: str) -> str:
    """Lower-case, cut at the first full stop and collapse white space: "Blue .\\n" becomes "blue"."""
    return " ".join(text.lower().split(".", 1)[0].split())


def accuracy_by_kind(answers: Sequence[str], truths: Sequence[str], kinds: Sequence[str]) -> dict[str, float]:
    """Share of right answers (0..1) for each kind in alphabetical order, then over all questions as "all".

    The three sequences belong together by position; ValueError when their lengths differ or they are empty.
    """
    if not len(answers) == len(truths) == len(kinds):
        raise ValueError(
            f"{len(answers)} answers, {len(truths)} truths and {len(kinds)} kinds were given; "
            "they belong together one by one, so give equally many"
        )
    if not answers:
        raise ValueError("no answers were given; accuracy needs at least one question")
    right: dict[str, list[bool]] = defaultdict(list)
    for answer, truth, kind in zip(answers, truths, kinds, strict=True):
        right[kind].append(normalise_answer(answer) == normalise_answer(truth))
    scores = {kind: sum(right[kind]) / len(right[kind]) for kind in sorted(right)}
    scores["all"] = sum(sum(values) for values in right.values()) / len(answers)
    return scores
