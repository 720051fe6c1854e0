"""A wrong checkpoint fails before anything is made of it, in the conversion and in loading, naming what is wrong."""

import functools
import json
import operator
import os
import re
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.checkpoints import tensors
from dynamic_llava.checkpoints.__main__ import main
from dynamic_llava.checkpoints.convert import convert, new_folder
from dynamic_llava.checkpoints.plan import make_plan
from dynamic_llava.files import EXIT_WRITE_FAILED, WriteError
from dynamic_llava.model.loading import checkpoint_files
from tests.builders import build_model
from tests.checkpoints.folders import (
    clip_folder,
    original_config,
    original_folder,
    original_weights,
    published_folder,
    write,
)


@pytest.fixture(scope="module")
def model():
    return build_model()


def quiet(line):
    pass


def refused(source, destination, **kwargs):
    """Return the message of a refused conversion; nothing may have been written."""
    with pytest.raises((ValueError, FileNotFoundError, WriteError)) as error:
        convert(source, destination, say=quiet, **kwargs)
    assert not destination.exists()
    assert not list(destination.parent.glob(".*.partial"))
    return str(error.value)


def changed(folder, model, change, **config):
    """Write the original layout after `change` has edited its tensors."""
    weights = original_weights(model)
    change(weights)
    return write(folder, original_config(model, **config), weights)


@pytest.mark.parametrize(
    "lost",
    [
        "model.layers.3.mlp.up_proj.weight",
        "lm_head.weight",
        "model.mm_projector.2.bias",
        "model.embed_tokens.weight",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias",
    ],
)
def test_a_missing_tensor_is_named_as_it_is_stored(model, tmp_path, lost):
    source = changed(tmp_path / "source", model, lambda weights: weights.pop(lost))
    assert lost in refused(source, tmp_path / "new")


def test_a_wrong_shape_is_named_with_both_shapes(model, tmp_path):
    name = "model.layers.1.self_attn.k_proj.weight"
    source = changed(tmp_path / "source", model, lambda weights: weights.update({name: torch.ones(3, 5)}))
    assert f"{name} is (3, 5) and should be (64, 64)" in refused(source, tmp_path / "new")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.extra.weight", torch.ones(2), "without a place in LLaVA-1.5: model.extra.weight"),
        ("model.layers.6.mlp.up_proj.weight", torch.ones(128, 64), "no place for: model.layers.6.mlp.up_proj.weight"),
        ("model.norm.weight", torch.ones(64, dtype=torch.int64), "model.norm.weight is torch.int64"),
        ("model.instruct_score_predictor.output_mlp.0.weight", torch.ones(64), "instruct_score_predictor"),
    ],
)
def test_a_tensor_that_does_not_belong(model, tmp_path, name, value, message):
    source = changed(tmp_path / "source", model, lambda weights: weights.update({name: value}))
    assert message in refused(source, tmp_path / "new")


@pytest.mark.parametrize("pad", [10**30, 128, -129])
def test_a_padding_token_without_a_row_is_named_with_its_folder(model, tmp_path, pad):
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    values = json.loads(file.read_text())
    values["text_config"]["pad_token_id"] = pad
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"source: pad_token_id=.* is no row of 128 .*give 0 to 127, or null"):
        DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path / "source")


def test_part_of_a_predictor_is_no_predictor(tmp_path, model):
    model.save_pretrained(tmp_path / "source")
    file, lost = tmp_path / "source" / "model.safetensors", "model.language_model.output_predictor.head.4.bias"
    weights = load_file(file)
    weights.pop(lost)
    save_file(weights, file, metadata={"format": "pt"})
    assert lost in refused(tmp_path / "source", tmp_path / "new")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type: 'linear'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"model_type": "llava_mistral"}, "model_type 'llava_mistral'"),
        ({"model_type": "bert"}, "of no known layout"),
        ({"text_config": {}}, "ambiguous"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"hidden_size": 128}, "wrong shapes"),
        ({"hidden_size": "large"}, "hidden_size 'large', which should be a positive whole number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"pad_token_id": 10**30}, "no row of 128 (vocab_size)"),
        ({"sparse_config": 3}, "sparse_config"),
        ({"clip_vision_config": None}, "add clip_vision_config"),
        ({"sparse_config": {"vision_keep_rate": 0.2}}, "no sparse_layer"),
        ({"sparse_config": {"use_instruct_predictor": True}}, "use_instruct_predictor"),
        ({"sparse_config": {"vision_keep_rate": 2.0, "sparse_layer": 2}}, "image_keep_rate=2.0"),
        ({"sparse_config": {"vision_keep_rate": 0.2, "sparse_layer": 2}}, "image_score_predictor"),
    ],
)
def test_another_architecture_is_named(model, tmp_path, changes, message):
    source = original_folder(tmp_path / "source", model, **changes)
    assert message in refused(source, tmp_path / "new")


@pytest.mark.parametrize("rename", [("model.layers", "transformer.h"), ("model.layers", "language_model.model.layers")])
def test_names_that_contradict_the_configuration(model, tmp_path, rename):
    weights = {name.replace(*rename): value for name, value in original_weights(model).items()}
    source = write(tmp_path / "source", original_config(model), weights)
    assert "whose tensors begin with model.layers." in refused(source, tmp_path / "new")


def test_predictors_without_their_settings(model, tmp_path):
    source = write(tmp_path / "source", original_config(model), original_weights(model, predictors=True))
    assert "no sparse_config" in refused(source, tmp_path / "new")


def test_the_vision_tower_that_is_missing_is_named(model, tmp_path):
    source = original_folder(tmp_path / "source", model, without=["model.vision_tower."])
    message = refused(source, tmp_path / "new")
    assert "openai/some-tiny-tower" in message and "--vision-tower PATH" in message
    assert "model_type 'llava_llama'" in refused(source, tmp_path / "new", vision_tower=source)
    whole = original_folder(tmp_path / "whole", model)
    tower = clip_folder(tmp_path / "clip", model)
    assert "leave --vision-tower" in refused(whole, tmp_path / "new", vision_tower=tower)
    assert "no adapter_config.json" in refused(whole, tmp_path / "new", base=tower)


class Harmful:
    """A pickle of it runs a command when it is opened carelessly."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.fixture(params=["convert", "load"])
def open_folder(request, tmp_path):
    """Both ways to open a folder in a layout that both know; each returns the message of its refusal."""

    def attempt(folder):
        if request.param == "convert":
            return refused(folder, tmp_path / "new")
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            DynamicLlavaForConditionalGeneration.from_pretrained(folder)
        return str(error.value)

    return attempt


@pytest.fixture
def saved(model, tmp_path):
    """One of our own folders in three shards."""
    model.save_pretrained(tmp_path / "saved", max_shard_size="600KB")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) >= 3
    return tmp_path / "saved"


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(model, tmp_path, open_folder, new_format):
    proof = tmp_path / "harmed"
    source = tmp_path / "source"
    model.save_pretrained(source)
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    file = source / "pytorch_model.bin"
    torch.save(weights | {"x": Harmful(proof)}, file, _use_new_zipfile_serialization=new_format)
    message = open_folder(source)
    assert str(file) in message and "posix.system" in message and "could run code" in message
    assert not proof.exists()


def test_a_truncated_file_is_named(saved, open_folder):
    file = saved / "model-00002-of-00003.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert f"{file} is damaged or was not copied completely" in open_folder(saved)


def test_what_a_damaged_file_says_itself_is_shown_in_part(saved, open_folder):
    file = saved / "model-00002-of-00003.safetensors"
    head = json.dumps({"a": 5000 * "x"}).encode()
    file.write_bytes(struct.pack("<Q", len(head)) + head)
    message = open_folder(saved)
    assert f"{file} is damaged or was not copied completely (Error" in message and len(message) < 1500


@pytest.mark.parametrize("layout", ["ours", "original", "published"])
def test_a_value_of_any_length_is_quoted_in_part(model, tmp_path, layout):
    """For every setting of config.json at any depth; a reason that transformers gives quotes it whole."""
    source = tmp_path / "source"
    write = {"ours": lambda: model.save_pretrained(source), "original": lambda: original_folder(source, model)}
    write.get(layout, lambda: published_folder(source))()
    file = source / "config.json"
    whole = json.loads(file.read_text())
    refusals = 0
    for path in places(whole):
        values = json.loads(json.dumps(whole))
        *outer, last = path
        functools.reduce(operator.getitem, outer, values)[last] = 5000 * "x"
        file.write_text(json.dumps(values))
        try:
            make_plan(source)
            DynamicLlavaForConditionalGeneration.config_class.from_pretrained(source)
        except (ValueError, FileNotFoundError) as error:
            refusals += 1
            assert len(str(error)) < 2500, path
    assert refusals > 10


def places(values, path=()):
    """Return the path to every key of nested settings."""
    return [
        place
        for key, value in values.items()
        for place in ((*path, key), *(places(value, (*path, key)) if isinstance(value, dict) else ()))
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        *(({"pad_token_id": value}, f"has pad_token_id {value!r}; give a token id") for value in ([0, 1], "", [[]])),
        ({"eos_token_id": [2, "</s>"]}, r"has eos_token_id [2, '</s>']; give a token id, a list of them or null"),
        ({"do_sample": True, "max_new_tokens": "many"}, "has max_new_tokens 'many' ('<="),
        ({"early_stopping": []}, "has early_stopping [] ("),
    ],
)
def test_a_setting_of_generation_of_a_wrong_kind_is_named(saved, settings, words):
    file = saved / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(ValueError, match=re.escape(f"generation_config.json of {saved} {words}")):
        DynamicLlavaForConditionalGeneration.from_pretrained(saved)
    own = GenerationConfig(max_new_tokens=3)
    assert DynamicLlavaForConditionalGeneration.from_pretrained(saved, generation_config=own)


def test_a_truncated_bin_is_named(model, tmp_path, open_folder):
    model.save_pretrained(tmp_path / "source")
    single = tmp_path / "source" / "model.safetensors"
    file = tmp_path / "source" / "pytorch_model.bin"
    torch.save(load_file(single), file)
    single.unlink()
    content = file.read_bytes()
    for length in (0, 1000, len(content) // 2):
        file.write_bytes(content[:length])
        assert str(file) in open_folder(tmp_path / "source")


def test_a_missing_shard_is_named(saved, open_folder):
    (saved / "model-00002-of-00003.safetensors").unlink()
    said = open_folder(saved)
    assert "model-00002-of-00003.safetensors is missing, and model.safetensors.index.json names it" in said


@pytest.mark.parametrize(
    ("key", "value"), [("metadata", "7"), ("metadata", None), ("weight_map", "7"), ("weight_map", ["lm_head.weight"])]
)
def test_an_index_that_is_none(saved, open_folder, key, value):
    path = saved / "model.safetensors.index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert "model.safetensors.index.json is no index of weights" in open_folder(saved)


@pytest.mark.parametrize("key", ["metadata", "weight_map"])
def test_an_index_without_its_parts(saved, open_folder, key):
    path = saved / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index[key]
    path.write_text(json.dumps(index))
    assert "model.safetensors.index.json is no index of weights" in open_folder(saved)
    with pytest.raises(ValueError, match=r"index\.json is no index of weights"):
        checkpoint_files(saved)


def test_an_index_that_lacks_its_tensor(saved, open_folder):
    path = saved / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.language_model.ghost"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    assert "model-00001-of-00003.safetensors lacks the tensor model.language_model.ghost" in open_folder(saved)


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", "/etc/passwd", "a/b.safetensors", "..", " ", "a\nb.safetensors", "weights"]
)
def test_an_index_stays_in_its_folder(saved, open_folder, name):
    path = saved / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    assert f"names the file {name!r}" in open_folder(saved)


def test_a_whole_predictor_missing_is_damage_in_a_folder_of_ours(model, tmp_path, open_folder):
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    weights = {name: value for name, value in load_file(file).items() if "image_predictor" not in name}
    save_file(weights, file, metadata={"format": "pt"})
    assert "image_predictor" in open_folder(tmp_path / "source")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_an_incomplete_folder(model, tmp_path, open_folder, file):
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / file).unlink()
    assert str(tmp_path / "source") in open_folder(tmp_path / "source")


def test_loading_points_to_the_conversion(model, tmp_path):
    original = original_folder(tmp_path / "original", model)
    with pytest.raises(ValueError, match=r"dynamic_llava\.checkpoints convert .*original"):
        DynamicLlavaForConditionalGeneration.from_pretrained(original)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="--base MODEL"):
        DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path / "lora")


def test_a_folder_in_use_is_not_overwritten(model, tmp_path):
    source = original_folder(tmp_path / "source", model)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="not empty"):
        convert(source, tmp_path / "new", say=quiet)
    (tmp_path / "new" / "mine.txt").unlink()
    assert (convert(source, tmp_path / "new", say=quiet) / "config.json").is_file()


@pytest.mark.slow  # another process, which imports everything anew
def test_a_killed_conversion_leaves_nothing_that_loads(model, tmp_path):
    source = original_folder(tmp_path / "source", model)
    code = """
import os, sys
from dynamic_llava.checkpoints.convert import convert
convert(sys.argv[1], sys.argv[2], say=lambda line: os._exit(9) if line.startswith("written:") else None)
"""
    arguments = [sys.executable, "-c", code, str(source), str(tmp_path / "new")]
    assert subprocess.run(arguments, check=False, timeout=300).returncode == 9
    assert not (tmp_path / "new").exists()
    left = tmp_path / ".new.partial"
    assert (left / "model.safetensors").is_file() and not (left / "config.json").exists()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        DynamicLlavaForConditionalGeneration.from_pretrained(left)
    assert convert(source, tmp_path / "new", say=quiet).is_dir() and not left.exists()


def test_a_full_disk(model, tmp_path, monkeypatch):
    source = original_folder(tmp_path / "source", model)
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        assert "only 1.0 kB are free" in refused(source, tmp_path / "new")

    for number, words in ((28, "No space left"), (27, "File too large"), (30, "Read-only"), (1, "not permitted")):

        def fill(path, placements, error=number):
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(tensors, "_write_safetensors", fill)
        said = refused(source, tmp_path / "new")
        assert words in said and str(tmp_path) in said and f"{tmp_path / 'new'} could not be written" in said
    assert main(["convert", str(source), str(tmp_path / "new")]) == EXIT_WRITE_FAILED


def test_an_error_inside_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="inside"), new_folder(tmp_path / "new", 0) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError("inside")
    assert list(tmp_path.iterdir()) == []


def test_options_that_do_not_exist(model, tmp_path):
    source = original_folder(tmp_path / "source", model)
    with pytest.raises(ValueError, match="dtype='int8' is not offered"):
        make_plan(source, dtype="int8", say=quiet)
    with pytest.raises(ValueError, match="to='onnx' is not offered"):
        make_plan(source, to="onnx", say=quiet)
    assert "there is no folder" in refused(tmp_path / "nowhere", tmp_path / "new")


def test_the_command_line(model, tmp_path, capsys):
    source = original_folder(tmp_path / "source", model)
    assert main(["check", str(source)]) == 0
    assert "complete and in order" in capsys.readouterr().out
    assert main(["convert", str(source), str(tmp_path / "new"), "--dtype", "float16"]) == 0
    assert "model.mm_projector.0.* -> model.multi_modal_projector.linear_1.*" in capsys.readouterr().out
    assert main(["convert", str(source), str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.startswith("error: ") and (tmp_path / "new" / "config.json").is_file()
