"""`python -m dynamic_llava.profile`: commands, mistakes, and that nothing beyond torch and transformers is needed."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dynamic_llava.methods import FastV
from dynamic_llava.profile.__main__ import draw_curve, main
from dynamic_llava.profile.measuring import prefill_work
from dynamic_llava.profile.presets import PRESETS, find_preset
from dynamic_llava.profile.rehearsal import preset_under
from dynamic_llava.profile.results import read
from dynamic_llava.profile.tables import curve_report
from dynamic_llava.profile.workload import method_of

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--preset", "cpu-bytes", "--batch-size", "1", "--layers", "3", "--device", "cpu"]
TINY = [*SMALL, "--outputs", "4"]
LIGHT = ("attention", "prefill", "training", "predictors")
"""Parts of the rehearsal that compile nothing."""
FOREIGN = (
    "tyro", "omegaconf", "matplotlib", "PIL", "accelerate", "peft", "datasets", "deepspeed", "wandb", "nltk",
    "openpyxl", "gradio", "lmms_eval", "torchvision",
)  # fmt: skip


def lines(capsys):
    return capsys.readouterr().out.strip().split("\n")


def test_tables_of_the_paper_and_their_json(capsys):
    assert main(["flops", "--json"]) == 0
    out = lines(capsys)
    rows = [json.loads(line) for line in out if line.startswith("{")]
    assert len(rows) == 23 and all(row["device"] == "none (calculated)" and row["commit"] for row in rows)
    assert sum(row.get("agrees") is False for row in rows) == 2
    assert "HiRED 7B: 2.07 printed, 1.98" in "\n".join(out)
    assert main(["tokens"]) == 0
    assert "794 printed, 791" in capsys.readouterr().out


def test_memory_is_calculated_and_measured(capsys):
    assert main(["memory", "--preset", "table4"]) == 0
    out = capsys.readouterr().out
    assert "54.050" in out and "39.685" in out and "measured" not in out, "GiB of 4K tokens, dense and I|T"
    assert out.count("LLaVA-1.5 was trained on 4096") == 1
    assert main(["memory", *TINY, "--measured", "--json"]) == 0
    rows = [json.loads(line) for line in lines(capsys) if line.startswith("{")]
    assert [row["way"] for row in rows] == ["dense", "image", "both"] and all(row["measured"] > 0 for row in rows)
    assert all(row["device"] == "cpu" for row in rows)


@torch.enable_grad()
def test_a_training_step_is_measured(capsys):
    assert main(["training", *SMALL, "--json"]) == 0
    out = lines(capsys)
    row = json.loads(out[-1])
    assert (row["layers"], row["batch"], row["calls"], row["device"]) == (3, 1, 3, "cpu")
    assert 1.0 < row["memory_calculated"] / row["memory"] < 1.25
    assert f"peak {row['flops'] / row['seconds'] / row['share'] / 1e12:.3f} TFLOP/s" in "".join(out[:-1])
    assert f"{row['memory'] / 2**30:.3f}" in "".join(out[:-1])


@pytest.mark.slow
def test_latency_and_roofline(capsys):
    assert main(["latency", *TINY, "--uncached", "--json"]) == 0
    rows = [json.loads(line) for line in lines(capsys) if line.startswith("{")]
    phases = {row["phase"] for row in rows}
    assert phases == {"vision", "prefill", "step", "step without cache", "total", "total without cache"}
    assert main(["roofline", *TINY]) == 0
    out = capsys.readouterr().out
    assert "limit / measured" in out and "GB/s" in out


def test_curves_and_their_picture(tmp_path, capsys, monkeypatch):
    picture = tmp_path / "curve.png"
    assert (
        main(["curve", "--preset", "table14", "--tokens", "40", "--plot", str(picture), "--device-memory", "80"]) == 0
    )
    assert f"wrote {picture}" in capsys.readouterr().out and picture.stat().st_size > 10_000
    monkeypatch.setitem(sys.modules, "dynamic_llava.viz.curves", None)
    said = draw_curve(curve_report(PRESETS["table14"], 10), tmp_path / "none.png", "")
    assert said.startswith("no picture was drawn") and not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["latency", "--preset", "table5"], "preset 'table5' is not known; choose one of table4"),
        (["memory", "--preset", "cpu", "--device", "cpu"], "--device belongs to --measured"),
        (["memory", "--preset", "cpu", "--outputs", "4", "2"], "ascending"),
        (["latency", "--preset", "cpu", "--layers", "2"], "more layers than the sparse one"),
        (["latency", "--preset", "cpu", "--device", "gpu0"], "--device gpu0 is no device"),
        (["curve", "--tokens", "0"], "longest=0"),
        (["curve", "--device-memory", "80"], "give --plot as well"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_whole_way_needs_nothing_beyond_torch_and_transformers(tmp_path):
    """Every command but `memory CONFIG.yaml`, in processes in which nothing else can be imported."""
    block = f"import sys; sys.modules.update(dict.fromkeys({FOREIGN!r}, None)); "
    commands = [
        ["flops"],
        ["tokens"],
        ["memory", *TINY, "--measured"],
        ["roofline", *TINY, "--uncached"],
        ["training", *SMALL],
        ["curve", "--tokens", "20", "--plot", str(tmp_path / "x.png")],
        *(["part", name, "--set", "rehearsal", "--results", str(tmp_path / "results.jsonl")] for name in LIGHT),
    ]
    code = block + f"from dynamic_llava.profile.__main__ import main; sys.exit(sum(map(main, {commands!r})))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("no picture was drawn: matplotlib is not installed") == 1
    written = {entry["part"] for entry in read(tmp_path / "results.jsonl") if "row" in entry}
    assert written == set(LIGHT)


@pytest.mark.slow
def test_the_script_rehearses_with_the_python_it_is_given(tmp_path):
    """The parts that compile nothing, through the script; the others are in test_rehearsal.py."""
    arguments = ["--set", "rehearsal", "--parts", *LIGHT, "--output-folder", str(tmp_path / "x")]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    script = ["bash", str(ROOT / "scripts/benchmark.sh"), *arguments]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"wrote {tmp_path}/x/log.txt" in done.stdout
    summary = (tmp_path / "x/summary.md").read_text()
    assert summary.count("| done |") == len(LIGHT) and "its numbers mean nothing" in summary
    for title in ("Training attention", "A training step", "What the predictors cost"):
        assert f"## {title}" in summary


def test_another_method_is_profiled_at_its_own_rates(capsys):
    """Its bytes are those of its kept tokens, and no predictor is part of it."""
    assert main(["memory", "--method", "structure", "--method.layer", "3", "--method.output-keep-rate", "none"]) == 0
    table = capsys.readouterr().out
    assert "both is structure (layer 3, image_keep_rate 0.2, output_keep_rate None)" in table.replace("\n", " ")
    preset = preset_under(find_preset("table4"), {"name": "fastv", "layer": 3, "image_keep_rate": "0.25"})
    seen = [preset.prompt + 10] * 3 + [50 + 144 + 10] * 37
    assert preset.seen("both", 10) == preset.held("both", 10) == seen
    assert method_of(preset, "both") == FastV(layer=3, image_keep_rate=0.25) and preset.ways == ("dense", "both")
    own = replace(find_preset("table4"), sparse_layer=3, image_keep_rate=0.25)
    assert prefill_work(preset, "both", 2).flops < prefill_work(own, "both", 2).flops
    for words, message in (
        (("--method", "dynamic"), "is profiled without --method"),
        (("--method", "mixed"), "is profiled without --method"),
        (("--method", "mixed", "--method.image-by", "dynamic"), "models have random weights"),
        (("--method", "fastvv"), "did you mean 'fastv'"),
        (("--method", "fastv", "--method.layer", "40"), "has 40"),
    ):
        assert main(["memory", *words]) == 2
        assert message in capsys.readouterr().err


def test_the_curve_of_another_method(capsys):
    """It is beside the dense one, in place of the paper's."""
    words = ["--preset", "cpu-bytes", "--layers", "3", "--tokens", "40", "--json"]
    assert main(["curve", *words, "--method", "tome"]) == 0
    rows = [json.loads(line) for line in lines(capsys) if line.startswith("{")]
    assert {row["method"] for row in rows} == {"LLaVA-1.5", "tome (image_keep_rate 0.5)"}
    dense, merged = (max(row["cache"] for row in rows if row["method"].startswith(name)) for name in ("LLaVA", "tome"))
    assert 0 < merged < dense
    assert main(["training", *SMALL, "--method", "h2o"]) == 2
    assert "'h2o' evicts" in capsys.readouterr().err


@pytest.mark.slow
@torch.enable_grad()
def test_a_training_step_of_another_method_is_measured(capsys):
    assert main(["training", *SMALL, "--json", "--method", "fastv"]) == 0
    (row,) = [json.loads(line) for line in lines(capsys) if line.startswith("{")]
    assert row["seconds"] > 0 and 0.9 < row["memory_calculated"] / row["memory"] < 1.25
