"""ANLS, relaxed accuracy and OCRBench's rule: worked examples of their sources, and derivations that share no code."""

from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamic_llava.eval.metrics.documents import anls, holds_answer, is_relaxed_right

WORDS = st.text("aAbBß İé1 \n\t", max_size=9)
"""Letters whose upper or lower case has another length among them, and white space of every kind."""


def distance(one, other):
    """Levenshtein's recursion as it is defined."""

    @lru_cache(None)
    def of(i, j):
        if not i or not j:
            return i + j
        return min(of(i - 1, j) + 1, of(i, j - 1) + 1, of(i - 1, j - 1) + (one[i - 1] != other[j - 1]))

    return of(len(one), len(other))


def servers_anls(text, answers):
    """The server's script of challenge 17, from its description: the smallest share of the distance decides."""
    shares = []
    for answer in answers:
        length = max(len(answer.upper()), len(text.upper()))
        apart = distance(" ".join(answer.strip().lower().split()), " ".join(text.strip().lower().split()))
        shares.append(apart / length if length else 0.0)
    found = 1 - min(shares)
    return found if found >= 0.5 else 0.0


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_anls_is_the_servers(text, answers):
    assert anls(text, answers) == pytest.approx(servers_anls(text, answers))


@pytest.mark.parametrize(
    ("text", "answers", "value"),
    [
        ("1/8/93", ["1/8/93"], 1.0),
        ("  UNIVERSITY   of California", ["university of california"], 1.0),
        ("kitten", ["sitting"], 4 / 7),  # three edits, the textbook's example
        ("ab", ["ax"], 0.5),  # the papers' formula makes 0 of it, the server does not
        ("a", ["ax", "axx", "b"], 0.5),
        ("abc", ["xyz", "abd"], 2 / 3),  # the most similar label counts
        ("cat", ["a cat"], 0.6),
        ("", ["a"], 0.0),
        ("", [""], 1.0),
        (" \n", [""], 1.0),
        ("a  b", ["a c"], 0.75),  # one edit over four characters as they came, not over three
        ("Straße", ["STRASSE"], 1 - 2 / 7),
        ("日本語", ["日本"], 2 / 3),
        ("x" * 10**6, ["yes"], 0.0),
        ("x" * 10**5, ["x" * 10**5], 1.0),
    ],
)
def test_anls_by_hand(text, answers, value):
    assert anls(text, answers) == pytest.approx(value)


def test_anls_without_nltk_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nltk.metrics.distance", None)
    with pytest.raises(ValueError, match=r"ANLS needs nltk; run `pip install 'dynamic-llava\[eval\]'`"):
        anls("a", ["b"])


@pytest.mark.parametrize(
    ("text", "label", "right"),
    [
        ("14", "14", True), ("14.7", "14", True), ("14.71", "14", False), ("13.3", "14", True), ("13.29", "14", False),
        ("-14", "14", False), ("-13.5", "-14", True), ("105", "100", True), ("95", "100", True), ("1e2", "100", True),
        ("5%", "0.05", True), ("5%", "5", False), ("5", "5%", False), ("32.5%", "32%", True), ("5 %", "0.05", True),
        ("0", "0", True), ("0.0", "0", False), ("0.001", "0", False), ("0%", "0", False),
        ("Green", "green", True), (" green\n", "Green", True), ("green.", "green", False), ("", "", True),
        ("", "3", False), ("three", "3", False), ("1,400", "1400", False), ("1,400", "1,400", True),
        ("2019", "2100", True), ("nan", "nan", False), ("inf", "3", False), ("%", "%", True), ("ÉTÉ", "été", True),
    ],
)  # fmt: skip
def test_relaxed_accuracy_by_hand(text, label, right):
    """The rule's oddities are kept: a share of per cent, a label of 0, years within 5 %, no thousands."""
    assert is_relaxed_right(text, label) is right


@given(st.integers(-999, 999), st.integers(-999, 999).filter(bool))
def test_relaxed_accuracy_of_whole_numbers(said, label):
    """In whole numbers: 20 times the difference is at most the label."""
    assert is_relaxed_right(str(said), str(label)) is (20 * abs(said - label) <= abs(label))


@pytest.mark.parametrize(
    ("text", "answers", "formula", "right"),
    [
        ("CENTRE", ["centre"], False, True), ("The word is Centre.", ["CENTRE"], False, True),
        ("cent re", ["centre"], False, False), ("of\nthe", ["of the"], False, True), ("", ["a"], False, False),
        ("it is 8 January", ["1/8/93", "8 january"], False, True), ("1/8/94", ["1/8/93", "8 January"], False, False),
        (r"\frac{A}{2}", [r"\frac { A } { 2 }"], True, True), (r"\frac{a}{2}", [r"\frac { A } { 2 }"], True, False),
        ("x\n=\n1", ["x = 1"], True, True), ("日本", ["本"], False, True),
    ],
)  # fmt: skip
def test_ocrbench_by_hand(text, answers, formula, right):
    assert holds_answer(text, answers, formula=formula) is right
