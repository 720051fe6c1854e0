"""The word-level tokenizer: lossless on the world's text, indifferent to where a text is cut."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from dynamic_llava.processing.prompts import SYSTEM, conversation_prompt
from dynamic_llava.tiny.base.sequences import SPECIAL, build_tokenizer
from dynamic_llava.tiny.world.scenes import sample_scene
from dynamic_llava.tiny.world.texts import KINDS, REQUESTS, STYLES, ask, describe


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer([SYSTEM, "USER: ASSISTANT:"])


def world_texts():
    rng = np.random.default_rng(11)
    for _ in range(100):
        scene = sample_scene(rng)
        yield from (describe(scene, style).text for style in STYLES)
        for question in filter(None, (ask(scene, kind, rng) for kind in KINDS)):
            yield question.text
            yield question.answer
    yield from (request for requests in REQUESTS.values() for request in requests)
    yield SYSTEM


def test_world_text_round_trips_without_unknown_words(tokenizer):
    for text in world_texts():
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids) == text


def test_special_tokens_have_fixed_ids(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("red").input_ids == [1, *tokenizer("red", add_special_tokens=False).input_ids]
    assert tokenizer("unheard").input_ids[-1] == tokenizer.unk_token_id


def test_a_text_may_be_cut_at_images_answers_and_roles(tokenizer):
    turns = [("<image>\nHow many objects are there?", "two"), ("What color is the ring?", "red")]
    text = conversation_prompt(turns)
    whole = tokenizer(text, add_special_tokens=False).input_ids
    for cut in ("<image>", "</s>", " ASSISTANT:", " USER:"):
        at = text.index(cut)
        pieces = [tokenizer(part, add_special_tokens=False).input_ids for part in (text[:at], text[at:])]
        assert pieces[0] + pieces[1] == whole, cut


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = conversation_prompt([("<image>\nDescribe the image in detail.", "The image shows one object.")])
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)
    assert loaded.padding_side == "left"


def test_the_vocabulary_is_a_function_of_the_prompt_texts():
    first, second = (build_tokenizer([SYSTEM, "USER: ASSISTANT:"]).get_vocab() for _ in range(2))
    assert first == second
    assert set(build_tokenizer([]).get_vocab()) < set(first)
