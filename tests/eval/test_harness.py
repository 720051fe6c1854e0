"""Chat messages as another harness has them, as prompts; and what an answer cost, as the class tells the harness."""

import pytest
import torch

from dynamic_llava.costs import decoder_shape
from dynamic_llava.eval.harness import Harness, chat_prompt
from dynamic_llava.eval.predict import QueryBatch, generate_answers
from dynamic_llava.processing.prompts import conversation_prompt
from tests.sft_builders import picture, tiny_processor, write_checkpoint

GREEDY = {"do_sample": False, "num_beams": 1, "max_new_tokens": 6}


def text(said):
    return {"type": "text", "text": said}


def image(seed=0):
    return {"type": "image", "url": picture(seed)}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.mark.parametrize(
    ("content", "written"),
    [
        ([image(), text("What?")], "<image>\nWhat?"),
        ([image(1), image(2), text("Which?")], "<image> <image>\nWhich?"),
        ([text("Which?")], "Which?"),
        ("Which?", "Which?"),
        ([image(), text("")], "<image>\n"),
        ([text("This"), image(1), text("or"), image(2), image(3), text("?")], "This\n<image>\nor\n<image> <image>\n?"),
        ([image(1), image(2), text("Between <image> and <image>?")], "Between <image> and <image>?"),
        ([image(1), text("This <image>"), text("well")], "This <image>\nwell"),
        ([image(1), text("<image>"), text("What?")], "<image>\nWhat?"),
    ],
)
def test_a_message_is_written_as_llava_was_taught(processor, content, written):
    prompt, images = chat_prompt(processor, [{"role": "user", "content": content}])
    assert prompt == conversation_prompt([(written, None)])
    assert len(images) == written.count("<image>")


def test_a_conversation_keeps_its_turns_system_text_and_order_of_images(processor):
    first, second = image(1), image(2)
    messages = [
        {"role": "system", "content": [text("Be brief.")]},
        {"role": "user", "content": [first, text("What?")]},
        {"role": "assistant", "content": [text("A cat.")]},
        {"role": "user", "content": [text("And"), second]},
    ]
    prompt, images = chat_prompt(processor, messages)
    assert prompt == conversation_prompt([("<image>\nWhat?", "A cat."), ("And\n<image>", None)], "Be brief.")
    assert images == [first["url"], second["url"]]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "type 'video'.*no video and no sound"),
        ([{"role": "user", "content": [{"type": "image", "url": 3}]}], "type 'image'.*Pillow images or files"),
        ([{"role": "user", "content": [image(), text("<image> <image>")]}], "2 <image> places for 1 images"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "last message is the assistant's"),
        ([{"role": "assistant", "content": "b"}], "message 0 has role 'assistant'"),
        ([{"content": "b"}], "message 0 is"),
        ([], "at least one message"),
        (None, "a conversation is a list of messages; a NoneType"),
    ],
)
def test_messages_that_have_no_answer_are_refused(processor, messages, message):
    with pytest.raises(ValueError, match=message):
        chat_prompt(processor, messages)


WINDOW = {"method": "dynamic", "method.output-window": "3", "method.output-threshold": "9"}


@pytest.mark.parametrize("switches", [{}, {"sparsity": "none"}, {"method": "h2o"}, WINDOW], ids=str)
def test_answers_and_their_bytes_are_those_of_generation_whatever_the_batch(tmp_path, switches):
    """The bytes of a row alone are those of its cache's filled slots."""
    harness = Harness()
    harness.open(str(write_checkpoint(tmp_path / "m")), torch.device("cpu"), "auto", None, switches, "nothing")
    messages = [
        [image(1), text("What is it?")],
        [text("How many legs has a spider?")],
        [image(2), image(3), text("Or")],
    ]
    pairs = [chat_prompt(harness.processor, [{"role": "user", "content": content}]) for content in messages]
    together = harness.answer(*zip(*pairs, strict=True), GREEDY, [0, 1, 2])
    alone = [harness.answer([prompt], [images], GREEDY, [key])[0] for key, (prompt, images) in enumerate(pairs)]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert [harness.cache_bytes(one) for one in together] == [one.cache_bytes for one in alone]
    shape = decoder_shape(harness.model.config)
    dense = [shape.layers * (one.prompt_tokens + len(one.tokens) - 1) * 2 * shape.kv_width * 4 for one in alone]
    assert switches != {"sparsity": "none"} or dense == [one.cache_bytes for one in alone]
    assert switches != WINDOW or [one.window_holds for one in together] == [3, 3, 3]
    inputs = harness.processor(text=[pairs[0][0]], images=[pairs[0][1]], padding_side="left")
    (own,) = generate_answers(
        harness.model,
        harness.processor,
        [QueryBatch((0,), inputs)],
        max_new_tokens=6,
        switches={"method": harness.method},
    )
    assert own == alone[0]
