"""Bases with a chat template and an end token of their own: used exactly, or refused by name."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamic_llava import DynamicLlavaProcessor
from dynamic_llava.processing.base_template import Ends, find_format
from dynamic_llava.processing.prompts import IGNORED_LABEL, VICUNA_V1, RenderingError
from tests.base_folders import IMAGE_SIZE, LLAVA_HF, PATCH, REFUSED, THINKS, USED, byte_tokenizer

WORDS = st.text(st.sampled_from("ab é猫🐱 .?\n'{}%"), min_size=1, max_size=12).filter(str.strip)
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def processors():
    return {name: processor_of(template, end) for name, (template, end) in USED.items()}


def processor_of(template, end, **options):
    return DynamicLlavaProcessor(byte_tokenizer(end, template), IMAGE_SIZE, PATCH, **options)


def rendered(processor, template, turns, asks=False):
    """Return transformers' own rendering of the base's template; without what it writes to ask when nobody asked."""
    in_parts = "p['type']" in template
    messages = []
    for question, answer in turns:
        for role, text in (("user", question), ("assistant", answer)):
            image = [{"type": "image"}] if text is not None and "<image>" in text else []
            said = [] if text is None else [*image, {"type": "text", "text": text.removeprefix("<image>\n")}]
            messages += [{"role": role, "content": said if in_parts else text}] if text is not None else []
    return processor.tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=asks
    )


@pytest.mark.parametrize("name", USED)
def test_the_text_is_what_the_template_writes(processors, name):
    template, processor = USED[name][0], processors[name]

    @given(TURNS)
    def check(turns):
        turns = [(f"<image>\n{turns[0][0]}", turns[0][1]), *turns[1:]]
        written = rendered(processor, template, turns)
        text = processor.conversation_prompt(turns)
        assert written == text or (name == "always asks" and written.startswith(text))
        asked = processor.conversation_prompt([*turns[:-1], (turns[-1][0], None)])
        assert text.startswith(asked)
        if name != "never asks":
            assert asked == rendered(processor, template, [*turns[:-1], (turns[-1][0], None)], asks=True)

    check()


@pytest.mark.parametrize("name", USED)
def test_labels_are_the_answers_and_the_base_own_end_token(processors, name):
    end, processor = USED[name][1], processors[name]
    tokenizer = processor.tokenizer
    turns = [("<image>\nWhat is it?", "a red circle 🐱"), ("And?", "猫"), ("Who?", "")]
    encoded = processor.encode_conversation(turns)
    said = [tokenizer.decode(encoded.input_ids[start:stop]) for start, stop in encoded.output_spans]
    assert [text.strip() for text in said] == [f"{answer}{' ' * (name == 'llama 2')}{end}" for _, answer in turns[:2]]
    learned = [label for label in encoded.labels if label != IGNORED_LABEL]
    assert learned.count(tokenizer.convert_tokens_to_ids(end)) == 2 and processor.end_token_id in learned
    assert encoded.input_ids.count(tokenizer.bos_token_id) == {"llama 2": 3}.get(name, 1)
    for number, (start, _) in enumerate(encoded.output_spans):
        prompt = processor.conversation_prompt([*turns[:number], (turns[number][0], None)])
        assert processor.encode_prompt(prompt) == encoded.input_ids[:start]
        if not number:
            asked = processor(text=prompt, images=[picture()])["input_ids"][0].tolist()
            assert asked == encoded.input_ids[:start], "generation is asked as training answers"


def picture():
    from PIL import Image

    return Image.new("RGB", (20, 30), "red")


@pytest.mark.parametrize("name", USED)
def test_chat_messages_and_a_saved_processor_keep_the_template(processors, name, tmp_path):
    template, processor = USED[name][0], processors[name]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == processor.conversation_prompt([("<image>\nWhat?", None)]) and processor.chat_template == template
    processor.save_pretrained(tmp_path)
    again = DynamicLlavaProcessor.from_pretrained(tmp_path)
    assert again.prompt_format == processor.prompt_format == pickle.loads(pickle.dumps(processor)).prompt_format
    answered = [*messages, {"role": "assistant", "content": "That."}]
    whole = again.apply_chat_template(answered)
    assert whole.startswith(text) and again.apply_chat_template(answered, continue_final_message=True) in whole
    if "raise_exception" not in template:
        system = again.apply_chat_template([{"role": "system", "content": "Be brief."}, *answered])
        assert "Be brief." in system
    else:
        with pytest.raises(ValueError, match="no place for a system message"):
            again.apply_chat_template([{"role": "system", "content": "Be brief."}, *answered])


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_by_name(name):
    template, end, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        processor_of(template, end)


@pytest.mark.parametrize("template", [None, LLAVA_HF, VICUNA_V1.template], ids=["none", "llava-hf", "saved"])
def test_llava_1_5_stays_vicuna_v1(template):
    assert processor_of(template, "</s>").prompt_format == VICUNA_V1


def test_words_that_a_template_treats_apart_are_refused_in_that_conversation_alone():
    processor = processor_of(THINKS, "<|im_end|>")
    assert "fine" in processor.conversation_prompt([("What?", "fine")])
    for call in (processor.conversation_prompt, processor.encode_conversation):
        with pytest.raises(RenderingError, match="in a way of its own"):
            call([("What?", "<think>hm</think>fine")])


def test_generation_stops_where_the_files_say():
    tokenizer = byte_tokenizer("<|eot_id|>", USED["chatml"][0])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert find_format(tokenizer, tokenizer.chat_template, Ends([1, end], "a file")).end_token == "<|im_end|>"
    with pytest.raises(ValueError, match=rf"token {end}, and generation stops at \[1\] \(a file\)"):
        find_format(tokenizer, tokenizer.chat_template, Ends([1], "a file"))
