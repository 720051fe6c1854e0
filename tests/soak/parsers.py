"""Everything that reads a file or a structure that somebody else wrote, on valid files: the corpus that is spoilt."""

import contextlib
import io
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from dynamic_llava import DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor, cli
from dynamic_llava.checkpoints.__main__ import main as checkpoints_main
from dynamic_llava.config import DataConfig
from dynamic_llava.data import SftDataset
from dynamic_llava.eval.__main__ import main as eval_main
from dynamic_llava.eval.answers import AnswerLine, write_answers
from dynamic_llava.eval.folder import AnswerStore
from dynamic_llava.eval.generation.build import BuildOptions, build
from dynamic_llava.eval.tasks import get_task
from dynamic_llava.processing.images import load_image
from dynamic_llava.sweep.config import SweepConfig
from dynamic_llava.train.__main__ import main as train_main
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.distributed import read_deepspeed
from tests.base_folders import CHATML, LLAMA_3, write_base
from tests.builders import build_model
from tests.checkpoints.folders import original_folder, published_folder
from tests.eval.task_data import TASK_DATA
from tests.eval.test_parsers import SOURCE
from tests.sft_builders import picture, tiny_processor, write_checkpoint, write_data
from tests.soak.jobs import ROOT, TRAINING
from tests.spoiling import OF_ANSWERS, TEXT_FILES, readings


@dataclass(frozen=True)
class Parser:
    """A reader and how it is put to the test."""

    files: Callable[[Path], list[Path]]
    """Writes valid files below a folder, once; returns those that are spoilt."""
    read: Callable[[Path], object]
    """Reads them all, as the library does; raises ValueError or FileNotFoundError for what it refuses."""
    cases: int = 2000
    group: str | None = None
    """The table's row, where several parsers share one."""
    names: tuple[str, ...] = ()
    """Words that stand for a file's name in messages; the names of all spoilt files are taken anyway."""


def refusal_of(main, arguments, allowed=(0, 1)):
    """Run a command in this process; raise ValueError with the line of its error where it refuses."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(argument) for argument in arguments])
    lines = [line for line in said.getvalue().splitlines() if line.startswith(("error: ", "failed: "))]
    if lines:
        raise ValueError("\n".join(lines))
    assert code in allowed, f"exit code {code} without a line that says why: {said.getvalue()[-500:]}"


def task_parser(name):
    """A benchmark's question files, read for whatever the valid ones can be read for."""
    sound = []

    def works(reading):
        try:
            reading()
        except (ValueError, FileNotFoundError):
            return False
        return True

    def files(folder):
        made = TASK_DATA[name](folder)
        sound[:] = [reading for reading in readings(made, made.answers(folder), folder) if works(reading)]
        return sorted(path for path in folder.rglob("*") if path.suffix in TEXT_FILES and path.parent.name != "out")

    def read(folder):
        for reading in sound:
            reading()

    return Parser(files, read, cases=400, group="questions of every benchmark", names=OF_ANSWERS)


def answers_parser(name):
    """An answer file that is scored."""
    made = {}

    def files(folder):
        made["data"] = TASK_DATA[name](folder / "data")
        return [write_answers(folder / "answers.jsonl", made["data"].answers(folder / "data"))]

    def read(folder):
        task = get_task(made["data"].task)
        task.score_file(folder / "answers.jsonl", folder / "data", part=True)

    return Parser(files, read, cases=200, group="answers to every benchmark")


def sources(folder):
    (folder / "source.json").write_text(json.dumps(SOURCE))
    others = [{**sample, "id": f"t{number}", "image": f"gqa/t{number}.jpg"} for number, sample in enumerate(SOURCE)]
    (folder / "training.json").write_text(json.dumps(others))
    return [folder / "source.json", folder / "training.json"]


def read_sources(folder):
    build(BuildOptions("single", folder / "source.json", folder / "out.json", (folder / "training.json",), n=1))


SETTINGS = {"model": {"dtype": "float32"}, "sparsity": "both", "task": {"name": "toy"}}


def records(folder):
    begun = AnswerStore(folder, "toy", SETTINGS, 3)
    begun.append([AnswerLine("q0", "said", metadata={"place": 0}), AnswerLine("q1", "said", metadata={"place": 1})])
    begun.close()
    return [folder / "toy.run.json", folder / "toy.part0.jsonl"]


def training_data(folder):
    file, _ = write_data(folder, samples=5)
    return [file]


def read_training_data(folder):
    """Every sample as training fetches it; as many as the file has."""
    file = folder / "data.json"
    dataset = SftDataset(DataConfig(json=str(file), image_folder=str(folder / "images"), max_length=400), PROCESSOR)
    for number in range(len(dataset)):
        dataset[number]
    entries = json.loads(file.read_bytes())
    assert len(dataset) == len(entries), f"{len(entries)} samples in the file, {len(dataset)} were read"


PROCESSOR = tiny_processor()


def images(folder):
    for ending, more in (("png", {}), ("jpg", {}), ("webp", {}), ("gif", {}), ("bmp", {}), ("tiff", {})):
        picture(size=(40, 30)).save(folder / f"a.{ending}", **more)
    return sorted(folder.iterdir())


def read_images(folder):
    for path in sorted(folder.iterdir()):
        load_image(path)


def configurations(folder):
    (folder / "run.yaml").write_text(yaml.safe_dump({"name": "run", **TRAINING}))
    for name in ("lora_7b.yaml", "dynamic_llava_7b.yaml"):
        (folder / name).write_text(yaml.safe_dump(yaml.safe_load((ROOT / "configs" / name).read_text())))
    return sorted(folder.glob("*.yaml"))


def read_configurations(folder):
    for path in sorted(folder.glob("*.yaml")):
        cli.read_yaml(RunConfig, path)


def sweeps(folder):
    for number, path in enumerate(sorted((ROOT / "configs/sweeps").glob("*.yaml"))[:3]):
        (folder / f"sweep{number}.yaml").write_text(path.read_text())
    return sorted(folder.glob("*.yaml"))


def read_sweeps(folder):
    for path in sorted(folder.glob("*.yaml")):
        cli.read_yaml(SweepConfig, path)


def deepspeeds(folder):
    for path in (ROOT / "configs/deepspeed").glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    return sorted(folder.iterdir())


def read_deepspeeds(folder):
    for path in sorted(folder.iterdir()):
        read_deepspeed(str(path))


CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A ring."}]},
    {"role": "user", "content": "Sure?"},
]


def chats(folder):
    picture().save(folder / "a.png")
    shown = {"type": "image", "image": str(folder / "a.png")}
    chat = [CHAT[0], {"role": "user", "content": [shown, {"type": "text", "text": "What?"}]}, *CHAT[2:]]
    (folder / "messages.json").write_text(json.dumps(chat))
    return [folder / "messages.json"]


def read_chats(folder):
    """A structure has no file: it is named as what it is."""
    try:
        messages = json.loads((folder / "messages.json").read_bytes())
    except ValueError:
        return  # bytes that are no structure never get here
    PROCESSOR.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)


def checkpoint(folder):
    write_checkpoint(folder / "model")
    return sorted(path for path in (folder / "model").iterdir() if path.suffix in (".json", ".jinja"))


def read_checkpoint(folder):
    DynamicLlavaForConditionalGeneration.from_pretrained(folder / "model")
    DynamicLlavaProcessor.from_pretrained(folder / "model")


def weights(folder):
    """The head of a safetensors file, and an index of several."""
    write_checkpoint(folder / "model")
    build_model().save_pretrained(folder / "parts", max_shard_size="300KB")
    whole = (folder / "model/model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    (folder / "head.json").write_bytes(whole[8 : 8 + size])
    (folder / "rest").write_bytes(whole[8 + size :])
    return [folder / "head.json", folder / "parts/model.safetensors.index.json"]


def read_weights(folder):
    head = (folder / "head.json").read_bytes()
    whole = struct.pack("<Q", len(head)) + head + (folder / "rest").read_bytes()
    (folder / "model/model.safetensors").write_bytes(whole)
    DynamicLlavaForConditionalGeneration.from_pretrained(folder / "model")
    DynamicLlavaForConditionalGeneration.from_pretrained(folder / "parts")


def other_bases(folder):
    write_base(folder / "chatml", CHATML, "<|im_end|>")
    write_base(folder / "llama", LLAMA_3, "<|eot_id|>")
    return sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".jinja"))


def read_other_bases(folder):
    for name in ("chatml", "llama"):
        processor = DynamicLlavaProcessor.from_pretrained(folder / name)
        processor.apply_chat_template(CHAT[1:], add_generation_prompt=True, tokenize=False)


def other_layouts(folder):
    original_folder(folder / "original", files="bin")
    published_folder(folder / "published", files="safetensors-shards")
    for name in ("original", "published"):
        tiny_processor().save_pretrained(folder / name)
    return sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".bin"))


def read_other_layouts(folder):
    for name in ("original", "published"):
        refusal_of(checkpoints_main, ["check", folder / name], allowed=(0,))


def training_records(folder):
    """A run of two steps that was stopped after the first, and what its folder says."""
    write_checkpoint(folder / "base", output_min_length=14)
    write_data(folder, samples=4)
    values = {**TRAINING, "name": "run", "output_folder": str(folder / "runs"), "model": {"base": str(folder / "base")}}
    values["data"] = {"json": str(folder / "data.json"), "image_folder": str(folder / "images"), "max_length": 400}
    values["train"] = {**TRAINING["train"], "batch_size": 2, "max_steps": 2, "save_every": 1}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    refusal_of(train_main, [folder / "run.yaml"], allowed=(0,))
    run = folder / "runs/run"
    (run / "model").rename(folder / "kept-model")
    found = [*run.glob("checkpoint-*/*.json"), *run.glob("*.json*"), run / "config.yaml"]
    return sorted(path for path in found if path.is_file())


def read_training_records(folder):
    """Goes on with the run; what it leaves is put back by the next case."""
    shutil.rmtree(folder / "runs/run/model", ignore_errors=True)
    refusal_of(train_main, [folder / "run.yaml"], allowed=(0,))


def finished_records(folder):
    """What lies beside a model that was trained."""
    training_records(folder)
    (folder / "kept-model").rename(folder / "runs/run/model")
    found = folder / "runs/run/model"
    return [path for path in (found / "run.yaml", found / "trained_with.json") if path.exists()]


def read_finished_records(folder):
    refusal_of(train_main, [folder / "run.yaml"], allowed=(0,))


def summaries(folder):
    """An evaluation that has ended, whose files the same command reads again."""
    write_checkpoint(folder / "model")
    TASK_DATA["pope"](folder / "data")
    read_summaries(folder)
    found = [folder / "out/summary.json", *(folder / "out/answers").glob("*")]
    return sorted(path for path in found if path.suffix in TEXT_FILES)


def read_summaries(folder):
    given = ["--model", folder / "model", "--tasks", "pope", "--data-root", folder / "data"]
    refusal_of(eval_main, [*given, "--output-folder", folder / "out", "--max-new-tokens", 2], allowed=(0,))


PARSERS = {
    **{f"questions of {name}": task_parser(name) for name in TASK_DATA},
    **{f"answers to {name}": answers_parser(name) for name in TASK_DATA},
    "sources of items": Parser(sources, read_sources),
    "records of an evaluation": Parser(
        records, lambda folder: AnswerStore(folder, "toy", SETTINGS, 3).close(), names=("toy.",)
    ),
    "training data": Parser(training_data, read_training_data, cases=1000),
    "images": Parser(images, read_images, cases=4000),
    "run configurations": Parser(configurations, read_configurations, cases=1000),
    "sweep configurations": Parser(sweeps, read_sweeps, cases=600),
    "DeepSpeed files": Parser(deepspeeds, read_deepspeeds),
    "chat messages": Parser(
        chats, read_chats, names=("message", "content", "role", "conversation", "image file", "a text")
    ),
    "checkpoint settings": Parser(checkpoint, read_checkpoint, cases=600, names=("model",)),
    "weights' heads": Parser(
        weights, read_weights, cases=300, names=("model.safetensors", "model-0000", "checkpoint of this configuration")
    ),
    "other bases": Parser(other_bases, read_other_bases, cases=400, names=("chatml", "llama")),
    "other layouts": Parser(other_layouts, read_other_layouts, cases=300, names=("original", "published")),
    "records of a training": Parser(training_records, read_training_records, cases=60, names=("checkpoint-",)),
    "records of a model": Parser(
        finished_records, read_finished_records, cases=60, names=("a finished model of another run",)
    ),
    "summaries": Parser(summaries, read_summaries, cases=60),
}
"""Name -> parser. A new reader is one entry."""
