"""Every layout in, ours out, and the way back: the same bits, and the logits of transformers' own LLaVA."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.checkpoints.convert import convert
from dynamic_llava.checkpoints.plan import make_plan
from dynamic_llava.model.weight_files import WeightFiles
from tests.builders import build_model, collate, dense_twin, fixed_rows, predictors
from tests.checkpoints.folders import (
    PREDICTORS,
    clip_folder,
    original_config,
    original_folder,
    original_weights,
    published_folder,
    same_tensors,
    sparse_config,
    write,
)
from tests.parity.test_loading import hub_folder

FILES = ["safetensors", "safetensors-shards", "safetensors-numbered", "bin", "bin-shards", "old-bin"]


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture
def lines():
    """Collects what a conversion says."""
    return []


def dense(model):
    return {name: value for name, value in model.state_dict().items() if not name.startswith(PREDICTORS)}


def load(folder, **kwargs):
    return DynamicLlavaForConditionalGeneration.from_pretrained(folder, **kwargs).eval()


@pytest.mark.parametrize("files", FILES)
def test_the_published_layout(model, tmp_path, files):
    source = published_folder(tmp_path / "published", model, files)
    loaded = load(convert(source, tmp_path / "ours"))
    same_tensors(loaded.state_dict(), model.state_dict())
    assert loaded.config.sparsity.to_dict() == model.config.sparsity.to_dict() | {"cache_block": 64}
    inputs = collate(fixed_rows(), "left")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_other_sizes_than_the_recorded_ones(tmp_path):
    """GQA, more layers, other predictors and rates: everything comes from the folder."""
    other = build_model(
        kv_heads=2, layers=5, seed=3, sparse_layer=3, image_keep_rate=0.5, output_keep_rate=0.3,
        predictor_width=16, predictor_heads=2, predictor_mlp=40, predictor_blocks=3, output_min_length=7,
    )  # fmt: skip
    loaded = load(convert(published_folder(tmp_path / "published", other), tmp_path / "ours"))
    same_tensors(loaded.state_dict(), other.state_dict())
    assert loaded.config.text_config.num_key_value_heads == 2
    inputs = collate(fixed_rows(), "left")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, other(**inputs).logits)


def test_sizes_that_the_configuration_leaves_out_come_from_the_tensors(model, tmp_path):
    sparse = sparse_config(model)
    for name in ("d_model", "dim_feedforward", "num_layers"):
        del sparse[name]
    config = original_config(model, model_type="llava", sparse_config=sparse)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"):
        del config[name]
    source = write(tmp_path / "source", config, original_weights(model, predictors=True))
    same_tensors(load(convert(source, tmp_path / "ours")).state_dict(), model.state_dict())


def test_a_budget_that_the_published_code_rounds_otherwise_is_told(model, tmp_path, lines):
    """0.29 of 100 is 29, but int() of the binary product is 28."""
    vision = {**original_config(model)["clip_vision_config"], "image_size": 140}
    sparse = sparse_config(model, vision_keep_rate=0.29)
    weights = original_weights(model, predictors=True)
    name = "model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight"
    weights[name] = torch.zeros(101, 32)
    source = write(
        tmp_path / "source", original_config(model, sparse_config=sparse, clip_vision_config=vision), weights
    )
    make_plan(source, say=lines.append)
    assert any("0.29 of 100 image tokens are 29 here and 28" in line for line in lines)
    make_plan(published_folder(tmp_path / "exact", model), say=lines.append)
    assert sum("image tokens are" in line for line in lines) == 1


def test_a_published_model_with_one_predictor(model, tmp_path, caplog, lines):
    config = original_config(model, sparse_config=sparse_config(model, use_text_predictor=False))
    weights = {n: v for n, v in original_weights(model, True).items() if "output_text_score" not in n}
    source = write(tmp_path / "source", config, weights)
    loaded = load(convert(source, tmp_path / "ours", say=lines.append))
    assert any("not trained: output_predictor" in line for line in lines)
    assert loaded.config.untrained_predictors == ["output_predictor"]
    assert "a checkpoint without output_predictor: their" in caplog.text
    own = loaded.state_dict()
    for name, value in model.state_dict().items():
        assert name.startswith(PREDICTORS[1]) or torch.equal(own[name], value), name
    assert all(torch.isfinite(parameter).all() for parameter in predictors(loaded)[1].parameters())


@pytest.mark.parametrize("files", ["safetensors", "bin-shards"])
def test_the_original_layout_against_transformers(model, tmp_path, files):
    """transformers' LLaVA, rewritten into the original layout, comes back bit by bit and gives the same logits."""
    twin = dense_twin(model)
    loaded = load(convert(original_folder(tmp_path / "original", model, files), tmp_path / "ours"), sparsity={})
    assert loaded.config.untrained_predictors == ["image_predictor", "output_predictor"]
    same_tensors(dense(loaded), dense(model))
    back = convert(tmp_path / "original", tmp_path / "hf", to="llava-hf")
    plain = LlavaForConditionalGeneration.from_pretrained(back).eval()
    same_tensors(plain.state_dict(), twin.state_dict())
    rows = fixed_rows()
    inputs = {n: v for n, v in collate(rows, "left").items() if n not in ("output_mask", "keep_mask")}
    with torch.no_grad():
        wanted = twin(**inputs).logits
        assert torch.equal(plain(**inputs).logits, wanted)
        found = loaded(**inputs, sparsity="none").logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-5)


def test_llava_hf_in_and_out(model, tmp_path):
    """A folder with the hub's names comes back without a bit changed, and one that transformers 5 wrote is the same."""
    (tmp_path / "hub").mkdir()
    source = hub_folder(model, tmp_path / "hub")
    back = convert(convert(source, tmp_path / "ours"), tmp_path / "back", to="llava-hf")
    same_tensors(load_file(tmp_path / "ours" / "model.safetensors"), dense(model))
    same_tensors(load_file(back / "model.safetensors"), load_file(source / "model.safetensors"))
    dense_twin(model).save_pretrained(tmp_path / "saved")
    again = convert(tmp_path / "saved", tmp_path / "again", to="llava-hf")
    same_tensors(load_file(again / "model.safetensors"), load_file(source / "model.safetensors"))
    written, first = (json.loads((folder / "config.json").read_text()) for folder in (again, tmp_path / "saved"))
    assert written == first


def test_ours_loses_its_predictors_on_the_way_to_llava_hf_and_says_so(model, tmp_path, lines):
    model.save_pretrained(tmp_path / "ours")
    hf = convert(tmp_path / "ours", tmp_path / "hf", to="llava-hf", say=lines.append)
    count = sum(name.startswith(PREDICTORS) for name in model.state_dict())
    assert any(f"{count} tensors are dropped" in line for line in lines)
    same_tensors(LlavaForConditionalGeneration.from_pretrained(hf).state_dict(), dense(model))


def test_ours_to_ours(model, tmp_path):
    model.save_pretrained(tmp_path / "ours")
    again = convert(tmp_path / "ours", tmp_path / "again", shard_bytes=200_000)
    assert len(list(again.glob("model-*.safetensors"))) > 3 and (again / "model.safetensors.index.json").is_file()
    assert all(path.stat().st_size < 210_000 for path in again.glob("model-*.safetensors"))
    loaded = load(again)
    same_tensors(loaded.state_dict(), model.state_dict())
    assert loaded.config.sparsity == model.config.sparsity


@pytest.mark.parametrize("full", [False, True], ids=["tower", "full-clip"])
def test_a_separate_vision_tower(model, tmp_path, full, lines):
    source = original_folder(tmp_path / "original", model, without=["model.vision_tower."], clip_vision_config=None)
    tower = clip_folder(tmp_path / "clip", model, full)
    loaded = load(convert(source, tmp_path / "ours", vision_tower=tower, say=lines.append))
    same_tensors(dense(loaded), dense(model))
    assert any("left out: position numbers" in line for line in lines)
    assert any("left out: CLIP's text half" in line for line in lines) == full


def test_a_tower_of_openai_needs_no_configuration(tmp_path, lines):
    """LLaVA-1.5 itself: the tower is inside and config.json has its name only; sizes come from the tensors."""
    from transformers import CLIPVisionConfig, LlamaConfig

    from dynamic_llava import DynamicLlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=128,
        rms_norm_eps=1e-5,
    )
    own = DynamicLlavaConfig(vision_config=vision, text_config=text, image_token_index=3, image_seq_length=16)
    large = DynamicLlavaForConditionalGeneration(own)
    weights = original_weights(large)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    config = original_config(large, mm_vision_tower="openai/clip-vit-large-patch14-336")
    del config["clip_vision_config"]
    loaded = load(convert(write(tmp_path / "a", config, weights), tmp_path / "ours", say=lines.append))
    same_tensors(dense(loaded), dense(large))
    found = loaded.config.vision_config
    assert (found.num_attention_heads, found.image_size, found.hidden_act) == (2, 56, "quick_gelu")
    assert any("2 heads of 64" in line for line in lines) and any("rotary frequencies" in line for line in lines)


def test_number_formats_stay_or_become_what_is_asked_for(model, tmp_path):
    weights = {n: v.half() if "layers" in n else v for n, v in original_weights(model, True).items()}
    config = original_config(model, sparse_config=sparse_config(model), model_type="dynamic_llava_llama")
    source = write(tmp_path / "source", config, weights)
    kept = WeightFiles.of_folder(convert(source, tmp_path / "kept"))
    assert kept.heads["model.language_model.layers.0.mlp.up_proj.weight"].dtype == torch.float16
    assert kept.heads["model.language_model.image_predictor.down.1.weight"].dtype == torch.float32
    read = load_file(tmp_path / "kept" / "model.safetensors")
    same_tensors({n: kept.read(n) for n in kept.heads}, read)
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["dtype"] == "float16"
    cast = load_file(convert(source, tmp_path / "cast", dtype="bfloat16") / "model.safetensors")
    for name, value in read.items():
        assert torch.equal(cast[name], value.bfloat16()), name
    assert load(tmp_path / "cast").dtype == torch.bfloat16
