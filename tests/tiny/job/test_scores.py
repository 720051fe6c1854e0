"""Scores, perplexity, and means with their intervals, against cases computed by hand."""

import math

import pytest
import torch

from dynamic_llava.tiny.job.asking import answer_nll, perplexity
from dynamic_llava.tiny.job.scores import accuracy_by_kind, normalise_answer, patch_overlap
from dynamic_llava.tiny.job.tables import mean_and_interval, student_t_probability, student_t_quantile


def test_answers_are_compared_without_case_stop_and_spaces():
    assert normalise_answer("  Blue .\n") == "blue"
    assert normalise_answer("dark  blue. And more") == "dark blue"


def test_accuracy_by_kind_weights_questions_not_kinds():
    scores = accuracy_by_kind(["red", "Two.", "blue", "one"], ["red", "two", "green", "two"], ["b", "a", "b", "b"])
    assert scores == {"a": 1.0, "b": pytest.approx(1 / 3), "all": 0.5}
    assert list(scores) == ["a", "b", "all"]


def test_accuracy_refuses_unequal_lengths_and_nothing():
    with pytest.raises(ValueError, match="1 answers, 2 truths"):
        accuracy_by_kind(["a"], ["a", "b"], ["k", "k"])
    with pytest.raises(ValueError, match="at least one"):
        accuracy_by_kind([], [], [])


def test_overlap_by_hand():
    # image 0: objects {0,1} and {5}; kept {1, 2, 3}. image 1: object {4}; kept {4}.
    scores = patch_overlap([[1, 2, 3], [4]], [[[0, 1], [5]], [[4]]], patches=8)
    assert scores["precision"] == pytest.approx(2 / 4)
    assert scores["recall"] == pytest.approx(2 / 4)
    assert scores["iou"] == pytest.approx(2 / 6)
    assert scores["objects_hit"] == pytest.approx(2 / 3)
    assert scores["object_share"] == pytest.approx(4 / 16)
    assert scores["kept_share"] == pytest.approx(4 / 16)


def test_overlap_refuses_worlds_without_objects():
    with pytest.raises(ValueError, match="no image has"):
        patch_overlap([[0]], [[]], patches=4)


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227)]
)
def test_student_t_quantiles_of_the_tables(degrees, quantile):
    assert student_t_quantile(0.95, degrees) == pytest.approx(quantile, rel=1e-5)
    assert student_t_probability(quantile, degrees) == pytest.approx(0.95, abs=1e-5)


def test_interval_of_five_seeds_by_hand():
    mean, half = mean_and_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.77645 * math.sqrt(2.5 / 5), rel=1e-5)
    assert mean_and_interval([7.0]) == (7.0, None)
    with pytest.raises(ValueError, match="at least one"):
        mean_and_interval([])


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
