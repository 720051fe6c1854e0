"""How a chosen option, or yes and no, is read from an answer, by each benchmark's own rule; measures by hand."""

import pytest

from dynamic_llava.eval.metrics.choices import (
    answer_tail,
    first_character,
    read_letter,
    read_mmbench,
    read_mmstar,
    read_option,
    read_scienceqa,
    read_yes_no,
    scienceqa_choice,
    yes_no_scores,
)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"), ("E", "E"), ("F", None), ("B.", None), ("b", None), ("B) y", None), ("B ", None), (" B", None),
        ("B. ", "B"), ("B. yes", "B"), ("B.\nyes", None), ("F. yes", None), ("BB. ", None), ("", None), ("AB", None),
        ("The answer is B", None), ("The answer is B.", "B"), ("The answer is B, so", "B"), ("The answer is C!", "C"),
        ("The answer is B. The answer is B.", None), ("the answer is B.", None), ("The answer is BC", "B"),
        ("The answer is F.", "F"), ("A. The answer is B.", "A"), ("The answer is b.", None),
    ],
)  # fmt: skip
def test_scienceqa(text, letter):
    assert read_scienceqa(text) == letter


@pytest.mark.parametrize(
    ("text", "choices", "chosen"),
    [("A", 2, 0), ("B. y", 2, 1), ("C", 2, -1), ("E", 5, 4), ("E", 4, -1), ("no", 5, -1), ("The answer is F.", 5, -1)],
)
def test_a_scienceqa_letter_beyond_the_choices_is_minus_one(text, choices, chosen):
    assert scienceqa_choice(text, choices) == chosen


OPTIONS = {"A": "a red cat", "B": "Dog", "C": "dogs of war"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"), ("(B)", "B"), ("B.", "B"), ("**C**", "C"), ("The answer is [B]:", "B"), ("{C};", "C"), ("a", None),
        ("D", None), ("", None), ("A or B", None), ("A A", "A"), ("#B!", "B"), ("A-B", None),
        ("B one two three", "B"), ("B one two three four", None), ("A man holding a bat.", None), ("A x y z u A", None),
        # no letter that counts: the only option whose text occurs, whatever the case
        ("It is A RED CAT", "A"), ("a dog", "B"), ("the dogs of war", None), ("A or B: a red cat", "A"),
        ("A small one, I think, is the dog", "B"),
    ],
)  # fmt: skip
def test_mmbench(text, letter):
    assert read_mmbench(text, OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"), ("a", "A"), ("(b)", "B"), ("B.", "B"), ("b)", "B"), ("(C", "C"), ("C:", "C"), ("D, since", "D"),
        ("(b) Closed", "B"), ("B. Closed", "B"), ("B\nbecause", "B"), (" B ", "B"), ("E", None), ("", None),
        ("The answer is C", "C"), ("the ANSWER IS: (d).", "D"), ("Answer: A.", "A"), ("A dog", None), ("Bad", None),
        ("Dr. No", None), ("The answer is A. No, the answer is B.", "B"), ("Red", None), ("A.B", None),
    ],
)  # fmt: skip
def test_a_letter_of_either_case(text, letter):
    assert read_letter(text, "ABCD") == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("a", "A"), ("(b) Open", "B"), ("open", "A"), ("Open.", "A"), ("The answer is CLOSED.", "B"), ("", None),
        ("The answer is", None), ("It is open", None), ("c", None), ("answer: (a)", "A"),
    ],
)  # fmt: skip
def test_a_letter_or_else_the_options_text(text, letter):
    assert read_option(text, {"A": "Open", "B": "Closed"}) == letter


def test_options_of_one_text_are_not_told_apart():
    assert read_option("same", {"A": "Same", "B": "same"}) is None


@pytest.mark.parametrize(
    ("text", "character"),
    [
        ("(C)", "c"), ("C", "c"), ("c.", "c"), ("(C) 3", "c"), ("The answer is A", "a"), ("Answer: (B).", "b"),
        ("", ""), (".", ""), ("Cat", "c"), (" B", "b"), ("The answer is: A", ":"), ("3", "3"),
    ],
)  # fmt: skip
def test_cvbench_takes_the_first_character_of_the_tail(text, character):
    assert first_character(text) == character


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"), ("b", "B"), ("(c) x", "C"), ("D. Closed", "D"), ("Option B", "B"), ("the answer is c.", "C"),
        ("\nA", "A"), ("A dog", "A"), ("Both", "B"), ("E", None), ("", None), ("(", None), ("Option", None),
        ("option (b)", None), ("The answer is", None), ("The answer: A", None), ("It is A", None), ("\u0391", None),
    ],
)  # fmt: skip
def test_mmstar_takes_one_of_four_places(text, letter):
    assert read_mmstar(text) == letter


def test_the_tail_follows_the_last_mark():
    assert answer_tail("The answer is a. Answer: b") == " b"
    assert answer_tail("no mark") == "no mark"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("no", "no"), ("No, it is not.", "no"), ("There is not one", "no"), ("NO", "yes"), ("Nope", "yes"),
        ("none", "yes"), ("", "yes"), ("Yes\nNo", "yes"), ("Yes, no doubt", "no"), ("Yes. no", "yes"),
    ],
)  # fmt: skip
def test_answers_are_read_as_pope_reads_them(text, label):
    assert read_yes_no(text) == label


def test_yes_no_scores_by_hand():
    # true yes 2, false yes 1, false no 1, true no 1
    scores = yes_no_scores(["yes", "yes", "yes", "no", "no"], ["yes", "yes", "no", "yes", "no"])
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["precision"] == pytest.approx(2 / 3)
    assert scores["recall"] == pytest.approx(2 / 3)
    assert scores["f1"] == pytest.approx(2 / 3)
    assert scores["yes_rate"] == pytest.approx(3 / 5)
    assert scores["undefined"] == []


def test_yes_no_scores_name_what_is_undefined():
    scores = yes_no_scores(["no", "no"], ["no", "no"])
    assert scores["f1"] == 0.0 and scores["accuracy"] == 1.0
    assert scores["undefined"] == ["precision", "recall", "f1"]
    with pytest.raises(ValueError, match="maybe"):
        yes_no_scores(["no"], ["maybe"])
