"""Answers and descriptions recomputed from the text alone by code that shares nothing with the generator."""

import re
from collections import Counter

import numpy as np
import pytest

from dynamic_llava.processing.prompts import SYSTEM
from dynamic_llava.tiny.base.sequences import build_tokenizer
from dynamic_llava.tiny.world.scenes import COLORS, SHAPES, SIZES, Scene, SceneObject, sample_scene
from dynamic_llava.tiny.world.texts import (
    KINDS,
    REQUESTS,
    STYLES,
    ask,
    attribute_recall,
    describe,
    parse_attributes,
    request_style,
    sample_request,
    scene_attributes,
)

NUMBERS = {0: "zero", 1: "one", 2: "two", 3: "three", 4: "four"}
SCENES = [sample_scene(np.random.default_rng((3, i))) for i in range(150)]


def named(text):
    """The attribute words of a question."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    return {
        "color": [c for c in COLORS if c in words],
        "shape": [s for s in SHAPES if s in words],
        "size": [s for s in SIZES if s in words],
    }


def matching(scene, text):
    wanted = {name: values for name, values in named(text).items() if values}
    return [o for o in scene.objects if all(getattr(o, name) in values for name, values in wanted.items())]


def truth(scene, text):
    found = matching(scene, text)
    if text.startswith("How many"):
        return NUMBERS[len(found)]
    if text.startswith(("Is there", "Do you see")):
        return "Yes" if found else "No"
    assert len(found) == 1, f"{text!r} is ambiguous"
    if "color" in text:
        return found[0].color
    return found[0].shape if "hape" in text else found[0].size


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_true_and_referents_match(kind):
    rng, asked = np.random.default_rng(1), 0
    for scene in SCENES * 3:
        question = ask(scene, kind, rng)
        if question is None:
            continue
        asked += 1
        assert question.kind == kind
        assert question.answer == truth(scene, question.text), question
        assert [scene.objects[i] for i in question.referents] == matching(scene, question.text)
    assert asked > 300


def test_existence_is_balanced_and_negatives_are_what_they_say():
    rng, answers = np.random.default_rng(2), Counter()
    for scene in SCENES * 4:
        question = ask(scene, "exist", rng)
        answers[question.answer] += 1
        absent = named(question.text)
        if question.negative == "adversarial":
            assert any(o.color in absent["color"] or o.shape in absent["shape"] for o in scene.objects)
        assert (question.negative is None) == (question.answer == "Yes")
    assert 0.42 < answers["Yes"] / answers.total() < 0.58


@pytest.mark.parametrize("negative", ["random", "popular", "adversarial"])
def test_existence_can_be_fixed(negative):
    rng = np.random.default_rng(3)
    for scene in SCENES[:40]:
        assert ask(scene, "exist", rng, present=True, negative=negative).answer == "Yes"
        question = ask(scene, "exist", rng, present=False, negative=negative)
        assert (question.answer, question.negative) == ("No", negative)
        assert truth(scene, question.text) == "No"


def test_popular_negatives_are_frequent_objects():
    rng, counts = np.random.default_rng(4), Counter()
    for scene in SCENES:
        counts[tuple(named(ask(scene, "exist", rng, present=False, negative="popular").text)["color"])] += 1
    assert set(counts) <= {(c,) for c in ("red", "green", "blue", "yellow")}


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match=r"relation.*count_by"):
        ask(SCENES[0], "relation", np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"hard.*adversarial"):
        ask(SCENES[0], "exist", np.random.default_rng(0), negative="hard")


DESCRIBED = [sample_scene(np.random.default_rng((4, i))) for i in range(120)]


@pytest.mark.parametrize("style", STYLES)
def test_length_is_50_to_100_tokens(style):
    tokenizer = build_tokenizer([SYSTEM, "USER: ASSISTANT:"])
    lengths = {len(tokenizer(describe(s, style).text, add_special_tokens=False).input_ids) + 1 for s in DESCRIBED}
    assert min(lengths) >= 50 and max(lengths) <= 100 and len(lengths) > 2


@pytest.mark.parametrize("style", STYLES)
def test_every_object_is_named_in_order_with_place_and_summary(style):
    for scene in DESCRIBED:
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
    for scene in DESCRIBED[:30]:
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
    scene = next(s for s in DESCRIBED if len(s.objects) == 4)
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
        describe(DESCRIBED[0], "poem")
