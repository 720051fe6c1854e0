"""The base's training: packed rows mean what single conversations mean, the auxiliary sees the true attention, resuming
is exact, and the export is an ordinary checkpoint.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from dynamic_llava.cli import read_yaml
from dynamic_llava.processing.prompts import SYSTEM, encode_conversation
from dynamic_llava.tiny.base.alignment import AlignmentSettings, initialise_decoder, word_targets
from dynamic_llava.tiny.base.language import AttentionTap, CachedWorld, LanguageSettings, grounding_loss, train_language
from dynamic_llava.tiny.base.model import build_tiny_llava, build_tower, export, folded, tiny_config
from dynamic_llava.tiny.base.optim import MuonAdamW, cosine_factor, trapezoid_factor
from dynamic_llava.tiny.base.pipeline import BaseConfig, sample_questions, train_base
from dynamic_llava.tiny.base.sequences import SegmentWriter, build_tokenizer, collate, sample_row
from dynamic_llava.tiny.base.vision import VisionSettings, patch_labels, pixel_values, train_tower
from dynamic_llava.tiny.world.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, sample_pictures
from dynamic_llava.tiny.world.texts import KINDS, ShortQuestion, describe

IMAGE_ID = 4
SCENES, PICTURES = sample_pictures(6, (21,))
OWNERS = np.stack([p.patch_object for p in PICTURES])


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer([SYSTEM, "USER: ASSISTANT:"])


@pytest.fixture(scope="module")
def writer(tokenizer):
    return SegmentWriter(tokenizer)


def small_model(tokenizer, seed=0):
    config = tiny_config(len(tokenizer), 0, 1, 2, IMAGE_ID)
    config.text_config.num_hidden_layers = 4
    model = build_tiny_llava(config, seed)
    initialise_decoder(model, seed)
    return model


def packed_rows(writer, questions=6):
    rng = np.random.default_rng(1)
    return [sample_row(scene, writer, rng, questions) for scene in SCENES[:3]]


def test_segments_are_the_ordinary_conversation(tokenizer, writer):
    question = ShortQuestion("color", "What color is the ring?", "red", (0,))
    single = encode_conversation(tokenizer, [("<image>\nWhat color is the ring?", "red")], 64, IMAGE_ID)
    segment = writer.conversation([question])
    assert [*writer.prefix, *segment.ids] == single.input_ids
    learned = [-100] * len(writer.prefix)
    learned += [token if weight else -100 for token, weight in zip(segment.ids, segment.weight, strict=True)]
    assert learned == single.labels
    turns = writer.conversation([question, ShortQuestion("count", "How many objects are there?", "two", (0, 1))])
    expected = [("<image>\nWhat color is the ring?", "red"), ("How many objects are there?", "two")]
    assert [*writer.prefix, *turns.ids] == encode_conversation(tokenizer, expected, 64, IMAGE_ID).input_ids
    assert sum(w > 0 for w in turns.weight) == 4


def test_description_segments_mark_answers_and_referents(tokenizer, writer):
    scene = SCENES[0]
    text = describe(scene, "list").text
    segment = writer.description(scene, "list", "Describe the image in detail.")
    single = encode_conversation(tokenizer, [("<image>\nDescribe the image in detail.", text)], 64, IMAGE_ID)
    assert [*writer.prefix, *segment.ids] == single.input_ids
    assert sum(w > 0 for w in segment.weight) == sum(label != -100 for label in single.labels)
    for token, objects in zip(segment.ids, segment.referents, strict=True):
        for index in objects:
            obj = scene.objects[index]
            assert tokenizer.decode([token]).strip() in (obj.color, obj.shape, obj.size, obj.row, obj.column)
    assert {i for objects in segment.referents for i in objects} == set(range(len(scene.objects)))


@torch.no_grad()
def test_a_packed_conversation_equals_the_conversation_alone(tokenizer, writer):
    model, rows = small_model(tokenizer).eval(), packed_rows(writer)
    pixels = pixel_values(torch.from_numpy(np.stack([p.pixels for p in PICTURES[:3]])))
    batch = collate(rows, writer.prefix, OWNERS[:3], tokenizer.pad_token_id)
    packed = model(
        input_ids=batch.ids, pixel_values=pixels, attention_mask=batch.visible, position_ids=batch.positions
    ).logits
    for b, row in enumerate(rows):
        at = len(writer.prefix)
        for segment in row:
            ids = torch.tensor([[*writer.prefix, *segment.ids]])
            alone = model(input_ids=ids, pixel_values=pixels[b : b + 1]).logits[0, len(writer.prefix) :]
            torch.testing.assert_close(packed[b, at : at + len(segment.ids)], alone, atol=2e-5, rtol=1e-5)
            at += len(segment.ids)


@torch.no_grad()
def test_the_tap_sees_the_attention_of_the_layer(tokenizer, writer):
    model, rows = small_model(tokenizer).eval(), packed_rows(writer)
    model.set_attn_implementation("eager")
    batch = collate(rows, writer.prefix, OWNERS[:3], tokenizer.pad_token_id)
    pixels = pixel_values(torch.from_numpy(np.stack([p.pixels for p in PICTURES[:3]])))
    mask = torch.zeros(batch.visible.shape).masked_fill(~batch.visible, torch.finfo(torch.float32).min)
    with AttentionTap(model.model.language_model.layers[3].self_attn, 2) as tap:
        output = model(
            input_ids=batch.ids,
            pixel_values=pixels,
            attention_mask=mask,
            position_ids=batch.positions,
            output_attentions=True,
        )
        weights = tap.weights(batch.visible)
    torch.testing.assert_close(weights, output.attentions[3][:, :2], atol=1e-6, rtol=1e-4)
    start = writer.prefix.index(IMAGE_ID)
    expected = []
    for b, at, patches in zip(batch.refer_row, batch.refer_at, batch.refer_patches, strict=True):
        mass = weights[b, :, at, start : start + 64][:, patches > 0].sum(-1)
        expected.append(-(mass + 1e-4).log().mean())
    torch.testing.assert_close(grounding_loss(weights, batch, start), torch.stack(expected).mean())


def test_training_resumes_exactly(tokenizer, tmp_path):
    world = CachedWorld(SCENES, torch.randn(6, 64, 96, generator=torch.Generator().manual_seed(0)), OWNERS)
    settings = LanguageSettings(steps=4, batch=2, questions=4, warmup=2, decay=2, grounding_steps=3, save_every=2)
    whole, stopped, resumed = (small_model(tokenizer) for _ in range(3))
    assert list(train_language(whole, tokenizer, world, settings, 0, tmp_path / "a.pt")) == [2, 4]
    assert next(train_language(stopped, tokenizer, world, settings, 0, tmp_path / "b.pt")) == 2
    assert list(train_language(resumed, tokenizer, world, settings, 0, tmp_path / "b.pt")) == [4]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert list(train_language(stopped, tokenizer, world, settings, 0, tmp_path / "b.pt")) == [4]
    with pytest.raises(ValueError, match="other settings"):
        next(train_language(stopped, tokenizer, world, replace(settings, batch=3), 0, tmp_path / "b.pt"))


def test_word_targets_name_the_patch(tokenizer):
    targets, owned = word_targets(tokenizer, SCENES, PICTURES)
    for i, scene in enumerate(SCENES):
        for patch in range(64):
            words = tokenizer.decode(targets[i, patch]).split()
            if owned[i, patch]:
                obj = scene.objects[OWNERS[i, patch]]
                assert words == [obj.color, obj.shape, obj.size, obj.row, obj.column]
            else:
                assert words[:3] == [scene.background] * 3
    assert tokenizer.decode(targets[0, 63]).split()[3:] == ["bottom", "right"] or owned[0, 63]


def test_the_tower_learns_from_patch_labels(tokenizer):
    config = tiny_config(len(tokenizer), 0, 1, 2, IMAGE_ID)
    tower = build_tower(config, 0)
    before = tower.get_submodule("embeddings.patch_embedding").weight.detach().clone()
    scores = train_tower(tower, VisionSettings(images=8, steps=3, batch=4, warmup=1, measured=8), 0)
    assert set(scores) == {"shape", "color", "size", "ground"}
    weight = tower.get_submodule("embeddings.patch_embedding").weight
    assert weight.shape == before.shape and not torch.equal(weight, before)
    labels = patch_labels(SCENES, PICTURES)
    owner = OWNERS[0][OWNERS[0] >= 0][0]
    patch, obj = int(np.argmax(OWNERS[0] == owner)), SCENES[0].objects[owner]
    kinds = labels.kinds[0, patch].tolist()
    assert kinds == [1 + SHAPES.index(obj.shape), COLORS.index(obj.color), SIZES.index(obj.size)]
    assert labels.background[0] == BACKGROUNDS.index(SCENES[0].background)


@torch.no_grad()
def test_the_export_is_an_ordinary_checkpoint(tokenizer, tmp_path):
    model = small_model(tokenizer).eval()
    target = tmp_path / "export"
    export(folded(model, 4.0), tokenizer, target, {"seed": 0}, None)
    export(folded(model, 4.0), tokenizer, target, {"seed": 1}, None)
    assert json.loads((target / "provenance.json").read_text()) == {"seed": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
    loaded = LlavaForConditionalGeneration.from_pretrained(target)
    features = torch.randn(2, 64, 96)
    torch.testing.assert_close(
        loaded.model.multi_modal_projector(4 * features), model.model.multi_modal_projector(features)
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="other files"):
        export(folded(model, 4.0), tokenizer, tmp_path / "other", {}, None)


def test_rates():
    assert cosine_factor(0, 100, 10) == pytest.approx(0.1) and cosine_factor(99, 100, 10) < 0.04
    assert [trapezoid_factor(s, 100, 10, 50) for s in (0, 30, 50, 75)] == pytest.approx([0.1, 1, 1, 0.5])
    with pytest.raises(ValueError, match="matrices only"):
        MuonAdamW([torch.nn.Parameter(torch.zeros(3))], [], muon_lr=0.1, adam_lr=0.1)


def test_questions_for_measurement_are_balanced_or_refused():
    found = sample_questions(SCENES, 5, (0,))
    assert len(found) == 30 and len({q.kind for _, q in found}) == 6
    with pytest.raises(ValueError, match="more scenes"):
        sample_questions([replace(SCENES[0], objects=SCENES[0].objects[:1] * 2)], 1, (0,))


def test_the_shipped_config_is_read(pytestconfig):
    config = read_yaml(BaseConfig, pytestconfig.rootpath / "configs" / "tiny_base.yaml")
    assert config.language.batch == 10 and not config.install


def test_all_stages_run_resume_and_export(tmp_path):
    config = BaseConfig(
        output=str(tmp_path / "run"),
        threads=1,
        questions_per_kind=4,
        descriptions=2,
        vision=VisionSettings(images=4, steps=1, batch=2, measured=4),
        alignment=AlignmentSettings(images=4, steps=1, batch=8),
        language=LanguageSettings(images=4, steps=2, batch=1, questions=3, save_every=1),
    )
    first = train_base(config)
    weights = (tmp_path / "run" / "export" / "model.safetensors").read_bytes()
    assert first["language_steps_done"] == 2 and len(first["crutches"]) == 5
    assert set(first["unseen_data_scores"]["short_answers"]) == {*KINDS, "all"}
    again = train_base(config)
    assert again == first
    assert (tmp_path / "run" / "export" / "model.safetensors").read_bytes() == weights
    log = (tmp_path / "run" / "export" / "training_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 2]
