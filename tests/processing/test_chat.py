"""Chat messages: vicuna_v1's text whatever way it is made, images in their places, batches, and the pipeline."""

import json

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import LlavaProcessor, PreTrainedTokenizerFast, pipeline

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.processing.prompts import CHAT_TEMPLATE, SYSTEM, conversation_prompt
from tests.sft_builders import picture, tiny_processor, write_checkpoint

IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def user(*content):
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def assistant(words):
    return {"role": "assistant", "content": words}


# messages, then the turns that they stand for, and the system text
CHATS = {
    "text": ([user("What?")], [("What?", None)], SYSTEM),
    "image before text": ([user(IMAGE, text("What?"))], [("<image>\nWhat?", None)], SYSTEM),
    "image after text": ([user(text("What?"), IMAGE)], [("What?\n<image>", None)], SYSTEM),
    "two images": ([user(IMAGE, IMAGE, text("Which?"))], [("<image>\n<image>\nWhich?", None)], SYSTEM),
    "between": ([user(text("Is"), IMAGE, text("red?"))], [("Is\n<image>\nred?", None)], SYSTEM),
    "several turns": (
        [user(IMAGE, text("What?")), assistant("A ring."), user("Sure?"), assistant([text("Yes.")]), user("Why?")],
        [("<image>\nWhat?", "A ring."), ("Sure?", "Yes."), ("Why?", None)],
        SYSTEM,
    ),
    "answered": ([user("What?"), assistant("It's <a> \"ring\".")], [("What?", "It's <a> \"ring\".")], SYSTEM),
    "system": ([{"role": "system", "content": "Be short."}, user("What?")], [("What?", None)], "Be short."),
    "system parts": ([{"role": "system", "content": [text("a"), text("b")]}, user(IMAGE)], [("<image>", None)], "a\nb"),
    "other letters": ([user(" Größe: 3 m²\n{{ x }} 🐱 ")], [(" Größe: 3 m²\n{{ x }} 🐱 ", None)], SYSTEM),
}  # fmt: skip


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize(("messages", "turns", "system"), CHATS.values(), ids=CHATS)
def test_the_text_is_vicuna_v1(processor, messages, turns, system):
    asks = turns[-1][1] is None
    expected = conversation_prompt(turns, system)
    assert processor.apply_chat_template(messages, add_generation_prompt=asks) == expected
    if asks:
        assert processor.apply_chat_template(messages) + "ASSISTANT:" == expected
    else:
        assert processor.apply_chat_template(messages, continue_final_message=True) + "</s>" == expected


@pytest.mark.parametrize(("messages", "turns", "system"), CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("asks", [False, True])
def test_the_saved_template_renders_the_same_text(processor, folder, messages, turns, system, asks):
    """Other tools read chat_template.jinja: transformers' own processor, and any jinja with transformers' settings."""
    if asks and turns[-1][1] is not None:
        pytest.skip("an answered conversation asks for nothing")
    expected = processor.apply_chat_template(messages, add_generation_prompt=asks)
    saved = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    assert saved == CHAT_TEMPLATE == processor.chat_template
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    assert environment.from_string(saved).render(messages=messages, add_generation_prompt=asks) == expected
    theirs = LlavaProcessor.from_pretrained(folder)
    assert theirs.apply_chat_template(messages, add_generation_prompt=asks) == expected


def test_images_come_from_wherever_a_message_names_them(processor, tmp_path):
    first, second, third = picture(0), picture(1, (30, 70)), picture(2)
    second.save(tmp_path / "b.png")
    third.save(tmp_path / "c.png")
    messages = [
        user({"type": "image", "image": first}, {"type": "image", "path": tmp_path / "b.png"}, text("Which?")),
        assistant("One."),
        user({"type": "image", "url": str(tmp_path / "c.png")}, text("And?")),
    ]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    turns = [("<image>\n<image>\nWhich?", "One."), ("<image>\nAnd?", None)]
    expected = processor(conversation_prompt(turns), [first, second, third])
    assert set(inputs) == set(expected)
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    ids = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    assert torch.equal(ids, expected["input_ids"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_rows(processor, side):
    chats = [
        [user({"type": "image", "image": picture(0)}, text("What?"))],
        [user("What is it all about?")],
        [user({"type": "image", "image": picture(1)}, {"type": "image", "image": picture(2)})],
    ]
    call = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    batch = processor.apply_chat_template(chats, **call, padding_side=side, return_tensors="pt")
    assert processor.apply_chat_template(chats, add_generation_prompt=True) == [
        processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats
    ]
    alone = [processor.apply_chat_template(chat, **call) for chat in chats]
    for row, one in enumerate(alone):
        assert torch.equal(batch["input_ids"][row][batch["attention_mask"][row].bool()], one["input_ids"][0])
    assert torch.equal(
        batch["pixel_values"], torch.cat([one["pixel_values"] for one in alone if "pixel_values" in one])
    )
    assert "pixel_values" not in alone[1]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ([assistant("Hello.")], "message 0 has role 'assistant' where 'user' belongs"),
        ([user("a"), user("b")], "message 1 has role 'user' where 'assistant' belongs"),
        ([user("a"), {"role": "system", "content": "b"}], "message 1 has role 'system' where 'assistant'"),
        ([{"role": "system", "content": "a"}], "a system message alone"),
        ([{"role": "tool", "content": "a"}], "message 0 has role 'tool'; choose"),
        ([{"role": "user"}], "a message is a dict with 'role' and 'content'"),
        (["x" * 5000], r"message 0 is 'x{1,60}\.\.\.x{1,60}'; a message is a dict"),
        ([{"role": "user", "content": 3}], "content of type int"),
        ([user({"type": "video", "path": "a.mp4"})], "message 0 holds .*a.mp4"),
        ([user({"type": "text"})], "message 0 holds"),
        ([user({"type": "image", "image": "a.png", "path": "b.png"})], r"by \['image', 'path'\]; give one of"),
        ([user({"type": "image", "base64": "aaaa"})], r"by \['base64'\]"),
        ([user("a"), assistant([IMAGE])], "message 1 of role 'assistant' holds an image"),
        ([{"role": "system", "content": [IMAGE]}, user("a")], "message 0 of role 'system' holds an image"),
    ],
)
def test_messages_without_a_place_in_vicuna_v1_are_named(processor, messages, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(messages)


def test_wrong_requests_are_named(processor):
    open_chat, answered = [user("a")], [user("a"), assistant("b")]
    call = processor.apply_chat_template
    with pytest.raises(ValueError, match="add_generation_prompt=True asks for an answer"):
        call(answered, add_generation_prompt=True)
    with pytest.raises(ValueError, match="continue_final_message=True goes on with an answer"):
        call(open_chat, continue_final_message=True)
    with pytest.raises(ValueError, match="exclude each other"):
        call(answered, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(ValueError, match="chat_template is fixed"):
        call(open_chat, chat_template="{{ messages }}")
    with pytest.raises(ValueError, match="no use without tokenize=True"):
        call(open_chat, return_dict=True)
    with pytest.raises(ValueError, match="1 images of conversation 0 are named nowhere"):
        call([user(IMAGE, text("a"))], tokenize=True)
    with pytest.raises(ValueError, match="do not match the <image> places"):
        call([user("<image> written by hand")], tokenize=True)
    with pytest.raises(ValueError, match="is a web address, and nothing is downloaded"):
        call([user({"type": "image", "url": "https://example.org/a.png"})], tokenize=True)
    with pytest.raises(FileNotFoundError, match=r"there is no image file nowhere\.png"):
        call([user({"type": "image", "path": "nowhere.png"})], tokenize=True)
    with pytest.raises(AttributeError):
        processor.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match="padding=False, but the rows have"):
        processor(["a", "abc"], padding=False)


def test_plain_text_and_chat_give_the_same_inputs(processor):
    """tokenize=False and the call after it are the two halves of tokenize=True."""
    messages = [user({"type": "image", "image": picture()}, text("What?"))]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    whole = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    halves = processor(text=prompt, images=picture())
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_the_image_processor_stands_alone(processor, folder):
    alone = processor.image_processor(picture(size=(90, 30)))
    assert torch.equal(alone["pixel_values"], processor(images=picture(size=(90, 30)))["pixel_values"])
    theirs = LlavaProcessor.from_pretrained(folder).image_processor(picture(size=(90, 30)), return_tensors="pt")
    assert torch.equal(alone["pixel_values"], theirs["pixel_values"])


def test_a_saved_processor_is_whole(folder, tmp_path):
    """Every file comes back the same, also from the folder of the processor alone."""
    loaded = DynamicLlavaProcessor.from_pretrained(folder)
    loaded.save_pretrained(tmp_path)
    assert loaded.tokenizer.padding_side == "left"
    again = DynamicLlavaProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == loaded.to_dict() and again.image_processor.to_dict() == loaded.image_processor.to_dict()
    for name in ("processor_config.json", "preprocessor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"] == "DynamicLlavaProcessor"
    assert isinstance(again.tokenizer, PreTrainedTokenizerFast)


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("image-text-to-text", model=str(folder))


QUESTIONS = [("What is it?", 0), ("Is there a red ring, or is there none?", 1)]
CALL = {"max_new_tokens": 8, "do_sample": False}


def asked(question, seed):
    return [user({"type": "image", "image": picture(seed)}, text(question))]


def test_the_pipeline_answers_as_generate_does(pipe, folder, caplog):
    assert isinstance(pipe.model, DynamicLlavaForConditionalGeneration)
    assert isinstance(pipe.processor, DynamicLlavaProcessor)
    assert "not supported" not in caplog.text
    inputs = pipe.processor.apply_chat_template(
        asked(*QUESTIONS[0]), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    sequence = pipe.model.generate(**inputs, **CALL)
    by_hand = pipe.processor.decode(sequence[0, inputs["input_ids"].shape[1] :])
    answer = pipe(text=asked(*QUESTIONS[0]), generate_kwargs=CALL, return_full_text=False)
    assert answer[0]["generated_text"].strip() == by_hand.strip() != ""
    assert pipe(text=asked(*QUESTIONS[0]), generate_kwargs=CALL, return_full_text=False) == answer, "no chance in it"
    whole = pipe(text=asked(*QUESTIONS[0]), generate_kwargs=CALL)[0]["generated_text"]
    assert whole[-1] == {"role": "assistant", "content": answer[0]["generated_text"]}
    ids = pipe(text=asked(*QUESTIONS[0]), generate_kwargs=CALL, return_tensors=True)[0]["generated_token_ids"]
    assert torch.equal(ids, sequence[0])
    dense = pipe(text=asked(*QUESTIONS[0]), generate_kwargs=CALL | {"sparsity": "none"}, return_tensors=True)
    assert not torch.equal(dense[0]["generated_token_ids"], ids), "switches reach the model"


def test_the_pipeline_answers_batches_as_single_chats(pipe):
    chats = [asked(*question) for question in QUESTIONS]
    single = [pipe(text=chat, generate_kwargs=CALL, return_full_text=False)[0]["generated_text"] for chat in chats]
    for batch_size in (1, 2):
        answers = pipe(text=chats, generate_kwargs=CALL, return_full_text=False, batch_size=batch_size)
        assert [answer[0]["generated_text"] for answer in answers] == single


def test_the_pipeline_goes_on_with_an_answer_and_takes_plain_text(pipe):
    begun = [*asked(*QUESTIONS[0]), assistant("It is")]
    inputs = pipe.processor.apply_chat_template(begun, continue_final_message=True, tokenize=True, return_dict=True)
    sequence = pipe.model.generate(**inputs, **CALL)
    ids = pipe(text=begun, generate_kwargs=CALL, return_tensors=True)[0]["generated_token_ids"]
    assert torch.equal(ids, sequence[0])
    prompts = [f"USER: <image>\n{question} ASSISTANT:" for question, _ in QUESTIONS]
    images = [picture(seed) for _, seed in QUESTIONS]
    rows = pipe(images=images, text=prompts, generate_kwargs=CALL, return_tensors=True)
    expected = pipe.model.generate(**pipe.processor(text=prompts, images=images), **CALL)
    assert torch.equal(torch.stack([row["generated_token_ids"] for row in rows]), expected)
