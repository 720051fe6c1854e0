"""A checkpoint is complete or does not count; a stopped run continues exactly; a full disk destroys nothing."""

import json
import logging
import os
import shutil
import signal
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import dynamic_llava.train.run as run_module
from dynamic_llava.config import DataConfig, ModelConfig, TrainConfig
from dynamic_llava.train import checkpoints as module
from dynamic_llava.train.__main__ import main
from dynamic_llava.train.checkpoints import (
    MARKER,
    Checkpoints,
    check_pickles,
    compared_settings,
    is_complete,
    published,
)
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.run import run, write_config
from dynamic_llava.train.stopping import EXIT_SAVE_FAILED, EXIT_STOPPED, SaveError, Stopped
from tests.builders import TINY_SPARSITY
from tests.sft_builders import write_checkpoint, write_data

Usage = namedtuple("Usage", "total used free")


def checkpoints_in(folder, config=None, processes=1, **settings):
    return Checkpoints(folder, compared_settings(config or RunConfig(), processes), processes, **settings)


def write_some(folder):
    """Return a `save` that writes two files into the folder of a checkpoint."""

    def save():
        (folder / "part").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"x" * 100)
        (folder / "part" / "optimizer.pt").write_bytes(b"y" * 50)

    return save


def write_steps(checkpoints, *steps):
    for step in steps:
        checkpoints.write(step, write_some(checkpoints.folder / f"checkpoint-{step}"), 1)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_complete_ones_are_kept_and_the_newest_is_resumed_from(tmp_path):
    checkpoints = checkpoints_in(tmp_path, keep=2)
    assert checkpoints.resume_point(resume=True) is None
    write_steps(checkpoints, 5, 10, 100)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100"]
    assert checkpoints.resume_point(resume=True) == tmp_path / "checkpoint-100"


def no_marker(checkpoint):
    (checkpoint / MARKER).unlink()


def half_a_marker(checkpoint):
    text = (checkpoint / MARKER).read_text()
    (checkpoint / MARKER).write_text(text[: len(text) // 2])


def a_lost_file(checkpoint):
    (checkpoint / "part" / "optimizer.pt").unlink()


def a_cut_file(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"x" * 99)


def a_marker_in_another_encoding(checkpoint):
    (checkpoint / "complete.json").write_bytes(b"\xff" + (checkpoint / "complete.json").read_bytes())


@pytest.mark.parametrize("damage", [no_marker, half_a_marker, a_marker_in_another_encoding, a_lost_file, a_cut_file])
def test_what_is_not_complete_does_not_count_and_goes(tmp_path, damage, caplog):
    checkpoints = checkpoints_in(tmp_path)
    write_steps(checkpoints, 5, 10)
    damage(tmp_path / "checkpoint-10")
    assert not is_complete(tmp_path / "checkpoint-10")
    assert checkpoints.resume_point(resume=True) == tmp_path / "checkpoint-5"
    assert "checkpoint-10 is incomplete" in caplog.text
    assert names(tmp_path) == ["checkpoint-5"]


def test_starting_over_removes_all_of_them(tmp_path, caplog):
    checkpoints = checkpoints_in(tmp_path)
    write_steps(checkpoints, 5, 10)
    (tmp_path / "checkpoint-notes").mkdir()
    assert checkpoints.resume_point(resume=False) is None
    assert names(tmp_path) == ["checkpoint-notes"], "only what a run has written is removed"
    assert caplog.text.count("train.resume is false") == 2


def test_other_settings_are_refused_by_name(tmp_path):
    write_steps(checkpoints_in(tmp_path), 5)
    other = RunConfig(train=TrainConfig(max_steps=7, learning_rate=1e-3))
    with pytest.raises(
        ValueError, match=r"train\.learning_rate was 5e-06 and is 0\.001; train\.max_steps was None"
    ) as e:
        checkpoints_in(tmp_path, other).resume_point(resume=True)
    assert "train.resume: false" in str(e.value) and "batch" not in str(e.value)
    assert names(tmp_path) == ["checkpoint-5"], "a refused run removes nothing"


def test_what_changes_no_weight_may_change(tmp_path):
    write_steps(checkpoints_in(tmp_path), 5)
    train = TrainConfig(log_every=3, save_every=9, batch_size=2, gradient_accumulation=2, gradient_checkpointing=True)
    other = RunConfig(name="moved", output_folder="elsewhere", data=DataConfig(workers=4), train=train)
    assert checkpoints_in(tmp_path, other, processes=2).resume_point(resume=True) == tmp_path / "checkpoint-5"
    with pytest.raises(ValueError, match="samples per optimizer step was 8 and is 12"):
        checkpoints_in(tmp_path, other, processes=3).resume_point(resume=True)


def test_zero_goes_on_with_the_same_processes_and_stage_only(tmp_path):
    write_steps(checkpoints_in(tmp_path, zero_stage=3, processes=2), 5)
    with pytest.raises(ValueError, match=r"in 2 parts, one per process, and this run has 1 processes"):
        checkpoints_in(tmp_path, zero_stage=3).resume_point(resume=True)
    with pytest.raises(ValueError, match=r"written with ZeRO-3 and this run trains without DeepSpeed"):
        checkpoints_in(tmp_path, processes=2).resume_point(resume=True)


class Harmful:
    def __reduce__(self):
        return os.system, ("true",)


def test_a_file_that_would_run_something_is_refused(tmp_path):
    def write(value):
        save = write_some(tmp_path / "checkpoint-5")

        def with_part():
            save()
            (tmp_path / "checkpoint-5" / "global_step5").mkdir()
            torch.save(value, tmp_path / "checkpoint-5" / "global_step5" / "zero_pp_rank_0_optim_states.pt")

        checkpoints_in(tmp_path).write(5, with_part, 1)
        return checkpoints_in(tmp_path)

    assert write({"state": torch.ones(2)}).resume_point(resume=True) == tmp_path / "checkpoint-5"
    with pytest.raises(ValueError, match=r"zero_pp_rank_0_optim_states.pt would run posix.system"):
        write({"state": Harmful()}).resume_point(resume=True)


def full_disk_of_torch():
    raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")


def full_disk_of_safetensors():
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_disk_of_python():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("error", [full_disk_of_torch, full_disk_of_safetensors, full_disk_of_python])
def test_a_save_that_fails_is_named_and_leaves_the_others(tmp_path, error):
    checkpoints = checkpoints_in(tmp_path, keep=1)
    write_steps(checkpoints, 5)

    def save():
        write_some(tmp_path / "checkpoint-10")()
        error()

    with pytest.raises(
        SaveError, match=r"checkpoint-10 could not be written: it takes at least 1,000 bytes and [\d,]+ "
    ):
        checkpoints.write(10, save, 1000)
    assert is_complete(tmp_path / "checkpoint-5") and not is_complete(tmp_path / "checkpoint-10")
    assert checkpoints.resume_point(resume=True) == tmp_path / "checkpoint-5"


def test_too_little_room_is_found_before_anything_is_written(tmp_path, monkeypatch):
    checkpoints = checkpoints_in(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: Usage(1000, 800, 200))
    with pytest.raises(SaveError, match="it takes at least 201 bytes and 200 are free there"):
        checkpoints.write(5, write_some(tmp_path / "checkpoint-5"), 201)
    assert names(tmp_path) == []
    write_steps(checkpoints, 5)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: Usage(1000, 900, 100))
    with pytest.raises(SaveError, match="at least 150 bytes"):  # what the last one took, not what was estimated
        write_steps(checkpoints, 10)
    assert names(tmp_path) == ["checkpoint-5"]


def test_a_model_appears_when_it_is_whole(tmp_path):
    def write(text):
        with published(tmp_path, 1) as unfinished:
            for name in ("model", "adapter"):
                (unfinished / name).mkdir()
                (unfinished / name / "weights").write_text(text)
            if text == "broken":
                raise OSError(28, "No space left on device")

    write("first")
    with pytest.raises(SaveError, match="unfinished could not be written"):
        write("broken")
    assert (tmp_path / "model" / "weights").read_text() == "first"
    write("second")
    assert names(tmp_path) == ["adapter", "model"]
    assert (tmp_path / "model" / "weights").read_text() == (tmp_path / "adapter" / "weights").read_text() == "second"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    file, images = write_data(folder, samples=20)
    return RunConfig(
        output_folder=str(folder / "runs"),
        model=ModelConfig(base=str(write_checkpoint(folder / "base"))),
        data=DataConfig(json=str(file), image_folder=str(images), max_length=400),
        sparsity=replace(TINY_SPARSITY, output_min_length=14),
        train=TrainConfig(
            batch_size=8, max_steps=6, learning_rate=1e-3, predictor_learning_rate=1e-3, log_every=2, save_every=2
        ),
    )


@pytest.fixture(scope="module")
def whole(start):
    """The run that nobody disturbed: 3 steps make an epoch, so a resumed one begins within the second."""
    return run(replace(start, name="whole"))


def lines_of(result):
    lines = [json.loads(line) for line in (result.run_folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("tokens_per_second", "mfu")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines if "lm_loss" in line]


class Signals(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


def disturb(monkeypatch, callback):
    build = run_module.build_trainer

    def build_trainer(*arguments):
        trainer = build(*arguments)
        trainer.add_callback(callback)
        return trainer

    monkeypatch.setattr(run_module, "build_trainer", build_trainer)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on_exactly(start, whole, number, monkeypatch, caplog):
    config = replace(start, name=f"stopped-{number.name}")
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        disturb(patched, Signals(4, number))
        with caplog.at_level(logging.WARNING), pytest.raises(Stopped, match="after step 4 of 6"):
            run(config)
    assert signal.getsignal(number) is before
    assert "stopped as asked after step 4 of 6" in caplog.text
    assert is_complete(config.folder / "checkpoint-4") and not (config.folder / "model").exists()
    again = run(config)
    assert lines_of(again) == lines_of(whole)
    ours, theirs = load_file(again.folder / "model.safetensors"), load_file(whole.folder / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((config.folder / "environment.json").read_text())["resumed_from_step"] == 4
    assert [line["step"] for line in again.history] == [1, 2, 4, 6]


def test_lines_after_the_checkpoint_are_written_anew(start, whole, caplog):
    """As after a crash: lines and half a line that no checkpoint covers, and a checkpoint cut off in the middle."""
    config = replace(start, name="whole")
    shutil.rmtree(config.folder / "model")
    log = config.folder / "metrics.jsonl"
    expected = lines_of(whole)
    log.write_text(log.read_text() + '{"step": 7, "lm_loss": 1.0, "loss"')
    (config.folder / "checkpoint-5").mkdir()
    (config.folder / "checkpoint-5" / "model.safetensors").write_bytes(b"x")
    assert lines_of(run(config)) == expected
    assert "checkpoint-5 is incomplete" in caplog.text
    assert [line["step"] for line in map(json.loads, log.read_text().splitlines()) if "lm_loss" in line] == [1, 2, 4, 6]


def test_a_stop_in_the_last_step_is_a_finished_run(start, monkeypatch):
    disturb(monkeypatch, Signals(2, signal.SIGTERM))
    result = run(replace(start, name="last", train=replace(start.train, max_steps=2, save_every=None)))
    assert sorted(path.name for path in result.run_folder.iterdir()) == [
        "config.yaml", "environment.json", "metrics.jsonl", "model",
    ]  # fmt: skip


def test_what_a_checkpoint_holds(start, whole):
    """Pickles of transformers' own are read with weights_only; its pickled arguments are not kept."""
    assert names(whole.run_folder) == [
        "checkpoint-2", "checkpoint-4", "config.yaml", "environment.json", "metrics.jsonl", "model",
    ]  # fmt: skip
    checkpoint = whole.run_folder / "checkpoint-4"
    files = set(json.loads((checkpoint / MARKER).read_text())["files"])
    assert files == {path.name for path in checkpoint.iterdir()} - {MARKER}
    pickles = {name for name in files if name.endswith((".pt", ".pth", ".bin"))}
    assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for name in pickles - {"rng_state.pth"}:
        torch.load(checkpoint / name, weights_only=True)


class Attack:
    """Runs a function when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("it ran",)


def test_a_pickle_that_is_not_deepspeeds_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step = tmp_path / "checkpoint-1" / "global_step1"
    step.mkdir(parents=True)
    torch.save({"weights": torch.ones(2)}, step / "states.pt")
    check_pickles(tmp_path / "checkpoint-1")
    torch.save({"weights": torch.ones(2), "more": Attack()}, step / "states.pt")
    with pytest.raises(ValueError, match=r"states\.pt would run .*mkdir"):
        check_pickles(tmp_path / "checkpoint-1")
    assert not (tmp_path / "it ran").exists()


def command_line(config, folder):
    file = folder / "run.yaml"
    write_config(config, file)
    return [str(file)]


def test_the_command_line_tells_how_a_run_ended(start, tmp_path, monkeypatch, capsys):
    config = replace(start, name="ended", output_folder=str(tmp_path))
    with monkeypatch.context() as patched:
        disturb(patched, Signals(1, signal.SIGTERM))
        monkeypatch.setenv("DYNAMIC_LLAVA_LAUNCH_FOLDER", str(tmp_path))
        assert main(command_line(config, tmp_path)) == EXIT_STOPPED
    assert (tmp_path / "exit-code").read_text() == str(EXIT_STOPPED)
    other = replace(config, train=replace(config.train, seed=5))
    assert main(command_line(other, tmp_path)) == 2
    assert "train.seed was 0 and is 5" in capsys.readouterr().err


def test_a_full_disk_ends_a_run_with_a_message_and_its_checkpoints(start, tmp_path, monkeypatch, capsys):
    config = replace(start, name="full", output_folder=str(tmp_path))

    def save_file(tensors, filename, metadata=None):
        if "checkpoint-4" in str(filename):
            full_disk_of_safetensors()
        real(tensors, filename, metadata=metadata)

    from transformers import modeling_utils

    real = modeling_utils.safe_save_file
    with monkeypatch.context() as patched:
        patched.setattr(modeling_utils, "safe_save_file", save_file)
        assert main(command_line(config, tmp_path)) == EXIT_SAVE_FAILED
    error = capsys.readouterr().err
    assert "checkpoint-4 could not be written: it takes at least" in error and "No space left on device" in error
    assert is_complete(config.folder / "checkpoint-2") and not (config.folder / "model").exists()
    assert main(command_line(config, tmp_path)) == 0
    assert json.loads((config.folder / "environment.json").read_text())["resumed_from_step"] == 2
