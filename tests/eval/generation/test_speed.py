"""Perplexity in one pass is many times faster than the cached loop; the committed measurement says how many."""

import json

import pytest

from dynamic_llava.eval.generation.speed import measure_ppl_speed, write_speed
from tests.test_architecture import ROOT

TIMES = 8


@pytest.mark.slow
def test_one_pass_is_at_least_eight_times_faster_and_equal(tmp_path):
    found = measure_ppl_speed(repeats=3)
    assert found.difference < 1e-4
    assert found.ratio >= TIMES, found.describe()
    written = json.loads(write_speed(found, tmp_path / "speed.json").read_text())
    assert written["ratio"] == found.ratio and written["environment"]["torch"]


def test_the_committed_measurement():
    written = json.loads((ROOT / "docs" / "results" / "ppl_speed.json").read_text())
    sizes = {"hidden": 256, "layers": 8, "image_tokens": 576, "answer_tokens": 256, "batch": 1}
    assert written["sizes"].items() >= sizes.items() and written["device"] == "cpu"
    assert written["ratio"] == pytest.approx(written["loop_s"] / written["one_pass_s"]) and written["ratio"] >= TIMES
    assert abs(written["perplexity"] / written["loop_perplexity"] - 1) < 1e-4
    assert {"seed", "date", "environment"} <= set(written)


def test_no_repeats_is_refused():
    with pytest.raises(ValueError, match="repeats=0 is not possible"):
        measure_ppl_speed(repeats=0)
