"""Ways to write a sample: those that are read give one and the same row; no other is taken for text in silence."""

import json

import pytest

from dynamic_llava.config import DataConfig, SparsityConfig
from dynamic_llava.data import SftDataset
from dynamic_llava.data.check import check
from dynamic_llava.processing.prompts import SYSTEM
from tests.sft_builders import conversation, picture, tiny_processor

QUESTION, ANSWER = "<image>\nWhat is it?", "A cat."
LLAVA = conversation(QUESTION, ANSWER)


def chat(question=QUESTION, answer=ANSWER, *, system=None):
    """Return the same conversation as role/content messages."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def parts(*images, text="What is it?"):
    """Return a question of image parts and one text part."""
    return [*({"type": "image", **image} for image in images), {"type": "text", "text": text}]


ONE_IMAGE = {
    "image, conversations": {"image": "a.png", "conversations": LLAVA},
    "a list of one": {"image": ["a.png"], "conversations": LLAVA},
    "images, messages": {"images": ["a.png"], "messages": chat()},
    "images, a path": {"images": "a.png", "messages": chat()},
    "image, messages": {"image": "a.png", "messages": chat()},
    "images, conversations": {"images": ["a.png"], "conversations": LLAVA},
    "role and content under conversations": {"images": ["a.png"], "conversations": chat()},
    "from and value under messages": {"image": "a.png", "messages": LLAVA},
    "a place as a part": {"images": ["a.png"], "messages": chat(parts({}))},
    "a place as an empty part": {"images": ["a.png"], "messages": chat(parts({"image": None}))},
    "a part that names its image": {"messages": chat(parts({"image": "a.png"}))},
    "a part with a path": {"messages": chat(parts({"path": "a.png"}))},
    "a part with a relative address": {"messages": chat(parts({"url": "a.png"}))},
    "answers as parts": {"images": ["a.png"], "messages": chat(answer=[{"type": "text", "text": ANSWER}])},
    "empty others beside": {"image": "a.png", "images": [], "messages": None, "conversations": LLAVA, "video": None},
    "other keys beside": {"image": "a.png", "image_path": "/x/a.png", "image_size": [3, 4], "conversations": LLAVA},
    "an answer that nobody asked for": {"image": "a.png", "messages": [*chat()[1:], *chat()]},
}  # fmt: skip

REFUSED = {
    "no image key": {"conversations": LLAVA},
    "null": {"image": None, "conversations": LLAVA},
    "empty string": {"image": "", "conversations": LLAVA},
    "empty list": {"image": [], "conversations": LLAVA},
    "a list with null": {"image": [None], "conversations": LLAVA},
    "a list with an empty string": {"image": [""], "conversations": LLAVA},
    "a nested list": {"image": [["a.png"]], "conversations": LLAVA},
    "a dictionary": {"image": {"path": "a.png"}, "conversations": LLAVA},
    "an empty dictionary": {"image": {}, "conversations": LLAVA},
    "zero": {"image": 0, "conversations": LLAVA},
    "false": {"image": False, "conversations": LLAVA},
    "false without a place": {"image": False, "conversations": conversation("What?", ANSWER)},
    "a list with a dictionary": {"images": [{"bytes": "iVBOR", "path": "a.png"}], "messages": chat()},
    "both keys": {"image": "a.png", "images": ["a.png"], "conversations": LLAVA},
    "both conversations": {"image": "a.png", "messages": chat(), "conversations": LLAVA},
    "image_path": {"image_path": "a.png", "conversations": LLAVA},
    "image_path without a place": {"image_path": "a.png", "conversations": conversation("What?", ANSWER)},
    "nested, with a place": {"content": {"image": "a.png"}, "conversations": LLAVA},
    "nested, without a place": {"content": {"image": "a.png"}, "conversations": conversation("What?", ANSWER)},
    "img": {"img": ["x/a"], "conversations": conversation("What?", ANSWER)},
    "video": {"video": "v.mp4", "conversations": conversation("<video>\nWhat?", ANSWER)},
    "videos, messages": {"videos": ["v.mp4"], "messages": chat("<video>What?")},
    "audio": {"audio": "a.wav", "conversations": conversation("What?", ANSWER)},
    "image without a place": {"image": "a.png", "conversations": conversation("What?", ANSWER)},
    "images without a place": {"images": ["a.png"], "messages": chat("What?")},
    "two places for one image": {"image": "a.png", "conversations": conversation("<image><image>What?", ANSWER)},
    "messages without images": {"messages": chat()},
    "a part without an image": {"messages": chat(parts({}))},
    "a part and a place for one image": {"images": ["a.png"], "messages": chat(parts({}, text="<image>What?"))},
    "a part that names and a list as well": {"images": ["a.png"], "messages": chat(parts({"image": "a.png"}))},
    "a part that names and one that does not": {"messages": chat(parts({"image": "a.png"}, {}))},
    "an image_url part": {"messages": chat([{"type": "image_url", "image_url": {"url": "a.png"}}])},
    "a video part": {"messages": chat([{"type": "video", "video": "v.mp4"}, {"type": "text", "text": "What?"}])},
    "a part with an image of bytes": {"messages": chat(parts({"image": {"bytes": "iVBOR"}}))},
    "a part with two images": {"messages": chat(parts({"image": "a.png", "path": "a.png"}))},
    "a place in a system text": {"image": "a.png", "messages": chat("What?", system="<image>")},
    "an image in an answer": {"images": ["a.png"], "messages": chat("What?", parts({}))},
    "no conversation": {"image": None, "text": "<image> What? A cat."},
    "no conversation and no image": {"text": "A cat."},
    "a conversation of texts": {"conversations": ["What?", "A cat."]},
    "a later place": {"conversations": conversation("What?", "A cat.", "And <image>?", "A dog.")},
    "a place in a turn out of order": {"conversations": LLAVA[:1] * 2},
    "a list as value": {"conversations": conversation([{"type": "image"}], ANSWER)},
    "user in LLaVA's words": {"image": "a.png", "conversations": [{"from": "user", "value": QUESTION}, *LLAVA[1:]]},
    "human in the words of messages": {"images": ["a.png"], "messages": [{"role": "human", "content": QUESTION}]},
}  # fmt: skip

TEXT_ONLY = {
    "no key": {"conversations": conversation("Who?", "I.")},
    "null": {"image": None, "conversations": conversation("Who?", "I.")},
    "empty": {"images": [], "messages": chat("Who?", "I.")},
    "markup in an answer": {"conversations": conversation("Show SVG.", "<svg><image></svg>")},
    "numbers and captions": {
        "image_id": "000123", "image_size": [3, 4], "image_caption": "A cat, seen.", "video": None, "image_urls": [],
        "conversations": conversation("Who?", "I."),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in "ab":
        picture(ord(name)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def config_of(folder, *samples, **changes):
    file = folder / "data.json"
    good = {"id": "good", "image": "b.png", "conversations": conversation("<image>\nFine?", "Yes.")}
    file.write_text(json.dumps([good, *({"id": f"n{number}", **sample} for number, sample in enumerate(samples))]))
    return DataConfig(json=str(file), image_folder=str(folder / "images"), max_length=400, **changes)


def row_of(config, processor):
    row = dict(SftDataset(config, processor).rows[1])
    return {key: value for key, value in row.items() if key != "index"}


def test_every_way_that_is_read_gives_the_same_row(folder, processor):
    dataset = SftDataset(config_of(folder, *ONE_IMAGE.values()), processor)
    rows = [dict(dataset.rows[number], index=0, id="") for number in range(1, len(dataset))]
    assert len(rows) == len(ONE_IMAGE) and all(row == rows[0] for row in rows), list(ONE_IMAGE)
    assert rows[0]["images"] == ["a.png"] and rows[0]["spans"], "the answer is learned"
    written_so = sum("role" in str(sample) for sample in ONE_IMAGE.values())
    assert dataset.counts.chat_messages == written_so
    assert f"{written_so} written as role/content messages" in str(dataset.counts)
    report = check(config_of(folder, *ONE_IMAGE.values()), processor, SparsityConfig())
    assert report.errors == 0 and report.findings.counts["role/content messages"] == written_so


def test_several_images_and_turns_are_read_alike(folder, processor):
    llava = conversation("<image> and <image>, same?", "No.", "Is <image>?", "Yes.")
    asked = [parts({}), "No.", parts({}, text="Same?"), "Yes."]
    spoken = [{"role": "assistant" if n % 2 else "user", "content": content} for n, content in enumerate(asked)]
    dataset = SftDataset(
        config_of(
            folder,
            {"image": ["a.png", "b.png", "a.png"], "conversations": llava},
            {"images": ["a.png", "b.png"], "messages": spoken},
        ),
        processor,
    )
    assert [len(dataset[number]["pixel_values"]) for number in range(3)] == [1, 3, 2]
    assert dataset.rows[2]["images"] == ["a.png", "b.png"] and len(dataset[2]["spans"]) == 2


@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_a_system_text_replaces_the_usual_one(folder, processor, key):
    own = "Answer in one word."
    messages = chat(system=own) if key == "messages" else [{"from": "system", "value": own}, *LLAVA]
    sample = SftDataset(config_of(folder, {"image": "a.png", key: messages}), processor)[1]
    text = processor.decode(sample["input_ids"]).replace(" ", "")
    assert text.startswith(own.replace(" ", "")) and SYSTEM.replace(" ", "") not in text


@pytest.mark.parametrize("text_only", ["skip", "dense"])
@pytest.mark.parametrize("way", REFUSED)
def test_an_image_that_is_not_where_it_is_read_is_an_error(folder, processor, way, text_only):
    """Before any skip, whether text is left out or trained on, and whether broken images are left out or refused."""
    for broken in ("refuse", "skip"):
        config = config_of(folder, REFUSED[way], text_only=text_only, broken=broken)
        with pytest.raises(ValueError, match=r"1 of 2 samples cannot be used(.|\n)*index 1, id 'n0': "):
            SftDataset(config, processor)
        report = check(config, processor, SparsityConfig(), images="stat")
        assert report.errors and "training would fail" in str(report), str(report)


@pytest.mark.parametrize("way", TEXT_ONLY)
def test_what_is_text_stays_text(folder, processor, way):
    config = config_of(folder, TEXT_ONLY[way])
    assert SftDataset(config, processor).counts.text_only_skipped == 1
    assert check(config, processor, SparsityConfig()).findings.counts == {"text-only": 1}


@pytest.mark.parametrize(
    ("way", "advice"),
    [
        ("image_path", "1 <image> places in the questions; 'image_path' is not read: name images under 'image'"),
        ("video", "'video' is not read: name images under 'image', and leave out samples with a video"),
        ("both keys", "'image' and 'images' are both given and mean the same; keep one of them"),
        ("a dictionary", "'image' is {'path': 'a.png'}; give a path or a list of paths"),
        ("user in LLaVA's words", "message 0 is from 'user' where 'human' is due"),
        ("an image_url part", "message 0 has no text in 'content' but {'type': 'image_url'"),
        ("nested, without a place", "'content.image' is not read"),
    ],
)
def test_the_message_says_what_to_rename(folder, processor, way, advice):
    with pytest.raises(ValueError) as error:
        SftDataset(config_of(folder, REFUSED[way]), processor)
    assert advice in str(error.value)
