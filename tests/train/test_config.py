"""A run goes on with what it began with: files are compared by what they hold, and a change is refused or said."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

import dynamic_llava.train.run as run_module
from dynamic_llava.config import DataConfig, ModelConfig, TrainConfig
from dynamic_llava.data import SftDataset
from dynamic_llava.train.checkpoints import MARKER
from dynamic_llava.train.config import RunConfig, changed_inputs, file_inputs, run_inputs
from dynamic_llava.train.run import run
from tests.builders import TINY_SPARSITY
from tests.sft_builders import picture, tiny_processor, write_checkpoint, write_data

ZERO2 = Path(__file__).resolve().parents[2] / "configs" / "deepspeed" / "zero2.json"


class Killed(BaseException):
    """What ends a run as abruptly as a signal that cannot be caught."""


class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise Killed


def config_in(folder, **train):
    settings = {"batch_size": 4, "max_steps": 3, "learning_rate": 1e-3, "log_every": 1, "save_every": 2}
    return RunConfig(
        name="killed",
        output_folder=str(folder / "runs"),
        model=ModelConfig(base=str(folder / "base")),
        data=DataConfig(json=str(folder / "data.json"), image_folder=str(folder / "images"), max_length=400),
        sparsity=TINY_SPARSITY,
        train=TrainConfig(**{**settings, **train}),
    )


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with base, data and a run that was killed after its checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("killed")
    write_checkpoint(folder / "base")
    write_data(folder, samples=12)
    with pytest.MonkeyPatch.context() as patched:
        build = run_module.build_trainer

        def build_trainer(*arguments):
            trainer = build(*arguments)
            trainer.add_callback(Kill())
            return trainer

        patched.setattr(run_module, "build_trainer", build_trainer)
        with pytest.raises(Killed):
            run(config_in(folder))
    return folder


@pytest.fixture
def copy(killed, tmp_path):
    return shutil.copytree(killed, tmp_path / "elsewhere")


def one_sample_less(folder):
    entries = json.loads((folder / "data.json").read_text())
    del entries[7]
    (folder / "data.json").write_text(json.dumps(entries))


def other_answer_of_the_same_length_and_date(folder):
    rewrite(folder / "data.json", lambda content: content.replace(b"a cat that", b"a dog that"))


def other_picture(folder):
    picture(99, (31, 17)).save(folder / "images" / "3.png")


def a_bit_of_the_weights(folder):
    weights = load_file(folder / "base" / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    before = (folder / "base" / "model.safetensors").stat()
    save_file(weights, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    os.utime(folder / "base" / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))


def other_configuration(folder):
    rewrite(
        folder / "base" / "config.json",
        lambda content: content.replace(b'"rms_norm_eps": 1e-0', b'"rms_norm_eps": 2e-0'),
    )


def another_tokenizer(folder):
    rewrite(
        folder / "base" / "tokenizer.json", lambda content: content.replace(b'"version": "1.0"', b'"version":"1.0" ')
    )


def an_adapter(folder):
    (folder / "base" / "adapter_model.safetensors").write_bytes(b"x")


def rewrite(file, change):
    """Change a file in place and give it its former date."""
    before, content = file.stat(), file.read_bytes()
    assert change(content) != content
    file.write_bytes(change(content))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    one_sample_less: r"data\.json was [\d,]+ bytes, sha256 \w+ and is .*; samples was 12 samples, .* and is 11 samples",
    other_answer_of_the_same_length_and_date: r"data\.json was ([\d,]+ bytes), sha256 \w+ and is \1, sha256 \w+",
    other_picture: r"data\.image_folder was 12 images of [\d,]+ bytes, sha256 \w+ and is 12 images of [\d,]+ bytes, ",
    a_bit_of_the_weights: r"model\.base/model\.safetensors was ([\d,]+ bytes), sha256 \w+ and is \1, sha256 \w+",
    other_configuration: r"model\.base/config\.json was ([\d,]+ bytes), sha256 \w+ and is \1, sha256 \w+",
    another_tokenizer: r"model\.base/tokenizer\.json was ([\d,]+ bytes), sha256 \w+ and is \1, sha256 \w+",
    an_adapter: r"model\.base/adapter_model\.safetensors was absent and is 1 bytes, sha256 \w+",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_input_is_refused_with_both_values(copy, change):
    change(copy)
    with pytest.raises(ValueError, match=CHANGES[change]) as error:
        run(config_in(copy))
    assert "the inputs of this run have changed since" in str(error.value) and "checkpoint-2" in str(error.value)
    assert "--train.accept-changed-inputs" in str(error.value)
    assert (copy / "runs" / "killed" / "checkpoint-2" / MARKER).is_file(), "a refused run removes nothing"


def test_the_same_content_elsewhere_goes_on(copy):
    assert run(config_in(copy)).metrics["steps"] == 3
    assert json.loads((copy / "runs" / "killed" / "environment.json").read_text())["resumed_from_step"] == 2


def test_a_run_goes_on_with_changed_inputs_where_that_is_asked_for(copy, caplog):
    one_sample_less(copy)
    result = run(config_in(copy, accept_changed_inputs=True))
    assert result.metrics["steps"] == 3 and "going on from" in caplog.text and "is 11 samples" in caplog.text
    assert json.loads((copy / "runs" / "killed" / "environment.json").read_text())["resumed_from_step"] == 2


def test_the_other_way_out_starts_over(copy):
    one_sample_less(copy)
    assert [line["step"] for line in run(config_in(copy, resume=False)).history] == [1, 2, 3]


def test_a_checkpoint_that_recorded_no_contents_is_compared_by_names(copy, killed):
    """As those of earlier versions."""
    marker = copy / "runs" / "killed" / "checkpoint-2" / MARKER
    facts = json.loads(marker.read_text())
    del facts["inputs"], facts["settings"]["data.text_only"]
    marker.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"data\.image_folder was .*; data\.json was .*; model\.base was "):
        run(config_in(copy))
    names = {name: facts["settings"][name] for name in ("data.json", "data.image_folder", "model.base")}
    assert names["model.base"] == str(killed / "base")
    for name in names:
        facts["settings"][name] = str(copy / Path(names[name]).name)
    marker.write_text(json.dumps(facts))
    one_sample_less(copy)
    assert run(config_in(copy)).metrics["steps"] == 3


def test_every_setting_of_a_deepspeed_file_is_an_input(tmp_path, copy):
    file = tmp_path / "ds.json"
    settings = json.loads(ZERO2.read_text())
    file.write_text(json.dumps(settings))
    config = config_in(copy, deepspeed=str(file))
    dataset = SftDataset(config.data, tiny_processor())
    before = run_inputs(config, str(copy / "base"), dataset)
    file.write_text(json.dumps(settings, indent=7))
    assert run_inputs(config, str(copy / "base"), dataset) == before
    settings["zero_optimization"]["reduce_bucket_size"] = 5
    file.write_text(json.dumps(settings))
    (found,) = changed_inputs(before, run_inputs(config, str(copy / "base"), dataset))
    assert found.startswith("train.deepspeed.zero_optimization.reduce_bucket_size was ") and found.endswith("is 5")


def test_a_base_of_several_files_and_a_missing_image_are_covered(copy):
    model_files = copy / "base" / "model.safetensors"
    names = {name.split("/")[1] for name in file_inputs(config_in(copy), str(copy / "base")) if "/" in name}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert {path.name for path in (copy / "base").iterdir()} - names <= {"README.md"}
    weights = load_file(model_files)
    model_files.unlink()
    torch.save(weights, copy / "base" / "pytorch_model.bin")
    assert "model.base/pytorch_model.bin" in file_inputs(config_in(copy), str(copy / "base"))
    config = config_in(copy)
    dataset = SftDataset(config.data, tiny_processor())
    before = run_inputs(config, str(copy / "base"), dataset)
    (copy / "images" / "5.png").unlink()
    (found,) = changed_inputs(before, run_inputs(config, str(copy / "base"), dataset))
    assert found.startswith("data.image_folder was 12 images of ")


def test_names_that_are_no_files_are_refused_as_before(copy):
    config = config_in(copy)
    with pytest.raises(FileNotFoundError, match="there is no data file"):
        run(replace(config, data=replace(config.data, json=str(copy / "nothing.json"))))
