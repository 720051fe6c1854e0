"""What a cut before the language model is shown of the vision tower, against transformers' own attention weights."""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from accelerate.utils import convert_to_fp32, send_to_device
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, CLIPModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, get_method
from dynamic_llava.costs import decoder_shape, llava_shape
from dynamic_llava.engine.tower import TowerReading
from dynamic_llava.eval.efficiency import prefill_costs
from dynamic_llava.methods import METHODS, TOWER_EVIDENCE, Choice, Cut, ImageTokens, Method
from tests.builders import (
    HIDDEN,
    IMAGE_SIZE,
    TOKENS_PER_IMAGE,
    assert_same_logits,
    build_model,
    collate,
    fixed_rows,
    model_of,
    prompts,
    shared_model,
    tiny_config,
)
from tests.clip_folders import PUBLISHED, SHARED, tiny_clip
from tests.toys import pooled as pooled

READERS = [name for name, kind in METHODS.items() if any(cut.reads_tower for cut in kind().cuts(6))]
PIXELS = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(7))
CALL = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
EVERYTHING = Cut(0, TOWER_EVIDENCE, text_tower=PUBLISHED)


@torch.no_grad()
def weights_of(model):
    """Return the tower's attention weights and hidden states, asked of transformers with eager attention."""
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    out = tower(PIXELS, output_attentions=True, output_hidden_states=True)
    tower.set_attn_implementation(before)
    return out.attentions, out.hidden_states


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("asked", "block"), [({}, 1), ({"tower_layer": -1}, 2), ({"tower_layer": 1}, 0), ({"layer": 3}, 2)]
)
@torch.no_grad()
def test_evidence_is_that_of_the_layer_asked_for(attention, asked, block):
    """By default of the block whose output the projector reads, as the call chooses it; else of a named one."""
    model = build_model(attention=attention)
    attentions, hidden = weights_of(model)
    cut = dataclasses.replace(EVERYTHING, tower_layer=asked.get("tower_layer"), early_depth=0.4)
    images = model.model.encode_images(PIXELS, asked.get("layer"), cut=cut)
    plain = model.model.encode_images(PIXELS, asked.get("layer"))
    assert all(torch.equal(one, other) for one, other in zip(images.pooler_output, plain.pooler_output, strict=True))
    seen, layer = images.pooler_output.seen, model.model.vision_tower.encoder.layers[block]
    normed = layer.layer_norm1(hidden[block])
    query, key = layer.self_attn.q_proj(normed), layer.self_attn.k_proj(normed)
    joint = (query[:, :1] @ key.transpose(1, 2) * key.shape[-1] ** -0.5).softmax(-1)[:, 0, 1:]
    clip = CLIPModel.from_pretrained(tiny_clip(hidden[0].shape[-1]))
    patches = hidden[asked.get("layer", -2)][:, 1:]
    wanted = {
        "class_row": attentions[block].mean(1)[:, 0, 1:],
        "tower_keys": key.unflatten(-1, (layer.self_attn.num_heads, -1)).mean(2)[:, 1:],
        "joint_class_row": joint,
        "joint_tower_keys": key[:, 1:],
        "received": attentions[block].mean((1, 2))[:, 1:],
        "early_received": attentions[0].mean((1, 2))[:, 1:],  # round(0.4 * 3) is the first of three
        "early_class_row": attentions[0].mean(1)[:, 0, 1:],
        "tower": patches,
        "clip_tokens": clip.visual_projection(clip.vision_model.post_layernorm(patches)),
    }
    assert set(seen) == set(wanted) == TOWER_EVIDENCE
    for name, values in wanted.items():
        torch.testing.assert_close(seen[name], values, rtol=1e-5, atol=1e-6)
    assert seen["class_row"].dtype == seen["joint_class_row"].dtype == torch.float32
    assert (seen["class_row"].sum(1) < 1).all(), "the class token attends to itself too"


@torch.no_grad()
def test_nothing_is_read_that_no_method_asks_for(monkeypatch):
    """And what is asked for costs one row: no weights are returned, and no other kernel runs."""
    model, inputs = shared_model(), prompts(fixed_rows(seed=31, output=0))

    def refuse(*_):
        raise AssertionError("the tower was read")

    with monkeypatch.context() as patched:
        patched.setattr(TowerReading, "__init__", refuse)
        for name in set(METHODS) - set(READERS):
            model_of(name)(**inputs, method=name)
        model(**inputs, method="visionzip", keep_mask=torch.ones_like(inputs["input_ids"]))
    tower = model.model.vision_tower

    def counted(**given):
        with FlopCounterMode(display=False) as counter:
            model.model.encode_images(PIXELS, **given)
        return counter.get_total_flops()

    row = 2 * len(PIXELS) * (TOKENS_PER_IMAGE + 1) * tower.config.hidden_size
    assert counted(cut=Cut(0, frozenset({"class_row"}))) - counted() == row
    vision = llava_shape(model.config).vision
    for name in READERS:
        method = get_method(name)
        read = counted(cut=method.cuts(6)[0]) - counted()
        if name == "downsample":
            assert read < 0 == method.tower_flops(6, vision), "the tower has less to do, and nothing is read"
            continue
        if name in ("trim", "cdpruner"):
            assert read == row // (TOKENS_PER_IMAGE + 1) * TOKENS_PER_IMAGE * SHARED, "the projection alone"
            assert method.tower_flops(6, vision) == 0, "what CLIP costs is stated in docs/methods.md, not counted"
            continue
        rows = {"hiprune": 34, "average_pool": 0, "vscan": 2}.get(name, 1)
        assert len(PIXELS) * method.tower_flops(6, vision) == read == row * rows, name
    assert get_method("fastv").tower_flops(6, vision) == 0
    said = [SimpleNamespace(prompt_dropped=0, prompt_tokens=25, image_kept=[range(3)], image_seen=[3] * 6)]
    shape, settings = decoder_shape(model.config), model.config.sparsity
    one, other = (
        prefill_costs(shape, settings, said, TOKENS_PER_IMAGE, method=get_method(name), vision=vision)
        for name in ("hired", "divprune")
    )
    assert 1e9 * (one["prefill_gflop_exact"] - other["prefill_gflop_exact"]) == pytest.approx(row / len(PIXELS))
    assert counted(cut=Cut(0, frozenset({"tower", "tower_keys"}))) == counted()
    assert tower.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", READERS)
@torch.no_grad()
def test_images_that_are_encoded_once_are_decided_on_everywhere(name):
    """Beams, steps without cache, a later turn with a new image, and features handed over with what the tower says."""
    model, batch = shared_model(2), fixed_rows(seed=32, output=0)
    inputs, method = prompts(batch), get_method(name)
    wanted = model.generate(**inputs, **CALL, method=name)
    cut = method.cuts(6)[0]
    encoded = model.model.encode_images(inputs["pixel_values"], cut=cut).pooler_output
    given = {**inputs, "pixel_values": None, "image_features": encoded}
    for more in ({}, {"use_cache": False}):
        again = model.generate(**given, **CALL, **more, method=name)
        assert torch.equal(again.sequences, wanted.sequences)
        assert_same_logits(torch.stack(again.logits), torch.stack(wanted.logits))
    beams = model.generate(**inputs, **CALL, method=name, num_beams=3, num_return_sequences=2)
    for row, kept in enumerate(wanted.sparsity.image_indices):
        for beam in (2 * row, 2 * row + 1):
            assert all(map(torch.equal, beams.sparsity.image_indices[beam], kept))
    later = prompts(fixed_rows(seed=33, output=0))
    cache = model(**inputs, method=name, use_cache=True).cache
    mask = torch.cat([inputs["attention_mask"], later["attention_mask"]], 1)
    turn = {"input_ids": later["input_ids"], "pixel_values": later["pixel_values"], "attention_mask": mask}
    if any(one.reads_question for one in method.cuts(6)):
        with pytest.raises(ValueError, match=f"'{name}' decides by the row's first question"):
            model(**turn, method=name, cache=cache)
        return
    record = model(**turn, method=name, cache=cache).sparsity
    alone = model(**later, method=name).sparsity
    for found, kept in zip(record.image_indices, alone.image_indices, strict=True):
        assert all(map(torch.equal, found, kept))


def test_two_threads_read_one_tower_each_for_itself():
    """Every call has a reading of its own, so methods that ask for different things share a model."""
    model, inputs = shared_model(), prompts(fixed_rows(seed=36, output=0))

    def kept(name):
        with torch.no_grad():
            record = model(**inputs, method=name).sparsity
        return [image.tolist() for row in record.image_indices for image in row]

    alone = {name: kept(name) for name in READERS}
    with ThreadPoolExecutor(len(READERS)) as pool:
        for _ in range(4):
            assert dict(zip(READERS, pool.map(kept, READERS), strict=True)) == alone


@torch.no_grad()
def test_encoded_images_pass_hooks_and_copies_whole():
    """Models in parts, and training in half precision, hand every argument and output through accelerate's helpers."""
    cut = get_method("visionzip").cuts(6)[0]
    encoded = shared_model().model.encode_images(PIXELS, cut=cut).pooler_output
    sent = send_to_device({"image_features": encoded}, "cpu")["image_features"]
    for one in (
        sent,
        convert_to_fp32({"images": encoded})["images"],
        copy.deepcopy(encoded),
        encoded.chosen([2, 0, 1]),
    ):
        assert one.serves(cut) and len(one) == len(PIXELS) and one.seen["tower"].shape == encoded.seen["tower"].shape
    assert torch.equal(encoded.chosen([2, 0]).seen["class_row"][1], encoded.seen["class_row"][0])


@torch.no_grad()
def test_the_tower_runs_the_kernel_that_its_configuration_names():
    """A kernel that is looked up by its name sees the plain one; what is read is the same."""
    model, names = build_model(), []

    def spying(module, *args, **kwargs):
        names.append(module.config._attn_implementation)
        return sdpa_attention_forward(module, *args, **kwargs)

    cut = get_method("visionzip").cuts(6)[0]
    expected = model.model.encode_images(PIXELS, cut=cut).pooler_output
    AttentionInterface.register("flash_of_a_tower", spying)
    model.model.vision_tower.config._attn_implementation = "flash_of_a_tower"
    found = model.model.encode_images(PIXELS, cut=cut).pooler_output
    assert names == ["flash_of_a_tower"] * 3
    for name, values in expected.seen.items():
        torch.testing.assert_close(found.seen[name], values)
    model.model.vision_tower(PIXELS)
    assert len(names) == 6, "the tower alone runs as ever"


@pytest.mark.parametrize("name", READERS)
@torch.no_grad()
def test_what_cannot_be_read_is_refused_and_says_what_to_do(name):
    model, inputs = shared_model(), prompts(fixed_rows(seed=31, output=0))
    features = model.model.encode_images(inputs["pixel_values"]).pooler_output
    given = {**inputs, "pixel_values": None}
    words = rf"'{name}' decides by the vision tower \(.*projected features.*give pixel_values.*divprune"
    for images in (features, torch.stack(list(features))):
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=words):
                call(**given, image_features=images, method=name)
    other = Cut(0, TOWER_EVIDENCE, tower_layer=2, text_tower=PUBLISHED)
    with pytest.raises(ValueError, match=words):
        model(
            **given,
            image_features=model.model.encode_images(inputs["pixel_values"], cut=other).pooler_output,
            method=name,
        )
    text = prompts(fixed_rows(seed=31, output=0)[1:2])
    assert model(**text, method=name).sparsity.image_indices == [[]], "without an image nothing is asked for"


@dataclasses.dataclass(frozen=True)
class Drawn(Method):
    """A method that draws in training by what it sees of the tower, and learns nothing."""

    name: ClassVar[str] = "drawn"

    def cuts(self, layers):
        return (Cut(0, TOWER_EVIDENCE, early_depth=0, text_tower=PUBLISHED),)

    def keep_image(self, cut, images: ImageTokens, learned):
        images.seen["tower_keys"].sum(-1) + images.seen["tower"].sum(-1) + images.seen["received"]
        return images.seen["class_row"] >= images.seen["class_row"].median(-1, keepdim=True).values

    def sample(self, cut, images, learned, draw):
        return self.keep_image(cut, images, learned).float()


@pytest.mark.parametrize("row", [0, 1])
def test_a_method_that_samples_is_asked_by_rows_with_and_without_images(row):
    """Row 1 has none: the hook is asked all the same, about shapes that it knows."""
    model = build_model(layers=3).train()
    inputs = collate(fixed_rows(seed=37, output=6)[row : row + 1])
    inputs.pop("keep_mask")
    labels = torch.where(inputs.pop("output_mask"), inputs["input_ids"], -100)
    model(**inputs, labels=labels, method=Drawn()).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def with_projector():
    values = {key: value for key, value in tiny_config().to_dict().items() if key != "model_type"}
    config = DynamicLlavaConfig(**{**values, "projector": "tests.toys.pooled:Pooled"})
    return DynamicLlavaForConditionalGeneration(config).eval()


@torch.no_grad()
def test_image_tokens_that_are_no_patches_are_refused():
    with pytest.raises(ValueError, match=r"class_row.*projector='tests.toys.pooled:Pooled'.*per_patch.*divprune"):
        with_projector().model.encode_images(PIXELS, cut=Cut(0, frozenset({"class_row"})))
    model = shared_model().model
    with pytest.raises(ValueError, match=r"vision_feature_select_strategy='full'.*'default'"):
        model.encode_images(PIXELS, strategy="full", cut=EVERYTHING)
    with pytest.raises(ValueError, match="vision_feature_select_strategy='half' is unknown"):
        model.encode_images(PIXELS, strategy="half", cut=EVERYTHING)
    with pytest.raises(ValueError, match=r"layer -4, and attention is that of the layers 1 to 3, or -3 to -1"):
        model.encode_images(PIXELS, layer=-4, cut=EVERYTHING)
    with pytest.raises(ValueError, match=r"layer 9, and attention is that of the layers 1 to 3"):
        model.encode_images(PIXELS, cut=dataclasses.replace(EVERYTHING, tower_layer=9))
    assert set(model.encode_images(PIXELS, layer=-4, cut=Cut(0, frozenset({"tower"}))).pooler_output.seen) == {"tower"}


@dataclasses.dataclass(frozen=True)
class Elsewhere(Method):
    """A method with any cuts, which keeps everything."""

    name: ClassVar[str] = "elsewhere"
    training_free: ClassVar[bool] = True

    where: tuple[Cut, ...] = ()

    def cuts(self, layers):
        return self.where


class Learning(Elsewhere):
    def build(self, width, settings):
        return nn.Linear(width, 1)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Elsewhere((Cut(1, frozenset({"class_row"})),)), "class_row at layer 1.*let it decide there"),
        (Elsewhere((Cut(2, before_projector=True),)), "features before the projector at layer 2"),
        (Elsewhere((Cut(0, frozenset({"class_row", "question_row"})),)), "question_row at layer 0.*class_row, joint"),
        (Learning((Cut(0, frozenset({"tower"})),)), "learns, and asks for tower.*learn nothing"),
    ],
)
def test_cuts_that_cannot_be_are_refused(method, words):
    with pytest.raises(ValueError, match=words):
        shared_model()(**prompts(fixed_rows(seed=31, output=0)), method=method)


@dataclasses.dataclass(frozen=True)
class Blend(Method):
    """Before the projector: two patches stay, one as it is, and one with shares of all."""

    name: ClassVar[str] = "blend"
    training_free: ClassVar[bool] = True

    where: Cut

    def cuts(self, layers):
        return (self.where,)

    def keep_image(self, cut, images: ImageTokens, learned):
        keep = torch.zeros_like(images.valid).index_fill(1, torch.tensor([3, 9]), True)
        shares = torch.eye(keep.shape[1]).repeat(len(keep), 1, 1)
        shares[:, 9] = torch.linspace(0, 1, keep.shape[1])
        return Choice(keep, shares=shares)


@pytest.mark.parametrize("before", [True, False])
@torch.no_grad()
def test_shares_are_sums_of_features_before_the_projector_and_of_tokens_behind_it(before):
    model, inputs = shared_model(), prompts(fixed_rows(seed=34, output=0))
    cut = Cut(0, before_projector=before)
    out = model(**inputs, method=Blend(cut))
    encoded = model.model.encode_images(inputs["pixel_values"], cut=Cut(0, frozenset({"tower"}))).pooler_output
    shares = torch.linspace(0, 1, TOKENS_PER_IMAGE)
    features = torch.stack(list(encoded))
    project = model.model.multi_modal_projector
    blended = project((shares @ encoded.seen["tower"])[:, None])[:, 0] if before else shares @ features
    features[:, 9] = blended
    keep = (inputs["input_ids"] != 3) & inputs["attention_mask"].bool()
    for row, columns in enumerate(inputs["input_ids"] == 3):
        places = columns.nonzero()[:, 0]
        keep[row, places[3::TOKENS_PER_IMAGE]] = keep[row, places[9::TOKENS_PER_IMAGE]] = True
    given = {**inputs, "pixel_values": None, "image_features": features}
    wanted = model(**given, keep_mask=keep, method=Elsewhere((Cut(0),)))
    assert_same_logits(out.logits[keep], wanted.logits[keep])
    assert torch.equal(out.sparsity.keep_mask.bool(), keep) and features.shape[-1] == HIDDEN


@pytest.mark.parametrize("name", READERS)
def test_training_reaches_projector_and_tower_through_what_is_merged(name):
    """Decisions have no gradient; features that stay or are merged have one."""
    model = build_model(layers=3).train()
    inputs = collate(fixed_rows(seed=35, output=6))
    inputs.pop("keep_mask")
    labels = torch.where(inputs.pop("output_mask"), inputs["input_ids"], -100)
    model(**inputs, labels=labels, method=name).loss.backward()
    tower = model.model.vision_tower.encoder.layers
    for layer in (model.model.multi_modal_projector.linear_1, tower[0].mlp.fc1, tower[1].self_attn.q_proj):
        assert layer.weight.grad.abs().sum() > 0
    assert tower[2].self_attn.q_proj.weight.grad is None, "the row that decides has no gradient"
