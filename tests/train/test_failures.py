"""A run that fails in the middle: its state is written first, one line says all, and the same command goes on."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import dynamic_llava.train.run as run_module
from dynamic_llava.config import DataConfig, ModelConfig, TrainConfig
from dynamic_llava.data import EpochSampler, SftDataset
from dynamic_llava.train.__main__ import main
from dynamic_llava.train.checkpoints import is_complete
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.run import run, write_config
from dynamic_llava.train.stopping import EXIT_FAILED, TrainingFailed
from tests.builders import TINY_SPARSITY
from tests.sft_builders import write_checkpoint, write_data

SAMPLES, STEP_SIZE, STEPS = 20, 8, 4
ORDER = list(EpochSampler(SAMPLES, STEP_SIZE, 0, lambda: 0))
VICTIM = ORDER[STEP_SIZE + 1]
"""A sample of the second step."""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Settings of a run of four steps, whose images each test may break in a copy of its own."""
    folder = tmp_path_factory.mktemp("start")
    file, images = write_data(folder, samples=SAMPLES)
    return RunConfig(
        output_folder=str(folder / "runs"),
        model=ModelConfig(base=str(write_checkpoint(folder / "base"))),
        data=DataConfig(json=str(file), image_folder=str(images), max_length=400),
        sparsity=replace(TINY_SPARSITY, output_min_length=14),
        train=TrainConfig(batch_size=STEP_SIZE, max_steps=STEPS, learning_rate=1e-3, predictor_learning_rate=1e-3),
    )


@pytest.fixture(scope="module")
def whole(start):
    """The weights of the run that nothing has befallen."""
    return load_file(run(replace(start, name="whole")).folder / "model.safetensors")


@pytest.fixture
def own(start, tmp_path):
    """The same settings with images, runs and a configuration file of the test's own; prepared already."""
    shutil.copytree(start.data.image_folder, tmp_path / "images")
    config = replace(
        start, output_folder=str(tmp_path), data=replace(start.data, image_folder=str(tmp_path / "images"))
    )
    SftDataset(config.data, run_module.DynamicLlavaProcessor.from_pretrained(config.model.base))
    return config


def command(config, *overrides):
    write_config(config, config.folder.parent / "run.yaml")
    return main([str(config.folder.parent / "run.yaml"), *overrides])


def picture_of(config, number):
    return Path(config.data.image_folder) / f"{number}.png"


def listed(config):
    return [json.loads(line) for line in (config.folder / "broken.jsonl").read_text().splitlines()]


def checkpoint(config, step):
    return config.folder / f"checkpoint-{step}"


def the_line(capsys):
    """What a failed command has printed as its error: one line, and no traceback anywhere."""
    printed = "".join(capsys.readouterr())
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in printed, printed
    assert printed.rstrip().endswith(errors[0]), "it is the last thing that is said"
    return errors[0]


def assert_equal(folder, weights):
    found = load_file(folder / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def cut(file):
    file.write_bytes(file.read_bytes()[:-200])


def empty(file):
    file.write_bytes(b"")


def gone(file):
    file.unlink()


def a_folder(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("damage", "workers"),
    [(cut, 0), (gone, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((empty, 1), (a_folder, 0)))],
)
def test_an_image_that_broke_since_preparation(own, whole, capsys, damage, workers):
    image = picture_of(own, VICTIM)
    kept = image.read_bytes()
    damage(image)
    assert command(own, "--data.workers", str(workers)) == 2
    line = the_line(capsys)
    assert f"index {VICTIM}, id 'sample-{VICTIM}': " in line and "leave such samples out by --data.broken skip" in line
    assert line.endswith(f"the same command goes on from {checkpoint(own, 1)}") and is_complete(checkpoint(own, 1))
    if image.is_dir():
        image.rmdir()
    image.write_bytes(kept)
    assert command(own, "--data.workers", str(workers)) == 2, "the file has not the content that the run began with"
    assert "the samples and their order are the same" in the_line(capsys)
    assert command(own, "--data.workers", str(workers), "--train.accept-changed-inputs") == 0
    assert json.loads((own.folder / "environment.json").read_text())["resumed_from_step"] == 1
    assert_equal(own.folder / "model", whole)


def test_skipping_is_the_way_out_that_the_line_names(own, whole, capsys, caplog):
    """A filler takes the place of the sample: nothing else moves, it counts nowhere, and it is listed."""
    damaged = [VICTIM, ORDER[2 * STEP_SIZE]]
    for number, damage in zip(damaged, (cut, gone), strict=True):
        damage(picture_of(own, number))
    assert command(own) == 2 and is_complete(checkpoint(own, 1))
    assert command(own, "--data.broken", "skip") == 0
    assert json.loads((own.folder / "environment.json").read_text())["resumed_from_step"] == 1
    assert [sample["index"] for sample in listed(own)] == damaged
    assert "is broken or cut off" in listed(own)[0]["why"] and "is missing" in listed(own)[1]["why"]
    assert caplog.text.count("it is left out and listed in") == 2
    weights = load_file(own.folder / "model" / "model.safetensors")
    assert any(not torch.equal(weights[name], whole[name]) for name in whole)
    at_once = replace(own, name="at_once", data=replace(own.data, broken="skip", workers=1))
    run(at_once)
    assert_equal(at_once.folder / "model", weights)
    assert sorted(sample["index"] for sample in listed(at_once)) == sorted(damaged)


def test_a_step_is_what_it_would_be_without_the_skipped_sample(own, monkeypatch):
    """Losses are divided by the samples that are there, not by the places of the batch."""
    seen, build = [], run_module.build_trainer

    def build_trainer(*arguments):
        trainer = build(*arguments)
        count = trainer._count

        def noted(batches, device):
            seen.extend(batch["sample_ids"].tolist() for batch in batches)
            return count(batches, device)

        monkeypatch.setattr(trainer, "_count", noted)
        return trainer

    monkeypatch.setattr(run_module, "build_trainer", build_trainer)
    cut(picture_of(own, VICTIM))
    run(replace(own, data=replace(own.data, broken="skip"), train=replace(own.train, max_steps=3)))
    steps = [ORDER[place : place + STEP_SIZE] for place in range(0, SAMPLES, STEP_SIZE)]
    expected = [[-1 if number == VICTIM else number for number in step] for step in steps]
    expected[-1] += [-1] * (STEP_SIZE - len(expected[-1]))
    assert seen == expected


class Fails(TrainerCallback):
    """Raises `error` at an event of the second step, once."""

    def __init__(self, event, error):
        self.error, self.failed = error, False
        self.counted = event in ("on_step_end", "on_log")  # by then the step is over
        setattr(self, event, self.fail)

    def fail(self, args, state, control, **kwargs):
        if not self.failed and state.global_step == 1 + self.counted:
            self.failed = True
            raise self.error


class Misuse(Exception):
    """An exception that nobody has heard of."""


PLACES = {
    "before the optimizer": ("on_pre_optimizer_step", RuntimeError("unexpected\nin two lines"), 1, 1),
    "within the optimizer": ("on_optimizer_step", MemoryError(), 1, None),
    "after the step": ("on_step_end", Misuse("no idea"), 1, 2),
    "while a line is written": ("on_log", OSError(5, "Input/output error"), 1, 2),
    "a wrong value": ("on_step_begin", ValueError("a value that does not fit"), 2, 1),
}
"""Where -> event, exception, exit code, and the step of the checkpoint that is written."""


def disturb(monkeypatch, callback):
    build = run_module.build_trainer

    def build_trainer(*arguments):
        trainer = build(*arguments)
        trainer.add_callback(callback)
        return trainer

    monkeypatch.setattr(run_module, "build_trainer", build_trainer)


@pytest.mark.parametrize("place", PLACES)
def test_any_exception_writes_a_checkpoint_where_the_state_is_sound(own, whole, capsys, monkeypatch, place):
    event, error, code, step = PLACES[place]
    disturb(monkeypatch, Fails(event, error))
    assert command(own, "--train.log-every", "2") == code
    line = the_line(capsys)
    assert (str(error).split("\n")[0] or type(error).__name__) in line and "traceback.txt" in line
    assert type(error).__name__ in (own.folder / "traceback.txt").read_text()
    if step is None:
        assert "may have changed a part of the weights" in line and "begins anew" in line
        assert not list(own.folder.glob("checkpoint-*"))
    else:
        assert f"goes on from {checkpoint(own, step)}" in line and is_complete(checkpoint(own, step))
    assert command(own, "--train.log-every", "2") == 0
    assert_equal(own.folder / "model", whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failing_worker_says_its_last_line_only(own, capsys, monkeypatch, workers):
    def broken_pad(*arguments, **options):
        raise KeyError("a fault of ours")

    monkeypatch.setattr(run_module.DynamicLlavaProcessor, "pad", broken_pad)
    assert command(own, "--data.workers", str(workers)) == 1
    line = the_line(capsys)
    assert "KeyError: 'a fault of ours'" in line and "no step had been taken" in line and "begins anew" in line


def test_the_first_failure_is_told_when_the_checkpoint_fails_too(own, capsys, monkeypatch):
    disturb(monkeypatch, Fails("on_step_end", Misuse("no idea")))
    monkeypatch.setattr(
        run_module.DynamicLlavaTrainer, "save_checkpoint", lambda self: (_ for _ in ()).throw(OSError(28, "full"))
    )
    assert command(own) == 1
    line = the_line(capsys)
    assert "Misuse: no idea" in line and "no checkpoint of step 2 could be written ([Errno 28] full)" in line


def test_from_python_the_cause_is_at_hand(own, monkeypatch):
    error = Misuse("no idea")
    disturb(monkeypatch, Fails("on_step_end", error))
    with pytest.raises(TrainingFailed, match="training failed at step 3: Misuse: no idea; the same command") as raised:
        run(own)
    assert raised.value.__cause__ is error


def test_a_killed_data_worker_is_one_line_and_the_same_command_goes_on(own, monkeypatch, capsys):
    config = replace(own, name="killed", data=replace(own.data, workers=1))
    real = SftDataset.__getitem__

    def killed(dataset, number):
        if number == VICTIM:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(dataset, number)

    with monkeypatch.context() as patched:
        patched.setattr(SftDataset, "__getitem__", killed)
        assert command(config) == EXIT_FAILED
    line = the_line(capsys)
    assert "DataLoader worker" in line and "the same command " in line
    assert command(config) == 0
