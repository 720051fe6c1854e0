"""A conversation on a kept cache is the conversation computed from scratch, turn by turn, and documented as it is."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from dynamic_llava import Conversation, DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor
from dynamic_llava.config.calibration import threshold_at
from dynamic_llava.model.margins import calibration_of, margins_of
from dynamic_llava.processing.prompts import conversation_prompt
from dynamic_llava.tiny import BASE_WEIGHTS
from dynamic_llava.tiny.world.scenes import sample_pictures

DOC = Path(__file__).resolve().parents[2] / "docs" / "chat.md"
SPARSITIES = ("both", "image", "output", "none")
TURNS = [
    ("Describe the image in detail.", 1, 12),
    ("How many objects are there?", 0, 12),
    ("What color is the circle?", 1, 1),
    ("Describe the image in detail.", 0, 9),
]
"""Question, new images, and after how many tokens the answer is stopped, unless it ends before."""


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = DynamicLlavaForConditionalGeneration.from_pretrained(BASE_WEIGHTS).eval()
    _, pictures = sample_pictures(3, (9,))
    images = [Image.fromarray(picture.pixels) for picture in pictures]
    return model, DynamicLlavaProcessor.from_pretrained(BASE_WEIGHTS), images


def said(tiny, sparsity, turns=TURNS, **options):
    """Return the conversation after `turns`, its answers, its images, and per turn the tokens before the answer."""
    model, processor, images = tiny
    chat, answers, shown, begun = Conversation(model, processor, sparsity=sparsity, **options), [], [], []
    for question, new, most in turns:
        steps = []
        given = images[len(shown) : len(shown) + new]
        answers.append(
            chat.ask(question, given, on_step=steps.append, stop=lambda steps=steps, most=most: len(steps) >= most)
        )
        shown += given
        assert [step.token for step in steps] == answers[-1].tokens
        assert [step.kept for step in steps] == [None, *answers[-1].kept]
        assert steps[-1].use == answers[-1].use
        begun.append(chat.ids.shape[1] - len(steps))
    return chat, answers, shown, begun


@pytest.mark.parametrize("sparsity", SPARSITIES)
@torch.no_grad()
def test_every_turn_is_what_a_recomputation_says(tiny, sparsity):
    model, processor, _ = tiny
    chat, answers, shown, begun = said(tiny, sparsity)
    pixels, image_token = processor.preprocess_images(shown), model.config.image_token_id
    for start, answer in zip(begun, answers, strict=True):
        ids = chat.ids[:, :start]
        images = int((ids == image_token).sum()) // processor.tokens_per_image
        scratch = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), output_mask=chat.output_mask[:, :start],
            pixel_values=pixels[:images], sparsity=sparsity, use_cache=False, do_sample=False,
            max_new_tokens=len(answer.tokens),
        )  # fmt: skip
        assert scratch[0, start:].tolist() == answer.tokens
    assert {answer.ended for answer in answers} == {"end", "stopped"}


@pytest.mark.parametrize("sparsity", SPARSITIES[:3])
@torch.no_grad()
def test_the_record_is_that_of_one_masked_forward(tiny, sparsity):
    model, processor, _ = tiny
    chat, answers, shown, begun = said(tiny, sparsity)
    fed = chat.ids[:, :-1]
    masked = model(
        input_ids=fed, output_mask=chat.output_mask[:, :-1], pixel_values=processor.preprocess_images(shown),
        labels=fed, sparsity=sparsity,
    ).sparsity  # fmt: skip
    keep = chat.record.keep_mask[0]
    assert torch.equal(keep, masked.keep_mask[0].bool())
    for start, answer in zip(begun, answers, strict=True):
        assert answer.kept == keep[start : start + len(answer.tokens) - 1].tolist()
    if "image" not in sparsity:
        assert 0 < keep[masked.layout.output[0]].float().mean() < 1


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_cache_is_counted_as_it_is(tiny, sparsity):
    model = tiny[0]
    chat, answers, _, _ = said(tiny, sparsity)
    use, text = answers[-1].use, model.config.text_config
    per_token = 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * 4
    low, layers = model.config.sparsity.sparse_layer, text.num_hidden_layers
    assert use.dense_tokens == chat.ids.shape[1] - 1
    assert use.bytes == per_token * (low * use.dense_tokens + (layers - low) * use.sparse_tokens)
    assert use.dense_bytes == per_token * layers * use.dense_tokens
    if sparsity == "none":
        assert use.sparse_tokens == use.dense_tokens == chat.cache.get_seq_length()
        assert str(use) == f"cache: {use.bytes / 2**20:.1f} MiB, {use.dense_tokens} tokens in every layer"
        return
    assert use.sparse_tokens == int(chat.record.cache_lengths) == int(chat.cache.sparse.lengths)
    assert use.bytes <= chat.cache.allocated_bytes()
    assert str(use).endswith(f" %), {use.sparse_tokens} of {use.dense_tokens} tokens in sparse layers")


@pytest.fixture
def calibrated(tiny, monkeypatch):
    """The model's settings with the quantiles of margins on a conversation of its own."""
    model, processor, _ = tiny
    chat, _, shown, _ = said(tiny, "none")
    batch = {
        "input_ids": chat.ids, "attention_mask": torch.ones_like(chat.ids), "output_mask": chat.output_mask,
        "pixel_values": processor.preprocess_images(shown),
    }  # fmt: skip
    sparsity = replace(model.config.sparsity, calibration=calibration_of(margins_of(model, [batch], 1)))
    monkeypatch.setattr(model.config, "sparsity", sparsity)
    return sparsity


def test_a_budget_of_bytes_chooses_the_threshold_of_each_turn(tiny, calibrated, monkeypatch):
    """By what the cache holds before a turn, counted here; the conversation outlives a turn that has no room."""
    model, processor, images = tiny
    text, longest, asked = model.config.text_config, 20, []
    one = 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * 4
    low, above = model.config.sparsity.sparse_layer, text.num_hidden_layers - model.config.sparsity.sparse_layer
    chat = Conversation(model, processor, kv_budget=500_000, max_new_tokens=longest)
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: [asked.append(given["method"]), generate(**given)][1])

    def expected(question, new):
        live = chat.cache.is_live
        dense, sparse = (int(chat.cache.dense.lengths), int(chat.cache.sparse.lengths)) if live else (0, 0)
        fed = chat._new_tokens(question)[0].shape[1] + chat.ids.shape[1] - dense
        kept = fed - new * (64 - int(0.2 * 64))
        left = chat.kv_budget / one - low * (dense + fed + longest - 1) - above * (sparse + kept)
        return left / above / (longest - 1)

    rates = []
    for question, new, budget in (("Describe the image in detail.", 1, 500_000), ("What color is it?", 0, 630_000)):
        chat.kv_budget = budget
        rates.append(expected("\n".join([*["<image>"] * new, question]), new))
        chat.ask(question, images[:new])
        threshold = threshold_at(calibrated.calibration["output"], min(1.0, rates[-1]))
        assert asked[-1].output_threshold == pytest.approx(threshold, abs=1e-9)
    assert all(0 < rate < 1 for rate in rates) and rates[0] != rates[1]
    before = chat.ids, list(chat.turns)
    chat.kv_budget = 1000
    with pytest.raises(ValueError, match="kv_budget=1000 is 1,000 bytes, and the longest row takes"):
        chat.ask("And now?")
    assert (chat.ids, chat.turns) == before
    chat.kv_budget = None
    assert chat.ask("And now?").tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "this checkpoint has not been calibrated"),
        ({"kv_budget": "much"}, "'much' is no number of bytes"),
        ({"sparsity": "image"}, "this call decides by none"),
        ({"method": "fastv"}, "kv_budget means nothing to method 'fastv'"),
    ],
)
def test_a_budget_that_chooses_nothing_is_refused_at_once(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        Conversation(*tiny[:2], **{"kv_budget": "1MiB", **options})


def test_the_tokens_are_those_of_training(tiny):
    """Questions are tokenised as in a training sample; answers that were cut off are closed like all others."""
    processor = tiny[1]
    chat, _, _, _ = said(tiny, "none")
    sample = processor.encode_conversation(chat.turns)
    assert [*chat.ids[0].tolist(), processor.tokenizer.eos_token_id] == sample.input_ids
    answer = torch.zeros(len(sample.input_ids), dtype=torch.bool)
    for start, end in sample.output_spans:
        answer[start:end] = True
    assert torch.equal(chat.output_mask[0], answer[:-1])


def test_sampling_follows_the_seed(tiny):
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(said(tiny, "both", TURNS[:1], temperature=1.5)[1][0].text)
    assert texts[0] == texts[1] != texts[2]


def test_an_answer_ends_at_max_new_tokens_or_where_the_context_does(tiny, monkeypatch):
    model, processor, images = tiny
    chat = Conversation(model, processor, max_new_tokens=3)
    answer = chat.ask("Describe the image in detail.", images[:1])
    assert (answer.ended, len(answer.tokens)) == ("length", 3)
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", chat.ids.shape[1] + 12)
    answer = chat.ask("Describe the image in detail.")
    assert (answer.ended, chat.ids.shape[1]) == ("length", model.config.text_config.max_position_embeddings)
    with pytest.raises(ValueError, match="begin a new one"):
        chat.ask("And now?")
    chat.reset()
    assert chat.ask("Describe the image in detail.").text


@pytest.mark.parametrize(
    ("question", "images", "error", "message"),
    [
        ("<image>\nWhat?", 0, ValueError, "give the images as `images`"),
        (" \n", 0, ValueError, "question is empty"),
        ("What?", "no.png", FileNotFoundError, "no image file no.png"),
    ],
)
def test_a_mistake_leaves_the_conversation_as_it_was(tiny, question, images, error, message):
    chat = said(tiny, "both", TURNS[:1])[0]
    before = chat.ids.clone(), chat.cache.seen_tokens
    with pytest.raises(error, match=message):
        chat.ask(question, [images] if images else [])
    assert torch.equal(chat.ids, before[0]) and chat.cache.seen_tokens == before[1]


def test_an_image_that_comes_too_late_for_the_method_leaves_the_conversation_as_it_was(tiny):
    model, processor, images = tiny
    chat = Conversation(model, processor, method="fastv")
    chat.ask("How many objects are there?", images[:1], stop=lambda: True)
    before, turns = chat.ids.clone(), list(chat.turns)
    for late in (lambda: chat.ask("And here?", images[1:2]), chat.check_later_images):
        with pytest.raises(ValueError, match="'fastv' decides by the row's first question"):
            late()
    assert torch.equal(chat.ids, before) and chat.turns == turns
    assert chat.ask("And in words?", stop=lambda: True).tokens and len(chat.turns) == 2


def test_an_error_in_the_middle_begins_anew(tiny):
    chat = said(tiny, "both", TURNS[:1])[0]

    def fail(step):
        raise RuntimeError("out of paper")

    with pytest.raises(RuntimeError, match="out of paper"):
        chat.ask("How many objects are there?", on_step=fail)
    assert chat.turns == [] and chat.record is None and chat.ids.shape == (1, 0)
    again = chat.ask("Describe the image in detail.", tiny[2][:1], stop=lambda: True)
    assert again.tokens == said(tiny, "both", TURNS[:1])[1][0].tokens[:1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": "all"}, "sparsity='all'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0 is negative"),
    ],
)
def test_impossible_settings_are_refused(tiny, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Conversation(*tiny[:2], **settings)


def blocks():
    return re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)


@torch.no_grad()
def test_the_documented_example_is_a_full_recomputation(tiny, capsys):
    """The very code of docs/chat.md, and its three answers without a cache."""
    model, processor, images = tiny
    scope = {"model": model, "processor": processor, "image": images[0], "another": images[1]}
    exec(blocks()[0], scope)
    chat = scope["chat"]
    assert len([line for line in blocks()[0].splitlines() if line.startswith(("chat", "print"))]) == 5
    answers = [answer for _, answer in chat.turns]
    assert capsys.readouterr().out.startswith("\n".join([*answers, "SparsityRecord of 1 x"]))
    for number, answer in enumerate(answers):
        turns = [*chat.turns[:number], (chat.turns[number][0], None)]
        inputs = processor(text=conversation_prompt(turns), images=images[: 1 + (number == 2)])
        output = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        for start, end in processor.encode_conversation(chat.turns[:number]).output_spans if number else ():
            output[0, start:end] = True
        scratch = model.generate(**inputs, output_mask=output, use_cache=False, max_new_tokens=40, do_sample=False)
        assert processor.decode(scratch[0, inputs["input_ids"].shape[1] :]).strip() == answer


@torch.no_grad()
def test_the_documented_generate_calls_are_the_conversation(tiny):
    model, processor, images = tiny
    scope = {"model": model, "processor": processor, "image": images[0], "another": images[1]}
    for code in blocks():
        exec(code, scope)
    chat = Conversation(model, processor, max_new_tokens=40)
    chat.ask("Describe the image in detail.", images[:1])
    chat.ask("How many objects are there?")
    assert torch.equal(scope["two"].sequences, chat.ids)
    assert torch.equal(scope["two"].sparsity.keep_mask, chat.record.keep_mask)
    assert scope["row"].cache_length == int(chat.record.cache_lengths)
