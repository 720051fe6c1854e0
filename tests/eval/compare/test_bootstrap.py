"""Tallies are the scores they are made of, on any sample; intervals are those of the samples, paired."""

import random

import numpy as np
import pytest

from dynamic_llava.eval.compare.bootstrap import paired_intervals
from dynamic_llava.eval.metrics.choices import yes_no_scores
from dynamic_llava.eval.metrics.tally import tally_of_means
from dynamic_llava.eval.tasks import TASKS, get_task
from dynamic_llava.eval.tasks.base import Score
from tests.eval.task_data import TASK_DATA

JUDGED = {"llava_bench", "mmvet"}
"""Tasks whose score is a judge's."""


def mixed_texts(made, seed):
    """Return answers of which about half are right."""
    draw = random.Random(seed)
    return [text if draw.random() < 0.5 else "no" for text in made.right]


@pytest.mark.parametrize("name", sorted(set(TASKS) & set(TASK_DATA) - JUDGED))
def test_the_tally_of_all_answers_is_the_score(tmp_path, name):
    """Of the number in tables, for every benchmark that has one here; and no file of results holds it."""
    made = TASK_DATA[name](tmp_path)
    task = get_task(made.task)
    for seed in range(4):
        score = task.score(made.answers(tmp_path, texts=mixed_texts(made, seed)), tmp_path)
        assert score.table_metric in score.tallies and isinstance(score, Score)
        for metric, tally in score.tallies.items():
            rounding = 0.005 if name == "vqav2" else 1e-9  # the server rounds
            assert float(tally.value(np.ones(len(tally.names)))) == pytest.approx(
                score.metrics[metric].value, abs=rounding
            )
            assert len(set(tally.names)) == len(tally.names) == len(tally.groups) == len(tally.numbers)
        assert "tallies" not in score.to_json()


def test_pope_is_recomputed_of_a_sample(tmp_path):
    """F1 is no mean: by POPE's own function on the answers as often as they were drawn; a category may be missing."""
    made = TASK_DATA["pope"](tmp_path)
    texts = mixed_texts(made, 3)
    tally = get_task("pope").score(made.answers(tmp_path, texts=texts), tmp_path).tallies["mean_f1"]
    labels = ["yes", "no", "yes", "no"] * 3
    asked = [question.extra for question in get_task("pope").questions(tmp_path)]
    assert len(asked) == len(tally.names)
    draw = np.random.default_rng(0)
    for weights in (draw.integers(0, 4, 12), np.r_[0, 0, 0, 0, draw.integers(1, 4, 8)]):
        means = []
        for start in range(0, 12, 4):
            places = [place for place in range(start, start + 4) for _ in range(weights[place])]
            if places:
                means.append(yes_no_scores([texts[i] for i in places], [labels[i] for i in places])["f1"])
        assert float(tally.value(weights)) == pytest.approx(100 * sum(means) / len(means))


def test_mme_is_recomputed_of_a_sample(tmp_path):
    """A category is worth its accuracy and that over images; an image that is drawn twice counts twice."""
    made = TASK_DATA["mme"](tmp_path)
    texts = ["Yes", "No", "Yes", "Yes", "No", "Yes"]
    tally = get_task("mme").score(made.answers(tmp_path, texts=texts), tmp_path).tallies["perception"]
    assert tally.unit == "images" and set(tally.groups) == {"existence", "artwork"}
    assert float(tally.value(np.array([1, 1]))) == 200.0
    assert float(tally.value(np.array([2, 0]))) == 200.0 and float(tally.value(np.array([0, 2]))) == 0.0


def test_intervals_of_a_mean_are_those_of_its_paired_differences():
    draw = np.random.default_rng(5)
    one, two = draw.random(40), draw.random(40)
    (found,) = paired_intervals(tally_of_means(one), [tally_of_means(two)], name="toy")
    samples = np.random.default_rng(6).integers(0, 40, (40_000, 40))
    expected = np.quantile((two - one)[samples].mean(1), (0.025, 0.975))
    assert np.allclose(found, expected, atol=0.01)
    assert found[0] < (two - one).mean() < found[1]


def test_equal_scores_differ_by_nothing_and_constant_differences_by_themselves():
    values = np.random.default_rng(1).random(30)
    same, more = paired_intervals(
        tally_of_means(values), [tally_of_means(values.copy()), tally_of_means(values + 0.5)], name="toy"
    )
    assert same == (0.0, 0.0)
    assert more == pytest.approx((0.5, 0.5))


def test_neither_order_nor_company_nor_chunks_change_an_interval(monkeypatch):
    draw = np.random.default_rng(2)
    base, one, two = (tally_of_means(draw.random(25)) for _ in range(3))
    both = paired_intervals(base, [one, two], name="toy")
    assert paired_intervals(base, [two, one], name="toy") == both[::-1]
    assert paired_intervals(base, [one], name="toy") == both[:1]
    monkeypatch.setattr("dynamic_llava.eval.compare.bootstrap._AT_ONCE", 1000)
    assert paired_intervals(base, [one, two], name="toy") == both
    assert paired_intervals(base, [one], name="other") != both[:1]
    assert paired_intervals(base, [one], name="toy", seed=1) != both[:1]


def test_other_units_are_not_paired():
    base, other = tally_of_means({"a": 1.0, "b": 0.0}), tally_of_means({"a": 1.0, "c": 0.0})
    assert paired_intervals(base, [other, base], name="toy") == [None, (0.0, 0.0)]
