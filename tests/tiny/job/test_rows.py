"""The rows as data."""

from dynamic_llava.config import SparsityConfig
from dynamic_llava.eval.efficiency import judging_flops
from dynamic_llava.methods import Dense
from dynamic_llava.model.switches import choose_method
from dynamic_llava.tiny.job.rows import REFERENCE, equal_keep_rows, first_rows


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
