"""configs/your_data.yaml from end to end on a handful of images; settings that contradict each other are refused."""

import json
import re
from pathlib import Path

import pytest

from dynamic_llava import DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor, cli
from dynamic_llava.data.__main__ import main as data_main
from dynamic_llava.processing.prompts import conversation_prompt
from dynamic_llava.profile.__main__ import main as profile_main
from dynamic_llava.sweep.config import SweepConfig
from dynamic_llava.sweep.plan import make_plan
from dynamic_llava.tiny.__main__ import main as tiny_main
from dynamic_llava.tiny.job.config import JobConfig
from dynamic_llava.train.__main__ import main
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.launch import main as launch_main
from tests.sft_builders import write_data

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The file copied beside data of one's own, with nothing but the lines changed that it calls yours."""
    monkeypatch.chdir(tmp_path)
    file, images = write_data(tmp_path, samples=6)
    file.rename("your_data.json")
    images.rename("your_images")
    text = (CONFIGS / "your_data.yaml").read_text()
    assert text.count("# yours") == 3
    copied = tmp_path / "my_run.yaml"
    copied.write_text(text.replace("name: your_data", "name: mine"))
    return copied


def test_the_file_that_readme_points_to_trains_on_your_data(copy, capsys):
    assert "configs/your_data.yaml" in (CONFIGS.parent / "README.md").read_text()
    trial = ["--model.base", "tiny", "--train.max-steps", "1", "--train.gradient-accumulation", "1"]
    assert data_main(["check", str(copy), *trial[:2]]) == 0
    assert "6 samples, 6 can be trained on" in capsys.readouterr().out
    assert main([str(copy), *trial, "--data.workers", "0"]) == 0
    model = copy.parent / "runs" / "mine" / "model"
    assert str(Path("runs/mine/model")) in capsys.readouterr().out
    assert json.loads((model / "config.json").read_text())["sparsity"]["image_keep_rate"] == 0.2
    processor = DynamicLlavaProcessor.from_pretrained(model)
    prompt = conversation_prompt([("<image>\nQuestion 1?", None)])
    inputs = processor(prompt, copy.parent / "your_images" / "1.png")
    loaded = DynamicLlavaForConditionalGeneration.from_pretrained(model).eval()
    assert loaded.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    assert profile_main(["memory", str(CONFIGS / "your_data.yaml"), "--gpus", "1", "--gpu-memory", "80"]) == 0


def extending(folder, text):
    """Write a file that starts from configs/tiny.yaml; return it."""
    file = folder / "mine.yaml"
    file.write_text(f"extends: {CONFIGS / 'tiny.yaml'}\nname: mine\n{text}\n")
    return file


CONTRADICTIONS = {
    "own data": ("data: {json: your_data.json}", r"data\.json='your_data\.json' and a `tiny` section contradict"),
    "own images": ("data: {image_folder: x}", r"data\.image_folder='x' and a `tiny` section contradict each other"),
    "another mode": ("train: {sparsity_mode: image}", r"train\.sparsity_mode='image' and a `tiny` section contradict"),
    "nothing to learn": ("train: {tune: predictors}", r"train\.tune='predictors' and a `tiny` section contradict"),
    "deepspeed": ("train: {deepspeed: x.json, clip_predictors_separately: false}", r"leave train\.deepspeed out"),
    "adapters": ("lora: {rank: 4}", r"a `lora` section is given but train\.tune='full'"),
    "clipping to nothing": ("train: {max_grad_norm: 0}", r"clip_predictors_separately clips to train\.max_grad_norm"),
}
"""What is added to configs/tiny.yaml -> what is said."""
ENTRIES = {
    "train": lambda file: main([str(file)]),
    "launch": lambda file: launch_main([str(file)]),
    "check": lambda file: data_main(["check", str(file)]),
    "first-batch": lambda file: data_main(["first-batch", str(file)]),
    "memory": lambda file: profile_main(["memory", str(file)]),
    "job": lambda file: tiny_main(["job", str(file)]),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_sections_that_contradict_each_other_are_refused(tmp_path, what):
    text, message = CONTRADICTIONS[what]
    with pytest.raises(ValueError, match=message):
        cli.read_yaml(JobConfig, extending(tmp_path, text))


@pytest.mark.parametrize("entry", ENTRIES)
def test_own_data_in_a_copy_of_the_tiny_file_are_refused_everywhere(tmp_path, capsys, entry):
    file = tmp_path / "mine.yaml"
    text = (CONFIGS / "tiny.yaml").read_text()
    file.write_text(text.replace("  max_length: 512\n", "  max_length: 512\n  json: a.json\n  image_folder: .\n"))
    assert ENTRIES[entry](file) == 2
    error = capsys.readouterr().err
    assert "`tiny` section" in error and "data that it generates itself" in error and "Traceback" not in error
    assert str(file) in error and "configs/your_data.yaml" in error


def test_the_way_out_is_one(tmp_path):
    config = cli.read_yaml(RunConfig, extending(tmp_path, "data: {json: your_data.json}\ntiny: null"))
    assert type(config) is RunConfig and config.data.json == "your_data.json"


@pytest.mark.parametrize("entry", sorted(set(ENTRIES) - {"job"}))
def test_the_file_of_the_main_job_names_its_command_everywhere_else(capsys, entry):
    file = CONFIGS / "tiny.yaml"
    assert ENTRIES[entry](file) == 2
    error = capsys.readouterr().err
    (command,) = re.findall(rf"`python -m dynamic_llava\.(\w+) job {re.escape(str(file))}`", error)
    assert command == "tiny"
    with pytest.raises(SystemExit, match="2"):
        tiny_main(["job", str(file), "--tiny.seeds", "0"])
    assert "tiny.seeds=0 is not allowed" in capsys.readouterr().err


def test_the_main_job_wants_its_file(capsys):
    assert tiny_main(["job", "--seed", "1"]) == 2
    assert "dynamic_llava.tiny job configs/tiny.yaml" in capsys.readouterr().err


TINY_COLUMN = {"header": "PPL", "task": "tiny", "metric": "ppl"}
POPE = {"header": "POPE", "task": "pope"}
SWEEPS = {
    "a run with data of its own": (
        {"tiny": {}, "columns": [TINY_COLUMN], "rows": [{"title": "mine", "config": "own.yaml"}]}, (),
        r"row 'mine' names data of its own \(mine\.json\), and the sweep's `tiny` section",
    ),
    "data in a row's overrides": (
        {"tiny": {}, "columns": [TINY_COLUMN],
         "rows": [{"title": "mine", "config": "bare.yaml", "overrides": ["--data.json", "x.json"]}]}, (),
        r"row 'mine' names data of its own \(x\.json\)",
    ),
    "data on the command line": (
        {"tiny": {}, "columns": [TINY_COLUMN], "rows": [{"title": "mine", "config": "bare.yaml"}]},
        ("--data.json", "x.json"), r"row 'mine' names data of its own \(x\.json\)",
    ),
    "a world that no column asks for": (
        {"tiny": {}, "columns": [POPE], "rows": [{"title": "mine", "config": "own.yaml"}]}, (),
        "`tiny` section, on whose data every run would be trained, and no column of task tiny",
    ),
    "benchmarks' data without a benchmark": (
        {"tiny": {}, "columns": [TINY_COLUMN], "data_root": "x", "rows": [{"title": "base", "model": "tiny"}]}, (),
        "sets data_root for benchmarks, and every column is of task tiny",
    ),
    "overrides without a training": (
        {"columns": [POPE], "rows": [{"title": "base", "model": "tiny"}]}, ("--seed", "1"),
        "--seed is for trainings, and no row of the sweep is one",
    ),
    "no question": (
        {"tiny": {"questions": 0}, "columns": [TINY_COLUMN], "rows": [{"title": "base", "model": "tiny"}]}, (),
        r"tiny\.questions=0 is not allowed; give 1 or more",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SWEEPS)
def test_a_sweep_that_contradicts_itself_is_refused(tmp_path, monkeypatch, what):
    monkeypatch.setattr("dynamic_llava.sweep.plan.build_world", lambda **sizes: tmp_path / "world")
    values, overrides, message = SWEEPS[what]
    (tmp_path / "own.yaml").write_text("model: {base: tiny}\ndata: {json: mine.json, image_folder: .}\n")
    (tmp_path / "bare.yaml").write_text("model: {base: tiny}\n")
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps({"name": "s", **values}))
    with pytest.raises(ValueError, match=message):
        make_plan(cli.read_yaml(SweepConfig, file), file, overrides)
