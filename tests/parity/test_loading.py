"""Checkpoints: llava-hf folders, old and new names, and ours; nothing but predictors may be missing."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynamic_llava import DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor
from tests.builders import TINY_SPARSITY, build_model, collate, dense_twin, fixed_rows
from tests.sft_builders import write_checkpoint

PREDICTORS = ("model.language_model.image_predictor.", "model.language_model.output_predictor.")
SPARSITY = TINY_SPARSITY.to_dict()


@pytest.fixture(scope="module")
def model():
    return build_model()


def hub_name(name):
    """Return the name under which llava-hf checkpoints on the hub store a tensor (transformers 4 names)."""
    for ours, theirs in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(name)


def hub_folder(model, folder, change=lambda weights: weights):
    """Write the dense part of `model` as a llava-hf folder; `change` edits its tensors first."""
    weights = {hub_name(name): value for name, value in model.state_dict().items() if not name.startswith(PREDICTORS)}
    save_file(change(dict(weights)), folder / "model.safetensors", metadata={"format": "pt"})
    config = dense_twin(model).config.to_dict()
    config["architectures"] = ["LlavaForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def load(folder, **kwargs):
    return DynamicLlavaForConditionalGeneration.from_pretrained(folder, sparsity=SPARSITY, **kwargs)


def test_hub_names_load_bit_equal_and_only_predictors_are_new(model, tmp_path, caplog):
    loaded, info = load(hub_folder(model, tmp_path), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    count = sum(name.startswith(PREDICTORS) for name in model.state_dict())
    both = "a dense checkpoint without image_predictor and output_predictor"
    assert f"{both}: their {count} tensors are newly initialised" in caplog.text
    for name, value in model.state_dict().items():
        if not name.startswith(PREDICTORS):
            assert torch.equal(loaded.state_dict()[name], value), name


def test_transformers_own_saves_load_bit_equal(model, tmp_path):
    dense_twin(model).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    for name, value in model.state_dict().items():
        if not name.startswith(PREDICTORS):
            assert torch.equal(loaded.state_dict()[name], value), name


def test_new_predictors_are_initialised_and_not_left_as_memory(model, tmp_path):
    loaded = load(hub_folder(model, tmp_path))
    for name, value in loaded.state_dict().items():
        if name.startswith(PREDICTORS):
            assert torch.isfinite(value).all() and value.abs().max() <= 1, name
            assert value.dim() == 1 or value.std() > 0, name


def test_our_own_save_comes_back_bit_equal(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.sparsity == model.config.sparsity
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    inputs = collate(fixed_rows(), "left")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    # The module's own names: a Trainer resumes from them without conversion.
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())


def test_single_settings_override_a_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path, sparsity={"image_keep_rate": 0.5})
    assert loaded.config.sparsity == replace(model.config.sparsity, image_keep_rate=0.5)


def test_auto_classes_know_a_saved_model(model, tmp_path):
    from transformers import AutoConfig, AutoModelForImageTextToText

    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is type(model)


@pytest.mark.parametrize(
    "lost",
    [
        "language_model.lm_head.weight",
        "language_model.model.layers.3.mlp.up_proj.weight",
        "multi_modal_projector.linear_1.bias",
        "vision_tower.vision_model.embeddings.position_embedding.weight",
    ],
)
def test_a_missing_tensor_is_an_error_that_names_it(model, tmp_path, lost):
    folder = hub_folder(model, tmp_path, lambda weights: {n: w for n, w in weights.items() if n != lost})
    with pytest.raises(ValueError, match="missing tensors") as error:
        load(folder)
    assert lost.split(".")[-2] in str(error.value) and str(folder) in str(error.value)
    assert "predictors as a whole may be missing" in str(error.value)


def test_a_tensor_without_a_place_is_an_error(model, tmp_path):
    folder = hub_folder(model, tmp_path, lambda weights: {**weights, "language_model.model.extra": torch.ones(2)})
    with pytest.raises(ValueError, match=r"without a place.*extra"):
        load(folder)


def test_a_wrong_shape_is_an_error(model, tmp_path):
    name = "multi_modal_projector.linear_2.weight"
    folder = hub_folder(model, tmp_path, lambda weights: {**weights, name: torch.ones(3, 3)})
    with pytest.raises(ValueError, match="linear_2"):
        load(folder)


def test_part_of_a_predictor_missing_is_an_error(model, tmp_path):
    """A saved predictor that lost one tensor is a damaged checkpoint, not a dense one."""
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.language_model.output_predictor.head.4.bias")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"output_predictor\.head\.4\.bias"):
        DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises((OSError, ValueError), match="nowhere"):
        DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path / "nowhere")


def test_what_damaged_files_say_is_cut(model, tmp_path):
    """An index in another encoding, a size of thousands of letters, a tokenizer that fails at its first text."""
    model.save_pretrained(tmp_path / "parts", max_shard_size="300KB")
    index = tmp_path / "parts" / "model.safetensors.index.json"
    index.write_bytes(index.read_text().encode("utf-16"))
    write_checkpoint(tmp_path / "size")
    for folder, file, key, value in (
        ("size", "config.json", "hidden_size", "x" * 5000),
        ("tokens", "tokenizer_config.json", "model_max_length", "yes"),
    ):
        write_checkpoint(tmp_path / folder)
        path = tmp_path / folder / file
        values = json.loads(path.read_text())
        (values["text_config"] if file == "config.json" else values)[key] = value
        path.write_text(json.dumps(values))
    loads = {
        "parts": DynamicLlavaForConditionalGeneration.from_pretrained,
        "size": DynamicLlavaForConditionalGeneration.from_pretrained,
        "tokens": DynamicLlavaProcessor.from_pretrained,
    }
    for name, read in loads.items():
        with pytest.raises(ValueError, match=name) as error:
            read(tmp_path / name)
        assert len(str(error.value)) < 1000, name
