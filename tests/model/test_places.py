"""What is given as a checkpoint and is none: loaders and commands name the mistake, and the way out works."""

import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import save_file

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor
from dynamic_llava.checkpoints.convert import convert
from dynamic_llava.model.loading import checkpoint_files
from dynamic_llava.processing.folder import load_tokenizer
from tests.eval.task_data import pope
from tests.tiny_pipeline import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("places") / "model", seed=0)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(module, *arguments):
    from importlib import import_module

    return import_module(f"dynamic_llava.{module}").main([*map(str, arguments)])


def run_file(base):
    sample = {"id": "0", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]}
    with open("data.json", "w") as file:
        json.dump([sample], file)
    with open("run.yaml", "w") as file:
        data = {"json": "data.json", "image_folder": ".", "text_only": "dense"}
        yaml.safe_dump({"model": {"base": str(base)}, "data": data, "output_folder": "out"}, file)
    return "run.yaml"


def evaluation(model, here):
    pope(here / "data")
    return ["--model", model, "--tasks", "pope", "--data-root", here / "data", "--output-folder", "out"]


LOADERS = {
    "model": DynamicLlavaForConditionalGeneration.from_pretrained,
    "processor": DynamicLlavaProcessor.from_pretrained,
    "config": DynamicLlavaConfig.from_pretrained,
    "tokenizer": load_tokenizer,
    "files": checkpoint_files,
}
COMMANDS = {
    "chat": lambda given, here: command("chat.__main__", "--model", given),
    "eval": lambda given, here: command("eval.__main__", *evaluation(given, here)),
    "train": lambda given, here: command("train.__main__", run_file(given)),
    "data check": lambda given, here: command("data.__main__", "check", run_file(given)),
    "data first-batch": lambda given, here: command("data.__main__", "first-batch", run_file(given)),
}
MISSING = ["runs/x/model", "./nothing", "nothing", "runs/nothing", "/nowhere/at/all"]
HF_WORDS = "Repo id must be|huggingface.co"


@pytest.mark.parametrize("given", MISSING)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_folder_that_is_missing(here, loader, given):
    (here / "runs").mkdir()
    with pytest.raises(
        FileNotFoundError, match=rf"there is no model folder .*{re.escape(given.lstrip('./'))}"
    ) as error:
        LOADERS[loader](given)
    assert not re.search(HF_WORDS, str(error.value))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_a_folder_that_is_missing(here, name, capsys):
    assert COMMANDS[name]("runs/x/model", here) == 2
    said = capsys.readouterr().err
    assert "error: there is no model folder runs/x/model" in said and not re.search(HF_WORDS, said)


@pytest.mark.parametrize("place", ["model", "seed0/both/model"])
@pytest.mark.parametrize("name", [*LOADERS, *COMMANDS])
def test_a_runs_folder_names_its_model(checkpoint, here, name, place, capsys):
    shutil.copytree(checkpoint, here / "runs" / "x" / place)
    (here / "runs" / "x" / "environment.json").write_text("{}")
    if name in COMMANDS:
        assert COMMANDS[name]("runs/x", here) == 2
        said = capsys.readouterr().err
    else:
        with pytest.raises(FileNotFoundError) as error:
            LOADERS[name]("runs/x")
        said = str(error.value)
        LOADERS[name](f"runs/x/{place}")  # what it names loads
    assert f"did you mean runs/x/{place}?" in said


def test_a_file_is_no_folder(checkpoint):
    for loader in LOADERS.values():
        with pytest.raises(FileNotFoundError, match=rf"is a file; give the folder that it lies in, {checkpoint}"):
            loader(checkpoint / "model.safetensors")
    assert DynamicLlavaConfig.from_pretrained(checkpoint / "config.json").model_type == "dynamic_llava"


def test_a_subfolder_is_looked_for_where_it_is_said_to_be(checkpoint, here):
    shutil.copytree(checkpoint, here / "repo" / "inner")
    for name in ("model", "processor", "config"):
        LOADERS[name]("repo", subfolder="inner")


def adapter(folder, key="model.language_model.layers.0.mlp.up_proj"):
    """Write peft's files of an adapter that doubles nothing and changes one map."""
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "lora_alpha": 2, "r": 2, "target_modules": ["up_proj"]}
    settings["base_model_name_or_path"] = "some/base"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    shape = {"A": (2, 64), "B": (128, 2)}
    tensors = {f"base_model.model.{key}.lora_{side}.weight": torch.ones(shape[side]) for side in "AB"}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("name", ["model", "files", "chat", "eval", "train"])
def test_an_adapter_beside_a_model_is_not_applied_unasked(checkpoint, here, name, capsys):
    """Nor left aside in silence: the same files would be two models, which an evaluation's digest could not tell."""
    folder = adapter(shutil.copytree(checkpoint, here / "both"))
    words = r"holds LoRA matrices \(adapter_config\.json\) beside a model.*--base .*both"
    if name in LOADERS:
        with pytest.raises(ValueError, match=words):
            LOADERS[name](folder)
    else:
        assert COMMANDS[name](folder, here) == 2
        assert re.search(words, capsys.readouterr().err)


def test_the_ways_out_of_an_adapter_beside_a_model(checkpoint, here):
    plain = DynamicLlavaForConditionalGeneration.from_pretrained(checkpoint).state_dict()
    key = "model.language_model.layers.0.mlp.up_proj"
    folder = shutil.copytree(checkpoint, here / "both")
    rows, columns = plain[f"{key}.weight"].shape
    adapter(folder)
    tensors = {f"base_model.model.{key}.lora_{side}.weight": torch.ones(2, columns) for side in "A"}
    tensors[f"base_model.model.{key}.lora_B.weight"] = torch.ones(rows, 2)
    save_file(tensors, folder / "adapter_model.safetensors")
    merged = convert(folder, here / "new", base=folder, say=lambda line: None)
    found = DynamicLlavaForConditionalGeneration.from_pretrained(merged).state_dict()
    torch.testing.assert_close(found[f"{key}.weight"], plain[f"{key}.weight"] + 2)
    for file in folder.glob("adapter_*"):
        file.unlink()
    DynamicLlavaForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model", "processor", "files", "chat", "eval", "train"])
def test_an_adapter_alone_says_what_to_do(here, name, capsys):
    folder = adapter(here / "lora")
    words = (
        r"lora holds LoRA matrices, no model; merge them .*\(some/base\): python -m dynamic_llava\.checkpoints convert"
    )
    if name in LOADERS:
        with pytest.raises(ValueError, match=words):
            LOADERS[name](folder)
    else:
        assert COMMANDS[name](folder, here) == 2
        assert re.search(words, capsys.readouterr().err)


def test_an_adapter_of_our_training_names_the_merged_model(checkpoint, here):
    shutil.copytree(checkpoint, here / "run" / "model")
    with pytest.raises(ValueError, match=r"the training has written the merged model beside it, .*run/model"):
        DynamicLlavaForConditionalGeneration.from_pretrained(adapter(here / "run" / "adapter"))


def test_a_projector_alone_says_what_to_do(here):
    (here / "stage1").mkdir()
    torch.save({"model.mm_projector.0.weight": torch.ones(2, 2)}, here / "stage1" / "mm_projector.bin")
    (here / "stage1" / "config.json").write_text(json.dumps({"model_type": "llava_llama", "mm_hidden_size": 2}))
    with pytest.raises(ValueError, match=r"projector alone.*convert .*stage1 NEW_FOLDER --base MODEL"):
        DynamicLlavaForConditionalGeneration.from_pretrained(here / "stage1")


def test_weights_that_are_not_read_are_named(checkpoint, here, caplog):
    folder = shutil.copytree(checkpoint, here / "more")
    save_file({"model.mm_projector.0.weight": torch.ones(2)}, folder / "extra.safetensors")
    (folder / "optimizer.pt").write_bytes(b"a Trainer's own")
    DynamicLlavaForConditionalGeneration.from_pretrained(folder)
    assert "extra.safetensors not read" in caplog.text and "optimizer.pt" not in caplog.text
