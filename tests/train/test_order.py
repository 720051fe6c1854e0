"""An epoch through the Trainer: every sample once, and what fills up its last step changes no number."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from dynamic_llava.config import DataConfig, ModelConfig, TrainConfig
from dynamic_llava.data import FILLER, SftDataset
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.run import build_trainer, load, run
from tests.builders import TINY_SPARSITY
from tests.sft_builders import write_checkpoint, write_data

SPARSITY = replace(TINY_SPARSITY, output_min_length=14)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), samples=11)


def config_of(tmp_path, base, data, *, name="run", sparsity=SPARSITY, **train):
    rates = {"learning_rate": 1e-3, "predictor_learning_rate": 1e-3, "log_every": 1}
    return RunConfig(
        name=name,
        output_folder=str(tmp_path / "runs"),
        model=ModelConfig(base=str(base)),
        data=DataConfig(json=str(data[0]), image_folder=str(data[1]), max_length=400),
        sparsity=sparsity,
        train=TrainConfig(**{**rates, **train}),
    )


@pytest.mark.parametrize("grouped", [False, True])
def test_every_sample_once_per_epoch(tmp_path, base, data, grouped):
    config = config_of(tmp_path, base, data, batch_size=4, gradient_accumulation=2, group_by_length=grouped)
    model, processor = load(config)
    dataset = SftDataset(config.data, processor)
    trainer = build_trainer(config, model, processor, dataset)
    loader = trainer.get_train_dataloader()
    epochs = []
    for epoch in range(2):
        trainer.state.epoch = float(epoch)
        epochs.append(torch.cat([batch["sample_ids"] for batch in loader]).tolist())
    for seen in epochs:
        assert sorted(seen) == [FILLER] * 5 + list(range(11))
    assert epochs[0] != epochs[1]
    if grouped:
        longest = dataset.lengths[epochs[0][:4]].max(), dataset.lengths[epochs[0][4:8]].max()
        assert longest[0] < longest[1], "a step's batches are sorted by length"


@pytest.mark.parametrize("reduction", ["batch", "applicable"])
def test_fillers_add_nothing(tmp_path, base, data, reduction):
    """11 samples in one step: 1 x 11, 1 x 16 with 5 fillers, and 2 x 4 x 2 with a micro-batch of fillers alone."""
    sparsity = replace(SPARSITY, keep_rate_reduction=reduction)
    wanted = None
    for batch_size, accumulation in ((11, 1), (16, 1), (4, 4)):
        name = f"x{batch_size}"
        config = config_of(
            tmp_path, base, data, name=name, sparsity=sparsity, max_steps=2, batch_size=batch_size,
            gradient_accumulation=accumulation,
        )  # fmt: skip
        history = run(config).history
        wanted = history if wanted is None else wanted
        assert wanted[0]["image_keep_loss"] > 0 and wanted[0]["output_keep_loss"] > 0
        for ours, theirs in zip(wanted, history, strict=True):
            for value in ("loss", "lm_loss", "image_keep_loss", "output_keep_loss", "grad_norm"):
                assert theirs[value] == pytest.approx(ours[value], rel=1e-5, abs=1e-7), (name, value)
            assert theirs["image_keep_rate"] == ours["image_keep_rate"]
            assert theirs["output_keep_rate"] == ours["output_keep_rate"]


def test_one_sample_in_a_step_of_many(tmp_path, base, data):
    entries = json.loads(data[0].read_text())[:1]
    file = tmp_path / "one.json"
    file.write_text(json.dumps(entries))
    alone = run(config_of(tmp_path, base, (file, data[1]), name="alone", batch_size=1, max_steps=1)).history[0]
    filled = run(config_of(tmp_path, base, (file, data[1]), name="filled", batch_size=8, max_steps=1)).history[0]
    assert filled["loss"] == pytest.approx(alone["loss"], rel=1e-5)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_run_resumed_within_its_second_epoch_goes_on_there(tmp_path, base, data, grouped, monkeypatch):
    """Three steps make an epoch; the checkpoint is written after the fourth of six."""
    fetched, original = [], SftDataset.__getitems__
    monkeypatch.setattr(SftDataset, "__getitems__", lambda self, ns: fetched.extend(ns) or original(self, ns))
    steps = {"batch_size": 4, "max_steps": 6, "save_every": 4, "hard_rate_tolerance": 1}  # 1: no reading at its end
    config = config_of(tmp_path, base, data, group_by_length=grouped, **steps)
    whole = run(config).history
    seen = fetched.copy()
    fetched.clear()
    shutil.rmtree(config.folder / "model")  # a finished run would not go on
    again = run(config).history
    assert len(seen) == 24 and fetched == seen[16:], "the second run fetches what the first one did after step 4"
    assert [line["step"] for line in again[-2:]] == [line["step"] for line in whole[-2:]] == [5, 6]
    for ours, theirs in zip(whole[-2:], again[-2:], strict=True):
        for value in ("loss", "lm_loss", "image_keep_loss", "output_keep_loss", "image_keep_rate", "grad_norm"):
            assert theirs[value] == ours[value], value
