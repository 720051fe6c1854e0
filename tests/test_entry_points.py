"""Every entry point: its --help, the extras that it names, what it prints at its start, and the files it leaves."""

import json
import os
import re
import stat
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from dynamic_llava.cli import commands
from dynamic_llava.cli.commands import EXTRAS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dynamic_llava"
HELP = {
    "calibrate.__main__": [""],
    "chat.__main__": [""],
    "checkpoints.__main__": ["", "convert", "check", "assemble"],
    "data.__main__": ["", "check", "first-batch"],
    "eval.__main__": [
        "", "compare", "compare-seeds", "score", "build-lvis", "build-sharegpt4v", "ppl-speed",
    ],
    "eval.vlmevalkit": [""],
    "look.__main__": [""],
    "profile.__main__": [
        "", "flops", "tokens", "memory", "memory x.yaml", "latency", "roofline", "training", "curve", "benchmark",
        "part", "summary", "against", "data",
    ],
    "report": [""],
    "smol.__main__": ["", "job", "table", "page"],
    "sweep.__main__": [""],
    "tiny.__main__": ["", "job", "page", "budgets", "measure", "benchmarks"],
    "tiny.train_base": [""],
    "train.__main__": [""],
    "train.launch": [""],
}  # fmt: skip
"""Every module that `python -m` runs, with its commands; the console command over them: tests/test_console.py."""
PAGES = [(module, page) for module, pages in HELP.items() for page in pages]
EXTRA_OF = {
    "calibrate.__main__": "train", "chat.__main__": None, "checkpoints.__main__": "convert",
    "data.__main__": "train", "eval.__main__": "eval", "eval.vlmevalkit": "eval", "look.__main__": "look",
    "profile.__main__": "train", "report": "train", "smol.__main__": "train", "sweep.__main__": "train",
    "tiny.__main__": "train", "tiny.train_base": "train", "train.__main__": "train", "train.launch": "train",
}  # fmt: skip
TWINS = [{"--output-folder", "--output-dir"}, {"--batch-size", "--batch"}, {"--output", "--out"}]
ALWAYS_THERE = {"yaml", "tqdm", "filelock"}
"""In an extra, because it is imported by name, but transformers needs it as well."""
BLOCKED = """
import runpy, sys
for name in {hidden!r}:
    sys.modules[name] = None
sys.argv = ["x", *{arguments!r}]
runpy.run_module("dynamic_llava.{module}", run_name="__main__", alter_sys=True)
"""


def help_of(module, page, capsys):
    with suppress(SystemExit):
        import_module(f"dynamic_llava.{module}").main([*page.split(), "--help"])
    said = capsys.readouterr()
    assert not said.err
    return said.out


def options_of(text):
    """Yield (option, its text) of a help page; an option begins a line, two spaces in."""
    for found in re.finditer(r"^  (-[-\w]*)(.*?)(?=^\S|^  \S|\Z)", text, flags=re.MULTILINE | re.DOTALL):
        yield found[0].split()[0].rstrip(","), " ".join(found[0].split())


def test_every_entry_point_is_here():
    files = [path for path in PACKAGE.rglob("*.py") if 'if __name__ == "__main__":' in path.read_text()]
    found = {path.relative_to(PACKAGE).with_suffix("") for path in files}
    assert {".".join(path.parts) for path in found} - {"__main__"} == set(HELP) == set(EXTRA_OF)


@pytest.mark.parametrize(("module", "page"), PAGES)
def test_help_is_of_one_style(module, page, capsys):
    """A usage line first, no frames, every option with its default or the word required."""
    text = help_of(module, page, capsys)
    assert text.startswith("usage: python -m dynamic_llava."), text
    assert not set(text) & set("╭╮╰╯│"), text
    options = dict(options_of(text))
    assert "-h" in options
    wrong = [
        flag for flag, about in options.items() if flag != "-h" and not re.search(r"\((default: .*|required)\)", about)
    ]
    assert not wrong, f"{wrong} say neither a default nor that they are required"


def test_no_option_has_a_twin(capsys):
    flags = {flag for module, page in PAGES for flag, _ in options_of(help_of(module, page, capsys))}
    assert {"--output-folder", "--batch-size", "--output", "--keep-projector", "--train.batch-size"} <= flags
    assert not [twins for twins in TWINS if twins <= flags]


def test_places_of_a_conversion_are_named(capsys):
    assert re.search(r"\bSRC DST$", help_of("checkpoints.__main__", "convert", capsys).split("\n\n")[0])


@pytest.mark.parametrize(
    ("module", "arguments", "meant"),
    [
        ("eval.__main__", ["--model", "x", "--output-dir", "y"], "--output-folder"),
        ("tiny.__main__", ["measure", "--output-dir", "y"], "--output-folder"),
        ("eval.__main__", ["build-lvis", "--kind", "single", "--out=x"], "--output"),
        ("profile.__main__", ["benchmark", "--output-dir", "y"], "--output-folder"),
        ("profile.__main__", ["latency", "--batch", "2"], "--batch-size"),
        ("train.__main__", ["--output-dir", "y"], "--output-folder"),
        ("checkpoints.__main__", ["convert", "a", "b", "--visiontower", "c"], "--vision-tower"),
        ("chat.__main__", ["--model", "tiny", "--max-tokens", "3"], "--max-new-tokens"),
        ("look.__main__", ["--output-dir", "y"], "--output-folder"),
    ],
)
def test_a_mistyped_or_former_option_names_the_one_that_is_meant(module, arguments, meant, capsys):
    with pytest.raises(SystemExit, match="2"):
        import_module(f"dynamic_llava.{module}").main(arguments)
    assert meant in capsys.readouterr().err.split("error:")[-1] if module != "train.__main__" else True


def test_the_extras_are_those_of_the_project():
    text = (ROOT / "pyproject.toml").read_text()  # Python 3.10 reads no TOML
    section = text.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    declared = {}
    for extra, packages in re.findall(r"^([\w-]+) = \[(.*?)\]", section, flags=re.MULTILINE | re.DOTALL):
        for name in re.findall(r'^\s*"([\w.-]+)', packages.replace('["', '[\n"'), flags=re.MULTILINE):
            if extra != "dev":
                declared.setdefault(name, set()).add(extra)
    names = {"google": "protobuf", "yaml": "pyyaml"}
    assert {names.get(name, name): set(extras) for name, extras in EXTRAS.items()} == declared


COMMANDS = {
    "train": ["run.yaml"],
    "train.launch": ["run.yaml"],
    "data": ["check", "run.yaml"],
    "sweep": ["sweep.yaml", "--dry-run"],
    "tiny.train_base": [],
    "tiny": ["page", "."],
    "smol": ["page", "."],
    "profile": ["memory", "run.yaml"],
    "look": [],
}


def run(module, arguments, folder, hidden=(), **more):
    code = BLOCKED.format(hidden=sorted(hidden), module=module, arguments=arguments)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment, timeout=300, **more
    )


@pytest.mark.parametrize("module", COMMANDS)
def test_a_missing_package_names_its_extra(tmp_path, module):
    for file in ("run.yaml", "sweep.yaml", "config.yaml"):
        (tmp_path / file).write_text("{}")
    done = run(module, COMMANDS[module], tmp_path, set(EXTRAS) - ALWAYS_THERE)
    extra = EXTRA_OF.get(module) or EXTRA_OF[f"{module}.__main__"]
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(
        rf'error: \w+ is not installed; it comes with: pip install "dynamic-llava\[{extra}\]"\n', done.stderr
    ), done.stderr


@pytest.mark.parametrize("package", ["datasets", "accelerate", "peft"])
def test_a_package_that_is_needed_later_names_its_extra_too(tmp_path, package, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)

    @commands.entry_point("train")
    def main():
        import_module(package)
        return 0

    assert main() == 2
    assert f'{package} is not installed; it comes with: pip install "dynamic-llava[train]"' in capsys.readouterr().err


def test_what_transformers_says_of_a_missing_package_names_the_extra():
    said = "LlamaConverter requires the SentencePiece library but it was not found in your environment."
    assert commands.missing_package(ImportError(said), None).endswith('pip install "dynamic-llava[convert]"')
    assert commands.missing_package(ImportError("cannot import name 'x' from 'dynamic_llava'"), "train") is None


def test_chat_needs_no_extra_and_says_nothing_of_others(tmp_path):
    """Without every optional package; and what is on stderr is ours."""
    arguments = ["--model", "tiny", "--sparsity", "none", "--max-new-tokens", "2"]
    done = run("chat", arguments, tmp_path, set(EXTRAS) - ALWAYS_THERE, input="What is in the image?\n")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    ours = ("a dense checkpoint without ", "cache: ")
    assert all(line.startswith(ours) for line in done.stderr.splitlines()), done.stderr


OURS = ("a dense checkpoint without ", "run: ", "MaskedSoftmax runs as ", "image_keep_rate", "output_keep_rate")


@pytest.mark.slow
def test_a_run_says_what_is_ours_logs_its_last_step_and_leaves_files_that_others_can_read(tmp_path):
    """umask 022: 0644 and 0755; the same with a group's umask. Nothing on stderr is another package's."""
    (tmp_path / "images").mkdir()
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That is it."}]
    from PIL import Image

    samples = []
    for number in range(6):
        Image.new("RGB", (40, 40), (number * 20, 0, 0)).save(tmp_path / "images" / f"{number}.png")
        samples.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(samples))
    values = {
        "name": "run",
        "model": {"base": "tiny"},
        "data": {"json": "data.json", "image_folder": "images"},
        "sparsity": {"predictor_width": 64, "predictor_heads": 4, "predictor_mlp": 128},
        "train": {"batch_size": 2, "max_steps": 5, "log_every": 3, "save_every": 2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    for mask, output in ((0o022, "a"), (0o007, "b")):
        done = run("train", ["run.yaml", "--output-folder", output], tmp_path, umask=mask)
        assert done.returncode == 0, done.stderr
        assert set(done.stdout.splitlines()) == {line for line in done.stdout.splitlines() if ": " in line}
        assert "DeepSpeed" not in done.stdout and "accelerator to" not in done.stdout
        foreign = [line for line in done.stderr.splitlines() if not line.startswith(OURS)]
        assert not foreign, foreign
        lines = [json.loads(line) for line in (tmp_path / output / "run" / "metrics.jsonl").read_text().splitlines()]
        assert {line["step"] for line in lines if "lm_loss" in line} >= {3, 5}
        for path in (tmp_path / output).rglob("*"):
            wanted = (0o777 if path.is_dir() else 0o666) & ~mask
            assert stat.S_IMODE(path.stat().st_mode) == wanted, f"{path}: {path.stat().st_mode:o}"


def test_whatever_is_saved_can_be_read_like_other_files(tmp_path):
    from dynamic_llava.checkpoints.convert import convert
    from dynamic_llava.tiny import BASE_WEIGHTS
    from dynamic_llava.tiny.job.job import write_untrained_base
    from dynamic_llava.tiny.world.dataset import build_world
    from tests.builders import build_model

    before = os.umask(0o027)
    try:
        build_model().save_pretrained(tmp_path / "saved")
        convert(tmp_path / "saved", tmp_path / "converted", say=lambda line: None)
        write_untrained_base(BASE_WEIGHTS, tmp_path / "untrained", 0)
        build_world(tmp_path / "world", train=1, test=4)
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        wanted = 0o750 if path.is_dir() else 0o640
        assert stat.S_IMODE(path.stat().st_mode) == wanted, f"{path}: {path.stat().st_mode:o}"
