"""Metrics against cases computed by hand."""

import pytest

from dynamic_llava.eval.metrics.yes_no import read_yes_no, yes_no_scores


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
