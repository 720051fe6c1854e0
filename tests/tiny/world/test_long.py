"""The long world: descriptions recomputed from the scene alone, in the shipped base's words, in data of its own."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from transformers import AutoTokenizer

from dynamic_llava.tiny import BASE_WEIGHTS
from dynamic_llava.tiny.world.dataset import build_world, load_truth
from dynamic_llava.tiny.world.long import (
    LONG_KINDS,
    LONG_REQUESTS,
    STATEMENTS,
    describe_long,
    sample_long_request,
    sample_long_scene,
)
from dynamic_llava.tiny.world.scenes import COLORS, SHAPES, SIZES, Scene, SceneObject, sample_scene
from dynamic_llava.tiny.world.texts import REQUESTS, STYLES, ask, describe, parse_attributes, scene_attributes

NUMBERS = ["zero", "one", "two", "three", "four"]
SCENES = [sample_long_scene(np.random.default_rng((7, i))) for i in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("worlds") / "long", train=12, test=16, seed=2, world="long")


def test_scenes_are_crowded_within_the_numbers():
    assert {len(scene.objects) for scene in SCENES} == {4, 5, 6, 7}
    for scene in SCENES:
        assert [o.x for o in scene.objects] == sorted(o.x for o in scene.objects)
        assert len({(o.color, o.shape) for o in scene.objects}) == len(scene.objects)
        for name in ("size", "column"):
            assert max(Counter(getattr(o, name) for o in scene.objects).values()) <= 4
    assert {o.size for scene in SCENES for o in scene.objects} == set(SIZES)


def test_the_shipped_tokenizer_has_every_word_and_counts_100_to_250():
    tokenizer = AutoTokenizer.from_pretrained(BASE_WEIGHTS)
    encoded = [tokenizer(describe_long(scene).text, add_special_tokens=False).input_ids for scene in SCENES]
    encoded += [tokenizer(request, add_special_tokens=False).input_ids for request in LONG_REQUESTS]
    assert all(tokenizer.unk_token_id not in ids for ids in encoded)
    lengths = {len(ids) + 1 for ids in encoded[: len(SCENES)]}
    assert min(lengths) >= 100 and max(lengths) <= 250 and len(lengths) == 4  # by the number of objects


def test_every_object_is_listed_in_order_with_its_place():
    for scene in SCENES:
        text = describe_long(scene).text
        assert parse_attributes(text) == scene_attributes(scene)
        listed = re.findall(
            rf"a ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) at the ([a-z]+) ([a-z]+)", text
        )
        assert listed == [(o.size, o.color, o.shape, o.row, o.column) for o in scene.objects]
        assert scene.background in text.split(".")[0]


def test_relations_name_the_neighbours_on_both_sides():
    for scene in SCENES:
        names = [f"{o.color} {o.shape}" for o in scene.objects]
        text = describe_long(scene).text
        found = re.findall(r"The ([a-z]+ [a-z]+) is between the ([a-z]+ [a-z]+) and the ([a-z]+ [a-z]+)", text)
        assert found == [(names[i], names[i - 1], names[i + 1]) for i in range(1, len(names) - 1)]
        assert f"Nothing is on the left of the {names[0]}." in text
        assert f"Nothing is on the right of the {names[-1]}." in text
        stated = [match.groups() for match in STATEMENTS["relation"].finditer(text)]
        assert stated == [(left, right) for _, left, right in found]


def test_counts_come_last_and_are_true():
    for scene in SCENES:
        text = describe_long(scene).text
        stated = [match[1] for match in STATEMENTS["count"].finditer(text)]
        true = [sum(o.column == column for o in scene.objects) for column in ("left", "center", "right")]
        true += [sum(o.size == size for o in scene.objects) for size in SIZES]
        assert stated == [NUMBERS[number] for number in true]
        counts, rest = text[text.index("Overall") :], text[: text.index("Overall")]
        assert not STATEMENTS["count"].search(rest) and not STATEMENTS["relation"].search(counts)
        assert len({match[0] for match in STATEMENTS["count"].finditer(text)}) == 6
        assert "one objects" not in text and not re.search(r"(zero|two|three|four) (\w+ )?object\b", text)
        assert not re.search(r"there are one|there is (zero|two|three|four)", text)


def test_default_descriptions_make_none_of_these_statements():
    for i in range(40):
        scene = sample_scene(np.random.default_rng((8, i)))
        for style in STYLES:
            assert not any(pattern.search(describe(scene, style).text) for pattern in STATEMENTS.values())


def test_spans_point_to_words_about_their_object():
    for scene in SCENES[:20]:
        described = describe_long(scene)
        assert {index for _, _, index in described.spans} == set(range(len(scene.objects)))
        for start, end, index in described.spans:
            words = described.text[start:end].split()
            obj = scene.objects[index]
            assert words and set(words) <= {obj.color, obj.shape, obj.size, obj.row, obj.column}


def test_requests_are_its_own_and_other_styles_are_refused():
    rng = np.random.default_rng(0)
    drawn = {sample_long_request(rng) for _ in range(40)}
    assert {request for _, request in drawn} == set(LONG_REQUESTS)
    assert not set(LONG_REQUESTS) & {request for requests in REQUESTS.values() for request in requests}
    assert all(describe_long(SCENES[0], style).text for style, _ in drawn)
    with pytest.raises(ValueError, match="'tell'; allowed in the long world: long"):
        describe_long(SCENES[0], "tell")


def test_no_question_needs_a_number_beyond_four():
    crowd = Scene(tuple(SceneObject("red", shape, "small", 9.0, 9.0, 4.6) for shape in SHAPES), "plain")
    rng = np.random.default_rng(0)
    assert ask(crowd, "count", rng) is None
    answers = {
        None if question is None else question.answer for question in (ask(crowd, "count_by", rng) for _ in range(60))
    }
    assert None in answers and answers <= {None, *NUMBERS}


def test_a_long_world_on_disk(folder, tmp_path, monkeypatch):
    truths = load_truth(folder)
    samples = {split: json.loads((folder / f"{split}.json").read_text()) for split in ("train", "test")}
    kinds = {split: Counter(sample["kind"] for sample in its) for split, its in samples.items()}
    assert set(kinds["test"]) == {*LONG_KINDS, "description"} and kinds["test"]["description"] == 4
    assert kinds["train"]["description"] == 12 and kinds["train"]["turns"] == 2 and kinds["train"].total() == 12 + 2 + 3
    assert all(kind in (*LONG_KINDS, "description", "turns") for kind in kinds["train"])
    for sample in samples["test"]:
        if sample["kind"] == "description":
            assert sample["conversations"][1]["value"] == describe_long(truths[sample["image"]].scene).text
    assert json.loads((folder / "world.json").read_text())["world"] == "long"
    with pytest.raises(ValueError, match="another world"):
        build_world(folder, train=12, test=16, seed=2)
    monkeypatch.setenv("DYNAMIC_LLAVA_CACHE", str(tmp_path))
    assert build_world(train=1, test=8, world="long").name == "tiny_world_v1_1_8_0_long"
    with pytest.raises(ValueError, match="unknown world 'longer'; allowed: default, long"):
        build_world(world="longer")
