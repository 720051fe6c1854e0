"""The comparison of selections over budgets: its table, its mean, and one real run on tiny models."""

import pytest

from dynamic_llava.tiny.job.measure import (
    ATTENTION,
    CHANCE,
    DENSE,
    LEARNED,
    accuracy_by_budget,
    budget_table,
    mean_by_budget,
)
from dynamic_llava.viz.curves import draw_budget_curves
from tests.tiny_pipeline import write_checkpoint, write_test_set

SEEDS = [
    {DENSE: {0.5: 1.0, 0.1: 1.0}, LEARNED: {0.5: 0.9, 0.1: 0.7}},
    {DENSE: {0.5: 1.0, 0.1: 1.0}, LEARNED: {0.5: 0.8, 0.1: 0.5}},
]


def test_table_counts_tokens_and_gives_intervals():
    table = budget_table(SEEDS, 64).splitlines()
    assert table[0] == "| row | 6 of 64 | 32 of 64 |"
    assert table[2] == "| dense control | 100.0 ± 0.0 | 100.0 ± 0.0 |"
    # two values 70 and 50: standard error 10, t-quantile of one degree of freedom 12.706
    assert table[3] == "| Dynamic I\\|T | 60.0 ± 127.1 | 85.0 ± 63.5 |"


def test_mean_over_seeds():
    assert mean_by_budget(SEEDS)[LEARNED] == pytest.approx({0.5: 0.85, 0.1: 0.6})


def test_curves_are_drawn_and_nothing_is_refused(tmp_path):
    assert draw_budget_curves(tmp_path / "budgets.png", mean_by_budget(SEEDS), 0.2).stat().st_size > 1000
    with pytest.raises(ValueError, match="no lines"):
        draw_budget_curves(tmp_path / "none.png", {}, 0.2)


def test_every_line_is_measured_at_every_rate(tmp_path):
    folder = write_checkpoint(tmp_path / "model", seed=0)
    test = write_test_set(tmp_path, images=2)
    said = []
    found = accuracy_by_budget(
        {"control": folder, "both": folder}, test, (0.1, 1.0), batch_size=3, max_new_tokens=2, say=said.append,
        method={"name": "structure", "output_keep_rate": "none"},
    )  # fmt: skip
    assert list(found) == [DENSE, LEARNED, ATTENTION, CHANCE, "control + structure"] and len(said) == 9
    assert found["control + structure"][1.0] == found[DENSE][1.0]
    for method, message in (("dense", "means nothing to method 'dense'"), ("dynamic", "learns something")):
        with pytest.raises(ValueError, match=message):
            accuracy_by_budget({"control": folder, "both": folder}, test, (0.1,), method={"name": method})
    assert all(list(line) == [0.1, 1.0] for line in found.values())
    # With every image token kept, attention and chance select nothing: the dense answers.
    assert found[ATTENTION][1.0] == found[CHANCE][1.0] == found[DENSE][1.0]
