"""LoRA folders: merged as peft itself merges, over any base, with whatever was trained whole beside the matrices."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.checkpoints.convert import convert
from dynamic_llava.config import LoraConfig, TrainConfig
from dynamic_llava.train.lora import add_adapters
from tests.builders import build_model, dense_twin
from tests.checkpoints.folders import (
    clip_folder,
    original_config,
    original_folder,
    original_weights,
    sparse_config,
    write,
)


@pytest.fixture(scope="module")
def model():
    return build_model()


def llama(model):
    """Return a model's language model as transformers' own Llama, under whose names LLaVA's training adapts it."""
    plain = LlamaForCausalLM(model.config.text_config)
    names = plain.state_dict()
    plain.load_state_dict({n: v for n, v in original_weights(model).items() if n in names}, strict=True)
    return plain


def adapted(plain, seed=1, **settings):
    """Return peft's model with random matrices."""
    torch.manual_seed(seed)
    targets = ["q_proj", "v_proj", "down_proj"]
    wrapped = peft.get_peft_model(plain, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    return wrapped


def projector(model):
    return {name: value for name, value in original_weights(model).items() if "mm_projector" in name}


def lora_folder(folder, wrapped, config, whole, old_files=False):
    """Write what LLaVA's training leaves behind: peft's folder, config.json and non_lora_trainables.bin."""
    wrapped.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({f"base_model.model.{name}": value for name, value in whole.items()}, folder / "non_lora_trainables.bin")
    if old_files:
        file = folder / "adapter_model.safetensors"
        torch.save(load_file(file), folder / "adapter_model.bin")
        file.unlink()
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}},
    ],
    ids=["plain", "rslora", "patterns"],
)
@pytest.mark.parametrize("old_files", [False, True], ids=["safetensors", "bin"])
def test_llava_over_vicuna(model, tmp_path, settings, old_files):
    """A language model as the base, the projector trained whole, the tower apart: the merge is peft's."""
    plain = llama(model)
    base = write(tmp_path / "vicuna", {**model.config.text_config.to_dict(), "model_type": "llama"}, plain.state_dict())
    wrapped = adapted(plain, **settings)
    source = lora_folder(tmp_path / "lora", wrapped, original_config(model), projector(model), old_files)
    tower = clip_folder(tmp_path / "clip", model)
    new = convert(source, tmp_path / "new", base=base, vision_tower=tower)
    merged = wrapped.merge_and_unload().state_dict()
    found = load_file(new / "model.safetensors")
    changed = 0
    for name, value in merged.items():
        ours = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
        torch.testing.assert_close(found[ours], value, rtol=0, atol=1e-6)
        changed += not torch.equal(found[ours], model.state_dict()[ours])
    assert changed == 3 * model.config.text_config.num_hidden_layers
    for part in ("multi_modal_projector", "vision_tower"):
        names = [name for name in found if part in name]
        assert names and all(torch.equal(found[name], model.state_dict()[name]) for name in names)
    DynamicLlavaForConditionalGeneration.from_pretrained(new)


def test_a_published_lora_with_predictors(model, tmp_path):
    """The base is a whole LLaVA, the predictors are adapted or trained whole, and their keep channel is turned."""
    base = original_folder(tmp_path / "llava", model)
    weights = original_weights(model, predictors=True)
    whole = {name: value for name, value in weights.items() if "_score_predictor." in name or "projector" in name}
    source = tmp_path / "lora"
    source.mkdir()
    name = "model.layers.0.mlp.up_proj"
    inner, outer = torch.randn(2, 64), torch.randn(128, 2)
    last = "model.image_score_predictor.output_mlp.4"
    pairs = {name: (inner, outer), last: (torch.randn(2, 8), torch.randn(2, 2))}
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    save_file(tensors, source / "adapter_model.safetensors")
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 8, "r": 2}))
    config = original_config(model, model_type="dynamic_llava_llama", sparse_config=sparse_config(model))
    (source / "config.json").write_text(json.dumps(config))
    torch.save({f"base_model.model.{n}": v for n, v in whole.items()}, source / "non_lora_trainables.bin")
    new = convert(source, tmp_path / "new", base=base)
    found = DynamicLlavaForConditionalGeneration.from_pretrained(new).state_dict()
    own = model.state_dict()
    added = {
        "model.language_model.layers.0.mlp.up_proj.weight": 4 * outer @ inner,
        "model.language_model.image_predictor.head.4.weight": (4 * pairs[last][1] @ pairs[last][0]).flip(0),
    }
    for key, value in own.items():
        torch.testing.assert_close(found[key], value + added.get(key, 0), rtol=0, atol=1e-5, msg=key)


def test_an_adapter_of_our_own_training(model, tmp_path):
    """peft's folder over transformers' dense LLaVA, predictors as copies: the converted model is the merged one."""
    dense_twin(model).save_pretrained(tmp_path / "base")
    wrapped = add_adapters(build_model(), LoraConfig(rank=2, alpha=4.0), TrainConfig(tune="lora"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    wrapped.get_base_model().config.save_pretrained(tmp_path / "adapter")
    new = convert(tmp_path / "adapter", tmp_path / "new", base=tmp_path / "base")
    found = DynamicLlavaForConditionalGeneration.from_pretrained(new).state_dict()
    merged = wrapped.merge_and_unload().state_dict()
    assert set(found) == set(merged)
    for name, value in merged.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)


def test_half_precision_is_merged_in_float32(model, tmp_path):
    """The base's format stays; what is added to it is not rounded before."""
    half = {name: value.half() for name, value in original_weights(model).items()}
    base = write(tmp_path / "llava", original_config(model), half)
    plain = llama(model)
    wrapped = adapted(plain)
    source = lora_folder(tmp_path / "lora", wrapped, original_config(model), projector(model))
    found = load_file(convert(source, tmp_path / "new", base=base) / "model.safetensors")
    name = "model.layers.2.mlp.down_proj"
    layer = wrapped.base_model.model.get_submodule(name)
    delta = 6 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    wanted = (half[f"{name}.weight"].float() + delta.detach()).half()
    difference = found["model.language_model.layers.2.mlp.down_proj.weight"].float() - wanted.float()
    assert difference.abs().max() <= 2**-10 and (difference != 0).float().mean() < 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_alpha": None}, "lora_alpha None"),
        ("single", "without the other matrix of the pair"),
        ("ranks", "no pair of LoRA matrices"),
        ("elsewhere", "which the base"),
        ("shape", "adapts model.layers.0.mlp.up_proj.weight"),
        ("unknown", "without a place in LLaVA-1.5"),
        ("no base", "give the folder of that model with --base"),
        ("no files", "neither adapter_model.safetensors nor adapter_model.bin"),
    ],
)
def test_what_is_refused(model, tmp_path, change, message):
    base = original_folder(tmp_path / "llava", model)
    source = tmp_path / "lora"
    source.mkdir()
    settings = {"peft_type": "LORA", "lora_alpha": 8, "base_model_name_or_path": "lmsys/vicuna"}
    settings |= change if isinstance(change, dict) else {}
    (source / "adapter_config.json").write_text(json.dumps(settings))
    head = "base_model.model.model.layers.0.mlp.up_proj"
    tensors = {f"{head}.lora_A.weight": torch.ones(2, 64), f"{head}.lora_B.weight": torch.ones(128, 2)}
    if change == "single":
        del tensors[f"{head}.lora_A.weight"]
    elif change == "ranks":
        tensors[f"{head}.lora_A.weight"] = torch.ones(3, 64)
    elif change == "shape":
        tensors[f"{head}.lora_A.weight"] = torch.ones(2, 65)
    elif change == "elsewhere":
        tensors = {name.replace("layers.0", "layers.99"): value for name, value in tensors.items()}
    elif change == "unknown":
        tensors["base_model.model.model.surprise.weight"] = torch.ones(2)
    if change != "no files":
        save_file(tensors, source / "adapter_model.safetensors")
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace(".", r"\.")):
        convert(source, tmp_path / "new", base=None if change == "no base" else base)
    assert not (tmp_path / "new").exists()
