"""Descriptions: length, truth, order, spans, and the way back to attributes."""

import re

import numpy as np
import pytest

from dynamic_llava.processing.prompts import SYSTEM
from dynamic_llava.tiny.base.tokenizer import build_tokenizer
from dynamic_llava.tiny.world.descriptions import (
    REQUESTS,
    STYLES,
    attribute_recall,
    describe,
    parse_attributes,
    request_style,
    sample_request,
    scene_attributes,
)
from dynamic_llava.tiny.world.scenes import COLORS, SHAPES, Scene, SceneObject, sample_scene

SCENES = [sample_scene(np.random.default_rng((4, i))) for i in range(120)]


@pytest.mark.parametrize("style", STYLES)
def test_length_is_50_to_100_tokens(style):
    tokenizer = build_tokenizer([SYSTEM, "USER: ASSISTANT:"])
    lengths = {len(tokenizer(describe(s, style).text, add_special_tokens=False).input_ids) + 1 for s in SCENES}
    assert min(lengths) >= 50 and max(lengths) <= 100 and len(lengths) > 2


@pytest.mark.parametrize("style", STYLES)
def test_every_object_is_named_in_order_with_place_and_summary(style):
    for scene in SCENES:
        text = describe(scene, style).text
        assert parse_attributes(text) == scene_attributes(scene)
        places = re.findall(r"(top|middle|bottom) (left|center|right)", text)
        assert places == [(o.row, o.column) for o in scene.objects]
        summary = text[re.search("Overall|To sum up", text).start() :]
        pairs = re.findall(rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})", summary)
        assert pairs == [(o.color, o.shape) for o in scene.objects]
        assert scene.background in text.split(".")[0]


@pytest.mark.parametrize("style", STYLES)
def test_spans_point_to_words_about_their_object(style):
    for scene in SCENES[:30]:
        described = describe(scene, style)
        assert {index for _, _, index in described.spans} == set(range(len(scene.objects)))
        for start, end, index in described.spans:
            obj = scene.objects[index]
            words = described.text[start:end].split()
            assert words and set(words) <= {obj.color, obj.shape, obj.size, obj.row, obj.column}


def test_articles_agree():
    scene = Scene((SceneObject("orange", "ring", "small", 10.0, 10.0, 4.6),), "plain")
    for style in STYLES:
        assert not re.search(r"\ba orange", describe(scene, style).text)
        assert "an orange ring" in describe(scene, style).text


def test_recall_counts_objects():
    scene = next(s for s in SCENES if len(s.objects) == 4)
    text = describe(scene, "list").text
    assert attribute_recall(text, scene_attributes(scene)) == 1
    first = scene.objects[0]
    wrong = text.replace(f"{first.size} {first.color} {first.shape}", "object")
    assert attribute_recall(wrong, scene_attributes(scene)) == 0.75
    assert attribute_recall("", scene_attributes(scene)) == 0
    with pytest.raises(ValueError, match="at least one object"):
        attribute_recall(text, set())


def test_the_request_decides_the_style():
    rng = np.random.default_rng(0)
    drawn = {sample_request(rng) for _ in range(100)}
    assert drawn == {(style, request) for style, requests in REQUESTS.items() for request in requests}
    assert all(request_style(request) == style for style, request in drawn)
    with pytest.raises(ValueError, match=r"Sing.*Describe"):
        request_style("Sing.")
    with pytest.raises(ValueError, match=r"poem.*list"):
        describe(SCENES[0], "poem")
