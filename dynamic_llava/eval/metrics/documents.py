"""How answers about documents, charts and text in images are scored, one published rule a benchmark.

ANLS (DocVQA, InfoVQA) follows the evaluation script of the Robust Reading Competition's server, challenge 17. It counts
a similarity of exactly 1/2, which the formula of the papers (arXiv 1907.00490, Eq. 1) makes 0; and it divides the
distance of the texts without their spare white space by the length of the texts as they came.

Relaxed accuracy (ChartQA, arXiv 2203.10244, Sec. 5.1) follows pix2struct's `relaxed_correctness`, which lmms-eval has
as well (2bb5e98): "5%" is 0.05 and so is not 5, and a label of 0 is compared as a text.

OCRBench follows its owner's example.py (Yuliang-Liu/MultimodalOCR, f5cbec6): an answer is right that holds the label.
"""

from collections.abc import Sequence

LEAST_SIMILARITY = 0.5
"""A similarity below it counts as none."""
TOLERANCE = 0.05
"""How far a number may be from the label's, as a share of it."""


def anls(text: str, answers: Sequence[str]) -> float:
    """Return the normalised Levenshtein similarity (0..1) to the most similar of the answers; 0 below a half.

    Case and spare white space do not count. ValueError without NLTK, whose distance it is.
    """
    return max(_similarity(text, answer) for answer in answers)


def _similarity(text: str, answer: str) -> float:
    try:
        from nltk.metrics.distance import edit_distance
    except ImportError:
        raise ValueError("ANLS needs nltk; run `pip install 'dynamic-llava[eval]'`") from None
    said, due = (" ".join(one.lower().split()) for one in (text, answer))
    longest = max(len(text.upper()), len(answer.upper()))
    if said == due:
        return 1.0
    if abs(len(said) - len(due)) > (1 - LEAST_SIMILARITY) * longest:
        return 0.0  # the distance is not less; an endless answer is not compared letter by letter
    similarity = 1 - edit_distance(said, due) / longest
    return similarity if similarity >= LEAST_SIMILARITY else 0.0


def is_relaxed_right(text: str, answer: str) -> bool:
    """Return whether an answer is within 5 % of the label where both are numbers, or else the same text.

    White space around them and case do not count.
    """
    said, due = text.strip(), answer.strip()
    number, wanted = _number(said), _number(due)
    if number is not None and wanted:
        return abs(number - wanted) / abs(wanted) <= TOLERANCE
    return said.lower() == due.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def holds_answer(text: str, answers: Sequence[str], *, formula: bool = False) -> bool:
    """Return whether a text holds one of the answers, whatever its case; with `formula` in its case, without spaces."""
    return any(_compared(answer, formula) in _compared(text, formula) for answer in answers)


def _compared(text: str, formula: bool) -> str:
    text = text.strip().replace("\n", " ")
    return text.replace(" ", "") if formula else text.lower()
