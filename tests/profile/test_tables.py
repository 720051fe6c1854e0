"""The paper's tables, recomputed: every value, and the misprints by name."""

from itertools import pairwise

import pytest

from dynamic_llava.profile.presets import PRESETS, Preset, find_preset, small_shape
from dynamic_llava.profile.tables import (
    curve_report,
    decoding_report,
    paper_report,
    prefill_report,
    tokens_report,
    uncached_limit,
)

# Method, model: Eq. 13, exact, exact causal (TFLOP), average tokens per layer.
TABLE_10 = {
    ("LLaVA-1.5", "7B"): (10.0696, 7.6343, 7.5475, 576),
    ("PruMerge+", "7B"): (2.5194, 1.9022, 1.8966, 146),
    ("FastV", "7B"): (3.1958, 2.4158, 2.4028, 184.5),
    ("VoCo-LLaMA", "7B"): (2.2076, 1.6664, 1.6622, 128),
    ("HiRED", "7B"): (1.9826, 1.4964, 1.4930, 115),
    ("Dynamic-LLaVA", "7B"): (2.4881, 1.8800, 1.8714, 143.8),
    ("TokenPacker 144", "7B"): (2.4848, 1.8760, 1.8706, 144),
    ("TokenPacker 64", "7B"): (1.1017, 0.8311, 0.8300, 64),
    ("TokenPacker + FastV", "7B"): (1.3564, 1.0235, 1.0217, 78.8),
    ("TokenPacker + Dynamic-LLaVA", "7B"): (1.0749, 0.8110, 0.8098, 62.4),
    ("LLaVA-1.5", "13B"): (19.5991, 14.8881, 14.7524, 576),
    ("PruMerge+", "13B"): (4.9164, 3.7223, 3.7136, 146),
    ("FastV", "13B"): (5.9551, 4.5123, 4.4944, 176.4),
    ("VoCo-LLaMA", "13B"): (4.3084, 3.2615, 3.2548, 128),
    ("HiRED", "13B"): (3.8696, 2.9290, 2.9237, 115),
    ("Dynamic-LLaVA", "13B"): (4.6561, 3.5270, 3.5151, 138.1),
    ("TokenPacker 144", "13B"): (4.8488, 3.6711, 3.6626, 144),
    ("TokenPacker 64", "13B"): (2.1508, 1.6274, 1.6257, 64),
    ("TokenPacker + FastV", "13B"): (2.6023, 1.9693, 1.9667, 77.4),
    ("TokenPacker + Dynamic-LLaVA", "13B"): (2.0619, 1.5602, 1.5585, 61.4),
}


def test_table_10_and_its_two_misprints():
    report = prefill_report()
    assert {(row["method"], row["model"]) for row in report.rows} == set(TABLE_10)
    for row in report.rows:
        eq13, exact, causal, average = TABLE_10[row["method"], row["model"]]
        assert row["flops_paper"] / 1e12 == pytest.approx(eq13, abs=6e-5)
        assert row["flops_exact"] / 1e12 == pytest.approx(exact, abs=6e-5)
        assert row["flops_causal"] / 1e12 == pytest.approx(causal, abs=6e-5)
        assert row["average_tokens"] == pytest.approx(average, abs=0.051)
    wrong = {(row["method"], row["model"], row["printed_tflop"]) for row in report.rows if not row["agrees"]}
    assert wrong == {("HiRED", "7B", "2.07"), ("TokenPacker 144", "13B", "4.9")}
    assert "HiRED 7B: 2.07 printed, 1.98 by Eq. 13; TokenPacker 144 13B: 4.9 printed, 4.85" in report.notes[0]
    assert all(text in report.table() for text in ("10.0696", "1.8714", "143.8"))


def test_decoding_columns_of_table_3():
    rows = decoding_report().rows
    assert [row["flops_paper"] / 1e12 for row in rows] == pytest.approx([2.745, 1.528, 5.356], abs=6e-4)
    assert [row["kv_bytes"] / 2**20 for row in rows] == pytest.approx([79.5, 44.3, 124.2], abs=0.05)


def test_table_8_and_its_misprint():
    report = tokens_report()
    wrong = [row for row in report.rows if not row["agrees"]]
    assert len(report.rows) == 18 and [(row["printed"], row["computing"]) for row in wrong] == [(794, 791)]
    changes = {(row["benchmark"], row["method"]): f"{row['change']:.0%}" for row in report.rows}
    assert changes["VQAv2", "Dynamic-LLaVA_I|T"] == "-79%" and changes["SciQA", "FastV"] == "-72%"
    assert changes["ShareGPT4V-VQA (single)", "Dynamic-LLaVA_I|T"] == "-57%"
    for row in report.rows:
        assert row["computing"] <= row["average_tokens"] <= row["image"] + row["text"] + row["output"]


def test_limits_of_the_papers_device():
    """Independent sums of the same limits: 46 %, 48 % of the bandwidth; 42 %, 23 %, 51 %, 36 % of the peak."""
    shares = {(row["preset"], row["measure"], row["way"]): row.get("share") for row in paper_report().rows}
    assert shares["table14", "step with cache, ms", "dense"] == pytest.approx(0.46, abs=0.005)
    assert shares["table14", "step with cache, ms", "both"] == pytest.approx(0.48, abs=0.005)
    assert shares["table14", "prefill, ms", "dense"] == pytest.approx(0.42, abs=0.006)
    assert shares["table14", "prefill, ms", "both"] == pytest.approx(0.23, abs=0.006)
    assert shares["table4", "prefill, s", "dense"] == pytest.approx(0.51, abs=0.006)
    assert shares["table4", "prefill, s", "both"] == pytest.approx(0.36, abs=0.006)
    assert uncached_limit(PRESETS["table4"], "dense", 1000) == pytest.approx(746, rel=0.01)
    assert uncached_limit(PRESETS["table4"], "both", 1000) == pytest.approx(296, rel=0.01)


def test_curves_begin_with_the_prompt_and_part_as_the_answer_grows():
    report = curve_report(PRESETS["table4"], 5120)
    lines = {}
    for row in report.rows:
        lines.setdefault(row["method"], []).append(row)
    dense, fastv, ours = (lines[name] for name in ("LLaVA-1.5", "FastV", "Dynamic-LLaVA_I|T"))
    assert dense[0]["flops"] / 1e12 == pytest.approx(128.4, abs=0.06), "the prefill limit of 13B, batch 8"
    assert [row["outputs"] for row in dense] == list(range(0, 5121, 256))
    for key in ("flops", "memory"):
        gaps = [(other[key] - mine[key]) for other, mine in zip(fastv, ours, strict=True)]
        assert all(earlier < later for earlier, later in pairwise(gaps[1:])), key
    relative = [row["flops"] / base["flops"] for row, base in zip(fastv, dense, strict=True)]
    assert relative == sorted(relative), "what only drops image tokens comes back to the dense model"
    assert report.notes[-1].count("trained on 4096") == 1


def test_presets_are_the_papers_protocols():
    table4, table14 = find_preset("table4"), find_preset("table14")
    assert (table4.shape.decoder.layers, table4.batch, table4.outputs) == (40, 8, (1024, 2048, 4096))
    assert (table14.batch, table14.outputs, table14.kept_prompt) == (1, (1000,), 115 + 50)
    assert table4.past_training(4096) is not None and table14.past_training(1000) is None
    assert table4.groups("both", 2048) == {"tokens": 626 + 2048, "kept": 165 + 1024, "sparse_layer": 2}
    assert table4.groups("image", 10)["kept"] == 175 and table4.groups("dense", 10)["kept"] is None
    assert table4.with_layers(8).shape.decoder.layers == 8 and table4.with_layers(None) == table4


def test_impossible_presets_are_refused():
    with pytest.raises(ValueError, match="preset 'table5' is not known; choose one of table4, table14"):
        find_preset("table5")
    shape = small_shape(64, 4)
    for change in (
        {"batch": 0},
        {"outputs": ()},
        {"outputs": (4, 2)},
        {"outputs": (0,)},
        {"sparse_layer": 4},
        {"text": 1},
    ):
        with pytest.raises(ValueError, match="possible"):
            Preset(**{"name": "x", "shape": shape, "batch": 1, "outputs": (4,), "about": "", **change})
    with pytest.raises(ValueError, match="longest=0"):
        curve_report(PRESETS["table4"], 0)
