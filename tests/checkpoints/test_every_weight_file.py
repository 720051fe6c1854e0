"""Every file of weights in a folder is read, is a copy of what is read, or is named: none is passed over in silence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.checkpoints.__main__ import main
from dynamic_llava.checkpoints.convert import convert
from tests.builders import build_model, dense_twin
from tests.checkpoints.folders import clip_folder, original_config, original_folder, original_weights, write

LAYER = "model.layers.0.mlp.up_proj"
FILES = [
    "mm_projector.bin", "projector.pt", "consolidated.00.pth", "model.ckpt", "pytorch_model.bin", "extra.safetensors",
    "EXTRA.SAFETENSORS", "model-00004-of-00004.safetensors", "model-00001-of-00002.safetensors", "ema.bin",
]  # fmt: skip
"""Names under which weights may lie that nothing reads, beside a model in model.safetensors."""


@pytest.fixture(scope="module")
def model():
    return build_model()


def quiet(line):
    pass


def projector(model, change=0.0):
    return {name: value + change for name, value in original_weights(model).items() if "mm_projector" in name}


def save(tensors, path):
    if path.suffix.lower() == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def lora(folder, model, **config):
    """Write LoRA matrices as LLaVA's training names them, without the files beside them."""
    folder.mkdir()
    tensors = {f"base_model.model.{LAYER}.lora_A.weight": torch.ones(2, 64)}
    tensors |= {f"base_model.model.{LAYER}.lora_B.weight": torch.ones(128, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "lora_alpha": 2, "r": 2, "base_model_name_or_path": "liuhaotian/llava-v1.5-7b"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if config:
        (folder / "config.json").write_text(json.dumps(original_config(model, **config)))
    return folder


def new_projector(new):
    return {name: value for name, value in load_file(new / "model.safetensors").items() if "projector" in name}


def test_a_lora_folder_without_its_projector_is_refused(model, tmp_path, capsys):
    base = original_folder(tmp_path / "llava", model)
    for name, config in (("middle", {}), ("end", {"freeze_mm_mlp_adapter": False})):
        arguments = [str(lora(tmp_path / name, model, **config)), "--base", str(base)]
        assert main(["check", *arguments]) == 2
        assert "lacks the projector" in capsys.readouterr().err
        assert main(["convert", *arguments[:1], str(tmp_path / "new"), *arguments[1:]]) == 2
        assert not (tmp_path / "new").exists()
        capsys.readouterr()
    new = tmp_path / "new"
    assert main(["convert", arguments[0], str(new), *arguments[1:], "--keep-projector"]) == 0  # the way out it names
    assert "projector: that of the base" in capsys.readouterr().out
    own = {name: value for name, value in model.state_dict().items() if "multi_modal_projector" in name}
    assert all(torch.equal(value, own[name]) for name, value in new_projector(new).items())


def test_a_projector_that_the_training_left_alone(model, tmp_path):
    base = original_folder(tmp_path / "llava", model)
    source = lora(tmp_path / "lora", model, freeze_mm_mlp_adapter=True)
    assert convert(source, tmp_path / "new", base=base, say=quiet).is_dir()


@pytest.mark.parametrize(
    ("file", "prefix"),
    [("non_lora_trainables.bin", "base_model.model."), ("mm_projector.bin", ""), ("mm_projector.bin", "short")],
)
@pytest.mark.parametrize("layout", ["original", "llava-hf", "ours"])
def test_a_lora_folder_with_its_projector(model, tmp_path, file, prefix, layout):
    """Over every layout of the base, the vocabulary of llava-hf's grown beyond the LoRA folder's among them."""
    base = original_folder(tmp_path / "llava", model, image_token_index=None)
    if layout != "original":
        base = convert(base, tmp_path / "base", to="llava-hf" if layout == "llava-hf" else "dynamic-llava", say=quiet)
    source = lora(tmp_path / "lora", model, freeze_mm_mlp_adapter=False, image_token_index=None)
    trained = projector(model, change=1.0)
    stored = {
        name.removeprefix("model.") if prefix == "short" else f"{prefix}{name}": value
        for name, value in trained.items()
    }
    torch.save(stored, source / file)
    new = convert(source, tmp_path / "new", base=base, say=quiet)
    found = load_file(new / "model.safetensors")
    for name, value in new_projector(new).items():
        assert torch.equal(value, model.state_dict()[name] + 1.0), name
    key = "model.language_model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(found[key], model.state_dict()[key] + 2.0)
    assert found["lm_head.weight"].shape[0] == 192
    loaded = DynamicLlavaForConditionalGeneration.from_pretrained(new)
    assert loaded.config.image_token_id == 128 and loaded.config.untrained_predictors


def test_two_projectors_that_differ(model, tmp_path):
    base = original_folder(tmp_path / "llava", model)
    source = lora(tmp_path / "lora", model)
    torch.save(
        {f"base_model.model.{n}": v for n, v in projector(model, 1.0).items()}, source / "non_lora_trainables.bin"
    )
    torch.save(projector(model, 1.0), source / "mm_projector.bin")
    convert(source, tmp_path / "same", base=base, say=quiet)
    torch.save(projector(model, 2.0), source / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"mm_projector\.bin is not read.*model\.mm_projector\.0\.weight"):
        convert(source, tmp_path / "new", base=base, say=quiet)


def test_one_tensor_under_two_names(model, tmp_path):
    base = original_folder(tmp_path / "llava", model)
    source = lora(tmp_path / "lora", model)
    name = "model.mm_projector.0.weight"
    value = projector(model)[name]
    torch.save({name: value, f"base_model.model.{name}": value}, source / "non_lora_trainables.bin")
    with pytest.raises(ValueError, match=r"are the same tensor; remove one"):
        convert(source, tmp_path / "new", base=base, say=quiet)


def test_a_module_that_peft_trained_whole_and_that_is_gone(model, tmp_path):
    base = original_folder(tmp_path / "llava", model)
    source = lora(tmp_path / "lora", model)
    torch.save(projector(model), source / "mm_projector.bin")
    settings = json.loads((source / "adapter_config.json").read_text()) | {"modules_to_save": ["lm_head"]}
    (source / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"has lm_head among its modules_to_save, and no file"):
        convert(source, tmp_path / "new", base=base, say=quiet)


@pytest.mark.parametrize("config", [True, False], ids=["with config.json", "without"])
@pytest.mark.parametrize("layout", ["original", "llava-hf", "vicuna"])
def test_a_projector_of_the_first_stage(model, tmp_path, capsys, layout, config):
    """Accepted over any base; over a language model the folder's own config.json says what it is."""
    source = tmp_path / "stage1"
    source.mkdir()
    torch.save(projector(model, 1.0), source / "mm_projector.bin")
    torch.save({"step": 1}, source / "rng_state.pth")  # a Trainer's own, no weights
    if config:
        (source / "config.json").write_text(json.dumps(original_config(model, freeze_mm_mlp_adapter=False)))
    assert main(["check", str(source)]) == 2
    assert (
        "a projector alone; give the folder of the model that it was trained on with --base" in capsys.readouterr().err
    )
    more = {}
    base = original_folder(tmp_path / "base", model)
    if layout == "llava-hf":
        dense_twin(model).save_pretrained(tmp_path / "hf")
        base = tmp_path / "hf"
    elif layout == "vicuna":
        weights = {n: v for n, v in original_weights(model).items() if "mm_projector" not in n and "vision" not in n}
        base = write(tmp_path / "llama", {**model.config.text_config.to_dict(), "model_type": "llama"}, weights)
        more["vision_tower"] = clip_folder(tmp_path / "clip", model)
        if not config:
            with pytest.raises(ValueError, match=r"config\.json of a LLaVA"):
                convert(source, tmp_path / "new", base=base, **more)
            return
    new = convert(source, tmp_path / "new", base=base, **more)
    assert all(torch.equal(value, model.state_dict()[name] + 1.0) for name, value in new_projector(new).items())


@pytest.mark.parametrize("content", ["other values", "another tensor"])
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_nothing_reads_is_named(model, tmp_path, capsys, file, content):
    source = original_folder(tmp_path / "source", model)
    save(projector(model, 1.0) if content == "other values" else {"0.weight": torch.ones(2)}, source / file)
    assert main(["check", str(source)]) == 2
    said = capsys.readouterr().err
    assert f"{source / file} is not read" in said and f"--leave-out {file}" in said
    assert main(["check", str(source), "--leave-out", file]) == 0


@pytest.mark.parametrize("file", FILES)
def test_a_second_copy_is_said_to_be_one(model, tmp_path, capsys, file):
    source = original_folder(tmp_path / "source", model)
    save(projector(model), source / file)
    assert main(["check", str(source)]) == 0
    assert f"{source / file}: not read; every tensor of it is in the files that are" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["base", "tower"])
def test_the_other_folders_are_looked_through_too(model, tmp_path, place):
    base = original_folder(tmp_path / "llava", model, without=["model.vision_tower."])
    tower = clip_folder(tmp_path / "clip", model)
    source = lora(tmp_path / "lora", model)
    torch.save(projector(model), source / "mm_projector.bin")
    where = base if place == "base" else tower
    torch.save({"model.layers.0.mlp.up_proj.weight": torch.ones(2)}, where / "more.bin")
    with pytest.raises(ValueError, match=r"more\.bin is not read"):
        convert(source, tmp_path / "new", base=base, vision_tower=tower, say=quiet)
    convert(source, tmp_path / "new", base=base, vision_tower=tower, leave_out=["more.bin"], say=quiet)


def test_what_is_left_out_must_be_there_and_unread(model, tmp_path):
    source = original_folder(tmp_path / "source", model)
    with pytest.raises(
        ValueError, match=r"--leave-out typo\.bin: no such file of weights.*there are model\.safetensors"
    ):
        convert(source, tmp_path / "new", leave_out=["typo.bin"], say=quiet)
    with pytest.raises(ValueError, match=r"model\.safetensors is what is read"):
        convert(source, tmp_path / "new", leave_out=["model.safetensors"], say=quiet)
    with pytest.raises(ValueError, match="--keep-projector belongs to LoRA matrices"):
        convert(source, tmp_path / "new", keep_projector=True, say=quiet)


def test_weights_of_other_frameworks_and_recordings_are_said(model, tmp_path, capsys):
    source = original_folder(tmp_path / "source", model)
    (source / "tf_model.h5").write_bytes(b"x")
    save_file({"logits": torch.ones(2)}, source / "recorded.safetensors")
    (source / "training_args.bin").write_bytes(b"a pickle that is never opened")
    assert main(["check", str(source)]) == 0
    said = capsys.readouterr().out
    assert "tf_model.h5: not read" in said and "recorded.safetensors: not read; it holds no model's weights" in said


def test_matrices_beside_a_model(model, tmp_path, capsys):
    """Loading would apply them unasked; the conversion merges them when it is told to, or leaves them out."""
    source = original_folder(tmp_path / "source", model)
    for file in lora(tmp_path / "lora", model).iterdir():
        shutil.copy(file, source)
    torch.save(projector(model), source / "mm_projector.bin")
    assert main(["check", str(source)]) == 2
    assert f"--base {source}" in capsys.readouterr().err
    merged = load_file(convert(source, tmp_path / "merged", base=source) / "model.safetensors")
    plain = load_file(
        convert(source, tmp_path / "plain", leave_out=["adapter_model.safetensors"]) / "model.safetensors"
    )
    key = "model.language_model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(merged[key], plain[key] + 2.0)


@pytest.mark.parametrize("argument", ["source", "base", "vision_tower"])
def test_a_name_of_the_hub(model, tmp_path, monkeypatch, argument):
    """What the hub's cache has on this machine is used; for anything else the command that downloads it is given."""
    base = original_folder(tmp_path / "llava", model, without=["model.vision_tower."])
    tower = clip_folder(tmp_path / "clip", model)
    source = lora(tmp_path / "lora", model)
    torch.save(projector(model), source / "mm_projector.bin")
    given = {"source": source, "base": base, "vision_tower": tower}
    cache = tmp_path / "cache" / "models--some-body--a.model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(given[argument], cache / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    convert(**{**given, argument: "some-body/a.model"}, destination=tmp_path / "new", say=quiet)
    with pytest.raises(FileNotFoundError, match=r"hf download nobody/nothing --local-dir nothing"):
        convert(**{**given, argument: "nobody/nothing"}, destination=tmp_path / "other", say=quiet)
    for path in ("lora/nothing", "./nothing", "a/b/nothing", "nothing", str(tmp_path / "nothing")):
        with pytest.raises(FileNotFoundError, match=r"there is no folder .*nothing"):
            convert(**{**given, argument: path}, destination=tmp_path / "other", say=quiet)
