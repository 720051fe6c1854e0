"""NaN and infinity end a run at once, with an exit code of their own, and cost no healthy checkpoint."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import dynamic_llava.train.run as run_module
from dynamic_llava.config import DataConfig, ModelConfig, TrainConfig
from dynamic_llava.train.__main__ import main
from dynamic_llava.train.checkpoints import is_complete
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.run import run, write_config
from dynamic_llava.train.stopping import EXIT_NOT_FINITE, NotFinite
from tests.builders import TINY_SPARSITY
from tests.sft_builders import write_checkpoint, write_data


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("health")
    file, images = write_data(folder, samples=16)
    return RunConfig(
        output_folder=str(folder / "runs"),
        model=ModelConfig(base=str(write_checkpoint(folder / "base"))),
        data=DataConfig(json=str(file), image_folder=str(images), max_length=400),
        sparsity=replace(TINY_SPARSITY, output_min_length=14),
        train=TrainConfig(
            batch_size=4, max_steps=6, learning_rate=1e-3, predictor_learning_rate=1e-3, log_every=1, save_every=1
        ),
    )


class Spoil(TrainerCallback):
    """Makes one number NaN at a step: of a gradient before it is used, or of a weight afterwards."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def spoil(self, model):
        weight = next(parameter for parameter in model.parameters() if parameter.requires_grad)
        value = weight.grad if self.what == "gradient" else weight.data
        value.view(-1)[3] = float("inf")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.what == "weight" and state.global_step == self.step:
            self.spoil(model)


def disturb(monkeypatch, spoil):
    build = run_module.build_trainer

    def build_trainer(*arguments):
        trainer = build(*arguments)
        trainer.add_callback(spoil)
        if spoil.what == "gradient":
            clip = trainer._clip_grad_norm

            def clipped(model):
                if trainer.state.global_step + 1 == spoil.step:
                    spoil.spoil(model)
                return clip(model)

            monkeypatch.setattr(trainer, "_clip_grad_norm", clipped)
        return trainer

    monkeypatch.setattr(run_module, "build_trainer", build_trainer)


def checkpoints_of(config):
    return sorted(path.name for path in config.folder.glob("checkpoint-*") if is_complete(path))


def lines_of(config):
    return [json.loads(line, parse_constant=pytest.fail) for line in (config.folder / "metrics.jsonl").open()]


@pytest.mark.parametrize(("keep", "accumulation"), [(1, 1), (2, 2)])
def test_a_learning_rate_that_destroys_the_model(start, tmp_path, capsys, keep, accumulation):
    """The weights stay finite for a step: their checkpoint counts for nothing, the one before it stays."""
    train = replace(
        start.train, learning_rate=1e30, warmup_ratio=0.3, keep_checkpoints=keep, batch_size=4 // accumulation,
        gradient_accumulation=accumulation,
    )  # fmt: skip
    config = replace(start, name="destroyed", output_folder=str(tmp_path), train=train)
    write_config(config, tmp_path / "run.yaml")
    assert main([str(tmp_path / "run.yaml")]) == EXIT_NOT_FINITE
    error = capsys.readouterr().err
    assert "step 3: the loss is NaN or infinite, so training ends here; try a smaller train.learning_rate" in error
    assert "the last healthy checkpoint is" in error and "checkpoint-1 (checkpoint-2 gave that loss" in error
    assert checkpoints_of(config) == ["checkpoint-1"] and not (config.folder / "model").exists()
    assert [line["step"] for line in lines_of(config)] == [1, 2]
    assert all(line["loss"] > 0 and line["lm_loss"] > 0 for line in lines_of(config))
    weights = load_file(config.folder / "checkpoint-1" / "model.safetensors")
    assert max(weight.abs().max() for weight in weights.values()) < 100
    # The way out that the message names.
    better = replace(config, train=replace(train, learning_rate=1e-3, resume=False))
    assert run(better).metrics["steps"] == 6


def test_a_gradient_that_is_not_finite_is_not_used(start, tmp_path, monkeypatch):
    config = replace(start, name="gradient", output_folder=str(tmp_path))
    disturb(monkeypatch, Spoil(4, "gradient"))
    with pytest.raises(NotFinite, match=r"step 4: the gradient's norm is .*checkpoint-2 \(checkpoint-3 gave"):
        run(config)
    assert checkpoints_of(config) == ["checkpoint-2"]


@pytest.mark.parametrize("step", [3, 6], ids=["at a checkpoint", "at the end"])
def test_a_weight_that_is_not_finite_is_never_written(start, tmp_path, monkeypatch, step):
    config = replace(start, name="weight", output_folder=str(tmp_path))
    disturb(monkeypatch, Spoil(step, "weight"))
    with pytest.raises(NotFinite, match=rf"step {step}: a trained weight is NaN or infinite.*checkpoint-{step - 1}"):
        run(config)
    assert checkpoints_of(config) == [f"checkpoint-{step - 2}", f"checkpoint-{step - 1}"]
    assert not (config.folder / "model").exists() and not (config.folder / "unfinished").exists()


def test_without_a_checkpoint_the_message_says_so(start, tmp_path):
    train = replace(start.train, learning_rate=1e30, save_every=None)
    with pytest.raises(NotFinite, match="no checkpoint had been written"):
        run(replace(start, name="none", output_folder=str(tmp_path), train=train))


def test_the_only_checkpoint_is_not_put_aside(start, tmp_path):
    train = replace(start.train, learning_rate=1e30, save_every=2, warmup_ratio=0.3)
    config = replace(start, name="only", output_folder=str(tmp_path), train=train)
    for _ in range(2):
        with pytest.raises(NotFinite, match=r"step 3.*the last healthy checkpoint is .*checkpoint-2$"):
            run(config)
    assert checkpoints_of(config) == ["checkpoint-2"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_every_value_that_is_not_finite_is_found_anywhere(dtype, value):
    from dynamic_llava.train.health import check_finite

    tensors = [torch.zeros(0), torch.ones(5, dtype=dtype), torch.tensor(1.0), torch.ones(3, 7, dtype=dtype)]
    check_finite("all of it", tensors, 1)
    for place in (1, 3):
        spoiled = [tensor.clone() for tensor in tensors]
        spoiled[place].view(-1)[-1] = value
        with pytest.raises(NotFinite, match="step 2: all of it is NaN or infinite"):
            check_finite("all of it", spoiled, 2)
