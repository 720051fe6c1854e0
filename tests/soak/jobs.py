"""The library's jobs as a user starts them, on inputs of seconds: what is killed, and what faults are put to.

Every job runs in a folder `work` of its own beside `inputs`, which it only reads; what it leaves is compared.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import CLIPVisionConfig, LlamaConfig

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from tests.builders import BOS, EOS, IMAGE_SIZE, IMAGE_TOKEN, PAD, PATCH, TINY_SPARSITY, TOKENS_PER_IMAGE, VOCABULARY
from tests.eval.run_builders import ragged_checkpoint
from tests.eval.task_data import TASK_DATA
from tests.sft_builders import tiny_processor, write_checkpoint, write_data

ROOT = Path(__file__).resolve().parents[2]
MARK = "SOAK_MARK"
"""Environment variable by which whatever a job has started is found."""
PATIENCE = 180
"""Seconds in which any of the jobs must have ended, on a machine that does other work too."""
TASKS = ("pope", "textvqa", "gqa", "vqav2", "mme", "scienceqa", "mmbench", "seed", "vizwiz")
TIMED = ("mfu", "seconds", "cpu_seconds", "train_seconds", "train_runtime")
TRAINING = {
    "model": {"base": "../inputs/base"},
    "data": {"json": "../inputs/data.json", "image_folder": "../inputs/images", "max_length": 400},
    "sparsity": {**TINY_SPARSITY.to_dict(), "output_min_length": 14, "mask_grad_clip": 0.001},
    "train": {"batch_size": 4, "max_steps": 12, "learning_rate": 2e-4, "log_every": 1, "save_every": 4},
}
SWEEP = {
    "name": "few",
    "title": "A few rows",
    "tiny": {"train_images": 8, "test_images": 16, "questions": 8, "descriptions": 1},
    "columns": [{"header": "accuracy", "task": "tiny", "metric": "accuracy/all", "scale": 100}],
    "rows": [{"title": "I|T", "config": "../inputs/swept.yaml"}],
}
MAIN_JOB = {
    "tiny.train-images": 4, "tiny.test-images": 16, "tiny.questions": 12, "tiny.descriptions": 3,
    "tiny.uncached-questions": 2, "tiny.uncached-descriptions": 1, "tiny.description-tokens": 12,
    "tiny.timing-batch": 1, "tiny.timing-tokens": 1, "tiny.timing-repeats": 1, "tiny.picture-scenes": 2,
    "tiny.picture-answers": 1, "train.max-steps": 2, "train.batch-size": 2, "name": "report", "output-folder": ".",
}  # fmt: skip


def digests(folder, *patterns):
    """Return path -> SHA-256 of the files below a folder that fit one of the patterns."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(found)}


def untimed(value):
    """Return a JSON value without what a clock or a machine's load has put into it."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in TIMED and not k.endswith(("_ms", "_per_second"))}
    return [untimed(one) for one in value] if isinstance(value, list) else value


def training_result(work):
    """The model's files, and the numbers of every step."""
    lines = [json.loads(line) for line in (work / "runs/run/metrics.jsonl").read_text().splitlines()]
    found = digests(work / "runs/run/model", "*.safetensors", "*.json", "run.yaml")
    return {**found, "metrics": [untimed(line) for line in lines if "lm_loss" in line]}


def evaluation_result(work):
    """Every answer, and the scores."""
    tasks = json.loads((work / "out/summary.json").read_text())["tasks"]
    scores = {name: (task["value"], task.get("error")) for name, task in tasks.items()}
    return {**digests(work / "out", "answers/*", "submissions/*"), "scores": scores}


def sweep_result(work):
    """The model, and the table's numbers."""
    table = json.loads((work / "runs/sweeps/few/results.json").read_text())
    models = digests(work / "runs", "*/model/*.safetensors")
    return {**models, "rows": untimed(table["rows"]), "missing": table["missing"]}


@dataclass(frozen=True)
class Job:
    """A command and what its end is compared by."""

    arguments: tuple[str, ...]
    """What follows the interpreter."""
    result: Callable[[Path], dict]
    """Of the folder `work`: name -> anything that must be equal after every kill."""
    inputs: Callable[[Path], None]
    """Writes what the command reads, once."""
    own_cache: bool = False
    """Whether generated files are a part of the job; otherwise they lie with the inputs."""
    environment: dict = field(default_factory=dict)
    stops: tuple[int, ...] = (-2, -15, 130, 143)
    """Exit codes after SIGINT and SIGTERM; 0 is allowed when the job was about to end."""
    done: str = "nothing"
    """What the same command says, with exit code 2, where all was done before the kill."""


def training_inputs(folder, **changes):
    """Write a base, data and the file of a run."""
    write_checkpoint(folder / "base", output_min_length=14)
    write_data(folder, samples=24)
    values = {"name": "run", **TRAINING, "train": TRAINING["train"] | changes}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))


def wide_model():
    """Return a random model of some 30 MB, whose files take their time."""
    sizes = {"num_attention_heads": 4, "initializer_range": 0.1}
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, image_size=IMAGE_SIZE, patch_size=PATCH, **sizes
    )
    text = LlamaConfig(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=4, vocab_size=VOCABULARY, pad_token_id=PAD,
        bos_token_id=BOS, eos_token_id=EOS, tie_word_embeddings=False, **sizes,
    )  # fmt: skip
    config = DynamicLlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=TOKENS_PER_IMAGE,
        tie_word_embeddings=False, sparsity=TINY_SPARSITY,
    )  # fmt: skip
    torch.manual_seed(0)
    return DynamicLlavaForConditionalGeneration(config)


def checkpointing_inputs(folder):
    """Write the inputs of a run that saves after each of its steps, and mostly does that."""
    training_inputs(folder, max_steps=6, save_every=1, batch_size=1)
    wide_model().save_pretrained(folder / "base")


def preparation_inputs(folder):
    """Write a data file of thousands of samples."""
    training_inputs(folder)
    entries = json.loads((folder / "data.json").read_text())
    many = [{**entry, "id": f"{entry['id']}-{number}"} for number in range(150) for entry in entries]
    (folder / "data.json").write_text(json.dumps(many))


def evaluation_inputs(folder):
    """Write a model and small benchmarks."""
    ragged_checkpoint(folder / "model")
    for name in TASKS:
        TASK_DATA[name](folder / "data")


def conversion_inputs(folder):
    """Write a checkpoint in this library's layout."""
    wide_model().save_pretrained(folder / "source")
    tiny_processor().save_pretrained(folder / "source")


def sweep_inputs(folder):
    """Write a sweep of a training and its evaluation."""
    small = {"predictor_width": 16, "predictor_heads": 2, "predictor_mlp": 32, "mask_grad_clip": 0.05}
    train = {"max_steps": 2, "batch_size": 2, "learning_rate": 1e-5}
    swept = {"name": "swept", "model": {"base": "tiny"}, "data": {"max_length": 512}, "sparsity": small, "train": train}
    (folder / "swept.yaml").write_text(yaml.safe_dump(swept))
    (folder / "few.yaml").write_text(yaml.safe_dump(SWEEP))


def report_inputs(folder):
    """Run the main job in small."""
    options = [word for name, value in MAIN_JOB.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "dynamic_llava.tiny", "job", str(ROOT / "configs" / "tiny.yaml"), *options]
    done = subprocess.run(command, cwd=folder, env=surroundings(folder / "cache"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def report_result(work):
    """The page and its pictures' names; drawing a picture twice gives the same bytes or not, as matplotlib likes."""
    return digests(work, "tiny.md") | {"pictures": sorted(path.name for path in work.glob("*.png"))}


BUILD = """
import sys
from pathlib import Path
from dynamic_llava.cli.commands import exit_on_mistake
from dynamic_llava.tiny.world.dataset import build_world
try:
    build_world(Path("world"), train=150, test=60)
except (ValueError, OSError) as error:
    sys.exit(exit_on_mistake(error))
"""
STOPPED = (75, -2, -15, 130, 143)
TRAIN = ("-m", "dynamic_llava.train", "../inputs/run.yaml")
LAUNCH = ("-m", "dynamic_llava.train.launch", "../inputs/run.yaml")
EVALUATE = (
    "-m", "dynamic_llava.eval", "--model", "../inputs/model", "--data-root", "../inputs/data", "--output-folder", "out",
    "--tasks", ",".join(TASKS), "--max-new-tokens", "8", "--batch-size", "2",
)  # fmt: skip
JOBS = {
    "preparation": Job(
        ("-m", "dynamic_llava.data", "first-batch", "../inputs/run.yaml"),
        lambda work: digests(work / "cache", "**/*.arrow", "**/*.json"), preparation_inputs, own_cache=True,
    ),
    "training": Job(TRAIN, training_result, training_inputs, stops=STOPPED),
    "training on two processes": Job(
        LAUNCH, training_result, training_inputs, environment={"PROCESSES": "2"}, stops=STOPPED,
    ),
    "checkpointing": Job(TRAIN, training_result, checkpointing_inputs, stops=STOPPED),
    "evaluation": Job(EVALUATE, evaluation_result, evaluation_inputs),
    "conversion": Job(
        ("-m", "dynamic_llava.checkpoints", "convert", "../inputs/source", "new", "--dtype", "bfloat16"),
        lambda work: digests(work, "new/*"), conversion_inputs, done="new is there already and not empty",
    ),
    "world building": Job(
        ("-c", BUILD), lambda work: digests(work, "world/**/*"), lambda folder: None,
    ),
    "sweep": Job(
        ("-m", "dynamic_llava.sweep", "../inputs/few.yaml"), sweep_result, sweep_inputs, stops=STOPPED,
    ),
    "report": Job(
        ("-m", "dynamic_llava.tiny", "page", "../inputs/report", "--page", "tiny.md"), report_result,
        report_inputs,
    ),
}  # fmt: skip
"""Name -> job. A new stage of the library is one entry."""


def surroundings(cache, mark="", **more):
    """Return the environment of a job's process."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    own = {"PYTHONPATH": path, "DYNAMIC_LLAVA_CACHE": str(cache), "CUDA_VISIBLE_DEVICES": "", MARK: mark}
    return {**kept, **own, **more}


class Bench:
    """A job's folder: its inputs, its undisturbed result, and `work`, emptied for every new start."""

    def __init__(self, job, folder):
        self.job, self.folder, self.mark = job, folder, f"{folder}-{time.monotonic_ns()}"
        self.work = folder / "work"
        (folder / "inputs").mkdir(parents=True)
        self.job.inputs(folder / "inputs")
        self.clear()

    def clear(self):
        """Begin with an empty folder."""
        self.remove(self.work)
        self.work.mkdir()

    @staticmethod
    def remove(folder):
        """Remove a folder, whatever was done to it; what a process that is ending still writes there, too."""
        for _ in range(20):
            if subprocess.run(["rm", "-rf", str(folder)], capture_output=True).returncode == 0:
                return
            time.sleep(0.5)
        subprocess.run(["rm", "-rf", str(folder)], check=True)

    @property
    def log(self):
        """What the latest process has said."""
        return self.folder / "log.txt"

    @property
    def cache(self):
        """Folder of generated files."""
        return self.work / "cache" if self.job.own_cache else self.folder / "cache"

    def start(self, *, before=(), arguments=None, **more):
        """Start the command, or other arguments, in a session of its own; `before` stands before the interpreter.

        What it says goes through a pipe, so that no limit on files is one on words.
        """
        environment = surroundings(self.cache, self.mark, **self.job.environment, **more)
        with self.log.open("wb") as log:
            self.ear = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log, start_new_session=True)
        process = subprocess.Popen(
            [*before, sys.executable, *(arguments or self.job.arguments)],
            cwd=self.work,
            env=environment,
            stdout=self.ear.stdin,
            stderr=self.ear.stdin,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.ear.stdin.close()
        return process

    def said(self):
        """Return what the latest process has said, by now if something that it started goes on."""
        with suppress(subprocess.TimeoutExpired):
            self.ear.wait(2)
        return self.log.read_text(errors="replace")

    def undisturbed(self):
        """Run the job; return (its result, seconds until it first wrote anything, seconds in all)."""
        self.clear()
        begun, first = time.monotonic(), None
        process = self.start()
        while process.poll() is None:
            if first is None and any(self.work.iterdir()):
                first = time.monotonic() - begun
            assert time.monotonic() - begun < 4 * PATIENCE, f"no end within {4 * PATIENCE} s"
            time.sleep(0.02)
        assert process.returncode == 0, self.said()[-3000:]
        seconds = time.monotonic() - begun
        return self.job.result(self.work), first or seconds / 2, seconds

    def left_over(self):
        """Return the processes that the job has started and that still run."""
        mark, found = f"{MARK}={self.mark}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((int(folder.name), (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()))
            except OSError:
                continue
        return found
