"""Soft accuracy of a short answer against those of several people: right when three others said so.

Each person's answer is left out once; with n equal answers among the others the prediction is worth min(1, n / 3); the
mean over the people is its accuracy. Left out is one record, not every record of the same text.
"""

from collections.abc import Sequence

from dynamic_llava.eval.metrics.vqa_normalise import normalise, normalise_as_server, one_line

ENOUGH = 3
"""So many others make an answer fully right."""


def leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """Return the soft accuracy (0..1) of a prediction by string equality; ValueError without an answer."""
    if not answers:
        raise ValueError("a question without human answers has no accuracy")
    equal = [answer == prediction for answer in answers]
    return sum(min(1.0, (sum(equal) - own) / ENOUGH) for own in equal) / len(answers)


def normalised_accuracy(text: str, answers: Sequence[str]) -> float:
    """Return the accuracy (0..1) of an answer as TextVQA and VizWiz count it: `normalise` on both sides."""
    return leave_one_out(normalise(text), [normalise(answer) for answer in answers])


def server_accuracy(submitted: str, answers: Sequence[str]) -> float:
    """Return the accuracy (0..1) that the VQA server gives a submitted answer.

    Both sides are normalised only where the people disagree. Where all gave one and the same answer, the strings
    themselves are compared, white space apart.
    """
    submitted, answers = one_line(submitted), [one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        submitted, answers = normalise_as_server(submitted), [normalise_as_server(answer) for answer in answers]
    return leave_one_out(submitted, answers)
