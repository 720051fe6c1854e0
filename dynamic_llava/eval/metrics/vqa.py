"""How VQA answers are normalised (by the VQA server's rules and those of M4C's processor), and their soft accuracy.

`normalise` is what VQAv2 and VizWiz submissions and TextVQA use; `normalise_as_server` is its later part, which the
VQA server applies by itself. Their oddities decide scores and are kept: the punctuation test looks at the unchanged
text, and only the first 32 full stops go (a flag stands where the published code wants a count).

The soft accuracy of a short answer against those of several people: it is right when three others said so. Each
person's answer is left out once; with n equal answers among the others the prediction is worth min(1, n / 3); the mean
over the people is its accuracy. Left out is one record, not every record of the same text.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

MARKS = ';/[]"{}()=+\\_-><@`,?!'
"""Punctuation in the order in which it is treated; full stops and apostrophes have rules of their own."""

FULL_STOPS = 32
"""Most full stops that are deleted: the value of re.UNICODE."""

NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4",
    "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip

ARTICLES = ("a", "an", "the")

ENOUGH = 3
"""Number of other people with the same answer that makes it fully right."""

_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")

_FULL_STOP = re.compile(r"\.(?!\d)")

_APOSTROPHES = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm I've
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
"""Words that are found without their apostrophe."""

_TWO_APOSTROPHES = """
he'd've I'd've it'd've mightn't've shouldn't've somebody'd've someone'd've something'd've there'd've they'd've who'd've
wouldn't've you'd've
"""
"""Words that are found without the first or without the second apostrophe: hed've, he'dve."""

_OTHERS = {
    "couldn'tve": "couldn't've",
    "couldnt've": "couldn't've",
    "hadnt've": "hadn't've",
    "hadn'tve": "hadn't've",
    "let's": "let's",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "shed've": "she'd've",
    "she'dve": "she'd've",
    "she's": "she's",
    "somebody'd": "somebodyd",
    "wed've": "we'd've",
    "we'dve": "we'd've",
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}
"""Words whose forms follow no rule; somebody'd loses its apostrophe."""


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _APOSTROPHES.split()}
    for word in _TWO_APOSTROPHES.split():
        first, second = word.index("'"), word.rindex("'")
        table |= {word[:place] + word[place + 1 :]: word for place in (first, second)}
    return table | _OTHERS


CONTRACTIONS = _contractions()
"""Word as found -> word as compared. Words with a capital (Im) are never met: the text is lower-cased before."""


def normalise(text: str) -> str:
    """Return the answer as a VQAv2 or VizWiz submission holds it and as TextVQA compares it.

    Lower-case, commas and question marks gone, 's parted from its word, then as `normalise_as_server`.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise_as_server(one_line(text))


@lru_cache(maxsize=1 << 17)
def normalise_as_server(text: str) -> str:
    """Return the answer as the VQA server compares it: punctuation, full stops, numbers, articles, contractions."""
    return _without_articles(_without_punctuation(text))


def one_line(text: str) -> str:
    """Return the text stripped, line ends and tabs as spaces."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Delete a mark that stands next to a space anywhere in `text`, or any mark beside a number with a comma.

    Marks between letters become spaces. Every test looks at `text` as it came.
    """
    number_with_comma = _DIGIT_COMMA_DIGIT.search(text) is not None
    found = text
    for mark in MARKS:
        beside_space = mark + " " in text or " " + mark in text
        found = found.replace(mark, "" if beside_space or number_with_comma else " ")
    return _FULL_STOP.sub("", found, count=FULL_STOPS)


def _without_articles(text: str) -> str:
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


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
