"""Every formula on shapes whose sizes do not follow from one another, against counts on real modules."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.config import LoraConfig, ModelConfig, TrainConfig
from dynamic_llava.costs import (
    decode_step_bytes,
    decoder_shape,
    flops_exact,
    kv_bytes,
    llava_shape,
    parameter_counts,
    training_memory,
    weight_bytes,
)
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.optimizer import parts, prepare
from tests.builders import FIRST_WORD, HIDDEN, IMAGE_SIZE, IMAGE_TOKEN, LAYERS, VOCABULARY
from tests.costs.counted import check_training_flops, learned_of_run
from tests.costs.variants import VARIANTS, variant_config
from tests.live_memory import measure_step

LORA = LoraConfig(rank=4, dropout=0.0)


def inputs(shape, tokens=40):
    """Return a batch of 2 rows of one image and an answer each."""
    ids = torch.randint(FIRST_WORD, VOCABULARY, (2, tokens))
    ids[:, 3 : 3 + shape.tokens_per_image] = IMAGE_TOKEN
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("lora", [None, LORA], ids=["plain", "lora"])
def test_parameters(name, lora):
    config = variant_config(name)
    run = RunConfig(sparsity=config.sparsity, train=TrainConfig(tune="lora" if lora else "full"), lora=lora)
    found = parts(prepare(DynamicLlavaForConditionalGeneration(config), run))
    counted = {part: sum(p.numel() for p in tensors) for part, tensors in found.items() if part != "replaced"}
    counts = parameter_counts(llava_shape(config), learned_of_run(llava_shape(config), run), lora)
    assert {part: count for part, count in counts.items() if count} == counted


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_bytes_and_flops_of_inference(name):
    config = variant_config(name)
    model, shape = DynamicLlavaForConditionalGeneration(config).eval(), llava_shape(config)
    batch = inputs(shape)
    cache = model(**batch, sparsity="none", use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_bytes(shape.decoder, 40, batch=2, bytes_per_value=4) == held
    read = [*model.model.language_model.layers.parameters(), model.lm_head.weight]
    norms = LAYERS * shape.decoder.layer_norms
    assert weight_bytes(shape.decoder, 4) == sum(p.nbytes for p in read) - 4 * norms
    assert decode_step_bytes(shape.decoder, 40, batch=2, bytes_per_value=4) == held + weight_bytes(shape.decoder, 4)
    embeds = torch.randn(2, 40, HIDDEN)
    with FlopCounterMode(display=False) as counter:
        model.model.language_model.layers[0](
            embeds, attention_mask=None, position_embeddings=(torch.ones(1, 40, shape.decoder.head_width),) * 2
        )
    assert LAYERS * counter.get_total_flops() == flops_exact(40, shape.decoder, batch=2)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("tune", ["full", "lora", "predictors"])
def test_flops_and_activations_of_a_training_step(name, tune):
    config = variant_config(name, masked_softmax="reference")
    lora = LORA if tune == "lora" else None
    run = RunConfig(sparsity=config.sparsity, train=TrainConfig(tune=tune, batch_size=2), lora=lora)
    check_training_flops(run, config)
    config.sparsity = replace(config.sparsity, masked_softmax="chunked")
    config._attn_implementation = "sdpa"
    model, shape = prepare(DynamicLlavaForConditionalGeneration(config), run).train(), llava_shape(config)
    batch = inputs(shape, 160)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_TOKEN, -100)
    labels[:, :4] = -100
    kept, _ = measure_step(model, {**batch, "labels": labels}, autocast=False, tau=1.0)
    memory = training_memory(
        shape, ModelConfig(dtype="float32"), run.sparsity, learned_of_run(shape, run), run.train, lora, tokens=160
    )
    assert memory.activations == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("name", VARIANTS)
def test_shape_of_a_configuration(name):
    shape = decoder_shape(variant_config(name))
    with torch.device("meta"):
        model = DynamicLlavaForConditionalGeneration(variant_config(name))
    layer = model.model.language_model.layers[0]
    linear = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
    assert shape.layer_parameters == sum(module.weight.numel() for module in linear)
    assert shape.layer_biases == sum(module.bias.numel() for module in linear if module.bias is not None)
