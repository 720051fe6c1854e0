"""LoRA: what is adapted and trained, the adapter folder, the merged model, and a run from the command line."""

import json

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor
from dynamic_llava.config import DataConfig, LoraConfig, ModelConfig, TrainConfig
from dynamic_llava.data import SftDataset
from dynamic_llava.train.__main__ import main
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.lora import save_lora
from dynamic_llava.train.optimizer import learning_rates, parts, prepare
from dynamic_llava.train.run import build_trainer, load
from tests.builders import LAYERS, TINY_SPARSITY, assert_same_logits, collate, dense_twin, fixed_rows, shared_model
from tests.sft_builders import tiny_processor, write_checkpoint, write_data


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), samples=12)


def config_of(folder, base, data, lora=None, **train):
    return RunConfig(
        output_folder=str(folder),
        model=ModelConfig(base=str(base)),
        data=DataConfig(json=str(data[0]), image_folder=str(data[1]), max_length=400),
        sparsity=TINY_SPARSITY,
        train=TrainConfig(**{"tune": "lora", "batch_size": 4, "max_steps": 2, "log_every": 1, **train}),
        lora=lora or LoraConfig(rank=4, alpha=8.0, dropout=0.0),
    )


def logits_of(model, mode="both"):
    """Teacher-forced logits of ragged rows: MaskedSoftmax by the model's own decisions."""
    inputs = collate(fixed_rows())
    del inputs["keep_mask"]
    with torch.no_grad():
        return model.eval()(**inputs, labels=inputs["input_ids"], sparsity=mode).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory, base, data):
    """A wrapped model whose adapters and predictors are moved at random, and the folder that save_lora wrote."""
    folder = tmp_path_factory.mktemp("run")
    config = config_of(folder, base, data, projector_learning_rate=1e-3)
    model, processor = load(config)
    config.folder.mkdir()
    trainer = build_trainer(config, prepare(model, config), processor, SftDataset(config.data, processor))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in learning_rates(config.train, config.sparsity):
            for parameter in parts(trainer.model)[part]:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    save_lora(trainer, processor, config.folder)
    return trainer.model, config.folder


def plain_adapter(base, folder):
    """Load an adapter folder as a user would, with peft alone."""
    model = DynamicLlavaForConditionalGeneration.from_pretrained(
        base, config=DynamicLlavaConfig.from_pretrained(folder)
    )  # fmt: skip
    return PeftModel.from_pretrained(model, folder)


def test_new_adapters_change_nothing_and_sit_in_the_language_model(tmp_path, base, data):
    config = config_of(tmp_path, base, data)
    before, _ = load(config)
    expected = logits_of(before)
    model = prepare(before, config)
    assert torch.equal(logits_of(model), expected)
    adapted = [name for name, _ in model.named_parameters() if ".lora_A." in name]
    assert len(adapted) == 7 * LAYERS and all(".language_model.layers." in name for name in adapted)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = parts(model)
    assert trainable == sum(p.numel() for part in learning_rates(config.train, config.sparsity) for p in found[part])
    assert not any(p.requires_grad for p in found["replaced"])
    originals = sum(p.numel() for part in ("image_predictor", "output_predictor") for p in found[part])
    assert sum(p.numel() for p in found["replaced"]) == originals


def test_initial_adapters_depend_on_the_seed_alone(tmp_path, base, data):
    def first(seed, drawn):
        torch.manual_seed(drawn)
        model = prepare(load(config_of(tmp_path, base, data, seed=seed))[0], config_of(tmp_path, base, data, seed=seed))
        return torch.cat([p.flatten() for p in parts(model)["adapters"]])

    assert torch.equal(first(0, 1), first(0, 2))
    assert not torch.equal(first(0, 1), first(3, 1))


def test_an_adapter_folder_gives_the_trained_model(saved, base):
    model, folder = saved
    expected = logits_of(model)
    assert not torch.allclose(expected, logits_of(shared_model()), atol=1e-2), "the adapter must do something"
    loaded = plain_adapter(base, folder / "adapter")
    assert_same_logits(logits_of(loaded), expected, tolerance=1e-6)
    assert loaded.config.sparsity == TINY_SPARSITY
    DynamicLlavaProcessor.from_pretrained(folder / "adapter")
    names = {path.name for path in (folder / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".md")) for name in names)
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


def test_an_adapter_folder_needs_only_a_dense_base(saved, tmp_path):
    """Predictors and projector come out of the adapter, so LLaVA-1.5's own weights are enough."""
    model, folder = saved
    dense_twin(shared_model()).save_pretrained(tmp_path / "dense")
    loaded = plain_adapter(tmp_path / "dense", folder / "adapter")
    assert_same_logits(logits_of(loaded), logits_of(model), tolerance=1e-6)


def test_the_merged_model_is_an_ordinary_checkpoint(saved, base):
    model, folder = saved
    merged, info = DynamicLlavaForConditionalGeneration.from_pretrained(folder / "model", output_loading_info=True)
    assert not info["missing_keys"] and type(merged) is DynamicLlavaForConditionalGeneration
    assert set(load_file(folder / "model" / "model.safetensors")) == set(load_file(base / "model.safetensors"))
    again = plain_adapter(base, folder / "adapter").merge_and_unload()
    for mode in ("both", "none"):
        expected = logits_of(model, mode)
        assert_same_logits(logits_of(merged, mode), expected, tolerance=1e-5)
        assert_same_logits(logits_of(again, mode), expected, tolerance=1e-5)


def test_a_lora_run_from_the_command_line(tmp_path, base, data, capsys):
    file = tmp_path / "adapted.yaml"
    settings = {
        "name": "adapted",
        "output_folder": str(tmp_path / "runs"),
        "model": {"base": str(base)},
        "data": {"json": str(data[0]), "image_folder": str(data[1]), "max_length": 400},
        "sparsity": TINY_SPARSITY.to_dict(),
        "train": {
            "tune": "lora", "learning_rate": 1e-3, "predictor_learning_rate": 1e-3, "batch_size": 4, "max_steps": 10,
            "log_every": 1, "gradient_checkpointing": True, "peak_tflops": 1e-3,
        },
        "lora": {"rank": 4, "alpha": 8},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(settings))
    assert main([str(file), "--lora.dropout", "0.1"]) == 0
    folder = tmp_path / "runs" / "adapted"
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["lora"] == {"rank": 4, "alpha": 8.0, "dropout": 0.1}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "lm_loss" in line]
    assert len(lines) == 10 and lines[-1]["lm_loss"] < lines[0]["lm_loss"]
    assert all(0 < line["mfu"] < 1e3 for line in lines)
    before = load_file(base / "model.safetensors")
    prefix = "base_model.model."
    adapter = {
        k.removeprefix(prefix): v for k, v in load_file(folder / "adapter" / "adapter_model.safetensors").items()
    }
    for predictor in ("image_predictor", "output_predictor"):
        names = [name for name in adapter if f".{predictor}." in name]
        assert names and any(not torch.equal(adapter[name], before[name]) for name in names)
    assert any(bool(tensor.any()) for name, tensor in adapter.items() if ".lora_B." in name)
    after = load_file(folder / "model" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all("_predictor." in name or name.endswith("_proj.weight") for name in changed)
    assert any(name.endswith("q_proj.weight") for name in changed)
    loaded = plain_adapter(base, folder / "adapter")
    merged = DynamicLlavaForConditionalGeneration.from_pretrained(folder / "model")
    assert_same_logits(logits_of(merged), logits_of(loaded), tolerance=1e-5)
    assert (
        tiny_processor().tokenizer.get_vocab()
        == DynamicLlavaProcessor.from_pretrained(folder / "model").tokenizer.get_vocab()
    )
    assert str(folder / "model") in capsys.readouterr().out
