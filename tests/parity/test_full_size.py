"""LLaVA-1.5 7B and 13B without their weights: every tensor has its place, predictors have their published size.

Shapes come from the meta device, so nothing of full size is ever allocated.
"""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, ImagePredictor, OutputPredictor

SIZES = {
    "7B": {"hidden": 4096, "mlp": 11008, "layers": 32, "heads": 32, "image": 8.57, "output": 2.27, "total": 7.06e9},
    "13B": {"hidden": 5120, "mlp": 13824, "layers": 40, "heads": 40, "image": 9.10, "output": 2.80, "total": 13.35e9},
}
IMAGE_TOKENS, PROMPT_TOKENS = 576, 64


def parts(size, width=None):
    """Return the vision and text configuration of llava-hf/llava-1.5-*; `width` shrinks all but depth and names."""
    vision = CLIPVisionConfig(
        hidden_size=width or 1024,
        intermediate_size=width or 4096,
        num_hidden_layers=24,
        num_attention_heads=4 if width else 16,
        image_size=28 if width else 336,
        patch_size=14,
        projection_dim=width or 768,
    )
    text = LlamaConfig(
        hidden_size=width or size["hidden"],
        intermediate_size=width or size["mlp"],
        num_hidden_layers=size["layers"],
        num_attention_heads=4 if width else size["heads"],
        vocab_size=32 if width else 32064,
        max_position_embeddings=4096,
    )
    return {"vision_config": vision, "text_config": text, "image_token_id": 31 if width else 32000}


def hub_tensors(size):
    """Return name -> shape of a llava-hf/llava-1.5-* checkpoint, written out by hand from the published index."""
    d, m, v = size["hidden"], size["mlp"], 32064
    shapes = {
        "language_model.model.embed_tokens.weight": (v, d),
        "language_model.model.norm.weight": (d,),
        "language_model.lm_head.weight": (v, d),
        "multi_modal_projector.linear_1.weight": (d, 1024),
        "multi_modal_projector.linear_1.bias": (d,),
        "multi_modal_projector.linear_2.weight": (d, d),
        "multi_modal_projector.linear_2.bias": (d,),
        "vision_tower.vision_model.embeddings.class_embedding": (1024,),
        "vision_tower.vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        "vision_tower.vision_model.embeddings.position_embedding.weight": (577, 1024),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"vision_tower.vision_model.{norm}.{kind}": (1024,) for kind in ("weight", "bias")}
    for i in range(size["layers"]):
        layer = f"language_model.model.layers.{i}."
        shapes |= {f"{layer}self_attn.{part}_proj.weight": (d, d) for part in "qkvo"}
        shapes |= {f"{layer}{norm}.weight": (d,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}mlp.{part}_proj.weight": (m, d) for part in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (d, m)
    for i in range(24):
        layer = f"vision_tower.vision_model.encoder.layers.{i}."
        linear = {f"self_attn.{part}_proj": (1024, 1024) for part in ("q", "k", "v", "out")}
        linear |= {"mlp.fc1": (4096, 1024), "mlp.fc2": (1024, 4096)}
        for name, shape in linear.items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{norm}.{kind}": (1024,) for kind in ("weight", "bias")}
    return shapes


def own_name(hub):
    for theirs, ours in (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.vision_model.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ):
        if hub.startswith(theirs):
            return ours + hub.removeprefix(theirs)
    raise AssertionError(hub)


@pytest.fixture(scope="module", params=SIZES)
def built(request):
    size = SIZES[request.param]
    with torch.device("meta"):
        model = DynamicLlavaForConditionalGeneration(DynamicLlavaConfig(**parts(size)))
        plain = LlavaForConditionalGeneration(LlavaConfig(**parts(size)))
    return size, model, plain


def is_predictor(name):
    return "image_predictor" in name or "output_predictor" in name


def test_every_published_tensor_has_its_place(built):
    size, model, plain = built
    own = {name: tuple(value.shape) for name, value in model.state_dict().items() if not is_predictor(name)}
    assert own == {own_name(name): shape for name, shape in hub_tensors(size).items()}
    assert own == {name: tuple(value.shape) for name, value in plain.state_dict().items()}
    dense = sum(value.numel() for value in plain.state_dict().values())
    assert dense == pytest.approx(size["total"], rel=0.005)


def test_the_settings_are_the_papers(built):
    _, model, _ = built
    sparsity = model.config.sparsity
    assert (sparsity.sparse_layer, sparsity.image_keep_rate, sparsity.output_keep_rate) == (2, 0.2, 0.5)
    assert (sparsity.output_min_length, sparsity.keep_rate_weight) == (50, 100.0)
    assert model.model.tokens_per_image == IMAGE_TOKENS


def predictors(model):
    found = {type(module): module for module in model.modules()}
    return found[ImagePredictor], found[OutputPredictor]


def test_predictors_have_the_published_size(built):
    size, model, _ = built
    image, output = ([p.numel() for p in predictor.parameters()] for predictor in predictors(model))
    assert round(sum(image) / 1e6, 2) == size["image"]
    assert round(sum(output) / 1e6, 2) == size["output"]


def linear_flops(module, tokens):
    """Two operations per weight and token, counted from the modules' own shapes."""
    return sum(2 * m.weight.numel() * tokens for m in module.modules() if isinstance(m, torch.nn.Linear))


def test_predictors_cost_less_than_one_percent(built):
    """Against the SPARSE prefill with the lm_head for one token: the strictest denominator."""
    size, model, _ = built
    image, output = predictors(model)
    blocks = len(image.blocks)
    pairs = 4 * IMAGE_TOKENS**2 * image.head[0].in_features
    cost = linear_flops(image, IMAGE_TOKENS) + blocks * pairs
    layer, split = model.model.language_model.layers[0], model.config.sparsity.sparse_layer
    kept = IMAGE_TOKENS // 5
    total = linear_flops(model.lm_head, 1)
    for depth, tokens in ((split, IMAGE_TOKENS + PROMPT_TOKENS), (size["layers"] - split, kept + PROMPT_TOKENS)):
        causal = 2 * tokens**2 * size["hidden"]
        total += depth * (linear_flops(layer, tokens) + causal)
    assert cost / total < 0.01
    step = size["layers"] * linear_flops(layer, 1) + linear_flops(model.lm_head, 1)
    assert linear_flops(output, 1) / step < 0.01


@pytest.mark.parametrize("name", SIZES)
def test_a_checkpoint_with_the_published_names_loads(tmp_path, name):
    """All names and the real depth, every matrix shrunk: loading depends on names, not on widths."""
    narrow = parts(SIZES[name], width=8)
    config = LlavaConfig(**narrow)
    shapes = {n: tuple(v.shape) for n, v in LlavaForConditionalGeneration(config).state_dict().items()}
    weights = {hub: torch.randn(shapes[own_name(hub)]) for hub in hub_tensors(SIZES[name])}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    values = config.to_dict() | {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    model = DynamicLlavaForConditionalGeneration.from_pretrained(
        tmp_path, sparsity={"predictor_width": 8, "predictor_heads": 2, "predictor_mlp": 8}
    )
    loaded = model.state_dict()
    for hub, value in weights.items():
        assert torch.equal(loaded[own_name(hub)], value), hub
