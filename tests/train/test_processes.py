"""Two processes train like one: the same losses, rates and weights, noise and regularisers on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.builders import TINY_SPARSITY
from tests.sft_builders import write_checkpoint, write_data

ROOT = Path(__file__).resolve().parents[2]


def train(folder, name, processes, batch_size, accumulation):
    config = {
        "name": name,
        "output_folder": str(folder / "runs"),
        "model": {"base": str(folder / "base")},
        "data": {"json": str(folder / "data.json"), "image_folder": str(folder / "images"), "max_length": 400},
        "sparsity": {**TINY_SPARSITY.to_dict(), "output_min_length": 14, "keep_rate_reduction": "applicable"},
        "train": {
            "batch_size": batch_size,
            "gradient_accumulation": accumulation,
            "max_steps": 5,
            "learning_rate": 1e-3,
            "predictor_learning_rate": 1e-3,
            "log_every": 1,
        },
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "DYNAMIC_LLAVA_CACHE": str(folder / "cache"),
    }
    command = [sys.executable, *launcher, "-m", "dynamic_llava.train", str(file)]
    subprocess.run(command, check=True, timeout=180, env=environment, cwd=folder, capture_output=True)
    run = folder / "runs" / name
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "lm_loss" in line], load_file(run / "model" / "model.safetensors")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    write_checkpoint(tmp_path / "base")
    write_data(tmp_path, samples=40)
    whole, weights = train(tmp_path, "one", 1, 8, 1)
    assert any(line["output_keep_loss"] > 0 for line in whole)
    for name, settings in (("two", (2, 4, 1)), ("two_accumulating", (2, 2, 2))):
        lines, other = train(tmp_path, name, *settings)
        assert len(lines) == len(whole) == 5, "both processes must write one log"
        for ours, theirs in zip(whole, lines, strict=True):
            for value in ("loss", "lm_loss", "image_keep_loss", "output_keep_loss"):
                assert theirs[value] == pytest.approx(ours[value], rel=1e-5, abs=1e-7), (name, value, ours["step"])
            for value in ("image_keep_rate", "output_keep_rate"):
                assert theirs[value] == ours[value], (name, value, ours["step"])
        assert max((other[key] - tensor).abs().max() for key, tensor in weights.items()) < 1e-5
