"""Quantised loading leaves both predictors as they are, whoever asks and whatever else is excluded."""

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, HqqConfig, LlavaForConditionalGeneration, QuantoConfig
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import EetqConfig, GPTQConfig, TorchAoConfig

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynamic_llava.model.loading import spare_learned
from tests.builders import TINY_SPARSITY, build_model, dense_twin, fixed_rows, predictors, prompts, tiny_config
from tests.sft_builders import write_checkpoint


def without_package(kind, **settings):
    """Return a configuration whose package need not be installed: its list is all that matters here."""
    config = kind.__new__(kind)
    config.__dict__.update(settings)
    return config


PARTS = ("image_predictor", "output_predictor")
EXCLUDED = [f"model.language_model.{part}" for part in PARTS]


def spare(settings):
    return spare_learned(settings, PARTS)


def bits_and_bytes(**switches):
    return lambda given: BitsAndBytesConfig(**switches, llm_int8_skip_modules=given)


SKIP, SPARE, LEAVE = "llm_int8_skip_modules", "modules_to_not_convert", "skip_modules"
SETTINGS = {
    "bitsandbytes 8 bit": (bits_and_bytes(load_in_8bit=True), SKIP),
    "bitsandbytes 4 bit": (bits_and_bytes(load_in_4bit=True), SKIP),
    "torchao": (lambda given: without_package(TorchAoConfig, modules_to_not_convert=given), SPARE),
    "quanto": (lambda given: QuantoConfig(modules_to_not_convert=given), SPARE),
    "eetq": (lambda given: EetqConfig(modules_to_not_convert=given), SPARE),
    "hqq": (lambda given: without_package(HqqConfig, skip_modules=given), LEAVE),
    "config.json, bitsandbytes": (lambda given: {"load_in_8bit": True, SKIP: given}, SKIP),
    "config.json, torchao": (lambda given: {"quant_method": "torchao", SPARE: given}, SPARE),
}


def list_of(settings, field):
    return settings[field] if isinstance(settings, dict) else getattr(settings, field)


@pytest.mark.parametrize(("build", "field"), SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("given", [None, ["lm_head", "model.vision_tower"], [*EXCLUDED, "lm_head"]], ids=str)
def test_a_list_is_extended_and_the_default_kept(build, field, given):
    settings = build(given)
    spared = list_of(spare(settings), field)
    assert set(EXCLUDED) <= set(spared)
    assert spared[: len(given or ["lm_head"])] == (given or ["lm_head"])
    assert len(spared) == len(set(spared)), "nothing twice"
    before = settings.get(field) if isinstance(settings, dict) else getattr(settings, field)
    assert before == given, "the caller's own object stays as it was"


def test_a_list_is_found_under_the_methods_own_name():
    assert list_of(spare({"load_in_4bit": True}), "llm_int8_skip_modules") == ["lm_head", *EXCLUDED]
    assert list_of(spare({"quant_method": "hqq"}), "skip_modules") == ["lm_head", *EXCLUDED]


def test_a_method_that_excludes_nothing_is_refused():
    with pytest.raises(ValueError, match="GPTQConfig has no list of modules to leave out"):
        spare(without_package(GPTQConfig, bits=4))


@pytest.mark.parametrize("given", [None, ["model.vision_tower", "model.multi_modal_projector"]])
def test_transformers_would_replace_every_other_linear_layer(given):
    """The same question that its quantisers ask of each layer, on a model without memory."""
    settings = spare(BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=given))
    with torch.device("meta"):
        model = DynamicLlavaForConditionalGeneration(tiny_config())
    excluded = HfQuantizer.get_modules_to_not_convert(
        model, settings.llm_int8_skip_modules, model._keep_in_fp32_modules
    )
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    replaced = [name for name in linear if should_convert_module(name, excluded)]
    assert len(linear) > len(replaced) > 20
    assert not [name for name in replaced if "_predictor" in name]
    others = {name.split(".")[1] if name.startswith("model.") else name for name in linear if name not in replaced}
    expected = (
        {"language_model", "lm_head"} if given is None else {"language_model", "vision_tower", "multi_modal_projector"}
    )
    assert others == expected
    kept = {name for name in linear if name not in replaced and name.startswith("model.language_model.")}
    assert kept and all("_predictor" in name for name in kept)


def test_a_quantised_checkpoint_spares_them_by_its_config(tmp_path):
    """A dense checkpoint that somebody quantised knows of no predictors."""
    config = dense_twin(build_model()).config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": None}
    config.save_pretrained(tmp_path)
    loaded = DynamicLlavaConfig.from_pretrained(tmp_path)
    assert loaded.quantization_config["llm_int8_skip_modules"] == ["lm_head", *EXCLUDED]


def test_from_pretrained_extends_what_it_is_given(tmp_path, monkeypatch):
    seen = []

    def stop(cls, *args, quantization_config=None, **kwargs):
        seen.append(quantization_config)
        raise InterruptedError

    write_checkpoint(tmp_path)
    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", classmethod(stop))
    with pytest.raises(InterruptedError):
        DynamicLlavaForConditionalGeneration.from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
        )
    assert seen[0].llm_int8_skip_modules == ["lm_head", *EXCLUDED]


def saved(source, folder):
    """Save a tiny model, of ours or a dense one; return it and what loading needs besides."""
    model = build_model()
    (model if source == "ours" else dense_twin(model)).save_pretrained(folder)
    return model, {} if source == "ours" else {"sparsity": TINY_SPARSITY.to_dict()}


def linear_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def check_predictors(loaded, expected):
    """Assert plain float32 parameters, and where the checkpoint holds them the very same numbers."""
    for mine, theirs in zip(predictors(loaded), predictors(expected), strict=True):
        for (name, actual), value in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            assert type(actual) is nn.Parameter and actual.dtype == torch.float32, name
            if not loaded.config.untrained_predictors:
                assert torch.equal(actual, value), name


def check_generation(loaded):
    inputs = prompts(fixed_rows(output=0))
    result = loaded.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert result.sequences.shape[1] == inputs["input_ids"].shape[1] + 4
    assert bool((result.sparsity.cache_lengths < result.sparsity.dense_cache_lengths).any())


@pytest.mark.parametrize("source", ["ours", "dense"])
@torch.no_grad()
def test_bitsandbytes_on_a_cpu_keeps_the_predictors(source, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, settings = saved(source, tmp_path)
    quantisation = BitsAndBytesConfig(load_in_8bit=True)
    loaded = DynamicLlavaForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=quantisation, device_map="cpu", **settings
    ).eval()
    layers = linear_layers(loaded)
    quantised = {name for name, layer in layers.items() if isinstance(layer, bitsandbytes.nn.Linear8bitLt)}
    assert not any("_predictor" in name or name == "lm_head" for name in quantised)
    assert quantised >= {name for name in layers if ".layers." in name and name.endswith("_proj")} != set()
    check_predictors(loaded, model)
    check_generation(loaded)
    loaded.save_pretrained(tmp_path / "quantised")
    again = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path / "quantised", device_map="cpu")
    check_predictors(again, loaded)
    inputs = prompts(fixed_rows(output=0))
    assert torch.equal(again.eval()(**inputs).logits, loaded(**inputs).logits)


@pytest.mark.parametrize("source", ["ours", "dense"])
@torch.no_grad()
def test_torchao_on_a_cpu_keeps_the_predictors(source, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    model, settings = saved(source, tmp_path)
    quantisation = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    loaded = DynamicLlavaForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=quantisation, device_map="cpu", **settings
    ).eval()
    layers = linear_layers(loaded)
    quantised = {name for name, layer in layers.items() if type(layer.weight.data) is not torch.Tensor}
    assert not any("_predictor" in name or name == "lm_head" for name in quantised)
    assert quantised >= {name for name in layers if ".layers." in name and name.endswith("_proj")} != set()
    check_predictors(loaded, model)
    check_generation(loaded)
