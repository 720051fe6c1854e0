"""A sweep in small with the real programs: killed in the middle of a training, started again, and whole at the end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dynamic_llava.sweep.__main__ import main
from tests.sweep.fakes import SWEEP

RUN = {
    "name": "base",
    "model": {"base": "tiny"},
    "data": {"max_length": 512},
    "sparsity": {
        "predictor_width": 16,
        "predictor_heads": 2,
        "predictor_mlp": 32,
        "output_min_length": 40,
        "mask_grad_clip": 0.05,
    },  # unbounded, this gradient overflows in the tiny world
    "train": {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-5},
}
SMALL = {
    "tiny": {"train_images": 12, "test_images": 40, "questions": 16, "descriptions": 2},
    "columns": [
        {"header": "accuracy", "task": "tiny", "metric": "accuracy/all", "scale": 100},
        {"header": "image kept", "task": "tiny", "metric": "keep_image", "scale": 100, "digits": 2},
    ],
    "rows": [{"title": "dense", "model": "tiny"}, {"title": "I|T", "config": "base.yaml", "paper": {"accuracy": 50}}],
}


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the sweep ended before it was killed"
        assert time.monotonic() < end, "the training did not begin in time"
        time.sleep(0.05)


def kill_with_children(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_sweep_is_killed_goes_on_and_makes_its_table(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DYNAMIC_LLAVA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(RUN))
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(SWEEP | SMALL))
    first = subprocess.Popen([sys.executable, "-m", "dynamic_llava.sweep", "few.yaml"], start_new_session=True)
    try:
        wait_for((tmp_path / "runs/base/config.yaml").exists, first)
    finally:
        if first.poll() is None:
            kill_with_children(first)
    evaluated = tmp_path / "runs/models/tiny/eval/none/tiny/summary.json"
    before = evaluated.stat().st_mtime_ns
    assert not (tmp_path / "runs/base/model").exists()

    assert main(["few.yaml"]) == 0
    assert evaluated.stat().st_mtime_ns == before, "a finished evaluation was repeated"
    found = json.loads((tmp_path / "runs/sweeps/few/results.json").read_text())
    dense, sparse = (row["cells"] for row in found["rows"])
    assert found["missing"] == 0 and found["seeds"] == [0]
    assert dense["accuracy"]["ours"] > 80 and dense["image kept"]["ours"] == 100  # the shipped base, on unseen images
    assert sparse["image kept"]["ours"] == pytest.approx(18.75)  # 12 of 64 patches
    assert sparse["accuracy"]["difference"] == pytest.approx(sparse["accuracy"]["ours"] - 50)
    assert "evaluate tiny: done before" in capfd.readouterr().out
