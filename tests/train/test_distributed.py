"""One model, trained by one process or two, by DDP, ZeRO-2 or ZeRO-3, stopped, killed and resumed: the same run.

Every run is the product's own command line in processes of its own; each is started once and shared by the tests.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dynamic_llava.data import EpochSampler
from dynamic_llava.train.checkpoints import MARKER, is_complete
from dynamic_llava.train.stopping import EXIT_NOT_FINITE, EXIT_SAVE_FAILED, EXIT_STOPPED
from tests.builders import TINY_SPARSITY
from tests.sft_builders import conversation, write_checkpoint, write_data

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SAMPLES, STEPS, STEP_SIZE, SEED = 40, 20, 8, 3
TIMEOUT = 400
"""Seconds for one run; on a free machine none takes 40."""
LOSSES = ("loss", "lm_loss", "image_keep_loss", "output_keep_loss", "mask_gradient")
KILLER = """
import os, signal, sys
def kill(event, arguments):
    if event == "open" and str(arguments[0]).endswith(os.environ["KILLED_AT"]) and arguments[1] == "w":
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
"""


class Runs:
    """A folder with bases and data, and the runs that were made in it."""

    def __init__(self, folder):
        self.folder = folder
        write_checkpoint(folder / "base", layers=3, output_min_length=14)
        write_checkpoint(folder / "dense", layers=3, dense=True)
        file, _ = write_data(folder, samples=SAMPLES)
        entries = json.loads(file.read_text())
        for entry in entries[1::2]:  # half of the samples have no image, and some batches of one process none at all
            del entry["image"]
            entry["conversations"] = conversation("What is a cat?", "A small animal that purrs.")
        file.write_text(json.dumps(entries))
        write_data(folder / "held", samples=12, seed=90)

    def config(self, name, base="base", lora=None, method=None, **train):
        """Write a run's file; return it."""
        settings = {
            "name": name,
            "output_folder": str(self.folder / "runs"),
            "model": {"base": str(self.folder / base)},
            "data": {
                "json": str(self.folder / "data.json"),
                "image_folder": str(self.folder / "images"),
                "max_length": 400,
                "text_only": "dense",
            },
            "sparsity": {
                **TINY_SPARSITY.to_dict(), "output_min_length": 14, "keep_rate_reduction": "applicable",
                "mask_grad_clip": 0.001, **({} if method is None else {"method": method}),
            },
            "train": {
                "batch_size": STEP_SIZE, "max_steps": STEPS, "learning_rate": 2e-4, "predictor_learning_rate": 2e-4,
                "log_every": 1, "seed": SEED, **train,
            },
            **({} if lora is None else {"lora": lora}),
        }  # fmt: skip
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings))
        return file

    def environment(self, **extra):
        """Variables of a process: this source, the CPU, a cache of its own."""
        path = os.pathsep.join(p for p in (extra.pop("first", ""), str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
        kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        cache = str(self.folder / "cache")
        own = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "DYNAMIC_LLAVA_CACHE": cache, "OMP_NUM_THREADS": "1"}
        return {**kept, **own, **extra}

    def start(self, file, processes, **extra):
        """Start the processes of a run as a launcher would; without any launcher's own seconds."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        started = []
        for rank in range(processes):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            place = {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 else {}
            log = (self.folder / f"{file.stem}-{rank}.log").open("w")
            command = [sys.executable, "-m", "dynamic_llava.train", str(file)]
            environment = self.environment(**place, **extra)
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT))
        return started

    def finish(self, name, started, expected=0):
        """Wait for the processes of a run; return its folder."""
        try:
            codes = [process.wait(TIMEOUT) for process in started]
        finally:
            for process in started:
                process.kill()
        logs = "\n".join((self.folder / f"{name}-{rank}.log").read_text()[-3000:] for rank in range(len(started)))
        assert codes == [expected] * len(started), f"{name}: {codes}\n{logs}"
        return self.folder / "runs" / name

    def make(self, name, processes, **settings):
        """Run a configuration from beginning to end; return its folder."""
        return self.finish(name, self.start(self.config(name, **settings), processes))

    def launch(self, file, processes):
        """Start scripts/train.sh's own launcher; return it with its log."""
        log = self.folder / f"{file.stem}-launch.log"
        command = [sys.executable, "-m", "dynamic_llava.train.launch", str(file)]
        environment = self.environment(PROCESSES=str(processes))
        with log.open("w") as output:
            return subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=ROOT), log

    @cache  # noqa: B019 - one object, which lives as long as the module's tests
    def one(self):
        """The reference: one process, whole batches."""
        return self.make("one", 1)

    @cache  # noqa: B019
    def zero3(self):
        """ZeRO-3 by the deepspeed launcher, undisturbed."""
        file = self.config("zero3", batch_size=4, save_every=7, deepspeed="configs/deepspeed/zero3.json")
        launcher, log = self.launch(file, 2)
        assert launcher.wait(TIMEOUT) == 0, log.read_text()[-3000:]
        assert "train.deepspeed set: deepspeed launcher with 2 processes" in log.read_text()
        return self.folder / "runs" / "zero3"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("distributed"))


def lines_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "lm_loss" in line]


def weights_of(folder):
    return load_file(folder / "model" / "model.safetensors")


def assert_trained_as(folder, processes, wrapper):
    facts = json.loads((folder / "environment.json").read_text())
    assert (facts["processes"], facts["wrapper"]) == (processes, wrapper)


def assert_same_run(folder, reference, steps=STEPS, losses=LOSSES):
    ours, theirs = lines_of(folder), lines_of(reference)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, steps + 1))
    for mine, other in zip(ours, theirs, strict=True):
        for name in losses:
            limit = 1e-3 if name == "mask_gradient" else 1e-5
            assert mine[name] == pytest.approx(other[name], rel=limit, abs=1e-7), (name, mine["step"])
        for name in ("image_keep_rate", "output_keep_rate"):
            assert mine.get(name) == other.get(name), (name, mine["step"])
    mine, other = weights_of(folder), weights_of(reference)
    assert mine.keys() == other.keys(), "the names of a single-process save"
    assert max((mine[name] - tensor).abs().max() for name, tensor in other.items()) < 1e-5


def assert_equal_runs(folder, reference):
    timed = {"tokens_per_second", "mfu"}
    ours, theirs = (
        [{k: v for k, v in line.items() if k not in timed} for line in lines_of(f)] for f in (folder, reference)
    )
    assert ours == theirs
    mine, other = weights_of(folder), weights_of(reference)
    assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in other)


def test_the_data_holds_what_the_equalities_are_about(runs):
    """Batches without an image beside others with some; noise, both regularisers, and a bound that bites."""
    text_only = {number for number in range(SAMPLES) if number % 2}
    without = 0
    for epoch in range(STEPS * STEP_SIZE // SAMPLES):
        order = list(EpochSampler(SAMPLES, STEP_SIZE, SEED, lambda epoch=epoch: epoch))
        without += sum(set(order[place : place + 4]) <= text_only for place in range(0, SAMPLES, 4))
    assert without > 0
    lines = lines_of(runs.one())
    assert_trained_as(runs.one(), 1, "DynamicLlavaForConditionalGeneration")
    mixed = [line for line in lines if 0 < line["image_keep_rate"] < 1 and 0 < line.get("output_keep_rate", 0) < 1]
    assert len(mixed) > STEPS / 2 and any(line["output_keep_loss"] > 0 for line in mixed)
    assert max(line["mask_gradient"] for line in lines) > 0.001, "largest before the bound"
    assert lines[-1]["lm_loss"] < lines[0]["lm_loss"]


def test_accumulation_equals_whole_batches_and_wandb_is_written_offline(runs):
    folder = runs.make("halves", 1, batch_size=4, gradient_accumulation=2, report_to="wandb")
    assert_same_run(folder, runs.one())
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert "no API key is set" in (runs.folder / "halves-0.log").read_text()


@pytest.mark.skipif(
    version("transformers").startswith("5.17."), reason="this release cannot resume DDP on a CPU: it restores to cpu:0"
)
def test_ddp_equals_one_process_stopped_and_resumed_on_the_way(runs):
    """torchrun, by the launcher; SIGTERM to the launcher alone saves on both processes."""
    file = runs.config("ddp", batch_size=2, gradient_accumulation=2)
    launcher, log = runs.launch(file, 2)
    lines, began = runs.folder / "runs" / "ddp" / "metrics.jsonl", time.monotonic()
    while launcher.poll() is None and time.monotonic() - began < TIMEOUT:
        if lines.exists() and lines.read_text().count("\n") >= 3:
            launcher.send_signal(signal.SIGTERM)
            break
        time.sleep(0.02)
    assert launcher.wait(TIMEOUT) == EXIT_STOPPED, log.read_text()[-3000:]
    assert "no GPU visible and PROCESSES=2: torchrun with 2 processes" in log.read_text()
    (checkpoint,) = (runs.folder / "runs" / "ddp").glob("checkpoint-*")
    assert is_complete(checkpoint) and not (runs.folder / "runs" / "ddp" / "model").exists()
    folder = runs.finish("ddp", runs.start(file, 2))
    assert json.loads((folder / "environment.json").read_text())["resumed_from_step"] >= 3
    assert_trained_as(folder, 2, "DistributedDataParallel")
    assert_same_run(folder, runs.one())


def test_zero2_equals_one_process(runs):
    settings = {"batch_size": 2, "gradient_accumulation": 2, "deepspeed": "configs/deepspeed/zero2.json"}
    folder = runs.make("zero2", 2, **settings)
    assert_trained_as(folder, 2, "DeepSpeedEngine")
    assert_same_run(folder, runs.one())


def test_zero3_equals_one_process(runs):
    assert_trained_as(runs.zero3(), 2, "DeepSpeedEngine")
    assert_same_run(runs.zero3(), runs.one())


def test_zero3_killed_inside_a_save_and_resumed_equals_the_undisturbed_run(runs, tmp_path):
    """The first process dies when it has written the model and its part of the optimizer, but no marker."""
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    file = runs.config("killed", batch_size=4, save_every=7, deepspeed="configs/deepspeed/zero3.json")
    first, second = runs.start(file, 2, first=str(tmp_path), KILLED_AT="checkpoint-14/latest")
    try:
        assert first.wait(TIMEOUT) == -signal.SIGKILL, (runs.folder / "killed-0.log").read_text()[-3000:]
    finally:
        first.kill()
        second.kill()
        second.wait()
    cut = runs.folder / "runs" / "killed" / "checkpoint-14"
    assert (cut / "model.safetensors").exists() and not (cut / MARKER).exists()
    folder = runs.finish("killed", runs.start(file, 2))
    assert f"{cut} is incomplete" in (runs.folder / "killed-0.log").read_text()
    facts = json.loads((folder / "environment.json").read_text())
    assert (facts["resumed_from_step"], facts["processes"], facts["wrapper"]) == (7, 2, "DeepSpeedEngine")
    assert_equal_runs(folder, runs.zero3())


def test_the_model_of_zero3_loads_and_generates_where_there_is_no_deepspeed(runs):
    program = f"""
import sys
sys.modules["deepspeed"] = None
from dynamic_llava import DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor
from dynamic_llava.processing.prompts import conversation_prompt
folder = {str(runs.zero3() / "model")!r}
model, info = DynamicLlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"]
processor = DynamicLlavaProcessor.from_pretrained(folder)
inputs = processor(conversation_prompt([("<image>\\nWhat is it?", None)]), {str(runs.folder / "images" / "0.png")!r})
answer = model.eval().generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
print(answer.shape[1] - inputs["input_ids"].shape[1])
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=runs.environment(), capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0 < int(done.stdout.split()[-1]) <= 4


def test_lora_under_zero3_equals_one_process_from_a_dense_base(runs):
    """New predictors and new adapters have the same values under ZeRO-3, which builds the model in another way."""
    settings = {"base": "dense", "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.0}, "tune": "lora", "max_steps": 6}
    alone = runs.make("lora", 1, **settings)
    folder = runs.make("lora3", 2, batch_size=4, deepspeed="configs/deepspeed/zero3.json", **settings)
    assert_trained_as(alone, 1, "PeftModel")
    assert_trained_as(folder, 2, "DeepSpeedEngine")
    assert_same_run(folder, alone, steps=6)
    ours, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (folder, alone))
    assert ours.keys() == theirs.keys() and any("output_predictor" in name for name in ours)
    assert max((ours[name] - tensor).abs().max() for name, tensor in theirs.items()) < 1e-5


@pytest.mark.skipif(
    version("transformers").startswith("5.17."), reason="this release cannot resume DDP on a CPU: it restores to cpu:0"
)
def test_a_learned_method_of_ones_own_killed_and_resumed_under_ddp_equals_one_process(runs, tmp_path):
    """From a dense base, with batches that have no image: its weights, its loss and its optimizer states are there."""
    method = {"name": "tests.toys.linear:Linear", "image_keep_rate": 0.3}
    settings = {"base": "dense", "method": method, "max_steps": 7}
    alone = runs.make("own", 1, **settings)
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    file = runs.config("own2", batch_size=4, save_every=3, **settings)
    first, second = runs.start(file, 2, first=str(tmp_path), KILLED_AT="checkpoint-6/trainer_state.json")
    try:
        assert first.wait(TIMEOUT) == -signal.SIGKILL, (runs.folder / "own2-0.log").read_text()[-3000:]
    finally:
        first.kill()
        second.kill()
        second.wait()
    folder = runs.finish("own2", runs.start(file, 2))
    facts = json.loads((folder / "environment.json").read_text())
    assert (facts["resumed_from_step"], facts["wrapper"]) == (3, "DistributedDataParallel")
    assert_same_run(folder, alone, steps=7, losses=("loss", "lm_loss", "share_loss", "mask_gradient"))
    assert any(line["share_loss"] > 0 for line in lines_of(alone))
    names = [name for name in weights_of(folder) if ".method." in name]
    assert len(names) == 5 and not any("_predictor" in name for name in weights_of(folder))


@pytest.mark.parametrize("deepspeed", [None, "zero2", "zero3"])
def test_a_frozen_model_as_its_own_teacher_equals_one_process(runs, deepspeed):
    """From a dense base, with batches that have no image: the dense pass, where predictors start, moving targets.

    At the end all processes calibrate the model together.
    """
    held = runs.folder / "held"
    settings = {
        "base": "dense", "tune": "predictors", "max_steps": 6, "distill": {"weight": 2.0, "temperature": 2.0},
        "start_keep_rate": 0.9, "keep_rate_schedule": {"shape": "cosine", "share": 0.8},
        "calibrate": {"json": str(held / "data.json"), "image_folder": str(held / "images"), "samples": 11},
    }  # fmt: skip
    if not (runs.folder / "runs" / "teacher" / "model").exists():
        runs.make("teacher", 1, **settings)
    extra = {} if deepspeed is None else {"deepspeed": f"configs/deepspeed/{deepspeed}.json"}
    folder = runs.make(f"teacher-{deepspeed}", 2, batch_size=2, gradient_accumulation=2, **extra, **settings)
    assert_trained_as(folder, 2, "DistributedDataParallel" if deepspeed is None else "DeepSpeedEngine")
    names = (*LOSSES, "distill_loss", "image_keep_target", "output_keep_target")
    assert_same_run(folder, runs.folder / "runs" / "teacher", steps=6, losses=names)
    first = lines_of(folder)[0]
    assert first["distill_loss"] > 0 and first["image_keep_target"] == 1 and first["image_keep_rate"] > 0.8
    own, alone = (
        json.loads((place / "model/config.json").read_text())["sparsity"]["calibration"]
        for place in (folder, runs.folder / "runs" / "teacher")
    )
    for kind in ("image", "output"):
        assert len(own[kind]) == 101 and own[kind] == pytest.approx(alone[kind], abs=1e-3)


def test_half_precision_and_recomputation_under_zero3(runs):
    settings = {"batch_size": 4, "max_steps": 3, "bf16": True, "gradient_checkpointing": True}
    folder = runs.make("half", 2, deepspeed="configs/deepspeed/zero3.json", **settings)
    assert_trained_as(folder, 2, "DeepSpeedEngine")
    for ours, theirs in zip(lines_of(folder), lines_of(runs.one()), strict=False):
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=0.05)
    assert weights_of(folder).keys() == weights_of(runs.one()).keys()


def test_a_write_that_fails_in_the_middle_leaves_the_run_resumable(runs):
    """The operating system itself refuses: files of this process may not grow beyond 200 kB, which the model does."""
    name = "full"
    file = runs.config(name, max_steps=3, save_every=2)
    program = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
sys.argv = ["train", {str(file)!r}]
runpy.run_module("dynamic_llava.train", run_name="__main__")
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=runs.environment(), capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT)
    assert done.returncode == EXIT_SAVE_FAILED, done.stderr[-3000:]
    assert "checkpoint-2 could not be written" in done.stderr and "are free there" in done.stderr
    folder = runs.finish(name, runs.start(file, 1))
    assert "checkpoint-2 is incomplete" in (runs.folder / f"{name}-0.log").read_text()
    assert [line["step"] for line in lines_of(folder)] == [1, 2, 3]


@pytest.mark.parametrize("deepspeed", [None, "zero2", "zero3"])
def test_every_process_ends_at_the_first_loss_that_is_not_finite(runs, deepspeed):
    """DDP averages gradients, ZeRO steps inside its backward pass: either way no weight of a checkpoint is spoilt."""
    name = f"nan-{deepspeed}"
    extra = {} if deepspeed is None else {"deepspeed": f"configs/deepspeed/{deepspeed}.json"}
    file = runs.config(name, batch_size=4, save_every=1, learning_rate=1e30, warmup_ratio=0.1, **extra)
    folder = runs.finish(name, runs.start(file, 2), expected=EXIT_NOT_FINITE)
    assert [path.name for path in folder.glob("checkpoint-*") if is_complete(path)] == ["checkpoint-1"]
    assert not (folder / "model").exists()
    assert all(line["lm_loss"] > 0 and line["loss"] > 0 for line in lines_of(folder))
    for rank in range(2):
        assert "NaN or infinite, so training ends here" in (runs.folder / f"{name}-{rank}.log").read_text()


def test_an_image_that_one_process_cannot_decode_saves_in_both(runs):
    """Both end in the same step with the same line and one checkpoint, which `skip` goes on from; neither hangs."""
    order = list(EpochSampler(SAMPLES, STEP_SIZE, SEED, lambda: 0))
    victim = next(number for number in order[2 * STEP_SIZE :] if number % 2 == 0)  # one with an image
    step = order.index(victim) // STEP_SIZE
    image = runs.folder / "images" / f"{victim}.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:-200])
    file = runs.config("undecodable", batch_size=4)
    folder = runs.finish("undecodable", runs.start(file, 2), expected=2)
    assert is_complete(folder / f"checkpoint-{step}")
    for rank in range(2):
        log = (runs.folder / f"undecodable-{rank}.log").read_text()
        last = log.strip().splitlines()[-1]
        assert last.startswith("error: ") and f"index {victim}, id 'sample-{victim}'" in last and "Traceback" not in log
        assert last.endswith(f"the same command goes on from {folder / f'checkpoint-{step}'}")
    file.write_text(file.read_text().replace("text_only: dense", "text_only: dense\n  broken: skip"))
    runs.finish("undecodable", runs.start(file, 2))
    image.write_bytes(whole)
    assert [json.loads(line)["index"] for line in (folder / "broken.jsonl").read_text().splitlines()] == [victim]
    assert json.loads((folder / "environment.json").read_text())["resumed_from_step"] == step
    assert lines_of(folder)[-1]["step"] == STEPS
