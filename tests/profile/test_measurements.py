"""Times and their sums: clocks, turns, limits, totals, the report's two forms, and what a set leaves out."""

import json
import logging
import math
import time
from dataclasses import replace

import pytest
import torch

from dynamic_llava.config import TrainConfig
from dynamic_llava.costs import training_flops
from dynamic_llava.profile import checks, training_speed
from dynamic_llava.profile.benchmark import CPU_MINUTES
from dynamic_llava.profile.cpu_set import cpu_parts
from dynamic_llava.profile.device_memory import Peak, peak_memory
from dynamic_llava.profile.goals import CPU_GOALS, GPU_GOALS, Goal, goals_report
from dynamic_llava.profile.gpu_set import gpu_parts, gpu_values
from dynamic_llava.profile.latency import (
    EAGER,
    Bench,
    Effort,
    latency_report,
    prefill_rows,
    step_rows,
    total_rows,
    uncached_rows,
    vision_rows,
)
from dynamic_llava.profile.measurement_set import Found, Part, run_set
from dynamic_llava.profile.page import slug, write_benchmark, write_unmeasured
from dynamic_llava.profile.presets import PRESETS, Preset, small_shape
from dynamic_llava.profile.report import Column, Report, measured_on
from dynamic_llava.profile.roofline import DeviceLimits, measure_limits, roofline_report, with_limit
from dynamic_llava.profile.timing import Timing, seconds_of, summary, time_in_turn
from dynamic_llava.profile.training_speed import training_report

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
    limits = DeviceLimits(bytes_per_second=10.0, flops_per_second=100.0, device="d")
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
    rows = vision_rows(bench) + prefill_rows(bench) + step_rows(bench, EAGER, (0, 8, 20))
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
    limits = DeviceLimits(1e10, 1e11, "cpu")
    limited = roofline_report("small", rows, limits)
    assert len(limited.rows) == len(rows) and "10.0 GB/s" in limited.notes[0]


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


def test_what_was_not_measured_says_so(tmp_path):
    goals = (Goal("a", "first", 1.0), Goal("b", "second", 0.5, at_most=False), Goal("c", "third", 2.0))
    rows = goals_report(goals, {"a": 1.0, "b": 0.4}).rows
    assert [row["met"] for row in rows] == ["yes", "no", None]
    assert rows[2]["measured"] == "not measured" and rows[1]["bound"] == "at least 0.500"
    page = write_unmeasured(tmp_path)
    text = page.read_text()
    assert page.name == "benchmark_nvidia-h200.md" and text.count("| not measured |") == len(GPU_GOALS)
    page.with_suffix(".json").write_text("{}")
    assert write_unmeasured(tmp_path) is None, "a measured page stays"
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_a_set_leaves_out_what_has_no_time_or_memory(tmp_path, caplog):
    def hungry(found):
        raise torch.OutOfMemoryError("tried to allocate\nmuch")

    def quick(found):
        found.values["cache_bytes_256"] = 1.01

    found = Found(CPU, torch.float32)
    with caplog.at_level(logging.INFO, logger="dynamic_llava.profile"):
        run_set(found, [Part("hungry", 0, hungry), Part("long", 9, quick), Part("quick", 0.1, quick)], minutes=1)
    assert found.values == {"cache_bytes_256": 1.01}
    assert found.left_out == [
        "hungry: out of memory (tried to allocate)",
        "long: 1.0 minutes were left, 9 are needed",
    ]
    page, data = write_benchmark(found, CPU_GOALS, tmp_path, "bash x.sh")
    text, content = page.read_text(), json.loads(data.read_text())
    assert "Left out: long" in text and "1.010 | yes" in text and "Table 10" in text and "bash x.sh" in text
    assert content["values"] == found.values and content["about"]["commit"]
    reports = {row["report"] for row in content["rows"]}
    assert {"goals", "flops", "tokens", "paper", "memory", "curve"} <= reports


def test_numbers_of_the_gpu_goals_follow_from_rows():
    def row(way, engine, seconds, moved, phase="step", outputs=1024, flops=1.0):
        return {
            "phase": phase,
            "way": way,
            "engine": engine,
            "outputs": outputs,
            "seconds": seconds,
            "bytes": moved,
            "flops": flops,
        }

    rows = [
        row("both", "compiled", 4e-3, 4.8e12 * 2e-3),
        row("dense", "StaticCache, compiled", 8e-3, 4.8e12 * 5e-3),
        row("both", "eager", 1.0, 1.0),
        row("dense", "eager", 1e-3, 1.0, phase="prefill", outputs=0, flops=989e12 * 0.5e-3),
        row("both", "eager", None, 1.0, phase="prefill", outputs=0),
    ]
    found = gpu_values(PRESETS["7b-b8"], rows, "NVIDIA H200")
    assert found == {
        "prefill_7b-b8_dense_mfu": pytest.approx(0.5),
        "decode_7b-b8_bandwidth": pytest.approx(0.5),
        "decode_7b-b8_ms": pytest.approx(4.0),
        "decode_7b-b8_speedup": pytest.approx(2 / 2.5),
    }
    assert gpu_values(PRESETS["7b-b8"], rows, "a device nobody knows") == {}


def test_sets_fit_their_minutes_and_name_every_goal():
    for parts, minutes in ((cpu_parts(), CPU_MINUTES), (gpu_parts(), 12.0)):
        assert sum(part.minutes for part in parts) <= minutes and len({part.name for part in parts}) == len(parts)
    keys = [goal.key for goal in (*CPU_GOALS, *GPU_GOALS)]
    assert all(math.isfinite(goal.bound) for goal in (*CPU_GOALS, *GPU_GOALS)) and len(set(keys)) >= len(keys) - 2


def test_generated_bytes_follow_the_longest_row():
    preset = replace(SMALL, outputs=(10, 70))
    found = checks.generated_bytes(preset, CPU, torch.float32)
    assert set(found) == {"cache_bytes_10", "cache_bytes_70"}
    assert all(1.0 <= ratio <= 1.02 for ratio in found.values())


@torch.enable_grad()
def test_a_training_step_and_its_mfu():
    report = training_report(SMALL, CPU, torch.float32, peak=1e11, rounds=1)
    row = report.rows[0]
    flops = training_flops(SMALL.shape, SMALL.sparsity, TrainConfig())
    tokens = 64 + 9 + 448
    assert (row["layers"], row["tokens"], row["batch"]) == (4, tokens, 2)
    assert row["flops"] == flops.of_batch(2, tokens, 2, 2 * 448)
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
        return Timing(2.0, 2.0, 2.0, 1), Peak(2**30, "told")

    monkeypatch.setattr(training_speed, "_measured_step", step)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    report = training_report(PRESETS["7b-b8"], CPU, torch.float32, peak=1e11)
    assert tried == [32, 16, 8] and report.rows[0]["layers"] == 8
    assert report.notes[-1].startswith("8 of 32 layers")
    monkeypatch.setattr(
        training_speed, "_measured_step", lambda *given: (_ for _ in ()).throw(torch.OutOfMemoryError("full"))
    )
    with pytest.raises(torch.OutOfMemoryError):
        training_report(PRESETS["7b-b8"], CPU, torch.float32, peak=1e11)
