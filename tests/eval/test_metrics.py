"""Metrics against cases computed by hand."""

import math

import pytest
import torch

from dynamic_llava.eval.metrics.perplexity import answer_nll, perplexity
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


def test_answer_nll_counts_labelled_tokens_only():
    logits = torch.zeros(2, 4, 3)
    logits[0, 1, 2] = math.log(2.0)  # p(2) = 2 / 4 at position 1
    labels = torch.tensor([[-100, -100, 2, 0], [-100, -100, -100, 1]])
    nll, count = answer_nll(logits, labels)
    assert count.tolist() == [2, 1]
    assert nll[0].item() == pytest.approx(math.log(2) + math.log(3), rel=1e-6)
    assert nll[1].item() == pytest.approx(math.log(3), rel=1e-6)
    assert perplexity(nll.sum().item(), 3) == pytest.approx((2 * 9) ** (1 / 3), rel=1e-6)


def test_perplexity_errors():
    with pytest.raises(ValueError, match="0 tokens"):
        perplexity(0.0, 0)
    with pytest.raises(ValueError, match="do not belong"):
        answer_nll(torch.zeros(1, 3, 2), torch.zeros(1, 4, dtype=torch.long))
