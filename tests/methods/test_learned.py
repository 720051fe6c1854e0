"""A second learned method, one file outside the package: it trains, saves, loads, decodes, is costed and converted."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, get_method
from dynamic_llava.checkpoints.convert import convert
from dynamic_llava.config import DataConfig, LoraConfig, ModelConfig, TrainConfig
from dynamic_llava.costs import llava_shape, parameter_counts, training_memory
from dynamic_llava.data import SftDataset
from dynamic_llava.engine.learned import learned_costs
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.optimizer import learning_rates, parts, prepare
from dynamic_llava.train.run import build_trainer, load, run
from tests.builders import (
    HIDDEN,
    TINY_SPARSITY,
    TOKENS_PER_IMAGE,
    assert_same_logits,
    build_model,
    collate,
    fixed_rows,
    prompts,
    tiny_config,
    training_passes,
)
from tests.sft_builders import write_checkpoint, write_data
from tests.toys.linear import Linear

NAME = "tests.toys.linear:Linear"
RATE, STEPS = 0.3, 6
METHOD = {"name": NAME, "image_keep_rate": RATE}
SPARSITY = replace(TINY_SPARSITY, method=METHOD)
OWN = {
    f"model.language_model.method.{name}"
    for name in ("scale", "norm.weight", "norm.bias", "linear.weight", "linear.bias")
}
TRAIN = {"batch_size": 4, "max_steps": 4, "learning_rate": 1e-3, "predictor_learning_rate": 1e-2, "log_every": 1}
CALL = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense base, data, and a folder for runs."""
    folder = tmp_path_factory.mktemp("learned")
    write_checkpoint(folder / "base", dense=True)
    write_data(folder, samples=8)
    return folder


def config_of(folders, name="run", lora=None, sparsity=SPARSITY, **train):
    return RunConfig(
        name=name,
        output_folder=str(folders / "runs"),
        model=ModelConfig(base=str(folders / "base")),
        data=DataConfig(json=str(folders / "data.json"), image_folder=str(folders / "images"), max_length=400),
        sparsity=sparsity,
        train=TrainConfig(**TRAIN | train),
        lora=lora,
    )


@pytest.fixture(scope="module")
def trained(folders):
    return run(config_of(folders))


@pytest.fixture(scope="module")
def model(trained):
    model = DynamicLlavaForConditionalGeneration.from_pretrained(trained.folder).eval()
    model.generation_config.eos_token_id = None
    return model


def test_it_trains_with_its_own_loss(trained, folders):
    for line in trained.history:
        assert line["share_loss"] > 0 and "image_keep_loss" not in line and "output_keep_loss" not in line
        assert line["loss"] == pytest.approx(line["lm_loss"] + line["share_loss"], rel=1e-5)
        assert 0 < line["image_keep_rate"] < 1 and "output_keep_rate" not in line and line["mask_gradient"] > 0
    before, _ = load(config_of(folders))
    after = load_file(trained.folder / "model.safetensors")
    assert before.config.untrained_predictors == ["method"]
    assert before.model.language_model.method.scale == 4, "what no layer of torch owns begins as the method says"
    for name in (*OWN, "model.language_model.layers.3.mlp.up_proj.weight"):
        assert not torch.equal(before.state_dict()[name], after[name]), name


def test_every_weight_of_it_gets_a_gradient_whatever_a_batch_holds():
    model = DynamicLlavaForConditionalGeneration(tiny_config(method=METHOD)).train()
    for out in training_passes(model):
        own = model.model.language_model.method.parameters()
        has_image = bool(out.sparsity.layout.is_image.any())
        assert all((parameter.grad is not None) and bool(parameter.grad.any()) == has_image for parameter in own)
        assert out.method_losses.keys() == {"share_loss"} and out.image_keep_loss is None
        assert out.loss == out.lm_loss + out.method_losses["share_loss"]


def test_a_checkpoint_says_whose_weights_it_holds(trained):
    stored = json.loads((trained.folder / "config.json").read_text())
    assert stored["sparsity"]["method"] == METHOD and stored["untrained_predictors"] == []
    names = set(load_file(trained.folder / "model.safetensors"))
    assert names >= OWN and not any("_predictor" in name for name in names)
    plain = DynamicLlavaConfig(**{**tiny_config().to_dict()})
    assert "method" not in plain.to_dict()["sparsity"], "checkpoints of Dynamic-LLaVA read as ever"


@torch.no_grad()
def test_it_decodes_on_every_path(model):
    batch = fixed_rows(seed=20, output=0)
    inputs = prompts(batch)
    cached = model.generate(**inputs, **CALL)
    kept = [len(image) for row in cached.sparsity.image_indices for image in row]
    assert kept and set(kept) == {int(RATE * TOKENS_PER_IMAGE)}
    uncached = model.generate(**inputs, **CALL, use_cache=False)
    steps = torch.stack(cached.logits, 1)
    assert torch.equal(uncached.sequences, cached.sequences)
    assert_same_logits(torch.stack(uncached.logits, 1), steps)
    width = inputs["input_ids"].shape[1]
    output = torch.arange(cached.sequences.shape[1])[None].expand_as(cached.sequences) >= width
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, STEPS), value=1)
    masked = model(
        input_ids=cached.sequences, attention_mask=mask, pixel_values=inputs["pixel_values"], output_mask=output,
        labels=cached.sequences,
    )  # fmt: skip
    assert_same_logits(masked.logits[:, width - 1 : -1], steps)
    dense = model.generate(**inputs, **CALL, sparsity="none")
    assert dense.sparsity is None
    given = model.generate(**inputs, **CALL, method=Linear(image_keep_rate=0.5))
    assert {len(image) for row in given.sparsity.image_indices for image in row} == {TOKENS_PER_IMAGE // 2}
    fixed = model.generate(**inputs, **CALL, method="fastv")
    assert fixed.sparsity is not None, "a training-free method runs on any checkpoint"


@pytest.mark.slow
@torch.no_grad()
def test_its_compiled_steps_are_its_steps(model):
    inputs = prompts(fixed_rows(seed=20, output=0))
    eager, compiled = (model.generate(**inputs, **CALL, compile=switch) for switch in (False, True))
    assert_same_logits(torch.stack(compiled.logits), torch.stack(eager.logits))


@torch.no_grad()
def test_weights_of_another_method_are_refused(model):
    inputs = prompts(fixed_rows(output=0))
    with pytest.raises(ValueError, match=r"'dynamic' decides by weights of its own.*those of 'linear'"):
        model(**inputs, method="dynamic")
    with pytest.raises(ValueError, match=r"'linear' decides by weights of its own.*those of 'dynamic'"):
        build_model()(**inputs, method=Linear())
    for switch in ({"sparsity": "image"}, {"output_threshold": 0.1}):
        with pytest.raises(ValueError, match="are switches of Dynamic-LLaVA"):
            model(**inputs, **switch)
    with pytest.raises(ValueError, match="learns nothing, so a checkpoint cannot hold its weights"):
        DynamicLlavaForConditionalGeneration(tiny_config(method={"name": "fastv"}))


def test_a_checkpoint_imports_no_code(trained, tmp_path):
    values = json.loads((trained.folder / "config.json").read_text())
    values["sparsity"]["method"] = {"name": "json.tool:Method"}
    sys.modules.pop("json.tool", None)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"imports no code.*import json\.tool yourself"):
        DynamicLlavaConfig.from_pretrained(tmp_path)
    assert "json.tool" not in sys.modules


def test_missing_weights_of_it_are_damage(trained, tmp_path):
    from safetensors.torch import save_file

    weights = load_file(trained.folder / "model.safetensors")
    (tmp_path / "config.json").write_text((trained.folder / "config.json").read_text())
    for lost, words in ((OWN, "lacks the whole method"), ({min(OWN)}, "missing tensors")):
        left = {name: tensor for name, tensor in weights.items() if name not in lost}
        save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=words):
            DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_it_is_costed(folders):
    config = config_of(folders)
    model, processor = load(config)
    trainer = build_trainer(config, prepare(model, config), processor, SftDataset(config.data, processor))
    shape, learned = llava_shape(model.config), learned_costs(SPARSITY, HIDDEN)
    counted = {part: sum(p.numel() for p in found) for part, found in parts(model).items()}
    counts = parameter_counts(shape, learned)
    assert counts["method"] == 3 * HIDDEN + 2 and {part: n for part, n in counts.items() if n} == counted
    assert learned["method"].judging(TOKENS_PER_IMAGE) == 2 * HIDDEN * TOKENS_PER_IMAGE
    assert trainer.flops.per_output_token == 0
    dense = build_trainer(
        replace(config, train=replace(config.train, sparsity_mode="none")), model, processor, trainer.train_dataset
    )
    assert trainer.flops.per_image - dense.flops.per_image == 3 * 2 * HIDDEN * TOKENS_PER_IMAGE
    memory = training_memory(shape, config.model, SPARSITY, learned, config.train, tokens=100)
    without = training_memory(shape, config.model, SPARSITY, {}, config.train, tokens=100)
    assert memory.optimizer - without.optimizer == 8 * counts["method"] and memory.activations > without.activations
    groups = {group["name"]: group["lr"] for group in trainer.create_optimizer().param_groups}
    assert groups == {"language_model": 1e-3, "method": 1e-2} == learning_rates(config.train, SPARSITY)


@pytest.mark.parametrize("tune", ["lora", "predictors"])
def test_it_is_tuned_alone_or_beside_adapters(folders, tune):
    lora = LoraConfig(rank=4, dropout=0.0) if tune == "lora" else None
    result = run(config_of(folders, name=tune, tune=tune, lora=lora, max_steps=2))
    before, _ = load(config_of(folders))
    after = load_file(result.folder / "model.safetensors")
    moved = {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after[name])}
    assert moved >= OWN and ("model.language_model.layers.0.mlp.up_proj.weight" in moved) == (tune == "lora")
    assert not any("embed" in name or "vision" in name for name in moved)
    DynamicLlavaForConditionalGeneration.from_pretrained(result.folder)


def test_it_is_left_out_of_quantisation_and_of_the_dense_layout(trained, tmp_path):
    config, _ = DynamicLlavaConfig.get_config_dict(trained.folder)
    assert "quantization_config" not in config
    values = json.loads((trained.folder / "config.json").read_text())
    values["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True).to_dict()
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "config.json").write_text(json.dumps(values))
    spared = DynamicLlavaConfig.from_pretrained(tmp_path / "q").quantization_config["llm_int8_skip_modules"]
    assert "model.language_model.method" in spared and not any("_predictor" in name for name in spared)
    convert(trained.folder, tmp_path / "hf", to="llava-hf")
    assert not any("method" in name for name in load_file(tmp_path / "hf" / "model.safetensors"))
    convert(trained.folder, tmp_path / "ours")
    assert set(load_file(tmp_path / "ours" / "model.safetensors")) >= OWN


def test_a_run_says_a_learned_method_in_its_settings(folders):
    with pytest.raises(ValueError, match=r"learns, and a checkpoint's settings say whose weights.*sparsity\.method"):
        run(replace(config_of(folders, "told", sparsity=TINY_SPARSITY), method=METHOD))


def test_a_training_free_method_tunes_the_model_of_any_checkpoint(model):
    training = DynamicLlavaForConditionalGeneration(model.config).train()
    inputs = {key: value for key, value in collate(fixed_rows()).items() if key != "keep_mask"}
    out = training(**inputs, labels=inputs["input_ids"], method=get_method("random"))
    out.loss.backward()
    assert out.loss == out.lm_loss and all(p.grad is None for p in training.model.language_model.method.parameters())
