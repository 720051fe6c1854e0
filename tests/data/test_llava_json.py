"""Bad samples are named by file, index and id; image paths stay inside their folder."""

import json

import pytest

from dynamic_llava.data.llava_json import (
    BAD_FIELD,
    BAD_ROLE,
    MISSING,
    OUTSIDE,
    find_problems,
    parse_sample,
    read_samples,
    resolve_image,
)
from tests.sft_builders import conversation, picture


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "inner").mkdir(parents=True)
    for name in ("a.png", "b.png", "inner/c.png"):
        picture().save(folder / name)
    picture().save(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "good_link.png").symlink_to(folder / "a.png")
    return folder


def sample(**changes):
    return {"id": "one", "image": "a.png", "conversations": conversation(), **changes}


def test_a_sample_is_read(images):
    parsed = parse_sample(sample(extra=1), 7, images)
    assert (parsed.index, parsed.id, parsed.images) == (7, "one", ("a.png",))
    assert parsed.turns == (("<image>\nWhat is it?", "A cat."),)


@pytest.mark.parametrize("question", ["What is it?\n<image>", "<image> What is it?", "What <image>is it?"])
def test_a_single_image_moves_to_the_front(images, question):
    parsed = parse_sample(sample(conversations=conversation(question)), 0, images)
    assert parsed.turns[0][0] == f"<image>\n{question.replace('<image>', '').strip()}"


def test_several_images_stay_in_place(images):
    messages = conversation("First <image>, second <image>", "Yes.", "And <image>?", "No.")
    parsed = parse_sample(sample(image=["a.png", "b.png", "inner/c.png"], conversations=messages), 0, images)
    assert parsed.turns == (("First <image>, second <image>", "Yes."), ("<image>\nAnd ?", "No."))


def test_an_unasked_first_answer_is_left_out(images):
    messages = [{"from": "gpt", "value": "Hello."}, *conversation()]
    assert len(parse_sample(sample(conversations=messages), 0, images).turns) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "0 images are named for 1 <image> places"),
        ({"image": ["a.png", "b.png"]}, "2 images are named for 1"),
        ({"image": 3}, "'image' is"),
        ({"image": "nothing.png"}, r"image 'nothing\.png' is missing from the image folder"),
        ({"image": "../outside.png"}, r"'\.\./outside\.png' leaves the image folder"),
        ({"image": "inner/../../outside.png"}, "leaves the image folder"),
        ({"image": "link.png"}, r"'link\.png' leaves the image folder"),
        ({"conversations": None}, "'conversations' is missing"),
        ({"conversations": []}, "0 messages make no whole"),
        ({"conversations": conversation()[:1]}, "1 messages make no whole"),
        (
            {"conversations": [*conversation(), *conversation("A")[::-1]]},
            "message 2 is from 'gpt' where 'human' is due",
        ),
        ({"conversations": conversation("<image>", "See <image>")}, "message 1 is an answer that holds <image>"),
        ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "A"}]}, "message 0 has no text"),
    ],
)
def test_what_is_wrong_is_said(images, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        parse_sample(sample(**changes), 0, images)


def test_absolute_paths_are_refused_even_inside(images):
    with pytest.raises(ValueError, match="leaves the image folder"):
        resolve_image(images, str(images / "a.png"))
    assert resolve_image(images, "good_link.png") == (images / "a.png").resolve()


def test_everything_that_is_wrong_with_a_sample_is_found(images):
    messages = [*conversation()[::-1], {"from": "human", "value": 3}]
    found = find_problems(sample(conversations=messages, image=["nothing.png", "../outside.png", "a.png"]), images)
    assert [problem.kind for problem in found] == [BAD_ROLE, BAD_FIELD, MISSING, OUTSIDE]
    assert find_problems(sample(), images) == []
    assert [problem.kind for problem in find_problems(3, images)] == [BAD_FIELD]


@pytest.mark.parametrize("image", ["inner", "", "inner/", "no/such/folder.png", "a.png/b.png", "x" * 3000 + ".png"])
def test_what_is_no_file_is_missing(images, image):
    with pytest.raises(FileNotFoundError, match="is missing from the image folder"):
        resolve_image(images, image)


def test_names_that_no_file_can_have_are_refused(images):
    (images / "circle").symlink_to(images / "circle")
    for image in ("a\0.png", "circle/a.png", ".."):
        with pytest.raises((ValueError, FileNotFoundError), match=r"no path of a file|leaves the image|missing"):
            resolve_image(images, image)


def test_folders_that_are_links_lead_nowhere_else(images, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    picture().save(tmp_path / "elsewhere" / "d.png")
    (images / "far").symlink_to(tmp_path / "elsewhere")
    (images / "near").symlink_to(images / "inner")
    with pytest.raises(ValueError, match="leaves the image folder"):
        resolve_image(images, "far/d.png")
    assert resolve_image(images, "near/c.png") == (images / "inner" / "c.png").resolve()


def test_an_image_folder_may_be_a_link_and_relative(images, tmp_path, monkeypatch):
    (tmp_path / "linked").symlink_to(images)
    monkeypatch.chdir(tmp_path)
    assert resolve_image("linked", "inner/c.png") == (images / "inner" / "c.png").resolve()


@pytest.mark.parametrize("place", ["id", "image", "question"])
def test_half_a_character_is_refused(images, place):
    broken = json.loads('"half \\ud83d"')
    changes = {"id": {"id": broken}, "image": {"image": broken}, "question": {"conversations": conversation(broken)}}
    kinds = {problem.kind for problem in find_problems(sample(**changes[place]), images)}
    assert BAD_FIELD in kinds


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": 1, "conv', "no valid JSON"),
        ('{"id": 1}\n{"id": 2}', "one sample per line"),
        ('{"id": 1}', "does not begin with"),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, message):
    file = tmp_path / "data.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        list(read_samples(file))
    assert "data.json" in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data file .*nothing\.json"):
        list(read_samples(tmp_path / "nothing.json"))


def test_letters_of_all_languages_are_read(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([sample(id="größe")], ensure_ascii=False), encoding="utf-8")
    assert next(read_samples(tmp_path / "data.json"))["id"] == "größe"
