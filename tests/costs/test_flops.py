"""The calculator against every value of the paper's Table 10 (Eq. 13) and against counted module shapes."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.config import DistillConfig, LoraConfig, SparsityConfig, TrainConfig
from dynamic_llava.costs import (
    LLAVA_7B,
    LLAVA_13B,
    LLAVA_SHAPES,
    DecoderShape,
    average_tokens,
    decode_step_bytes,
    device_peak,
    flops_decode_step,
    flops_exact,
    flops_paper,
    head_flops,
    kv_bytes,
    llava_shape,
    parameter_counts,
    predictor_flops,
    prefill_flops,
    training_flops,
    weight_bytes,
)
from dynamic_llava.train.config import RunConfig
from tests.builders import TOKENS_PER_IMAGE, tiny_config
from tests.costs.counted import check_training_flops

# (model, tokens, kept, sparse layer, Eq. 13, exact, exact causal, average tokens); TFLOP.
ROWS = {
    "dense": (LLAVA_7B, 576, None, 0, 10.0696, 7.6343, 7.5475, 576),
    "PruMerge+": (LLAVA_7B, 146, None, 0, 2.5194, 1.9022, 1.8966, 146),
    "FastV": (LLAVA_7B, 576, 144, 3, 3.1958, 2.4158, 2.4028, 184.5),
    "VoCo": (LLAVA_7B, 128, None, 0, 2.2076, 1.6664, 1.6622, 128),
    "HiRED": (LLAVA_7B, 115, None, 0, 1.9826, 1.4964, 1.4930, 115),
    "Dynamic": (LLAVA_7B, 576, 115, 2, 2.4881, 1.8800, 1.8714, 143.8),
    "13B dense": (LLAVA_13B, 576, None, 0, 19.5991, 14.8881, 14.7524, 576),
    "13B PruMerge+": (LLAVA_13B, 146, None, 0, 4.9164, 3.7223, 3.7136, 146),
    "13B FastV": (LLAVA_13B, 576, 144, 3, 5.9551, 4.5123, 4.4944, 176.4),
    "13B VoCo": (LLAVA_13B, 128, None, 0, 4.3084, 3.2615, 3.2548, 128),
    "13B HiRED": (LLAVA_13B, 115, None, 0, 3.8696, 2.9290, 2.9237, 115),
    "13B Dynamic": (LLAVA_13B, 576, 115, 2, 4.6561, 3.5270, 3.5151, 138.1),
    "TokenPacker 144": (LLAVA_7B, 144, None, 0, 2.4848, 1.8760, 1.8706, 144),
    "TokenPacker 64": (LLAVA_7B, 64, None, 0, 1.1017, 0.8311, 0.8300, 64),
    "TokenPacker + FastV": (LLAVA_7B, 144, 72, 3, 1.3564, 1.0235, 1.0217, 78.8),
    "TokenPacker + Dynamic": (LLAVA_7B, 144, 57, 2, 1.0749, 0.8110, 0.8098, 62.4),
    "13B TokenPacker 144": (LLAVA_13B, 144, None, 0, 4.8488, 3.6711, 3.6626, 144),
    "13B TokenPacker 64": (LLAVA_13B, 64, None, 0, 2.1508, 1.6274, 1.6257, 64),
    "13B TokenPacker + FastV": (LLAVA_13B, 144, 72, 3, 2.6023, 1.9693, 1.9667, 77.4),
    "13B TokenPacker + Dynamic": (LLAVA_13B, 144, 57, 2, 2.0619, 1.5602, 1.5585, 61.4),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_row_of_the_flops_table(row):
    shape, tokens, kept, layer, eq13, exact, causal, average = row
    groups = {"kept": kept, "sparse_layer": layer}
    assert flops_paper(tokens, shape.hidden, shape.layers, **groups) / 1e12 == pytest.approx(eq13, abs=6e-5)
    assert flops_exact(tokens, shape, **groups) / 1e12 == pytest.approx(exact, abs=6e-5)
    assert flops_exact(tokens, shape, causal=True, **groups) / 1e12 == pytest.approx(causal, abs=6e-5)
    seen = average_tokens(tokens, tokens if kept is None else kept, shape.layers, layer)
    assert seen == pytest.approx(average, abs=0.051)


def test_decoding_rows_of_the_paper_are_eq_13_on_the_output_length():
    assert flops_paper(159, 4096, 32) / 1e12 == pytest.approx(2.745, abs=6e-4)
    assert flops_paper(159, 4096, 32, kept=84, sparse_layer=2) / 1e12 == pytest.approx(1.528, abs=6e-4)
    assert flops_paper(159, 5120, 40) / 1e12 == pytest.approx(5.356, abs=6e-4)


def test_paper_overstates_by_1_32_and_its_ratio_holds():
    dense = flops_paper(576, 4096, 32), flops_exact(576, LLAVA_7B)
    sparse = flops_paper(576, 4096, 32, kept=115, sparse_layer=2), flops_exact(576, LLAVA_7B, kept=115, sparse_layer=2)
    assert dense[0] / dense[1] == pytest.approx(1.32, abs=0.005)
    assert 1 - sparse[0] / dense[0] == pytest.approx(0.753, abs=5e-4)
    assert 1 - sparse[1] / dense[1] == pytest.approx(0.754, abs=5e-4)


def test_prefill_with_fifty_text_tokens():
    for shape, dense, sparse in ((LLAVA_7B, 8.21, 2.52), (LLAVA_13B, 16.05, 4.79)):
        head = head_flops(1, shape)
        full = flops_exact(626, shape, causal=True) + head
        short = prefill_flops(626, shape, kept=165, sparse_layer=2)
        assert full == prefill_flops(626, shape) and 8 * full == prefill_flops(626, shape, batch=8)
        assert full / 1e12 == pytest.approx(dense, abs=0.006)
        assert short / 1e12 == pytest.approx(sparse, abs=0.006)


def test_exact_count_equals_counted_modules():
    shape = DecoderShape(hidden=64, layers=3, intermediate=96, heads=8, kv_heads=2, vocab=50)
    tokens, batch = 11, 2
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        hidden = torch.empty(batch, tokens, 64)
        for _ in range(shape.layers):
            for width in (64, shape.kv_width, shape.kv_width, 64, 96, 96):
                torch.nn.functional.linear(hidden, torch.empty(width, 64))
            torch.nn.functional.linear(torch.empty(batch, tokens, 96), torch.empty(64, 96))
            query = torch.empty(batch * 8, tokens, 8)
            weights = query @ query.transpose(1, 2)
            weights @ query
    assert flops_exact(tokens, shape, batch=batch) == counter.get_total_flops()


def test_prefill_plus_decoding_is_one_long_causal_pass():
    shape = DecoderShape(hidden=32, layers=4, intermediate=80, heads=4, kv_heads=2, vocab=50)
    steps = sum(flops_decode_step(tokens, shape) for tokens in range(9, 20))
    assert flops_exact(9, shape, causal=True) + steps == flops_exact(20, shape, causal=True)


@pytest.mark.parametrize("shape", [LLAVA_7B, LLAVA_13B], ids=["7B", "13B"])
def test_predictors_stay_under_one_percent(shape):
    dense = flops_exact(626, shape, causal=True)
    sparse = flops_exact(626, shape, kept=165, sparse_layer=2, causal=True)
    prefill = predictor_flops(shape.hidden, image_tokens=576)
    assert prefill < 0.01 * sparse < 0.01 * dense
    step = predictor_flops(shape.hidden, output_tokens=1)
    assert step < 0.001 * flops_decode_step(626, shape, kept=165, sparse_layer=2)


def test_key_value_bytes_of_two_layer_groups():
    mebibyte = 2**20
    assert kv_bytes(LLAVA_7B, 1) == 512 * 1024 and kv_bytes(LLAVA_13B, 1) == 800 * 1024
    assert kv_bytes(LLAVA_7B, 159) / mebibyte == pytest.approx(79.5, abs=0.05)
    assert kv_bytes(LLAVA_7B, 159, kept=84, sparse_layer=2) / mebibyte == pytest.approx(44.3, abs=0.05)
    assert kv_bytes(LLAVA_13B, 159) / mebibyte == pytest.approx(124.2, abs=0.05)
    dense = kv_bytes(LLAVA_13B, 576 + 50 + 2048, batch=8)
    sparse = kv_bytes(LLAVA_13B, 576 + 50 + 2048, kept=115 + 50 + 1024, sparse_layer=2, batch=8)
    assert dense / 2**30 == pytest.approx(16.32, abs=0.1) and sparse / 2**30 == pytest.approx(7.71, abs=0.1)
    grouped = DecoderShape(hidden=64, layers=6, intermediate=128, heads=8, kv_heads=2, vocab=50)
    assert kv_bytes(grouped, 10, kept=4, sparse_layer=2, bytes_per_value=4) == (2 * 10 + 4 * 4) * 2 * 16 * 4


def test_weights_read_by_a_decoding_step():
    assert weight_bytes(LLAVA_7B) / 1e9 == pytest.approx(13.21, abs=0.006)
    assert weight_bytes(LLAVA_13B) / 1e9 == pytest.approx(25.70, abs=0.006)


def test_a_step_reads_weights_once_and_every_rows_cache():
    """Half-way through the answer, over an A100's 2.039 TB/s: the table of limits."""
    limits = (
        (LLAVA_7B, 1, 1024, 6.77, 6.60),
        (LLAVA_7B, 8, 4096, 11.98, 9.12),
        (LLAVA_13B, 1, 1024, 13.06, 12.79),
        (LLAVA_13B, 8, 2048, 17.91, 14.94),
    )
    for shape, batch, outputs, dense, sparse in limits:
        tokens, kept = 626 + outputs // 2, 165 + outputs // 4
        least = decode_step_bytes(shape, tokens, batch=batch) / 2.039e9
        less = decode_step_bytes(shape, tokens, kept=kept, sparse_layer=2, batch=batch) / 2.039e9
        assert (least, less) == (pytest.approx(dense, abs=0.006), pytest.approx(sparse, abs=0.006))


def test_peaks_of_devices_by_name():
    for name, tflops, terabytes in (
        ("NVIDIA H200", 989.0, 4.8),
        ("NVIDIA H100 80GB HBM3", 989.0, 3.35),
        ("NVIDIA A100-SXM4-80GB", 312.0, 2.039),
        ("NVIDIA A100-SXM4-40GB", 312.0, 1.555),
        ("NVIDIA L40S", 362.0, 0.864),
    ):
        peak = device_peak(name)
        assert peak is not None and (peak.tflops, peak.terabytes) == (tflops, terabytes)
    assert device_peak("cpu") is None and device_peak("NVIDIA L40") is None


def test_parameters_of_the_published_sizes():
    for name, total in (("7b", 7.063e9), ("13b", 13.351e9)):  # LLaVA-1.5 itself
        counts = parameter_counts(LLAVA_SHAPES[name], {})
        assert counts["vision_tower"] == 303_507_456
        dense = sum(counts[part] for part in ("language_model", "vision_tower", "projector"))
        assert dense == pytest.approx(total, rel=1e-4)
    assert parameter_counts(LLAVA_SHAPES["7b"], {}, LoraConfig())["adapters"] == 319_815_680


WAYS = [
    pytest.param(*way, marks=() if way[1:] in (("both", "masked_softmax", None), ("none", "masked_softmax", 1e-4))
                 or way[:3] == ("predictors", "both", "zero_vectors") else pytest.mark.slow)
    for way in itertools.product(
        ("full", "lora", "predictors"),
        ("both", "image", "output", "none"),
        ("masked_softmax", "zero_vectors"),
        (None, 1e-4),
    )
    if (way[0], way[1], way[3]) != ("predictors", "none", None)  # nothing learns
]  # fmt: skip


@pytest.mark.parametrize(("tune", "mode", "dropped", "projector"), WAYS)
def test_training_flops_equal_counted_products(tune, mode, dropped, projector):
    lora = LoraConfig(rank=4, dropout=0.0) if tune == "lora" else None
    train = TrainConfig(tune=tune, sparsity_mode=mode, projector_learning_rate=projector)
    sparsity = SparsityConfig(**{**tiny_config().sparsity.to_dict(), "dropped_tokens": dropped})
    run = RunConfig(sparsity=sparsity, train=train, lora=lora)
    check_training_flops(run, tiny_config(2, "eager", masked_softmax="reference", dropped_tokens=dropped))


@pytest.mark.parametrize("tune", ["predictors", pytest.param("full", marks=pytest.mark.slow)])
def test_the_dense_pass_that_is_distilled_from_is_counted(tune):
    train = TrainConfig(tune=tune, distill=DistillConfig())
    run = RunConfig(sparsity=tiny_config().sparsity, train=train)
    check_training_flops(run, tiny_config(2, "eager", masked_softmax="reference"))
    assert training_flops(LLAVA_SHAPES["7b"], SparsityConfig(), {}, train).of_batch(1, 9, 0, 0, 5) == (
        training_flops(LLAVA_SHAPES["7b"], SparsityConfig(), {}, replace(train, distill=None)).of_batch(1, 9, 0, 0, 5)
        + flops_exact(9, LLAVA_SHAPES["7b"].decoder, causal=True)
        + head_flops(5, LLAVA_SHAPES["7b"].decoder)
    )


def test_an_images_flops_equal_counted_products():
    config = tiny_config(attention="eager")
    model, shape = DynamicLlavaForConditionalGeneration(config), llava_shape(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.get_image_features(torch.randn(2, 3, 56, 56))
    train = TrainConfig(sparsity_mode="none")
    assert counter.get_total_flops() == 2 * training_flops(shape, config.sparsity, {}, train).per_image
    whole = TrainConfig(sparsity_mode="none", projector_learning_rate=1e-4)
    maps = shape.vision.hidden * 64, 64**2
    more = (
        training_flops(shape, config.sparsity, {}, whole).per_image
        - training_flops(shape, config.sparsity, {}, train).per_image
    )
    assert more == 2 * TOKENS_PER_IMAGE * (maps[0] + 2 * maps[1]), "weights of both maps, the input of the second"


@pytest.mark.parametrize("name", LLAVA_SHAPES)
def test_training_flops_near_six_per_parameter_and_token(name):
    shape, sparsity = LLAVA_SHAPES[name], SparsityConfig()
    embedded = shape.decoder.vocab * shape.decoder.hidden
    weights = parameter_counts(shape, {})["language_model"] - embedded

    def per_learned(*settings):
        flops = training_flops(shape, sparsity, {}, *settings)
        return flops.per_token + flops.per_learned_token

    assert per_learned(TrainConfig()) / weights == pytest.approx(6, rel=1e-3)
    assert per_learned(TrainConfig(tune="lora"), LoraConfig(rank=1)) / weights == pytest.approx(4, rel=0.01)
    layers = shape.decoder.layers
    alone = per_learned(TrainConfig(tune="predictors"))
    assert alone / weights == pytest.approx(2 + 2 * (layers - 2) / layers, rel=0.02)


def test_refuses_impossible_settings():
    with pytest.raises(ValueError, match="do not fit"):
        DecoderShape(hidden=64, layers=2, intermediate=8, heads=8, kv_heads=3, vocab=5)
    with pytest.raises(ValueError, match="kept"):
        flops_exact(10, LLAVA_7B, kept=11, sparse_layer=2)
    with pytest.raises(ValueError, match="sparse_layer"):
        flops_paper(10, 64, 4, kept=5, sparse_layer=5)
    with pytest.raises(ValueError, match="sparse_layer"):
        average_tokens(10, 5, 4, -1)
