"""lmms-eval's requests in our words; needs no lmms-eval."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamic_llava.eval.lmms.requests import (
    MAX_NEW_TOKENS,
    cut_answer,
    plan_batches,
    read_generation,
    request_prompt,
)
from dynamic_llava.processing.prompts import conversation_prompt, image_places
from tests.eval.lmms.toy_data import QUESTIONS

GREEDY = {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS, "num_beams": 1, "repetition_penalty": 1.0}


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"do_sample": False},
        {"temperature": 0},
        {"temperature": 0.0, "do_sample": True, "top_p": 0.9},
        {"temperature": 0.7, "do_sample": False, "top_p": 1.0, "top_k": 5},
        {"temperature": None, "top_p": None, "num_beams": None, "until": None},
        {"image_aspect_ratio": "original", "until": ["ASSISTANT:"]},
    ],
)
def test_greedy_unless_a_positive_temperature_is_asked_for(asked):
    assert read_generation(asked).settings == GREEDY


def test_sampling_means_what_the_task_says_and_nothing_of_the_checkpoint():
    assert read_generation({"temperature": 0.7}).settings == {
        **GREEDY,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
    }
    asked = {
        "do_sample": True,
        "top_p": 0.5,
        "top_k": 7,
        "max_new_tokens": 3,
        "num_beams": 2,
        "repetition_penalty": 1.1,
    }
    assert read_generation(asked).settings == {**asked, "temperature": 1.0}


@pytest.mark.parametrize("name", ["max_gen_toks", "stop_sequences", "seed", "visual_cot"])
def test_a_setting_that_nothing_would_read_is_refused(name):
    with pytest.raises(ValueError, match=rf"\['{name}'\].*max_new_tokens"):
        read_generation({"max_new_tokens": 4, name: 1})


@pytest.mark.parametrize(
    "until, stops",
    [
        (None, ()),
        ([], ()),
        ([None], ()),
        (["\n\n"], ()),
        ("\n\n", ()),
        ("\n", ("\n",)),
        (["ASSISTANT:"], ("ASSISTANT:",)),
        (["Q:", "\n\n", "</s>"], ("Q:", "</s>")),
    ],
)
def test_until_without_the_blank_line(until, stops):
    assert read_generation({"until": until}).stops == stops


@pytest.mark.parametrize("until", [5 * ("",), [3], ["a", ""], ""])
def test_until_that_is_no_text_is_refused(until):
    with pytest.raises(ValueError, match="until="):
        read_generation({"until": until})


def test_what_the_task_asked_for_is_left_as_it_was():
    asked = {"until": ["a"], "temperature": 0.5, "max_new_tokens": 4}
    read_generation(asked)
    assert asked == {"until": ["a"], "temperature": 0.5, "max_new_tokens": 4}


@given(st.text("ab .\n", max_size=20), st.lists(st.text("ab\n", min_size=1, max_size=2), max_size=3))
def test_an_answer_ends_before_the_first_stop(text, stops):
    answer = cut_answer(text, stops)
    assert answer == answer.strip()
    assert text.lstrip().startswith(answer)
    assert not any(stop in answer for stop in stops)
    if not any(stop in text for stop in stops):
        assert answer == text.strip()


@pytest.mark.parametrize("images, question, text", QUESTIONS)
def test_images_come_first_unless_the_context_places_them(images, question, text):
    prompt = request_prompt(question, images)
    assert prompt == conversation_prompt([(text, None)])
    assert image_places(prompt) == images


@pytest.mark.parametrize("context, images", [("<image> a", 0), ("<image> a", 2), ("<image><image> a", 1)])
def test_places_that_do_not_fit_the_images_are_refused(context, images):
    with pytest.raises(ValueError, match=rf"for {images} images"):
        request_prompt(context, images)


@given(
    st.lists(st.tuples(st.text("x", max_size=9), st.sampled_from([4, 8, None])), max_size=20),
    st.integers(1, 6),
)
def test_batches_hold_every_request_once_with_one_setting_each(rows, size):
    requests = [SimpleNamespace(args=(context, {"max_new_tokens": limit})) for context, limit in rows]
    batches = plan_batches(requests, size)
    chats = [SimpleNamespace(args=(context, print, {"max_new_tokens": limit})) for context, limit in rows]
    assert plan_batches(chats, size, settings_at=2) == batches
    assert sorted(place for batch in batches for place in batch) == list(range(len(rows)))
    for batch in batches:
        assert 1 <= len(batch) <= size
        assert len({rows[place][1] for place in batch}) == 1
        lengths = [len(rows[place][0]) for place in batch]
        assert lengths == sorted(lengths, reverse=True)
    for limit in {limit for _, limit in rows}:
        count = sum(limit == other for _, other in rows)
        assert sum(rows[batch[0]][1] == limit for batch in batches) == -(-count // size), "more batches than needed"
