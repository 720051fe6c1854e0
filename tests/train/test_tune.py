"""What learns with train.tune: gradients where they belong and nowhere else, kept activations, bad settings."""

from dataclasses import replace

import pytest
import torch

from dynamic_llava.cli import read_yaml
from dynamic_llava.config import LoraConfig, ModelConfig, TrainConfig
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.optimizer import learning_rates, parts, prepare
from dynamic_llava.train.run import run
from tests.builders import LAYERS, build_model, collate, fixed_rows
from tests.sft_builders import write_checkpoint, write_data

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0)


def prepared(tune="full", dtype=torch.float32, layer=2, **train):
    """Return the tiny random model as a run prepares it, in training mode."""
    if dtype != torch.float32:
        train["bf16"] = True
    settings = RunConfig(
        model=ModelConfig(dtype=str(dtype).removeprefix("torch.")),
        train=TrainConfig(tune=tune, **train),
        lora=LORA if tune == "lora" else None,
    )
    return prepare(build_model(sparse_layer=layer).to(dtype), settings).train()


def batch():
    inputs = collate(fixed_rows())
    del inputs["keep_mask"]
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    return {**inputs, "labels": labels}


def backward(model, mode="both", **switches):
    """Run a step with fixed noise; return the gradients by parameter name."""
    model.zero_grad(set_to_none=True)
    outputs = model(**batch(), sparsity=mode, sample_key=torch.arange(4), tau=0.7, **switches)
    outputs.loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


LEARNING = {
    "full": {"language_model", "image_predictor", "output_predictor"},
    "lora": {"adapters", "image_predictor", "output_predictor"},
    "predictors": {"image_predictor", "output_predictor"},
}


@pytest.mark.parametrize("tune", LEARNING)
@pytest.mark.parametrize("mode", ["both", "image", "output"])
def test_gradients_are_where_they_belong(tune, mode):
    model = prepared(tune, sparsity_mode=mode)
    backward(model, mode)
    wanted = LEARNING[tune] - {"image": {"output_predictor"}, "output": {"image_predictor"}}.get(mode, set())
    with_gradient = {part for part, found in parts(model).items() if any(p.grad is not None for p in found)}
    assert (
        with_gradient
        == wanted
        == set(learning_rates(TrainConfig(tune=tune, sparsity_mode=mode), model.config.sparsity))
    )
    for part in with_gradient:
        # An adapter's first map has the gradient 0 as long as its second is 0.
        assert sum(bool(p.grad.any()) for p in parts(model)[part]) >= len(parts(model)[part]) // 2


def test_the_projector_learns_if_it_has_a_rate():
    for tune in LEARNING:
        model = prepared(tune, projector_learning_rate=1e-4)
        backward(model)
        assert all(bool(p.grad.any()) for p in parts(model)["projector"])
        assert not any(p.requires_grad for p in parts(model)["vision_tower"])


def test_predictors_alone_get_the_gradients_of_full_training():
    """The loss reaches the keep mask through frozen layers; nothing else about the gradient changes."""
    full, alone = backward(prepared("full")), backward(prepared("predictors"))
    assert set(alone) == {name for name in full if "_predictor." in name}
    assert all(torch.equal(full[name], gradient) for name, gradient in alone.items())


@pytest.mark.parametrize("tune", LEARNING)
def test_recomputing_changes_no_gradient(tune):
    kept, recomputed = backward(prepared(tune)), backward(prepared(tune, gradient_checkpointing=True))
    assert set(kept) == set(recomputed)
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)


def layers_that_keep(model):
    """Return the decoder layers, and "vision", of whose forward pass autograd keeps tensors."""
    kept, inside = set(), []
    places = {f"language_model.layers.{n}": n for n in range(LAYERS)} | {"vision_tower": "vision"}

    def leave(*_):
        inside.pop()

    for name, module in model.named_modules():
        for place in (place for end, place in places.items() if name.endswith(end)):
            module.register_forward_pre_hook(lambda *_, place=place: inside.append(place))
            module.register_forward_hook(leave)

    def pack(tensor):
        kept.update(inside)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch(), tau=1.0)
    return kept


@pytest.mark.parametrize("layer", [1, 2, 4])
def test_frozen_layers_below_the_predictors_keep_nothing(layer):
    assert layers_that_keep(prepared("predictors", layer=layer)) == set(range(layer, LAYERS))
    assert layers_that_keep(prepared("full", layer=layer)) == set(range(LAYERS))
    assert layers_that_keep(prepared("predictors", projector_learning_rate=1e-4)) == set(range(LAYERS))


@pytest.mark.parametrize("tune", LEARNING)
def test_recomputing_asks_for_no_gradient_at_the_inputs(tune):
    """transformers' own switch would send the backward pass through the frozen vision tower and the frozen layers."""
    model, flows = prepared(tune, gradient_checkpointing=True), {}
    for name, module in model.named_modules():
        for end in ("encoder.layers.0", "language_model.layers.0"):
            if name.endswith(end):
                module.register_forward_hook(lambda *call, end=end: flows.update({end: call[2].requires_grad}))
    model(**batch(), tau=1.0)
    assert flows == {"encoder.layers.0": False, "language_model.layers.0": tune != "predictors"}


@pytest.mark.parametrize("tune", ["lora", "predictors"])
def test_what_learns_beside_half_precision_is_float32(tune):
    model = prepared(tune, torch.bfloat16)
    for part, found in parts(model).items():
        wanted = torch.float32 if part in LEARNING[tune] else torch.bfloat16
        assert {p.dtype for p in found} == {wanted}, part
    with torch.autocast("cpu", torch.bfloat16):
        gradients = backward(model)
    assert all(torch.isfinite(gradient).all() and gradient.dtype == torch.float32 for gradient in gradients.values())


def test_a_frozen_half_precision_model_trains_and_loads(tmp_path):
    base = write_checkpoint(tmp_path / "base")
    file, images = write_data(tmp_path, samples=8)
    settings = RunConfig(
        output_folder=str(tmp_path / "runs"),
        model=ModelConfig(base=str(base), dtype="bfloat16"),
        train=TrainConfig(
            tune="predictors", bf16=True, batch_size=4, max_steps=3, predictor_learning_rate=1e-2, log_every=1,
            gradient_checkpointing=True,
        ),
        sparsity=build_model().config.sparsity,
    )  # fmt: skip
    settings = replace(settings, data=replace(settings.data, json=str(file), image_folder=str(images), max_length=400))
    result = run(settings)
    assert all(torch.isfinite(torch.tensor(list(line.values()))).all() for line in result.history)
    kind = type(build_model())
    before, after = (parts(kind.from_pretrained(folder, dtype=torch.float32)) for folder in (base, result.folder))
    for part, found in after.items():
        moved = any(not torch.equal(a.bfloat16(), b.bfloat16()) for a, b in zip(before[part], found, strict=True))
        assert moved == (part in LEARNING["predictors"]), part


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {tune: loraa}", "train.tune: Invalid value 'loraa'"),
        ("train: {tune: predictors, sparsity_mode: none}", "trains nothing"),
        ("lora: {rank: 8}", r"a `lora` section is given but train\.tune='full'"),
        ("train: {tune: predictors}\nlora: {}", r"train\.tune='predictors'; set it to 'lora'"),
        ("train: {tune: lora}\nlora: {rank: 0}", r"lora\.rank=0 is below its least value 1"),
        ("train: {tune: lora}\nlora: {alpha: 0}", r"lora\.alpha=0\.0 must be positive"),
        ("train: {tune: lora}\nlora: {dropout: 1}", r"lora\.dropout=1\.0 is a share"),
        ("train: {tune: lora}\nlora: {rankk: 4}", r"unknown key lora\.rankk; did you mean lora\.rank\?"),
        ("train: {tune: lora}\nmodel: {dtype: bfloat16}", r"needs train\.bf16"),
        ("train: {peak_tflops: 0}", r"train\.peak_tflops=0\.0 must be positive"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_yaml(RunConfig, tmp_path / "a.yaml")


def test_lora_without_a_section_has_the_defaults_and_says_so():
    assert RunConfig(train=TrainConfig(tune="lora")).lora == LoraConfig()
    assert RunConfig().lora is None
