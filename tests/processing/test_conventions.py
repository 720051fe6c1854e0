"""The processor is called as transformers' own LlavaProcessor is: equal results, or the argument is named."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import BatchFeature, LlavaProcessor

from dynamic_llava import DynamicLlavaProcessor
from dynamic_llava.processing import DynamicLlavaImageProcessor
from dynamic_llava.processing.images import load_image
from dynamic_llava.processing.prompts import ImageCutError
from tests.sft_builders import tiny_processor
from tests.tiny_pipeline import write_checkpoint

PROMPT = "USER: <image>\nHi ASSISTANT:"
TWO = [PROMPT, f"{PROMPT} a longer one"]


@pytest.fixture(scope="module")
def ours():
    return tiny_processor()


@pytest.fixture(scope="module")
def stock(ours, tmp_path_factory):
    """Return transformers' own processor over the same tokenizer, on the pixels of ours (tests/parity holds those)."""
    folder = tmp_path_factory.mktemp("stock")
    ours.save_pretrained(folder)
    for name in ("processor_config.json", "tokenizer_config.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, "processor_class": "LlavaProcessor"}))
    return LlavaProcessor.from_pretrained(folder)


def picture(seed=0, size=(60, 40)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


ARRAY = np.asarray(picture())
SAME = {
    "by name": ((), {"images": picture(), "text": PROMPT}),
    "by place": ((picture(), PROMPT), {}),
    "lists by place": (([picture()], [PROMPT]), {}),
    "numpy": ((), {"images": picture(), "text": PROMPT, "return_tensors": "np"}),
    "longest": ((), {"images": [picture(), picture(1)], "text": TWO, "padding": "longest"}),
    "right": ((), {"images": [picture(), picture(1)], "text": TWO, "padding": True, "padding_side": "right"}),
    "max_length": ((), {"images": picture(), "text": PROMPT, "padding": "max_length", "max_length": 80}),
    "multiple": ((), {"images": picture(), "text": PROMPT, "padding": True, "pad_to_multiple_of": 8}),
    "no start token": ((), {"images": picture(), "text": PROMPT, "add_special_tokens": False}),
    "a collator's call": (
        (), {"images": [[picture()]], "text": [PROMPT], "padding": True, "padding_side": "right",
             "add_special_tokens": False},
    ),
    "text_kwargs": (
        (), {"images": picture(), "text": PROMPT, "text_kwargs": {"padding": "max_length", "max_length": 90}},
    ),
    "images_kwargs": ((), {"images": picture(), "text": PROMPT, "images_kwargs": {"do_rescale": True}}),
    "common_kwargs": ((), {"images": picture(), "text": PROMPT, "common_kwargs": {"return_tensors": "np"}}),
    "truncation": ((), {"images": picture(), "text": PROMPT, "truncation": True, "max_length": 512}),
    "text is cut": ((), {"text": "a b c d e f g h i", "truncation": True, "max_length": 5}),
    "max_length alone": ((), {"text": "a b c d e f g h i", "max_length": 5}),
    "array": ((), {"images": ARRAY, "text": PROMPT}),
    "channels first": ((), {"images": ARRAY.transpose(2, 0, 1), "text": PROMPT}),
    "tensor": ((), {"images": torch.tensor(ARRAY).permute(2, 0, 1), "text": PROMPT}),
    "arrays": ((), {"images": [ARRAY, ARRAY], "text": [PROMPT, PROMPT]}),
    "nested": ((), {"images": [[picture()], [picture(1)]], "text": [PROMPT, PROMPT]}),
    "no attention mask": ((), {"text": "ab", "return_attention_mask": False}),
    "kinds of tokens": ((), {"images": picture(), "text": PROMPT, "return_mm_token_type_ids": True}),
    "text alone": ((), {"text": ["ab", "ab"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_a_call_gives_what_transformers_gives(ours, stock, name):
    given, arguments = SAME[name]
    tensors = {} if name == "common_kwargs" or "return_tensors" in arguments else {"return_tensors": "pt"}
    expected, found = stock(*given, **arguments, **tensors), ours(*given, **arguments, **tensors)
    assert isinstance(found, BatchFeature) and set(found) == set(expected)
    for key, value in expected.items():
        assert type(found[key]) is type(value), key
        assert np.array_equal(np.asarray(found[key]), np.asarray(value)), key


def test_lists_come_where_no_tensors_are_asked_for(ours, stock):
    arguments = {"images": [picture(), picture(1)], "text": TWO, "return_tensors": None, "padding": False}
    expected, found = stock(**arguments), ours(**arguments)
    assert found["input_ids"] == expected["input_ids"] and found["attention_mask"] == expected["attention_mask"]
    assert isinstance(found["pixel_values"], list) and np.array_equal(found["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("order", [(PROMPT, "file"), ("file", PROMPT)])
def test_a_text_and_a_file_name_are_told_apart_in_both_orders(ours, tmp_path, order):
    picture().save(tmp_path / "0.png")
    given = [str(tmp_path / "0.png") if one == "file" else one for one in order]
    assert torch.equal(ours(*given)["pixel_values"], ours(images=picture(), text=PROMPT)["pixel_values"])


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


KINDS = {
    "array": ARRAY,
    "tensor": torch.tensor(ARRAY),
    "channels first": ARRAY.transpose(2, 0, 1),
    "bytes": png(picture()),
    "data address": f"data:image/png;base64,{base64.b64encode(png(picture())).decode()}",
    "with alpha": np.dstack([ARRAY, ARRAY[..., 0]]),
}


@pytest.mark.parametrize("name", KINDS)
def test_an_image_of_any_kind_has_the_pixels_of_the_picture(ours, name):
    expected = ours(images=picture(), text=PROMPT)["pixel_values"]
    assert torch.equal(ours(images=KINDS[name], text=PROMPT)["pixel_values"], expected)
    assert torch.equal(ours(images=[[KINDS[name]]], text=[PROMPT])["pixel_values"], expected)
    assert torch.equal(ours.image_processor(KINDS[name])["pixel_values"], expected)
    chat = [{"role": "user", "content": [{"type": "image", "image": KINDS[name]}, {"type": "text", "text": "Hi"}]}]
    inputs = ours.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="np", padding=True)
    assert np.array_equal(inputs["pixel_values"], expected.numpy())


REFUSED = {
    "truncation through an image": (
        {"images": picture(), "text": PROMPT, "truncation": True, "max_length": 9}, "max_length=9",
    ),
    "an unknown argument": ({"text": "a", "truncatoin": True}, "truncatoin=True"),
    "another preparation": ({"images": picture(), "text": PROMPT, "do_rescale": False}, "do_rescale=False"),
    "another size": ({"images": picture(), "text": PROMPT, "size": {"shortest_edge": 7}}, "size="),
    "in images_kwargs": (
        {"images": picture(), "text": PROMPT, "images_kwargs": {"do_normalize": False}}, "do_normalize",
    ),
    "offsets": ({"text": "a", "return_offsets_mapping": True}, "return_offsets_mapping=True"),
    "a second text": ({"text": "a", "text_pair": "b"}, "text_pair='b'"),
    "videos": ({"text": "a", "videos": [ARRAY]}, "videos was given"),
    "padding": ({"text": "a", "padding": "all"}, "padding"),
    "max_length": ({"text": "a", "max_length": -1}, "max_length"),
    "text_kwargs": ({"text": "a", "text_kwargs": 3}, "text_kwargs is of type int"),
    "twice": ({"text": "a", "padding": True, "text_kwargs": {"padding": True}}, "padding"),
    "tensors": ({"text": "a", "return_tensors": "tf"}, "return_tensors='tf'"),
    "ragged": ({"text": ["a", "a b"], "padding": False}, "return_tensors=None"),
    "words": ({"text": [["a", "b"]]}, "text is of type list"),
    "a number": ({"text": 3}, "text is of type int"),
    "floats": ({"images": np.zeros((4, 4, 3)), "text": PROMPT}, "array of float64"),
    "no image": ({"images": [None], "text": PROMPT}, "NoneType is no image"),
    "a number for an image": ({"images": 5, "text": PROMPT}, "images are of type int"),
    "a dict": ({"images": [{"bytes": b""}], "text": PROMPT}, "dict is no image"),
    "mixed": ({"images": [[picture()], picture()], "text": TWO}, "beside lists of images"),
    "a shape": ({"images": np.zeros((5, 4, 7), np.uint8), "text": PROMPT}, "shape"),
    "bytes of nothing": ({"images": b"xx", "text": PROMPT}, "no image that Pillow can read"),
    "a bad address": ({"images": "data:image/png;base64,?", "text": PROMPT}, "base64"),
    "half a letter": ({"text": "a\ud800"}, "cannot be encoded"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_made_is_refused_by_the_name_of_the_argument(ours, name):
    arguments, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        ours(**arguments)


def test_the_ways_out_that_refusals_name(ours):
    long = {"images": picture(), "text": PROMPT, "truncation": True, "max_length": 9}
    with pytest.raises(ImageCutError):
        ours(**long)
    for change in ({"max_length": None}, {"truncation": False}):
        assert ours(**long | change)["input_ids"].shape == ours(images=picture(), text=PROMPT)["input_ids"].shape
    unit = torch.rand(3, 5, 6)
    assert ours(images=(unit * 255).round().to(torch.uint8), text=PROMPT)["pixel_values"].shape[0] == 1
    assert [len(row) for row in ours(text=["a", "a b"], padding=False, return_tensors=None)["input_ids"]] == [2, 4]


def test_assistant_tokens_are_marked(ours):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "That."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "This one."},
    ]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True, "return_tensors": "pt"}
    inputs = ours.apply_chat_template([messages, messages[:2]], **options)
    turns = [("<image>\nWhat?", "That."), ("And?", "This one.")]
    for row, said in enumerate((turns, turns[:1])):
        labels = ours.encode_conversation(said).labels
        marked = inputs["assistant_masks"][row][inputs["attention_mask"][row].bool()]
        assert marked.tolist() == [int(label != -100) for label in labels]
    assert inputs["assistant_masks"].shape == inputs["input_ids"].shape
    with pytest.raises(ValueError, match="return_assistant_tokens_mask needs"):
        ours.apply_chat_template(messages, return_assistant_tokens_mask=True)


def test_what_tools_ask_a_processor_for(ours, stock):
    assert set(ours.get_attributes()) == set(stock.get_attributes())
    assert set(ours.model_input_names) == set(stock.model_input_names)
    assert ours._get_num_multimodal_tokens(image_sizes=[(9, 9), (70, 20)]) == stock._get_num_multimodal_tokens(
        image_sizes=[(9, 9), (70, 20)]
    )
    assert (ours.image_token, ours.image_token_id, ours.patch_size) == (
        stock.image_token, stock.image_token_id, stock.patch_size,
    )  # fmt: skip
    assert ours.vision_feature_select_strategy == stock.vision_feature_select_strategy
    assert ours.num_additional_image_tokens == stock.num_additional_image_tokens
    assert ours.image_processor.crop_size["height"] == stock.image_processor.crop_size["height"]
    assert dict(ours.image_processor.size)["shortest_edge"] == stock.image_processor.size["shortest_edge"]


def test_an_image_processor_comes_back_from_its_file(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    again = DynamicLlavaImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == ours.image_processor.to_dict()


def test_files_have_the_same_pixels_through_a_pipeline(tmp_path):
    """Turned by EXIF or of 16 bits: a chat's files are opened by the processor, which ignores EXIF as LLaVA does."""
    from transformers import pipeline
    from transformers.pipelines.image_text_to_text import Chat

    folder = write_checkpoint(tmp_path / "model", seed=0)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray((np.arange(600, dtype=np.uint16) * 109).reshape(20, 30)).save(tmp_path / "deep.png")
    processor = DynamicLlavaProcessor.from_pretrained(folder)
    pipe = pipeline("image-text-to-text", model=str(folder))
    for name in ("turned.jpg", "deep.png"):
        path = str(tmp_path / name)
        expected = processor.preprocess_images([load_image(path)])
        for source in ({"path": path}, {"url": path}, {"image": path}):
            chat = [{"role": "user", "content": [{"type": "image", **source}, {"type": "text", "text": "What?"}]}]
            assert torch.equal(pipe.preprocess(Chat(chat))["pixel_values"], expected.to(pipe.dtype))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3) | st.binary(max_size=2)
    | st.sampled_from(["user", "assistant", "system", "text", "image", "image_url", "<image>"])
    | st.sampled_from(["\ud800", "\0", "x" * 300]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "image", "path", "url", "image_url"]), inner),
    max_leaves=8,
)  # fmt: skip
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]) | JSON, "content": JSON})
CALLS = st.dictionaries(
    st.sampled_from(
        ["images", "text", "padding", "padding_side", "truncation", "max_length", "return_tensors", "text_kwargs",
         "images_kwargs", "common_kwargs", "pad_to_multiple_of", "size", "do_rescale", "image_mean", "videos", "stride"]
    ),
    JSON,
    max_size=4,
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=300)
@given(st.lists(MESSAGE, max_size=3) | JSON, st.booleans(), CALLS)
def test_no_structure_of_messages_or_arguments_ends_in_another_error(conversation, tokenize, arguments):
    processor = fuzzed()
    calls = (
        lambda: processor.apply_chat_template(conversation, tokenize=tokenize, return_dict=tokenize),
        lambda: processor(**arguments),
        lambda: processor(images=conversation, text=PROMPT),
        lambda: processor.image_processor(conversation),
    )
    for call in calls:
        try:
            call()
        except (ValueError, FileNotFoundError) as error:
            assert str(error)


def fuzzed(kept=[]):  # noqa: B006
    return kept[0] if kept else kept.append(tiny_processor()) or kept[0]


@pytest.mark.slow
@settings(max_examples=40)
@given(data=st.data())
def test_no_settings_file_ends_in_another_error(data, tmp_path_factory):
    folder = saved_folder(tmp_path_factory)
    files = sorted(path.name for path in folder.glob("*.json"))
    name = data.draw(st.sampled_from(files))
    kept = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(damaged(data, kept))
        for load in (DynamicLlavaProcessor, DynamicLlavaImageProcessor):
            try:
                load.from_pretrained(folder)
            except (ValueError, OSError) as error:
                assert load is DynamicLlavaImageProcessor or str(folder) in str(error) or name in str(error), error
    finally:
        (folder / name).write_bytes(kept)


def saved_folder(factory, kept=[]):  # noqa: B006
    if not kept:
        kept.append(factory.mktemp("saved") / "model")
        write_checkpoint(kept[0], seed=0)
    return kept[0]


def damaged(data, content):
    """Return the bytes of a JSON file with one value replaced, or cut off, or of another kind."""
    if data.draw(st.booleans()):
        values = json.loads(content)
        target = values
        while True:
            key = data.draw(st.sampled_from(sorted(target)))
            if not isinstance(target[key], dict) or not target[key] or data.draw(st.booleans()):
                break
            target = target[key]
        target[key] = data.draw(JSON.filter(is_json))
        return json.dumps(values).encode()
    cut = data.draw(st.integers(0, len(content)))
    return data.draw(st.sampled_from([content[:cut], b"\xff" + content, b"[]", b"3", b"null", b""]))


def is_json(value):
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
