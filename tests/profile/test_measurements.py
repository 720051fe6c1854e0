"""Times and their sums: clocks, turns, limits, totals, both forms of a report, failures, what goals follow from."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dynamic_llava.config import TrainConfig
from dynamic_llava.costs import predictor_costs, training_flops
from dynamic_llava.profile import checks, training
from dynamic_llava.profile.latency import (
    EAGER,
    Bench,
    Effort,
    Variant,
    failures,
    generate_rows,
    latency_report,
    prefill_rows,
    step_rows,
    total_rows,
    uncached_rows,
    vision_rows,
)
from dynamic_llava.profile.measuring import (
    DeviceLimits,
    Peak,
    Timing,
    measure_limits,
    peak_memory,
    seconds_of,
    summary,
    time_in_turn,
    with_limit,
)
from dynamic_llava.profile.presets import PRESETS, Preset, small_shape
from dynamic_llava.profile.results import Column, Report, measured_on
from dynamic_llava.profile.summary import GOALS, GPU_GOALS, Goal, goals_report, slug, unmeasured_page
from dynamic_llava.profile.training import training_report

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SHAPE = small_shape(64, 4, 256)
SMALL = Preset(
    "small", replace(SHAPE, vision=replace(SHAPE.vision, patches=64), tokens_per_image=64), 2, (8, 20), "tiny", text=9
)


def test_ways_take_turns_and_warm_up_first():
    calls = []
    times = time_in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, 3, calls=2, warmup=1)
    assert "".join(calls) == "ab" + "aabb" * 3
    assert times["a"].calls == 6 and times["a"].low <= times["a"].median <= times["a"].high
    with pytest.raises(ValueError, match="rounds=0"):
        time_in_turn({}, CPU, 0)


def test_the_clock_and_its_summary():
    assert 0.02 <= seconds_of(lambda: time.sleep(0.02), CPU) < 0.2
    found = summary([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.low, found.median, found.high) == (2.0, 3.0, 4.0) and found.spread == pytest.approx(2 / 3)
    assert summary([5.0]).median == 5.0


def test_peak_memory_counts_what_is_held_and_what_passes_but_not_the_preparation():
    held = torch.zeros(1000)

    def prepare():
        torch.zeros(10**6)
        return torch.ones(500)

    peak = peak_memory(prepare, lambda kept: (kept + 1) * 2, CPU, [held, held[:10]])
    assert peak.bytes == 4 * (1000 + 500 + 500 + 500)


def test_limits_are_the_slower_of_bytes_and_flops():
    limits = DeviceLimits(bytes_per_second=10.0, flops_per_second=100.0)
    row = with_limit({"bytes": 20, "flops": 50, "seconds": 4.0}, limits)
    assert (row["limit"], row["bound"], row["share"]) == (2.0, "bytes", 0.5)
    assert with_limit({"bytes": 20, "flops": 500, "seconds": 10.0}, limits)["bound"] == "FLOPs"
    measured = measure_limits(CPU, torch.float32, rounds=1)
    assert 1e8 < measured.bytes_per_second < 1e13 and 1e9 < measured.flops_per_second < 1e16


def test_totals_are_the_integral_of_the_steps():
    def row(phase, way, outputs, seconds, engine="eager"):
        return {"phase": phase, "way": way, "engine": engine, "outputs": outputs, "seconds": seconds}

    rows = [row("vision", "all", 0, 0.5), row("prefill", "both", 0, 1.0), row("prefill", "dense", 0, 3.0)]
    rows += [row("step", "both", outputs, seconds) for outputs, seconds in ((0, 1.0), (8, 2.0), (20, 4.0))]
    rows += [row("step", "dense", 0, 2.0), row("step", "dense", 8, None), row("step", "dense", 20, 2.0)]
    totals = {(each["way"], each["outputs"]): each for each in total_rows(SMALL, rows)}
    assert set(totals) == {("both", 8), ("both", 20)}, "a way with a gap has no total"
    assert totals["both", 8]["seconds"] == 0.5 + 1.0 + 8 * 1.5
    assert totals["both", 20]["seconds"] == 0.5 + 1.0 + 8 * 1.5 + 12 * 3.0
    assert totals["both", 20]["tokens_per_second"] == pytest.approx(2 * 20 / 49.5)


def test_every_phase_has_a_row_with_its_work():
    bench = Bench(SMALL, CPU, torch.float32, Effort(rounds=1, step_rounds=2))
    rows = [*vision_rows(bench), *prefill_rows(bench), *step_rows(bench, EAGER, (0, 8, 20))]
    rows += uncached_rows(bench, (0, 8, 20))
    assert [row["phase"] for row in rows].count("step") == 9 and len(rows) == 1 + 2 + 9 + 6
    for row in rows:
        assert row["seconds"] > 0 and row["flops"] > 0 and row["bytes"] > 0 and row["calls"] >= 1
    work = {(row["phase"], row["way"], row["outputs"]): row for row in rows}
    assert work["step", "both", 20]["bytes"] > work["step", "both", 0]["bytes"]
    dense, image = (work["step", way, 20]["bytes"] for way in ("dense", "image"))
    assert dense - image == 2 * (64 - 12) * 2 * 2 * 64 * 4, "rows x dropped x layers x (keys, values) x width x bytes"
    report = latency_report(SMALL, rows)
    assert report.table().count("total without cache") == 4 and "total" in report.markdown()
    limited = latency_report(SMALL, rows, DeviceLimits(1e10, 1e11))
    assert sum("limit" in row for row in limited.rows) == len(rows) and "10.0 GB/s" in limited.table()


def test_the_table_and_the_lines_say_the_same():
    columns = [Column("name", "name"), Column("seconds", "ms", ".1f", 1e3), Column("note", "")]
    report = Report("latency", "T", columns, [{"name": "a", "seconds": 0.25}, {"name": "b", "note": "gone"}], ["n"])
    assert report.table().split("\n") == ["T", "", "name     ms", "a     250.0", "b            gone", "  n"]
    assert "| a | 250.0 |  |" in report.markdown()
    first, second = map(json.loads, report.lines(measured_on(CPU)))
    assert first["seconds"] == 0.25 and second["note"] == "gone" and first["report"] == "latency"
    for key in ("device", "torch", "transformers", "python", "commit", "date"):
        assert first[key]
    assert measured_on(None)["device"] == "none (calculated)"


def test_what_was_not_measured_says_so():
    goals = (Goal("a", "first", 1.0), Goal("b", "second", 0.5, at_most=False), Goal("c", "third", 2.0))
    rows = goals_report(goals, {"a": 1.0, "b": 0.4}).rows
    assert [row["met"] for row in rows] == ["yes", "no", None]
    assert rows[2]["measured"] == "not measured" and rows[1]["bound"] == "at least 0.500"
    page = ROOT / "docs/results/benchmark_nvidia-h200.md"
    if not page.with_suffix(".json").exists():
        assert page.read_text() == unmeasured_page(), "run `profile summary FOLDER --publish docs/results` again"
    assert unmeasured_page().count("| not measured |") == len(GPU_GOALS)
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_a_way_that_fails_is_named_and_the_others_are_measured(monkeypatch, caplog):
    """One after the other, as on an accelerator; where they take turns the failure is everybody's."""
    alone = Bench(SMALL, CPU, torch.float32, Effort(rounds=1, step_rounds=2, by_turns=False))

    def fails(*given, **switches):
        raise torch.OutOfMemoryError("full") if given[2] == "image" else RuntimeError("no kernel\nfor this")

    monkeypatch.setattr("dynamic_llava.profile.latency.sparse_decoding", fails)
    rows = list(step_rows(alone, EAGER, (8,)))
    dense, image, both = rows
    assert dense["seconds"] > 0 and dense["ready"] > 0
    assert image["note"] == "out of memory" and both["note"] == "failed"
    assert failures(rows) == ["step, both, eager: RuntimeError: no kernel"] and "no kernel" in caplog.text
    alone.effort = Effort(rounds=1, step_rounds=2)
    with pytest.raises(torch.OutOfMemoryError):
        list(step_rows(alone, EAGER, (8,)))


def test_tokens_of_generate_are_timed_and_nothing_ends_them():
    bench = Bench(SMALL, CPU, torch.float32, Effort(by_turns=False))
    rows = list(generate_rows(bench, (Variant("both"), Variant("dense"), Variant("dense", True)), 5))
    assert not failures(rows) and [row["calls"] for row in rows] == [5, 5, 5]
    assert [row["engine"] for row in rows] == ["eager", "DynamicCache", "StaticCache, transformers' own compilation"]
    assert all(row["tokens_per_second"] > 0 and row["phase"] == "generate" for row in rows)


def test_numbers_of_the_goals_follow_from_rows():
    """Both dense baselines count: what is held against "dense" is held against the faster one."""

    def row(way, engine, seconds, moved=1.0, phase="step", outputs=1024, flops=1.0):
        return {
            "phase": phase,
            "way": way,
            "engine": engine,
            "outputs": outputs,
            "seconds": seconds,
            "bytes": moved,
            "flops": flops,
        }

    eight = PRESETS["7b-b8"]
    rows = [
        row("both", "compiled", 4e-3, 4.8e12 * 2e-3),
        row("dense", "StaticCache, compiled", 8e-3, 4.8e12 * 5e-3),
        row("both", "eager", 6e-3),
        row("image", "eager", 12e-3),
        row("both", "compiled", None, outputs=2048),
    ]
    found = checks.step_values(eight, rows, "NVIDIA H200")
    assert found == {
        "step_7b-b8_1024_both_over_image": pytest.approx(0.5),
        "step_7b-b8_1024_compiled_over_static": pytest.approx(0.5),
        "step_7b-b8_1024_bandwidth": pytest.approx(0.5),
        "step_7b-b8_1024_ms": pytest.approx(4.0),
    }
    for dynamic, best in ((10e-3, 8e-3), (5e-3, 5e-3)):
        both = [*rows, row("dense", "DynamicCache", dynamic, 4.8e12 * 5e-3)]
        found = checks.step_values(eight, both, "NVIDIA H200")
        assert found["step_7b-b8_1024_both_over_dense"] == pytest.approx(4e-3 / best)
        assert found["step_7b-b8_1024_speedup"] == pytest.approx(best / 4e-3 / 2.5)
        assert found["step_7b-b8_1024_eager_over_dynamic"] == pytest.approx(6e-3 / dynamic)
    prefills = [
        row("dense", "eager", 1e-3, phase="prefill", flops=989e12 * 0.5e-3),
        row("both", "eager", None, phase="prefill"),
    ]
    assert checks.prefill_values(eight, prefills, "NVIDIA H200") == {"prefill_7b-b8_dense_mfu": pytest.approx(0.5)}
    prefills[1] = row("both", "eager", 0.5e-3, phase="prefill", flops=989e12 * 0.2e-3)
    assert checks.prefill_values(eight, prefills, "a device nobody knows") == {
        "prefill_7b-b8_over_flops": pytest.approx(0.5 / 0.4)
    }


def test_goals_are_for_numbers_that_a_set_can_give():
    for goals in GOALS.values():
        keys = [goal.key for goal in goals]
        assert len(set(keys)) == len(keys) and all(math.isfinite(goal.bound) for goal in goals)


def test_generated_bytes_follow_the_longest_row():
    preset = replace(SMALL, outputs=(10, 70))
    found = checks.generated_bytes(preset, CPU, torch.float32)
    assert set(found) == {"cache_bytes_10", "cache_bytes_70"}
    assert all(1.0 <= ratio <= 1.02 for ratio in found.values())


@torch.enable_grad()
def test_a_training_step_and_its_mfu():
    report = training_report(SMALL, CPU, torch.float32, peak=1e11, rounds=1)
    row = report.rows[0]
    learned = predictor_costs(SMALL.shape.decoder.hidden, SMALL.sparsity)
    flops = training_flops(SMALL.shape, SMALL.sparsity, learned, TrainConfig())
    tokens = 64 + 9 + 448
    assert (row["layers"], row["tokens"], row["batch"]) == (4, tokens, 2)
    assert row["flops"] == flops.of_batch(2, tokens, 2, 2 * 448, 2 * 448)
    assert row["share"] == pytest.approx(row["flops"] / row["seconds"] / 1e11)
    assert "layers" not in report.notes[-1], "the whole stack fitted"
    # Calculated: gradients and activations at once. Measured: they peak one after the other.
    assert 1.0 < row["memory_calculated"] / row["memory"] < 1.25


def test_a_training_step_that_does_not_fit_runs_fewer_layers(monkeypatch):
    tried = []

    def step(preset, device, dtype, rounds):
        tried.append(preset.shape.decoder.layers)
        if len(tried) < 3:
            raise torch.OutOfMemoryError("full")
        return Timing(2.0, 2.0, 2.0, 1, 2.0), Peak(2**30, "told")

    monkeypatch.setattr(training, "_measured_step", step)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    report = training_report(PRESETS["7b-b8"], CPU, torch.float32, peak=1e11)
    assert tried == [32, 16, 8] and report.rows[0]["layers"] == 8
    assert report.notes[-1].startswith("8 of 32 layers")
    monkeypatch.setattr(
        training, "_measured_step", lambda *given: (_ for _ in ()).throw(torch.OutOfMemoryError("full"))
    )
    with pytest.raises(torch.OutOfMemoryError):
        training_report(PRESETS["7b-b8"], CPU, torch.float32, peak=1e11)
