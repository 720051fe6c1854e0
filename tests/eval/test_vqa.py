"""The normaliser of VQA answers and the soft accuracy, their oddities included."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamic_llava.eval.metrics.vqa import (
    CONTRACTIONS,
    MARKS,
    leave_one_out,
    normalise,
    normalise_as_server,
    normalised_accuracy,
    server_accuracy,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"), ("A", ""), ("the an a", ""), ("U.S.", "us"), ("3,5", "35"), ("a/b", "b"), ("man's", "man 's"),
        ("None", "0"), ("zero ten eleven", "0 10 eleven"), ("3.5", "3.5"), ("1. 5", "1 5"), (".5", ".5"), ("5.", "5"),
        ("x.5y", "x.5y"), ("red,blue", "redblue"), ("really? yes", "really yes"), ("t-shirt", "t shirt"),
        ("t- shirt", "t shirt"), ("a-b c- d", "ab c d"), ("a-b - c", "ab c"), ("(left)", "left"), ("dont", "don't"),
        ("Dont you", "don't you"), ("somebody'd", "somebodyd"), ("ain't", "ain't"), ("hed've", "he'd've"),
        ("im", "im"), ("one\ntwo\tthree", "1 2 3"), ("  spaced   out ", "spaced out"), ("caf\u00e9", "caf\u00e9"),
        ("\uff11\uff12", "\uff11\uff12"), ("what?!", "what"), ("", ""), ("yes;no", "yes no"),
        ("'s", "'s"), ("it's 5, ok", "it 's 5 ok"), ("let's", "let 's"),
    ],
)  # fmt: skip
def test_normalise(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Man's", "man's"), ("3,5", "35"), ("red,blue", "red blue"), ("red, blue", "red blue"), ("what?", "what"),
        ("1,000 t-shirt", "1000 tshirt"), ("1,,000 a-b", "1  000 b"), ("let's", "let's"), ("The dog.", "dog"),
    ],
)  # fmt: skip
def test_the_server_has_no_first_step(text, expected):
    assert normalise_as_server(text) == " ".join(expected.split())


def test_punctuation_is_judged_on_the_text_as_it_came():
    # "-" stands next to a space only after "/" has become one; it still becomes a space itself
    assert normalise("b/-c") == "b c"
    assert normalise("b-/c x") == "b c x"
    # a mark next to a space anywhere goes everywhere
    assert normalise("b-c d- e") == "bc d e"


def test_only_the_first_32_full_stops_go():
    assert normalise("." * 31 + "x") == "x"
    assert normalise("." * 40) == "." * 8
    assert normalise("b." * 33) == "b" * 33 + "."
    # those before a digit are neither deleted nor counted
    assert normalise(".5" * 40 + "." * 33) == ".5" * 40 + "."


def test_number_words_are_mapped_before_articles_are_dropped_and_contractions_after():
    assert normalise("a one an two the") == "1 2"
    assert normalise("the dont") == "don't"


def test_the_contractions():
    assert len(CONTRACTIONS) == 120
    odd = {
        "somebody'd": "somebodyd", "ow's'at": "'ow's'at", "'ow'sat": "'ow's'at", "twas": "'twas", "let's": "let's",
        "she's": "she's", "y'allll": "y'all'll", "yall'd've": "y'all'd've", "hadn'tve": "hadn't've", "hes": "he's",
        "maam": "ma'am", "oclock": "o'clock", "shed've": "she'd've", "Im": "I'm", "wheres": "where's",
    }  # fmt: skip
    assert {word: CONTRACTIONS[word] for word in odd} == odd
    for absent in ("ill", "id", "its", "shes", "were", "well", "wed", "shed", "lets", "mustntve", "whens't"):
        assert absent not in CONTRACTIONS
    unchanged = {"let's", "she's"}
    assert {word for word, meant in CONTRACTIONS.items() if word == meant} == unchanged
    for word, meant in CONTRACTIONS.items():
        assert word.replace("'", "") == meant.replace("'", "")


@given(st.text(alphabet=st.sampled_from("ab1,.'?!-/ \nAe"), max_size=30))
def test_laws_of_the_normaliser(text):
    done = normalise(text)
    assert done == done.lower() == " ".join(done.split())
    assert not set(done) & set(MARKS)
    assert not {"a", "an", "the", "none", "zero", "one", "ten"} & set(done.split())
    assert normalise(f" {text}\n") == done


def test_three_of_the_others_make_an_answer_right():
    answers = ["cat"] * 3 + ["dog"] * 7
    # one of the three left out: 2 of 3 are among the others
    assert leave_one_out("cat", answers) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert leave_one_out("cat", ["cat", *["dog"] * 9]) == pytest.approx(9 / 30)
    assert leave_one_out("cat", ["cat"] * 4 + ["dog"] * 6) == 1.0
    assert leave_one_out("mouse", answers) == 0.0
    with pytest.raises(ValueError, match="no accuracy"):
        leave_one_out("cat", [])


@given(st.integers(0, 10))
def test_the_left_out_answer_is_one_record(equal):
    """Left out by text, k equal answers would give 10 - k times k, never the k times k - 1 of records."""
    answers = ["x"] * equal + [f"other {number}" for number in range(10 - equal)]
    expected = (equal * min(1, (equal - 1) / 3) + (10 - equal) * min(1, equal / 3)) / 10
    assert leave_one_out("x", answers) == pytest.approx(expected if equal else 0.0)


def test_the_server_compares_strings_where_all_people_agree():
    assert server_accuracy("yes", ["yes"] * 10) == 1.0
    assert server_accuracy("Yes.", ["yes"] * 10) == 0.0
    assert server_accuracy("Yes.", ["yes"] * 9 + ["no"]) == 1.0
    assert server_accuracy("a dog", ["a dog"] * 10) == 1.0
    assert server_accuracy("dog", ["a dog"] * 10) == 0.0
    assert server_accuracy("dog", ["a dog"] * 9 + ["cat"]) == 1.0
    # white space at the ends, line ends and tabs go before answers are compared or counted as different
    assert server_accuracy(" yes\n", ["yes\t"] * 5 + [" yes"] * 5) == 1.0
    # different as strings, equal once normalised: the rule looks at the strings
    assert server_accuracy("Yes", ["yes"] * 9 + ["Yes"]) == 1.0


def test_the_other_accuracy_always_normalises():
    assert normalised_accuracy("Yes.", ["yes"] * 10) == 1.0
    assert normalised_accuracy("the man's", ["man's"] * 10) == 1.0
    assert normalised_accuracy("two", ["2"] * 3 + ["three"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)
