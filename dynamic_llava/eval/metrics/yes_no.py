"""Yes/no scores in POPE's manner: how an answer is read, and precision, recall and F1 with "yes" as positive."""

import re
from collections.abc import Sequence
from typing import Any

_YES = re.compile(r"\byes\b", re.IGNORECASE)


def read_yes_no(text: str) -> str:
    """Read a free answer as "yes" or "no" exactly as POPE's script does.

    Cut at the first full stop, delete commas, split at single spaces; any word "No", "not" or "no" makes it "no",
    everything else (an empty answer too) is "yes".
    """
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if any(word in ("No", "not", "no") for word in words) else "yes"


def says_yes_or_no(text: str) -> bool:
    """Return whether an answer says either word at all: it is read as "no", or "yes" stands in what is read of it."""
    return read_yes_no(text) == "no" or _YES.search(text.split(".", 1)[0]) is not None


def yes_no_scores(answers: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """POPE's measures for free answers against labels "yes" / "no", each as a share (0..1).

    Returns accuracy, precision, recall, f1, yes_rate (of the answers) and `undefined`, the names of measures whose
    denominator was zero (they are reported as 0). ValueError when lengths differ or a label is neither yes nor no.
    """
    if len(answers) != len(labels) or not labels:
        raise ValueError(f"{len(answers)} answers for {len(labels)} labels; give one answer per label, at least one")
    unknown = sorted(set(labels) - {"yes", "no"})
    if unknown:
        raise ValueError(f"labels {unknown} are not known; give 'yes' or 'no'")
    read = [read_yes_no(answer) for answer in answers]
    pairs = list(zip(read, labels, strict=True))
    true_yes, false_yes = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    true_no, false_no = pairs.count(("no", "no")), pairs.count(("no", "yes"))
    undefined: list[str] = []

    def share(name: str, part: float, whole: float) -> float:
        if whole == 0:
            undefined.append(name)
            return 0.0
        return part / whole

    precision = share("precision", true_yes, true_yes + false_yes)
    recall = share("recall", true_yes, true_yes + false_no)
    f1 = share("f1", 2 * precision * recall, precision + recall)
    return {
        "accuracy": (true_yes + true_no) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_rate": read.count("yes") / len(read),
        "undefined": undefined,
    }
