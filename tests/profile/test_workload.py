"""What is measured is what runs: caches opened pre-filled equal generated ones, the baseline equals the model."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from dynamic_llava.methods import METHODS as REGISTERED
from dynamic_llava.methods import Mixed
from dynamic_llava.model import cache_of
from dynamic_llava.profile.inference_memory import cache_bytes, inference_memory, measured_memory
from dynamic_llava.profile.method_laws import method_laws
from dynamic_llava.profile.presets import Preset, small_shape
from dynamic_llava.profile.rehearsal import preset_under
from dynamic_llava.profile.workload import (
    Decoding,
    admission_cache,
    build_model,
    dense_cache,
    dense_decoding,
    dense_prefill,
    dense_twin,
    method_of,
    prompts,
    random_ids,
    sparse_decoding,
    sparse_prefill,
)
from tests.builders import LEARNED

CPU = torch.device("cpu")
SHAPE = small_shape(64, 4, 256)
SMALL = Preset(
    "small", replace(SHAPE, vision=replace(SHAPE.vision, patches=64), tokens_per_image=64), 2, (90,), "", text=9
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(SMALL, CPU, torch.float32)


@pytest.fixture(scope="module")
def twin(model):
    return dense_twin(model)


@torch.no_grad()
def test_the_baseline_is_the_same_model_on_the_same_tensors(model, twin):
    prompt = prompts(model, SMALL)
    own = model(input_ids=prompt.ids_BN, image_features=prompt.features_BnD, sparsity="none", logits_to_keep=1)
    assert torch.equal(own.logits, dense_prefill(twin, prompt).logits)
    own_tensors = {tensor.data_ptr() for tensor in model.parameters()}
    assert all(tensor.data_ptr() in own_tensors for tensor in twin.parameters())


SETTINGS = {
    "structure": {"image_keep_rate": 0.3, "output_keep_rate": 0.4},
    "random": {"image_keep_rate": 0, "output_keep_rate": None},
    "mixed": {"image_by": {"name": "fastv", "layer": 3}, "output_by": {"name": "structure", "layer": 3}},
    "tome": {"image_keep_rate": 0.2},
    "h2o": {"shares_of": "tokens"},
    "streaming_llm": {"window": 20},
}
READ_TEXT = ("cdpruner", "trim")
METHODS = [
    name
    for name, method in REGISTERED.items()
    if method is Mixed or (method.training_free and name not in ("dense", *READ_TEXT))
]
"""Every registered method that learns nothing, drops something and needs no tokenizer."""


@lru_cache
def preset_of(name):
    """Return the preset of a way of Dynamic-LLaVA or of a method, and the way."""
    if name in ("image", "both"):
        return SMALL, name
    return preset_under(SMALL, {"name": name, **SETTINGS.get(name, {})}), "both"


KINDS = ("valid", "image", "output")


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        pytest.param(name, outputs, marks=pytest.mark.slow if name in METHODS and outputs > 1 else ())
        for name in ("image", "both", *METHODS)
        for outputs in (1, 64, 90)
    ],
)
@torch.no_grad()
def test_a_cache_opened_pre_filled_is_that_of_a_generation(model, name, outputs):
    """Lengths of all groups of layers, or of all key heads; storage; and what it remembers of every token."""
    preset, way = preset_of(name)
    opened = sparse_prefill(model, preset, way, prompts(model, preset))
    generated = Decoding(model, random_ids(model, 2, 1), cache_of(opened), method=method_of(preset, way))
    for _ in range(outputs):
        generated.step()
    filled, cache = admission_cache(model, preset, way, outputs), generated.cache
    after = sparse_decoding(model, preset, way, outputs)
    after.step()
    generated.step()
    assert filled.seen_tokens + 1 == cache.seen_tokens == after.cache.seen_tokens
    for mine, theirs in zip(after.cache.groups, cache.groups, strict=True):
        assert torch.equal(mine.open_lengths(), theirs.open_lengths()) and mine.capacity == theirs.capacity
    if cache.evicts:
        assert torch.equal(after.cache.head_lengths(), cache.head_lengths())
        assert filled.head_lengths()[0].amax(-1).tolist() == preset.held(way, outputs)
    else:
        assert preset.held(way, outputs) == filled.record.tokens_per_layer()[0].tolist()
    assert torch.equal(after.cache.seen_outputs, cache.seen_outputs)
    assert torch.equal(after.cache.seen_images, cache.seen_images)
    assert torch.equal(filled.record.keep_mask.sum(1), filled.record.cache_lengths)
    assert all(torch.equal(*(getattr(one.record.layout, kind) for one in (after.cache, cache))) for kind in KINDS)
    assert torch.equal(after.cache.record.tokens_per_layer(), cache.record.tokens_per_layer())
    assert after.cache.allocated_bytes() == cache.allocated_bytes() or cache.evicts  # blocks go by the longest so far


def test_a_device_is_judged_by_every_other_method():
    judged = {law.partition(" on the device")[0] for law in method_laws(CPU)} - {"a training step"}
    assert judged == set(REGISTERED) - set(READ_TEXT) - set(LEARNED)


@pytest.mark.parametrize("name", READ_TEXT)
def test_methods_that_read_text_are_refused(model, name):
    with pytest.raises(ValueError, match=f"'{name}' reads the question's text.*no tokenizer.*divprune"):
        prompts(model, preset_of(name)[0])


@pytest.mark.parametrize("outputs", [0, 63, 90, 300])
def test_calculated_cache_bytes_are_the_allocated_ones(model, twin, outputs):
    for name in ("image", "both", *METHODS):
        preset, way = preset_of(name)
        cache = admission_cache(model, preset, way, outputs)
        if cache.evicts and outputs:
            after = sparse_decoding(model, preset, way, outputs)
            after.step()
            cache = after.cache
        assert cache.allocated_bytes() == cache_bytes(preset, way, outputs, bytes_per_value=4), name
    cache = dense_cache(twin, SMALL, outputs)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == cache_bytes(SMALL, "dense", outputs, bytes_per_value=4)


@torch.no_grad()
def test_dense_steps_go_on_from_the_filled_length(model, twin):
    decoding = dense_decoding(model, twin, SMALL, 20)
    decoding.step()
    decoding.step()
    assert decoding.cache.get_seq_length() == SMALL.prompt + 22 and decoding.token_B1.shape == (2, 1)
    static = dense_cache(twin, SMALL, 20, longest=SMALL.prompt + 30)
    assert int(static.get_seq_length()) == SMALL.prompt + 20
    assert static.layers[0].keys.shape[2] == SMALL.prompt + 30


def test_the_dense_way_has_no_method():
    with pytest.raises(ValueError, match="dense way has no method"):
        method_of(SMALL, "dense")


@pytest.mark.parametrize(
    "way", [pytest.param("dense", marks=pytest.mark.slow), pytest.param("image", marks=pytest.mark.slow), "both"]
)
def test_calculated_memory_is_near_the_measured_one(way):
    """Hidden 256 and 576 image tokens, so that what the formulas leave out is small; prefill and last steps."""
    preset = Preset("memory", small_shape(256, 3, 512), 1, (400,), "")
    model = build_model(preset, CPU, torch.float32)
    found = inference_memory(preset, way, 400, bytes_per_value=4)
    peaks = measured_memory(model, dense_twin(model), preset, way, 400)
    assert peaks["prefill"].bytes == pytest.approx(found.prefill, rel=0.04)
    assert peaks["decoding"].bytes == pytest.approx(found.decoding, rel=0.05)
    assert peaks["prefill"].how == "bytes of live tensors"
