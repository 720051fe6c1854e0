"""LLaVA-1.5 as it is published, 7B and 13B: its config.json, names and shapes pass every check before the values.

No real weights can be had here. The files are sparse: whole heads and holes instead of values, so they take no disk.
"""

import json

import pytest

from dynamic_llava.checkpoints.plan import make_plan

SIZES = {"7b": (4096, 11008, 32, 32, 13.5e9), "13b": (5120, 13824, 40, 40, 26e9)}


def shapes(hidden, mlp, layers):
    """Return names and shapes of the published tensors, the vision tower (CLIP-L/14 at 336 pixels) included."""
    found = {"model.embed_tokens.weight": (32000, hidden), "model.norm.weight": (hidden,)}
    found["lm_head.weight"] = (32000, hidden)
    for layer in range(layers):
        head = f"model.layers.{layer}."
        found |= {f"{head}self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        found |= {f"{head}mlp.{part}_proj.weight": (mlp, hidden) for part in ("gate", "up")}
        found[f"{head}mlp.down_proj.weight"] = (hidden, mlp)
        found |= {f"{head}{part}_layernorm.weight": (hidden,) for part in ("input", "post_attention")}
    for index, width in ((0, 1024), (2, hidden)):
        found |= {f"model.mm_projector.{index}.weight": (hidden, width), f"model.mm_projector.{index}.bias": (hidden,)}
    tower = "model.vision_tower.vision_tower.vision_model."
    found[f"{tower}embeddings.class_embedding"] = (1024,)
    found[f"{tower}embeddings.patch_embedding.weight"] = (1024, 3, 14, 14)
    found[f"{tower}embeddings.position_embedding.weight"] = (577, 1024)
    norms = [f"{tower}pre_layrnorm", f"{tower}post_layernorm"]
    for layer in range(24):
        head = f"{tower}encoder.layers.{layer}."
        norms += [f"{head}layer_norm1", f"{head}layer_norm2"]
        for part in ("q", "k", "v", "out"):
            found |= {f"{head}self_attn.{part}_proj.weight": (1024, 1024), f"{head}self_attn.{part}_proj.bias": (1024,)}
        found |= {f"{head}mlp.fc1.weight": (4096, 1024), f"{head}mlp.fc1.bias": (4096,)}
        found |= {f"{head}mlp.fc2.weight": (1024, 4096), f"{head}mlp.fc2.bias": (1024,)}
    return found | {f"{norm}.{part}": (1024,) for norm in norms for part in ("weight", "bias")}


def write_sparse(path, tensors):
    """Write a safetensors file of float16 tensors whose values are a hole."""
    header, end = {}, 0
    for name, shape in tensors.items():
        start, size = end, 2
        for length in shape:
            size *= length
        end = start + size
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize("size", SIZES)
def test_a_published_llava(tmp_path, size):
    hidden, mlp, layers, heads, least_bytes = SIZES[size]
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "intermediate_size": mlp,
        "max_length": 4096,
        "max_position_embeddings": 4096,
        "mm_hidden_size": 1024,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "model_type": "llava",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": 32000,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = shapes(hidden, mlp, layers)
    names = sorted(tensors)
    for number in (1, 2):
        part = {name: tensors[name] for name in names[number - 1 :: 2]}
        write_sparse(tmp_path / f"model-{number:05d}-of-00002.safetensors", part)
    plan = make_plan(tmp_path, say=lambda line: None)
    assert plan.size > least_bytes and len(plan.placements) == len(tensors)
    own, vision = plan.config, plan.config.vision_config
    assert own.text_config.vocab_size == 32064 and own.image_token_id == 32000 and own.image_seq_length == 576
    assert (vision.num_attention_heads, vision.num_hidden_layers, vision.image_size) == (16, 24, 336)
    assert own.untrained_predictors == ["image_predictor", "output_predictor"]
    assert own.sparsity.predictor_width == 512 and own.text_config.rope_parameters["rope_theta"] == 10000
    assert own.sparsity.sparse_layer == 2 and str(own.dtype) == "torch.float16"
    assert {placement.shape[0] for placement in plan.placements if "embed_tokens" in placement.name} == {32064}
