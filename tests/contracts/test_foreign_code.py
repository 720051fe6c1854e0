"""No code of a checkpoint runs: no load may ask whether it should, whoever sits at the program's standard input."""

import ast
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor
from dynamic_llava.model.supported import SETTINGS_FILES
from tests.eval.task_data import pope
from tests.tiny_pipeline import write_checkpoint

PACKAGE = Path(__file__).resolve().parents[2] / "dynamic_llava"
LOADS = {"from_pretrained", "from_config"}
OWN = {
    "DynamicLlavaConfig", "DynamicLlavaForConditionalGeneration", "DynamicLlavaProcessor", "Dynamic",
    "_load_config()", "cls.config_class",
}  # fmt: skip
"""Classes of this package; they refuse trust_remote_code=True and say False to transformers."""


def loads_of(path):
    """Yield (line, owner, whether trust_remote_code=False is said) of every load in a source file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADS:
            said = [word.value for word in node.keywords if word.arg == "trust_remote_code"]
            refused = len(said) == 1 and isinstance(said[0], ast.Constant) and said[0].value is False
            yield node.lineno, ast.unparse(node.func.value), refused


def test_every_load_in_the_package_refuses_code():
    found = [(path, *load) for path in sorted(PACKAGE.rglob("*.py")) for load in loads_of(path)]
    others = [load for load in found if load[2] not in OWN]
    assert {load[2] for load in others} >= {"AutoTokenizer", "super()", "AutoModel"}, "the search finds nothing"
    wrong = [f"{path.relative_to(PACKAGE)}:{line} {owner}" for path, line, owner, refused in others if not refused]
    assert not wrong, f"say trust_remote_code=False: {wrong}"


def test_nothing_in_the_package_trusts_code():
    """Not under another name either: no call that passes True, none of transformers that runs a folder's code."""
    words = ("trust_remote_code=True", "trust_remote_code: True", "get_class_from_dynamic_module", "custom_generate=")
    allowed = {"model/supported.py": "trust_remote_code=True"}  # the refusal itself
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for word in words:
            name = str(path.relative_to(PACKAGE))
            assert word not in text or allowed.get(name) == word, f"{name} holds {word}"


def edit(path, **values):
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**found, **values}), encoding="utf-8")


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("clean") / "model", seed=0)


class Attack:
    """A copy of a checkpoint with Python code that writes a file as soon as it is run."""

    def __init__(self, clean, folder):
        self.folder, self.ran = folder / "model", folder / "it ran"
        shutil.copytree(clean, self.folder)
        code = f"open({str(self.ran)!r}, 'w').close()\nclass Evil:\n    pass\ndef generate(*a, **k):\n    pass\n"
        (self.folder / "evil.py").write_text(code, encoding="utf-8")
        (self.folder / "custom_generate").mkdir()
        (self.folder / "custom_generate" / "generate.py").write_text(code, encoding="utf-8")

    def tokenizer(self):
        edit(
            self.folder / "tokenizer_config.json",
            tokenizer_class="Evil",
            auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        )
        return self

    def file(self, name):
        names = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
        mapped = dict.fromkeys((*names, "AutoTokenizer", "AutoVideoProcessor"), "evil.Evil")
        edit(self.folder / name, auto_map=mapped, custom_generate=str(self.folder))
        return self

    def parts_of_the_model(self):
        values = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        for part in ("vision_config", "text_config"):
            values[part]["auto_map"] = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}
        edit(self.folder / "config.json", **values)
        return self


@pytest.fixture
def attack(clean, tmp_path, monkeypatch):
    """Code in a checkpoint's folder, and somebody who says yes to every question."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    monkeypatch.chdir(tmp_path)
    made = Attack(clean, tmp_path)
    yield made
    assert not made.ran.exists(), "code of the checkpoint ran"


def _command(module, *arguments):
    from importlib import import_module

    return import_module(f"dynamic_llava.{module}").main([*map(str, arguments)])


def _run_file(folder):
    sample = {"id": "0", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]}
    (folder.parent / "data.json").write_text(json.dumps([sample]), encoding="utf-8")
    data = {"json": str(folder.parent / "data.json"), "image_folder": str(folder.parent)}
    values = {"model": {"base": str(folder)}, "data": data, "output_folder": str(folder.parent / "runs")}
    path = folder.parent / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def _evaluation(folder):
    pope(folder.parent)
    return [
        "--model",
        folder,
        "--tasks",
        "pope",
        "--data-root",
        folder.parent,
        "--output-folder",
        folder.parent / "out",
    ]


def _pipeline(folder):
    from transformers import pipeline

    return pipeline("image-text-to-text", model=str(folder))


def _auto(name, folder):
    import transformers

    return getattr(transformers, name).from_pretrained(folder)


COMMANDS = {
    "chat": lambda folder: _command("chat.__main__", "--model", folder, "--sparsity", "none"),
    "eval": lambda folder: _command("eval.__main__", *_evaluation(folder)),
    "train": lambda folder: _command("train.__main__", _run_file(folder)),
    "data check": lambda folder: _command("data.__main__", "check", _run_file(folder)),
    "data first-batch": lambda folder: _command("data.__main__", "first-batch", _run_file(folder)),
    "checkpoints convert": lambda folder: _command("checkpoints.__main__", "convert", folder, folder.parent / "new"),
    "checkpoints check": lambda folder: _command("checkpoints.__main__", "check", folder),
}
LOADERS = {
    "processor": DynamicLlavaProcessor.from_pretrained,
    "model": DynamicLlavaForConditionalGeneration.from_pretrained,
    "AutoProcessor": lambda folder: _auto("AutoProcessor", folder),
    "AutoModel": lambda folder: _auto("AutoModelForImageTextToText", folder),
    "pipeline": _pipeline,
}
CONFIGURATIONS = {
    "config": DynamicLlavaConfig.from_pretrained,
    "AutoConfig": lambda folder: _auto("AutoConfig", folder),
    "profile": lambda folder: _command("profile.__main__", "memory", _run_file(folder)),
}
"""What reads config.json alone, as data."""


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_refuses_the_code_of_a_tokenizer(attack, name, capsys):
    assert COMMANDS[name](attack.tokenizer().folder) == 2
    said = capsys.readouterr()
    assert "tokenizer_config.json" in said.err and "no code of a checkpoint is run" in said.err, said.err
    assert "run the custom code" not in said.out + said.err


@pytest.mark.parametrize("file", SETTINGS_FILES)
@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_refuses_code_whatever_file_names_it(attack, name, file):
    with pytest.raises(ValueError, match=rf"{re.escape(file)} of .* no code of a checkpoint is run"):
        LOADERS[name](attack.file(file).folder)


def test_the_way_out_that_the_refusal_names(attack):
    folder = attack.tokenizer().folder
    values = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    values.pop("auto_map")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(values | {"tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8"
    )
    assert len(DynamicLlavaProcessor.from_pretrained(folder)(text="a question").input_ids) == 1


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_is_read_as_data(attack, name):
    CONFIGURATIONS[name](attack.file("config.json").folder)


def test_code_that_nothing_looks_for_is_left_alone(attack):
    """The folder's custom_generate, and the tower's and the language model's own entries of config.json."""
    for load in LOADERS.values():
        load(attack.parts_of_the_model().folder)


@pytest.mark.parametrize("load", ["model", "AutoModel", "processor", "AutoProcessor"])
def test_trust_is_not_an_option(clean, load):
    import transformers

    classes = {
        "model": DynamicLlavaForConditionalGeneration, "AutoModel": transformers.AutoModelForImageTextToText,
        "processor": DynamicLlavaProcessor, "AutoProcessor": transformers.AutoProcessor,
    }  # fmt: skip
    with pytest.raises(ValueError, match="trust_remote_code=True is not offered"):
        classes[load].from_pretrained(clean, trust_remote_code=True)
    classes[load].from_pretrained(clean, trust_remote_code=False)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_checkpoint_cannot_name_a_kernel_of_the_hub(attack, key):
    """transformers would download it and run what it holds."""
    edit(attack.folder / "config.json", **{key: "somebody/attention"})
    for load in (DynamicLlavaConfig, DynamicLlavaForConditionalGeneration):
        with pytest.raises(ValueError, match=rf"config\.json of .*{key} .*'somebody/attention'"):
            load.from_pretrained(attack.folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chat", "eval"])
def test_a_yes_on_the_real_standard_input_runs_nothing(attack, name):
    folder = attack.tokenizer().folder
    arguments = ["--model", folder, "--sparsity", "none"] if name == "chat" else _evaluation(folder)
    command = [sys.executable, "-m", f"dynamic_llava.{name}", *map(str, arguments)]
    done = subprocess.run(command, input="y\nIs there a cat?\n", capture_output=True, text=True)
    assert done.returncode == 2 and "tokenizer_config.json" in done.stderr, done.stderr
