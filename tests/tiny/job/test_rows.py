"""The rows as data."""

import pytest

from dynamic_llava.config import SparsityConfig
from dynamic_llava.eval.efficiency import judging_flops
from dynamic_llava.eval.metrics.slots import slots
from dynamic_llava.methods import Dense
from dynamic_llava.model.switches import choose_method
from dynamic_llava.tiny.job.rows import (
    REFERENCE,
    SINKS,
    equal_keep_rows,
    first_rows,
    learned_row,
    other_rate,
    row_keys,
    window_rows,
)


def test_rows_are_distinct_and_hold_the_settings():
    settings = SparsityConfig(sparse_layer=3, image_keep_rate=0.25)
    rows = first_rows(settings) + equal_keep_rows(settings, 0.46789)
    assert len({row.key for row in rows}) == len(rows) == len({row.title for row in rows})
    methods = {row.key: row.switches["method"] for row in rows if "method" in row.switches}
    assert {method.cuts(6)[0].layer for method in methods.values()} == {3}
    assert methods["fastv"].image_keep_rate == methods["random_image"].image_keep_rate == 0.25
    assert methods["inside_random"].image_by.image_keep_rate == 0.25
    assert methods["no_image"].image_keep_rate == 0
    for key in ("random_output", "alternate_output"):
        assert methods[key].output_keep_rate == 0.4679 and methods[key].image_keep_rate is None
    for key in ("inside_random", "inside_alternate"):
        assert methods[key].output_by.output_keep_rate == 0.4679
    assert methods["inside_topk"].output_keep_rate == 0.4679


def test_learned_rows_are_those_where_the_image_predictor_runs():
    settings = SparsityConfig()
    rows = first_rows(settings) + equal_keep_rows(settings, 0.5)
    learned = {row.key for row in rows if judging_flops(settings, 64, 16, choose_method(settings, **row.switches))}
    assert learned == {
        "dynamic_image", REFERENCE, "uncached", "inside_random", "inside_alternate", "inside_topk",
    }  # fmt: skip
    assert not any(isinstance(row.switches.get("method"), Dense) for row in rows)


def test_rows_of_models_that_were_not_trained_are_left_out():
    keys = {row.key for row in first_rows(SparsityConfig(), dynamic_image=False, uncached=False)}
    assert "dynamic_image" not in keys and "uncached" not in keys and REFERENCE in keys


def test_windows_show_as_much_as_the_learned_selection():
    settings, lengths = SparsityConfig(sparse_layer=3), [40, 60]
    rows = {row.key: row for row in window_rows(settings, lengths, 0.5)}
    assert [*rows] == ["sinks_output", "recent_output", "inside_sinks", "inside_recent"]
    free, recent = (rows[key].switches["method"] for key in ("sinks_output", "recent_output"))
    assert (free.layer, free.image_keep_rate, free.output_keep_rate, free.output_sinks) == (3, None, 0, SINKS)
    kept = [[place < SINKS for place in range(length)] for length in lengths]
    assert slots(kept, free.output_window - 1) < 0.5 <= slots(kept, free.output_window)
    assert recent.output_window == free.output_window // 2 and recent.output_sinks == 0
    seen = slots([[False] * length for length in lengths], recent.output_window)
    assert seen + recent.output_keep_rate * (1 - seen) == pytest.approx(0.5, abs=1e-4)
    for key in ("sinks", "recent"):
        inside = rows[f"inside_{key}"].switches["method"]
        assert inside.output_by == rows[f"{key}_output"].switches["method"] and inside.image_by.name == "dynamic"
        assert (rows[f"inside_{key}"].answers_of, rows[f"{key}_output"].answers_of) == (REFERENCE, "control")
    assert f"the last {free.output_window}; 50.0 % of past outputs seen" in rows["sinks_output"].note


def test_a_model_of_another_rate_has_rows_inside_it_alone():
    rows = window_rows(SparsityConfig(), [30], 0.35, rate=0.35)
    assert [(row.key, row.model, row.answers_of) for row in rows] == [
        ("inside_sinks_35", "both_35", "dynamic_35"), ("inside_recent_35", "both_35", "dynamic_35"),
    ]  # fmt: skip
    learned = learned_row(0.35)
    assert (learned.key, learned.model, learned.title) == ("dynamic_35", "both_35", "Dynamic I|T, r_OT 0.35")
    assert [other_rate(rate) for rate in (0.2, 0.29, 0.125)] == ["_20", "_29", "_12.5"]


def test_the_keys_of_all_rows_are_known_before_anything_is_measured():
    settings = SparsityConfig()
    keys = row_keys(settings, [0.35, 0.2], dynamic_image=False, uncached=True)
    assert len(keys) == len({*keys}) and "dynamic_image" not in keys and "uncached" in keys
    assert {"dynamic_35", "inside_sinks_20", "inside_recent", "sinks_output", "inside_topk"} <= {*keys}
