"""TokenPacker against its formula, written out in plain loops; published sizes; what it cannot be given."""

from math import sqrt

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynamic_llava.projectors import PROJECTORS
from tests.projectors.formulas import attention, blocks, linear, mean, norm, perceptron
from tests.projectors.test_projectors import config_of

NAMES = {"tokenpacker": 2, "tokenpacker_3": 3, "tokenpacker_4": 4}


def centre_of(block, scale):
    """What bilinear shrinking by s, without smoothing, looks up: the middle patch of a block, or the mean of four."""
    middle = ((scale - 1) // 2, scale // 2)
    return mean([block[row * scale + column] for row in middle for column in middle])


def packed(patches, side, scale, heads, weights):
    """Return the tokens of one image; `patches` holds a list of numbers for each, row by row."""
    tokens = []
    width = len(weights["out_proj.bias"])
    parts = [slice(start * width, (start + 1) * width) for start in range(3)]
    for number, part in enumerate(parts):  # the attention's entrance is one tensor of three maps
        weights[f"into{number}.weight"] = weights["in_proj_weight"][part]
        weights[f"into{number}.bias"] = weights["in_proj_bias"][part]
    for block in blocks(patches, side, scale):
        point = centre_of([patch[-width:] for patch in block], scale)
        query = norm(linear(point, weights, "query"), weights, "query_norm", 1e-6)
        keys = [norm(perceptron(one, weights, "key"), weights, "key_norm", 1e-6) for one in block]
        values = [norm(perceptron(one, weights, "value"), weights, "value_norm", 1e-6) for one in block]
        taken = attention(
            linear(query, weights, "into0"),
            [linear(one, weights, "into1") for one in keys],
            [linear(one, weights, "into2") for one in values],
            heads,
        )
        tokens.append(perceptron(linear(taken, weights, "out_proj"), weights, "mlp"))
    return tokens


@pytest.mark.parametrize("name", NAMES)
def test_every_token_is_what_its_formula_says(name):
    torch.manual_seed(0)
    config = config_of(name, [-3, 1])
    config.vision_config.hidden_size, config.text_config.hidden_size = 6, 5
    projector = PROJECTORS[name](config, nn.GELU()).double()
    projector.heads = 2
    with torch.no_grad():
        for weight in projector.parameters():
            weight.normal_(std=0.7)
    side = config.vision_config.image_size // config.vision_config.patch_size
    features = torch.randn(2, side**2, 12, dtype=torch.float64)
    weights = {name: value.tolist() for name, value in projector.state_dict().items()}
    expected = [packed(image.tolist(), side, NAMES[name], 2, weights) for image in features]
    # Shrinking is done in float32, as published.
    torch.testing.assert_close(projector(features), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_token_sees_its_own_block_and_every_weight_and_feature_learns(name):
    torch.manual_seed(0)
    config = config_of(name)
    projector, scale = PROJECTORS[name](config, nn.GELU()), NAMES[name]
    side = config.vision_config.image_size // config.vision_config.patch_size
    features = torch.randn(1, side**2, 4 * config.vision_config.hidden_size, requires_grad=True)
    tokens = projector(features)
    tokens[0, -1].sum().backward(retain_graph=True)
    seen = features.grad[0].abs().sum(-1).reshape(side, side) > 0
    own = torch.zeros(side, side, dtype=torch.bool)
    own[-scale:, -scale:] = True
    assert torch.equal(seen, own)
    tokens.square().sum().backward()
    assert all(bool((weight.grad != 0).any()) for weight in projector.parameters())
    assert bool((features.grad.abs().sum(-1) > 0).all())


PUBLISHED = {
    # query, then keys and values of 4096 -> 1024 -> 1024, three norms, attention, the perceptron behind it.
    hidden: 1024**2
    + 2 * (4096 * 1024 + 1024 + 1024**2 + 1024)
    + 3 * 2 * 1024
    + 4 * (1024**2 + 1024)
    + (1024 * hidden + hidden + hidden**2 + hidden)
    for hidden in (4096, 5120)
}


@pytest.mark.parametrize("hidden", PUBLISHED)
@pytest.mark.parametrize(("name", "tokens"), [("tokenpacker", 144), ("tokenpacker_3", 64), ("tokenpacker_4", 36)])
def test_full_size_is_the_published_one(name, tokens, hidden):
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    config = DynamicLlavaConfig(
        vision_config=vision, text_config=LlamaConfig(hidden_size=hidden), projector=name, tie_word_embeddings=False
    )
    assert config.vision_feature_layer == [12, 16, 22, 23]
    with torch.device("meta"):
        projector = PROJECTORS[name](config, nn.GELU())
        assert projector(torch.empty(3, 576, 4096)).shape == (3, tokens, hidden)
    assert projector.heads == 8
    assert sum(weight.numel() for weight in projector.parameters()) == PUBLISHED[hidden]


def test_initial_values_are_the_published_ones():
    torch.manual_seed(0)
    config = config_of("tokenpacker")
    config.vision_config.hidden_size = 64
    projector = PROJECTORS["tokenpacker"](config, nn.GELU())
    for module in projector.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            assert 0.018 < weight.std() < 0.022 and weight.abs().max() < 0.13
            assert module.bias is None or not module.bias.any()
    built = DynamicLlavaForConditionalGeneration(config_of("tokenpacker")).model
    assert (
        built.multi_modal_projector.mlp[2].weight.std()
        < 0.03
        < 0.1
        < built.vision_tower.encoder.layers[0].mlp.fc1.weight.std()
    )
    bound = sqrt(6 / (64 + 3 * 64))
    assert not projector.in_proj_bias.any() and 0.95 * bound < projector.in_proj_weight.detach().abs().max() <= bound


@pytest.mark.parametrize(
    ("depth", "layers"), [(24, [12, 16, 22, 23]), (12, [6, 8, 10, 11]), (3, [1, 2, 1, 2]), (1, [0, 0, 0, 0])]
)
def test_layers_are_scaled_for_towers_of_other_depths(depth, layers):
    assert PROJECTORS["tokenpacker"].layers(-2, depth) == layers
    assert PROJECTORS["tokenpacker"].layers(depth - 1, depth) == layers
    assert PROJECTORS["tokenpacker"].layers([3, -1], depth) == [3, -1]
    assert PROJECTORS["mlp"].layers(-2, depth) == -2


UNFIT = {
    "one layer": ({"vision_feature_layer": -1}, ["vision_feature_layer=-1", "give a list", "-2"]),
    "class token": ({"vision_feature_select_strategy": "full"}, ["class token", "'default'"]),
    "activation": ({"projector_hidden_act": "relu"}, ["projector_hidden_act='relu'", "'mlp'"]),
    "no bias": ({"multimodal_projector_bias": False}, ["multimodal_projector_bias=False", "'mlp'"]),
}


@pytest.mark.parametrize("way", UNFIT)
def test_what_it_cannot_be_given_is_refused(way):
    settings, words = UNFIT[way]
    with pytest.raises(ValueError) as error:
        config = config_of("tokenpacker", settings.pop("vision_feature_layer", -2), **settings)
        PROJECTORS["tokenpacker"](config, nn.GELU())
    assert all(word in str(error.value) for word in ("'tokenpacker'", *words)), error.value


def test_a_grid_that_does_not_divide_is_an_error_with_what_to_do():
    values = config_of("mlp").to_dict()
    values.pop("model_type")
    with pytest.raises(ValueError, match=r"3 x 3 patches.*4 x 4 patches.*multiple of 3 times the patch_size"):
        DynamicLlavaConfig(**{**values, "projector": "tokenpacker_3"})
