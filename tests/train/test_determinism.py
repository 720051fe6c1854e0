"""The same seed on the same machine gives the same bits: weights, moments, random states, and every logged number."""

import json
import random
from dataclasses import replace

import numpy
import pytest
import torch
from safetensors.torch import load_file

from dynamic_llava.config import DataConfig, ModelConfig, TrainConfig
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.run import run
from tests.builders import TINY_SPARSITY
from tests.sft_builders import write_checkpoint, write_data
from tests.soak.determinism import values
from tests.soak.jobs import untimed


def found(config):
    """Return everything that a run has left, times apart."""
    files = {}
    for path in sorted(config.folder.rglob("*")):
        name = str(path.relative_to(config.folder))
        if path.suffix == ".safetensors":
            files[name] = values(load_file(path))
        elif path.suffix == ".pt":
            files[name] = values(torch.load(path, weights_only=True))
        elif path.name == "metrics.jsonl":
            files[name] = [untimed(json.loads(line)) for line in path.read_text().splitlines()]
    return files


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_two_trainings_are_the_same_bits(tmp_path, workers):
    """Whatever the process has drawn before, and with images read by worker processes."""
    file, images = write_data(tmp_path, samples=20)
    config = RunConfig(
        name="first",
        output_folder=str(tmp_path / "runs"),
        model=ModelConfig(base=str(write_checkpoint(tmp_path / "base", dense=True))),
        data=DataConfig(json=str(file), image_folder=str(images), max_length=400, workers=workers),
        sparsity=replace(TINY_SPARSITY, output_min_length=14),
        train=TrainConfig(batch_size=4, max_steps=6, learning_rate=1e-3, log_every=1, save_every=3, seed=5),
    )
    run(config)
    for draw in (torch.rand, numpy.random.rand, lambda count: [random.random() for _ in range(count)]):
        draw(7)
    run(replace(config, name="second"))
    first, second = found(config), found(replace(config, name="second"))
    assert first.keys() == second.keys() and {"model/model.safetensors", "metrics.jsonl"} <= first.keys()
    assert "checkpoint-3/optimizer.pt" in first
    assert [name for name in first if first[name] != second[name]] == []
    run(replace(config, name="other", train=replace(config.train, seed=6)))
    assert found(replace(config, name="other"))["metrics.jsonl"] != first["metrics.jsonl"]
