"""With nothing dropped a LLaVA-NeXT IS transformers' own: the same logits to the last bit, the same generations."""

import json
from math import prod

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, LlavaNextConfig, LlavaNextForConditionalGeneration

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor
from dynamic_llava.checkpoints.layouts import layout_by_config
from dynamic_llava.costs import decoder_shape, llava_shape, parameter_counts, prefill_flops
from dynamic_llava.engine.learned import learned_costs
from dynamic_llava.profile.bases import _named as profile_base
from tests.builders import TINY_SPARSITY, assert_same_logits
from tests.parity.test_dense import EXPANDS_ROWS_OF_IMAGES, KEEP_EVERYTHING, MODES
from tests.parity.test_loading import hub_name
from tests.tiled import PINPOINTS, ROWS, TILING, batch_of, next_model, next_twin, pixels_of

GIVEN = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
PAIRS = [("sdpa", "llama"), ("eager", "llama"), ("sdpa", "mistral")]
"""Attention and the family of the language model: Vicuna's and Mistral's."""


@pytest.fixture(scope="module", params=PAIRS, ids=" ".join)
def pair(request):
    ours = next_model(*request.param)
    return ours, next_twin(ours)


def given(*rows, filled=True, answer=6, side="left"):
    """Return what transformers' class takes of a batch."""
    batch = batch_of(rows, side, answer, filled)
    return {name: batch[name] for name in GIVEN if name in batch}


@pytest.mark.parametrize("filled", [True, False], ids=["filled up", "tiles in a row"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_prefill_logits_are_identical(pair, side, filled):
    ours, theirs = pair
    inputs = given(*ROWS, filled=filled, side=side)
    expected, real = theirs(**inputs), inputs["attention_mask"].bool()
    for name, switches in KEEP_EVERYTHING.items():
        logits = ours(**inputs, **switches).logits
        if name in ("none", "dense") or side == "right":
            assert (logits - expected.logits)[real].abs().max() == 0, name
        else:  # packing moves padded rows to the left, where attention may add up in another order
            assert_same_logits(logits[real], expected.logits[real], 1e-5, name)


@torch.no_grad()
def test_loss_and_packed_images_are_identical(pair):
    ours, theirs = pair
    inputs = given(*ROWS, side="right")
    labels = inputs["input_ids"].masked_fill(batch_of(side="right")["output_mask"].logical_not(), -100)
    ours_out, theirs_out = ours(**inputs, labels=labels, sparsity="none"), theirs(**inputs, labels=labels)
    assert (ours_out.logits - theirs_out.logits).abs().max() == 0 and torch.equal(ours_out.loss, theirs_out.loss)
    images = pixels_of(("tall", "small"))
    packed = theirs.model.get_image_features(**images, vision_feature_layer=-2, return_dict=True).pooler_output
    mine = ours.model.get_image_features(**images, return_dict=True).pooler_output
    assert all(torch.equal(one, other) for one, other in zip(mine, packed, strict=True))


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_generation_is_identical(pair, mode):
    ours, theirs = pair
    several = EXPANDS_ROWS_OF_IMAGES or not any(name.startswith("num_") for name in MODES[mode])
    rows = (("wide",), ("square", "tall")) if several else (("wide",), ("tall",))
    inputs = given(*rows, answer=0)
    call = {"max_new_tokens": 6, **MODES[mode]}
    torch.manual_seed(0)
    expected = theirs.generate(**inputs, **call)
    for switches in ({"sparsity": "none"}, {"image_keep_rate": 1.0, "output_threshold": float("-inf")}):
        torch.manual_seed(0)
        assert torch.equal(ours.generate(**inputs, **call, **switches), expected), switches


def test_a_row_of_text_alone_is_identical(pair):
    ours, theirs = pair
    inputs = given((), ())
    with torch.no_grad():
        assert (ours(**inputs, sparsity="none").logits - theirs(**inputs).logits).abs().max() == 0


def hub_folder(model, folder):
    """Write the dense part of a model as llava-hf has it on the hub, under transformers 4 names."""
    renamed = {}
    for name, value in model.state_dict().items():
        if "_predictor" not in name:
            is_newline = name == "model.image_newline"
            renamed["image_newline" if is_newline else hub_name(name)] = value
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    config = next_twin(model).config.to_dict() | {"architectures": ["LlavaNextForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config | {"use_image_newline_parameter": True}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("written", ["hub names", "transformers' own"])
def test_a_dense_checkpoint_loads_bit_equal_and_comes_back(written, tmp_path):
    """Only predictors are new; what is saved is ours and loads as it was, newline and resolutions included."""
    model = next_model()
    folder = tmp_path / "dense"
    folder.mkdir()
    hub_folder(model, folder) if written == "hub names" else next_twin(model).save_pretrained(folder)
    loaded, info = DynamicLlavaForConditionalGeneration.from_pretrained(
        folder, sparsity=TINY_SPARSITY.to_dict(), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert "_predictor" in name or torch.equal(loaded.state_dict()[name], value), name
    assert loaded.config.image_grid_pinpoints == PINPOINTS and loaded.config.untrained_predictors
    loaded.save_pretrained(tmp_path / "ours")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    assert type(again) is DynamicLlavaForConditionalGeneration and again.config.model_type == "dynamic_llava"
    assert again.model.tiling == TILING
    for name, value in loaded.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    headless = AutoModel.from_pretrained(tmp_path / "ours")
    assert torch.equal(headless.image_newline, model.model.image_newline)


def test_a_newline_that_is_missing_is_an_error(tmp_path):
    folder = hub_folder(next_model(), tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["image_newline"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing tensors model\.image_newline"):
        DynamicLlavaForConditionalGeneration.from_pretrained(folder, sparsity=TINY_SPARSITY.to_dict())


def vicuna_7b():
    """Return what the public config.json of llava-hf/llava-v1.6-vicuna-7b-hf says, defaults of its parts filled in."""
    tower = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336}
    tower |= {"patch_size": 14, "num_hidden_layers": 24, "num_attention_heads": 16, "projection_dim": 768}
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32064}
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "image_token_index": 32000,
        "model_type": "llava_next",
        "projector_hidden_act": "gelu",
        "text_config": text | {"pad_token_id": 0},
        "use_image_newline_parameter": True,
        "vision_config": tower,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def test_every_tensor_of_the_public_7b_has_its_place(tmp_path):
    """On the meta device: shapes of transformers' own class, predictors of the published size, and their FLOPs."""
    (tmp_path / "config.json").write_text(json.dumps(vicuna_7b()), encoding="utf-8")
    config = DynamicLlavaConfig.from_pretrained(tmp_path)
    values = {name: value for name, value in vicuna_7b().items() if name != "model_type"}
    with torch.device("meta"):
        model = DynamicLlavaForConditionalGeneration(config)
        plain = LlavaNextForConditionalGeneration(LlavaNextConfig(**values))
    own = {name: tuple(value.shape) for name, value in model.state_dict().items() if "_predictor" not in name}
    assert own == {name: tuple(value.shape) for name, value in plain.state_dict().items()}
    assert own["model.image_newline"] == (4096,) and sum(map(prod, own.values())) == pytest.approx(7.06e9, rel=0.005)
    learned = learned_costs(config.sparsity, 4096)
    sizes = {name: sum(p.numel() for p in getattr(model.model.language_model, name).parameters()) for name in learned}
    assert sizes == {name: part.parameters for name, part in learned.items()}
    assert [round(size / 1e6, 2) for size in sizes.values()] == [8.57, 2.27]
    tiling = model.model.tiling
    assert (tiling.most_tiles, tiling.tokens((672, 672)), tiling.image_tokens((672, 672))) == (5, 2928, 2880)
    judging = learned["image_predictor"].judging(2880)
    maps = 4096 * 512 + 512 * 256 + 256 * 128 + 128 * 2 + 2 * (4 * 512**2 + 2 * 512 * 2048)
    assert judging == 2 * 2880 * maps + 2 * 4 * 512 * 2880**2  # 83.2 GFLOPs: maps, and attention within the image
    prefill = prefill_flops([2928 + 64] * 2 + [2880 // 5 + 48 + 64] * 30, decoder_shape(config))
    assert judging / prefill < 0.01
    described = parameter_counts(llava_shape(config), learned)
    assert sum(described.values()) + 4096 == sum(map(prod, own.values())) + sum(sizes.values())


REFUSED = {
    "strategy": ({"vision_feature_select_strategy": "full"}, "set it to 'default'"),
    "projector": ({"projector": "pixel_shuffle"}, "only its own, 'mlp'"),
    "no multiples": ({"image_grid_pinpoints": [[56, 100]]}, r"each a multiple of the vision tower's image_size, 56"),
    "no pairs": ({"image_grid_pinpoints": [56, 112]}, r"give a list of \[height, width\]"),
    "none": ({"image_grid_pinpoints": []}, r"give a list of \[height, width\]"),
    "added tokens": ({"sparsity": {"method": {"name": "voco_llama", "tokens": 2}}}, "choose a method that adds none"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_no_llava_next_has_is_refused(how):
    change, words = REFUSED[how]
    values = {name: value for name, value in next_model().config.to_dict().items() if name != "model_type"}
    with pytest.raises(ValueError, match=words):
        DynamicLlavaConfig.from_dict(values | change)


def test_a_llava_keeps_no_resolutions_and_a_next_without_them_has_its_own(tmp_path):
    values = next_twin(next_model()).config.to_dict()
    for kind, given, expected in (("llava", PINPOINTS, None), ("llava_next", PINPOINTS, PINPOINTS)):
        (tmp_path / "config.json").write_text(json.dumps(values | {"model_type": kind, "image_grid_pinpoints": given}))
        assert DynamicLlavaConfig.from_pretrained(tmp_path).image_grid_pinpoints == expected
    public = vicuna_7b()
    del public["image_grid_pinpoints"]
    (tmp_path / "config.json").write_text(json.dumps(public))
    assert DynamicLlavaConfig.from_pretrained(tmp_path).image_grid_pinpoints == LlavaNextConfig().image_grid_pinpoints


def test_what_carries_images_of_one_size_alone_says_so(tmp_path):
    """The processor, and with it every command that loads it; conversion; budgets of bytes; costs by formula."""
    next_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LlavaNextProcessor of the dense checkpoint"):
        DynamicLlavaProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="which is not converted"):
        layout_by_config(tmp_path, json.loads((tmp_path / "config.json").read_text()))
    with pytest.raises(ValueError, match="give --image-tokens"):
        profile_base(str(tmp_path / "config.json"), None)
    with pytest.raises(ValueError, match="kv_budget counts images of one size"):
        next_model().generate(**given(("wide",), answer=0), kv_budget="1MiB", max_new_tokens=2)
    with pytest.raises(ValueError, match=r"tiling\.tokens"):
        _ = next_model().model.tokens_per_image
