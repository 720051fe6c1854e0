"""Resampler, C-Abstractor, Pixel-Shuffle and LDP-v2 against their formulas, in plain loops; their published sizes."""

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig

from dynamic_llava import DynamicLlavaConfig
from dynamic_llava.projectors import PROJECTORS, BlockProjector
from dynamic_llava.projectors.base import heads_of
from tests.projectors.formulas import (
    attention,
    blocks,
    depthwise,
    linear,
    mean,
    norm,
    perceptron,
    plus,
    sigmoid,
    silu,
    times,
)
from tests.projectors.test_projectors import config_of


def resampled(patches, side, weights):
    seen = [linear(patch, weights, "entrance") for patch in patches]
    queries = weights["queries"]
    for layer in range(6):
        at = f"blocks.{layer}."
        queries = [norm(one, weights, f"{at}query_norm", 1e-5) for one in queries]
        keys = queries + [norm(one, weights, f"{at}key_norm", 1e-5) for one in seen]
        taken = [
            attention(
                linear(one, weights, f"{at}query"),
                [linear(key, weights, f"{at}key") for key in keys],
                [linear(key, weights, f"{at}value") for key in keys],
                heads=1,
            )
            for one in queries
        ]
        queries = [plus(one, linear(other, weights, f"{at}out")) for one, other in zip(queries, taken, strict=True)]
        queries = [plus(one, weighed(norm(one, weights, f"{at}mlp_norm", 1e-5), weights, at)) for one in queries]
    return [linear(one, weights, "exit") for one in queries]


def weighed(value, weights, at):
    inner = times(silu(linear(value, weights, f"{at}weighing")), linear(value, weights, f"{at}up"))
    return linear(norm(inner, weights, f"{at}inner_norm", 1e-6), weights, f"{at}down")


def abstracted(patches, side, weights):
    patches = [plus(patch, place) for patch, place in zip(patches, weights["places"], strict=True)]
    for number in range(3):
        patches = bottleneck(patches, side, weights, f"before.{number}.")
    patches = [mean(block) for block in blocks(patches, side, 2)]
    for number in range(3):
        patches = bottleneck(patches, side // 2, weights, f"after.{number}.")
    return [perceptron(patch, weights, "mlp", silu) for patch in patches]


def bottleneck(patches, side, weights, at):
    def mapped(values, name):
        return [norm(pointwise(one, weights, f"{at}{name}.map"), weights, f"{at}{name}.norm", 1e-5) for one in values]

    inner = [silu(one) for one in mapped(patches, "into")]
    spread = depthwise(inner, side, weights, f"{at}across.map")
    inner = [silu(norm(one, weights, f"{at}across.norm", 1e-5)) for one in spread]
    squeezed = silu(pointwise(mean(inner), weights, f"{at}squeeze"))
    gate = sigmoid(pointwise(squeezed, weights, f"{at}excite"))
    inner = mapped([times(one, gate) for one in inner], "back")
    kept = mapped(patches, "shortcut") if f"{at}shortcut.map.weight" in weights else patches
    return [silu(plus(one, other)) for one, other in zip(inner, kept, strict=True)]


def pointwise(value, weights, name):
    matrix = [[number[0][0] for number in row] for row in weights[f"{name}.weight"]]
    flat = {f"{name}.weight": matrix} | ({f"{name}.bias": weights[f"{name}.bias"]} if f"{name}.bias" in weights else {})
    return linear(value, flat, name)


def shuffled(patches, side, weights):
    beside = [[number for patch in block for number in patch] for block in blocks(patches, side, 2)]
    return [perceptron(norm(one, weights, "norm", 1e-5), weights, "mlp") for one in beside]


def pooled(patches, side, weights):
    patches = [perceptron(patch, weights, "mlp") for patch in patches]
    coarse = [mean(block) for block in blocks(patches, side, 2)]
    return [
        plus(one, other) for one, other in zip(coarse, depthwise(coarse, side // 2, weights, "around"), strict=True)
    ]


FORMULAS = {"resampler": resampled, "c_abstractor": abstracted, "pixel_shuffle": shuffled, "ldp_v2": pooled}


@pytest.mark.parametrize("layers", [-2, [-3, 1]], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_every_token_is_what_its_formula_says(name, layers):
    torch.manual_seed(0)
    config = config_of(name, layers)
    config.vision_config.hidden_size, config.text_config.hidden_size = 4, 5
    projector = PROJECTORS[name](config, nn.GELU()).double()
    with torch.no_grad():
        for weight in projector.parameters():
            weight.normal_(std=0.7)
    features = torch.randn(2, 16, 4 if layers == -2 else 8, dtype=torch.float64)
    weights = {key: value.tolist() for key, value in projector.state_dict().items()}
    expected = torch.tensor([FORMULAS[name](image.tolist(), 4, weights) for image in features], dtype=torch.float64)
    torch.testing.assert_close(projector(features), expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("name", FORMULAS)
def test_every_weight_and_feature_learns(name):
    torch.manual_seed(0)
    projector = PROJECTORS[name](config_of(name), nn.GELU())
    features = torch.randn(2, 16, 32, requires_grad=True)
    projector(features).pow(3).sum().backward()
    assert all(bool((weight.grad != 0).any()) for weight in projector.parameters())
    assert bool((features.grad.abs().sum(-1) > 0).all())


@pytest.mark.parametrize("name", FORMULAS)
def test_one_of_ones_own_may_make_fewer_tokens(name):
    class Fewer(PROJECTORS[name]):
        name = "fewer"
        scale = 4

    tokens = Fewer(config_of(name), nn.GELU())(torch.randn(2, 16, 32))
    assert len(tokens[0]) == Fewer.tokens((4, 4)) == 1
    with pytest.raises(ValueError, match=r"'fewer'.*4 x 4 patches.*6 x 6 patches"):
        Fewer.tokens((6, 6))


F, W, D = 1024, 1024, 4096
"""Features, width and hidden size of LLaVA-1.5-7B."""
REGNET = 2 * W * W + 9 * W + 3 * 2 * W + (W // 4) * (2 * W + 1) + W
"""A bottleneck: two maps and a depthwise one, their norms, squeeze and excitation."""
PUBLISHED = {
    "resampler": (F * W + W)
    + 144 * W
    + 6 * (3 * 2 * W + 4 * (W * W + W) + 3 * 4 * W * W + 9 * W + 8 * W)
    + (W * D + D),
    "c_abstractor": 576 * F + 6 * REGNET + (W * D + D) + (D * D + D),
    "pixel_shuffle": 2 * 4 * F + (4 * F * D + D) + (D * D + D),
    "ldp_v2": (F * D + D) + (D * D + D) + 10 * D,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_is_that_of_its_formula_and_makes_144_tokens(name):
    vision = CLIPVisionConfig(
        hidden_size=F,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    config = DynamicLlavaConfig(vision_config=vision, text_config=LlamaConfig(hidden_size=D), projector=name)
    with torch.device("meta"):
        projector = PROJECTORS[name](config, nn.GELU())
        assert projector(torch.empty(2, 576, F)).shape == (2, 144, D)
    assert sum(weight.numel() for weight in projector.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", [name for name, kind in PROJECTORS.items() if issubclass(kind, BlockProjector)])
def test_what_it_cannot_be_given_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}.*class token"):
        PROJECTORS[name].tokens((12, 12), class_token=True)
    with pytest.raises(ValueError, match=f"{name}.*multiple of"):
        PROJECTORS[name].tokens((12, 13))
    for setting in ({"projector_hidden_act": "relu"}, {"multimodal_projector_bias": False}):
        with pytest.raises(ValueError, match=f"{next(iter(setting))}=.*'mlp'.*{name}"):
            PROJECTORS[name](config_of(name, **setting), nn.GELU())


@pytest.mark.parametrize("name", ["resampler", "c_abstractor"])
def test_bare_parameters_are_drawn_wherever_a_model_is_built(name):
    """transformers initialises modules by their kind, and these belong to none."""
    torch.manual_seed(0)
    values = list(PROJECTORS[name](config_of(name), nn.GELU()).named_parameters(recurse=False))
    assert len(values) == 1 and 0.01 < float(values[0][1].detach().std()) < 0.03


@pytest.mark.parametrize(("width", "heads"), [(1024, 16), (64, 1), (32, 1), (200, 2), (130, 2), (131, 1)])
def test_heads_divide_the_width_and_are_wide_enough(width, heads):
    assert heads_of(width, 64) == heads
