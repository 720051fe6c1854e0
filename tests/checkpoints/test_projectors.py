"""Checkpoints with other projectors: TokenPacker's public layout, its first stage alone; language models with none."""

import json

import pytest
import torch
from torch import nn

from dynamic_llava import DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor
from dynamic_llava.checkpoints import names
from dynamic_llava.checkpoints.convert import convert
from dynamic_llava.checkpoints.plan import make_plan
from dynamic_llava.model.weight_files import WeightFiles
from tests.builders import build_model
from tests.checkpoints.folders import clip_folder, original_config, original_weights, same_tensors, write
from tests.checkpoints.test_real_sizes import SIZES, shapes, write_sparse
from tests.projectors.test_projectors import config_of
from tests.sft_builders import character_tokenizer, picture

PUBLISHED = {
    "query.": "q_proj_1.",
    "key.": "k_proj_1.",
    "value.": "v_proj_1.",
    "query_norm.": "ln_q_1.",
    "key_norm.": "ln_k_1.",
    "value_norm.": "ln_v_1.",
    "in_proj_": "clip_attn.in_proj_",
    "out_proj.": "clip_attn.out_proj.",
    "mlp.": "mlp.",
}
"""Our beginnings of the names of TokenPacker's tensors, and those of CircleRadon/TokenPacker."""
OURS = "model.multi_modal_projector."


class Published(nn.Module):
    """The modules of TokenPacker as the published code names them, for their names and shapes; without its forward."""

    def __init__(self, width=1024, levels=4096, hidden=4096):
        super().__init__()
        self.q_proj_1 = nn.Linear(width, width, bias=False)
        self.k_proj_1, self.v_proj_1 = (
            nn.Sequential(nn.Linear(levels, width), nn.GELU(), nn.Linear(width, width)) for _ in range(2)
        )
        self.ln_q_1, self.ln_k_1, self.ln_v_1 = (nn.LayerNorm(width) for _ in range(3))
        self.clip_attn = nn.MultiheadAttention(width, 8)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))


def packed_model(name="tokenpacker", seed=0):
    torch.manual_seed(seed)
    model = DynamicLlavaForConditionalGeneration(config_of(name)).eval()
    with torch.no_grad():
        for weight in model.model.multi_modal_projector.parameters():
            weight.normal_(std=0.3)
    return model


def packed_weights(model):
    """Return a model's tensors as LLaVA-TokenPacker stores them."""
    found = {}
    for name, value in original_weights(model).items():
        if name.startswith(OURS):
            inner = name.removeprefix(OURS)
            ours = next(start for start in PUBLISHED if inner.startswith(start))
            name = f"model.mm_projector.{PUBLISHED[ours]}{inner.removeprefix(ours)}"
        found[name] = value
    return found


def dense(model):
    return {name: value for name, value in model.state_dict().items() if "_predictor." not in name}


def load(folder):
    """Open a folder with the attention of `config_of`, so that equal weights give equal features."""
    return DynamicLlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tokenpacker", {"mm_projector_type": "mlp2x_gelu"}),  # what its own script for the second stage writes
        ("tokenpacker", {"mm_projector_type": "tokenpacker"}),
        ("tokenpacker_3", {"mm_projector_type": "tokenpacker", "scale_factor": 3}),
        ("tokenpacker_4", {"mm_projector_type": "mlp2x_gelu", "scale_factor": 4}),
    ],
)
def test_the_public_layout_of_tokenpacker(tmp_path, name, said):
    model = packed_model(name)
    source = write(tmp_path / "public", original_config(model, **said), packed_weights(model))
    lines = []
    loaded = load(convert(source, tmp_path / "ours", say=lines.append))
    same_tensors(dense(loaded), dense(model))
    assert loaded.config.projector == name and loaded.config.vision_feature_layer == [1, 2, 1, 2]
    tokens = 1 if name == "tokenpacker_4" else 4
    assert loaded.config.image_seq_length == loaded.model.tokens_per_image == tokens
    assert any("4 model.mm_projector.k_proj_1.* -> model.multi_modal_projector.key.*" in line for line in lines)
    pixels = torch.randn(2, 3, *[model.config.vision_config.image_size] * 2)
    with torch.no_grad():
        ours, theirs = (one.model.encode_images(pixels).pooler_output for one in (loaded, model))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    # And once more from ours, as every layout.
    same_tensors(dense(load(convert(tmp_path / "ours", tmp_path / "again", say=lines.append))), dense(model))


def test_the_names_are_the_published_ones_both_ways():
    config = config_of("tokenpacker")
    config.vision_config.hidden_size = 64
    stored = {f"model.mm_projector.{name}" for name in Published(64).state_dict()}
    ours = {name: names.to_ours(name, names.ORIGINAL)[0] for name in stored}
    own = DynamicLlavaForConditionalGeneration(config_of("tokenpacker")).state_dict()
    assert set(ours.values()) == {name for name in own if name.startswith(OURS)}
    assert all(names.from_ours(there, names.ORIGINAL) == name for name, there in ours.items())
    short = {name.removeprefix("model.") for name in stored}
    assert {names.to_ours(name, names.PARTS)[0] for name in short} == set(ours.values())


@pytest.mark.parametrize("size", SIZES)
def test_the_published_sizes_pass_every_check(tmp_path, size):
    hidden, mlp, layers, heads, _ = SIZES[size]
    tensors = {name: shape for name, shape in shapes(hidden, mlp, layers).items() if "mm_projector" not in name}
    with torch.device("meta"):
        packed = Published(hidden=hidden).state_dict()
    tensors |= {f"model.mm_projector.{name}": tuple(value.shape) for name, value in packed.items()}
    config = {
        "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "hidden_size": hidden,
        "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": 32000,
        "num_key_value_heads": heads, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "image_aspect_ratio": "pad", "rms_norm_eps": 1e-05,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    for number in (1, 2):
        part = dict(list(tensors.items())[number - 1 :: 2])
        write_sparse(tmp_path / f"model-{number:05d}-of-00002.safetensors", part)
    plan = make_plan(tmp_path, say=lambda line: None)
    assert len(plan.placements) == len(tensors)
    assert (plan.config.projector, plan.config.image_seq_length) == ("tokenpacker", 144)
    assert plan.config.vision_feature_layer == [12, 16, 22, 23]


UNFIT = {
    "scale": ({"scale_factor": 5}, ["scale_factor: 5", "2, 3, 4"]),
    "tiles of an image": ({"image_aspect_ratio": "slice"}, ["image_aspect_ratio: 'slice'"]),
    "another scale's grid": ({"scale_factor": 3}, ["3 x 3 patches", "4 x 4 patches"]),
    "another layer": ({"mm_vision_select_layer": -1}, ["vision_feature_layer=-1"]),
}


@pytest.mark.parametrize("way", UNFIT)
def test_a_tokenpacker_that_is_none_of_ours_is_named(tmp_path, way):
    settings, words = UNFIT[way]
    model = packed_model()
    source = write(tmp_path / "public", original_config(model, **settings), packed_weights(model))
    with pytest.raises(ValueError) as error:
        convert(source, tmp_path / "ours", say=lambda line: None)
    assert all(word in str(error.value) for word in (str(source), *words)), error.value


def test_a_configuration_that_promises_a_tokenpacker_is_held_to_it(tmp_path):
    model = build_model()
    source = write(tmp_path / "odd", original_config(model, mm_projector_type="tokenpacker"), original_weights(model))
    with pytest.raises(ValueError, match=r"missing tensors: .*q_proj_1"):
        convert(source, tmp_path / "ours", say=lambda line: None)


def test_llava_hf_has_no_place_for_another_projector(tmp_path):
    packed_model().save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="'tokenpacker', and llava-hf's layout knows none but 'mlp'"):
        convert(tmp_path / "ours", tmp_path / "hf", to="llava-hf", say=lambda line: None)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("over", ["ours", "original"])
def test_a_first_stage_alone_takes_the_place_of_the_bases_projector(tmp_path, over):
    """mm_projector.bin of TokenPacker's first stage, over a LLaVA of ours or over a language model and a tower."""
    base, packed = build_model(), packed_model()
    stage = tmp_path / "stage"
    stage.mkdir()
    weights = {name: value for name, value in packed_weights(packed).items() if "mm_projector" in name}
    torch.save(weights, stage / "mm_projector.bin")
    (stage / "config.json").write_text(json.dumps(original_config(base, mm_projector_type="tokenpacker")))
    if over == "ours":
        base.save_pretrained(tmp_path / "base")
        loaded = load(convert(stage, tmp_path / "new", base=tmp_path / "base", say=lambda line: None))
    else:
        under = language_model(tmp_path / "base", base)
        tower = clip_folder(tmp_path / "clip", base)
        loaded = load(convert(stage, tmp_path / "new", base=under, vision_tower=tower, say=lambda line: None))
    wanted = {name: value for name, value in dense(base).items() if not name.startswith(OURS)}
    wanted |= {name: value for name, value in dense(packed).items() if name.startswith(OURS)}
    same_tensors(dense(loaded), wanted)
    assert (loaded.config.projector, loaded.config.image_seq_length) == ("tokenpacker", 4)


def language_model(folder, model):
    """Write a model's language model as a Llama with a tokenizer."""
    text = {**model.config.text_config.to_dict(), "model_type": "llama"}
    others = ("model.mm_projector.", "model.vision_tower.")
    write(folder, text, {name: value for name, value in original_weights(model).items() if not name.startswith(others)})
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["mlp", "resampler", "tests.toys.pooled:Pooled"])
def test_a_language_model_and_a_tower_become_a_llava_to_be_trained(tmp_path, name):
    model, lines = build_model(), []
    source, tower = language_model(tmp_path / "vicuna", model), clip_folder(tmp_path / "clip", model)
    folders = [tmp_path / "once", tmp_path / "again"]
    for folder in folders:
        convert(source, folder, vision_tower=tower, projector=name, say=lines.append)
    once, again = map(WeightFiles.of_folder, folders)
    assert all(torch.equal(once.read(key), again.read(key)) for key in once.heads), "another one each time"
    assert any("it has learned nothing, so train it first" in line for line in lines)
    loaded = load(tmp_path / "once")
    grown = (OURS, "lm_head.", "model.language_model.embed_tokens.")  # by <image>
    for key, value in dense(loaded).items():
        assert key.startswith(grown) or torch.equal(value, dense(model)[key]), key
    assert loaded.config.projector == name
    drawn = [value for key, value in dense(loaded).items() if key.startswith(OURS) and key.endswith(".weight")]
    assert all(0 < float(value.std()) < 0.5 for value in drawn if value.dim() > 1)
    processor = DynamicLlavaProcessor.from_pretrained(tmp_path / "once")
    inputs = processor(images=picture(), text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt")
    assert int((inputs["input_ids"] == loaded.config.image_token_id).sum()) == loaded.model.tokens_per_image
    assert loaded(**inputs, sparsity="none").logits.isfinite().all()


def test_a_new_projector_is_for_a_language_model_alone(tmp_path):
    model = build_model()
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"has a projector.*--model.projector resampler"):
        make_plan(tmp_path / "ours", projector="resampler", say=lambda line: None)
    with pytest.raises(ValueError, match="--vision-tower PATH and a new projector, --projector mlp"):
        make_plan(language_model(tmp_path / "vicuna", model), say=lambda line: None)
    with pytest.raises(ValueError, match="give the folder of that CLIP model with --vision-tower"):
        make_plan(tmp_path / "vicuna", projector="mlp", say=lambda line: None)
