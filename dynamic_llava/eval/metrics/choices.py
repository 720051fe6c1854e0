"""How a chosen option, or yes and no, is read from a free answer, one function a benchmark (standard library only).

The published rules differ, and what each of them does not read decides scores; benchmarks share none. For yes
and no there are also POPE's precision, recall and F1, "yes" being positive.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

SCIENCEQA_LETTERS = "ABCDE"
MMSTAR_LETTERS = ("A", "B", "C", "D")
_MMSTAR_BEGINNINGS = ("", "(", "option ", "the answer is ")
"""What may stand before MMStar's letter, in small letters."""

_SCIENCEQA_SENTENCE = re.compile(r"The answer is ([A-Z]).")

_ANSWER = re.compile(r"answer is|answer:", re.IGNORECASE)

_LETTER = re.compile(r"\(?([a-z])(?:\)|\s*$|\s*\n|[.:,](?:\s|$))", re.IGNORECASE)
"""b in or before a bracket, alone on its line, or with one mark and then a space or the end."""

_MMBENCH_MARKS = str.maketrans({mark: " " for mark in ".()[],:;!*#{}"})

_YES = re.compile(r"\byes\b", re.IGNORECASE)

LAST_WORDS = 4
"""MMBench's letter stands among so many last words: the article of "A man holding a bat." does not."""


def read_scienceqa(text: str) -> str | None:
    """Read a letter as LLaVA's ScienceQA script does; None where it says FAILED.

    The letter alone (A to E); else a letter and ". " at the beginning of at least three characters; else "The answer is
    X", exactly once, and one more character after it. So "B.", "b", "B) y" and "The answer is B" are not read.
    """
    if text in set(SCIENCEQA_LETTERS):
        return text
    if len(text) >= 3 and text[0] in SCIENCEQA_LETTERS and text[1:3] == ". ":
        return text[0]
    found = _SCIENCEQA_SENTENCE.findall(text)
    return found[0] if len(found) == 1 else None


def scienceqa_choice(text: str, choices: int) -> int:
    """Return the number of the chosen option, from 0; -1 for one that is not read or beyond the `choices`."""
    place = SCIENCEQA_LETTERS.find(read_scienceqa(text) or "?")
    return place if place < choices else -1


def read_mmbench(text: str, options: Mapping[str, str]) -> str | None:
    """Read a letter of `options` (letter -> text) as MMBench is scored without a judge; None where there is none.

    With the marks . ( ) [ ] , : ; ! * # { } as spaces: the only option letter among the words, if the first place where
    it stands is one of the last four; else the only option whose text occurs in the answer, whatever its case.
    """
    words = text.translate(_MMBENCH_MARKS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - LAST_WORDS:
        return letters[0]
    folded = text.casefold()
    named = [letter for letter, option in options.items() if option.casefold() in folded]
    return named[0] if len(named) == 1 else None


def read_mmstar(text: str) -> str | None:
    """Read a letter as MMStar's own evaluation does: the first character, or the one after "(", "Option ", "The answer
    is ", whatever the case and whatever follows, so "A dog" is A; None where it is none of A to D."""
    said = text.lower().strip().replace("\n", " ")
    found = (said[len(begin) :][:1].upper() for begin in _MMSTAR_BEGINNINGS if said.startswith(begin))
    return next((letter for letter in found if letter in MMSTAR_LETTERS), None)


def answer_tail(text: str) -> str:
    """Return what follows the last "answer is" or "answer:", whatever its case; all of a text without them."""
    return _ANSWER.split(text)[-1]


def read_letter(text: str, letters: Collection[str]) -> str | None:
    """Read one of the capital `letters`, of either case, in brackets or not, first in the text or in its tail.

    After it may come nothing, a new line, or a mark: "b", "(B)", "B.", "(b) Closed", "The answer is B"; not "A dog".
    """
    found = _LETTER.match(answer_tail(text).lstrip(" :\n\t"))
    return found[1].upper() if found is not None and found[1].upper() in letters else None


def read_option(text: str, options: Mapping[str, str]) -> str | None:
    """Read a letter of `options` (letter -> text), or else the option whose text the answer or its tail is."""
    letter = read_letter(text, options)
    said = answer_tail(text).strip(" .:,()\n\t").casefold()
    named = [name for name, option in options.items() if option.strip(" .:,()").casefold() == said]
    return letter or (named[0] if said and len(named) == 1 else None)


def first_character(text: str) -> str:
    """Return CV-Bench's answer: the tail's first character in lower case, full stops and brackets around it gone.

    "" for an answer without one. It is whatever stands first: "Cat" is "c".
    """
    return answer_tail(text).strip().strip(".() ")[:1].casefold()


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
