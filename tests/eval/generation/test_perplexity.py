"""One masked pass equals the cached loop, token by token, for ragged batches of one and several rounds; their speed."""

import json
import math
from dataclasses import replace

import pytest
import torch

from dynamic_llava.config import SPARSITY_MODES
from dynamic_llava.eval.generation.dialogues import EncodedRound, encode_dialogue
from dynamic_llava.eval.generation.perplexity import measure_ppl_speed, score_dialogues, score_step_by_step, write_speed
from dynamic_llava.methods import get_method
from dynamic_llava.model import AdmissionCache
from dynamic_llava.processing.prompts import SYSTEM
from tests.builders import (
    BOS,
    EOS,
    IMAGE_SIZE,
    IMAGE_TOKEN,
    TOKENS_PER_IMAGE,
    build_model,
    deciding,
    shared_model,
    words,
)
from tests.sft_builders import character_tokenizer
from tests.test_architecture import ROOT

IMAGE_KEPT = {
    "both": 4, "image": 4, "divprune": 3, "fastv": 8, "pyramiddrop": 2, "random": 3, "structure": 3, "tome": 8,
}  # fmt: skip
"""Image tokens that the settings of the tests' model, and the defaults of the others, leave of 16."""
HOW = (*SPARSITY_MODES, *(how for how in IMAGE_KEPT if how not in SPARSITY_MODES))
SINGLE = [[(5, 30)], [(2, 1)], [(9, 12)]]
SEVERAL = [[(4, 9), (3, 20), (6, 1)], [(7, 25)], [(2, 3), (5, 14)], [(3, 1), (2, 1), (2, 6), (4, 8)]]
"""Text tokens of a question and tokens of its answer, `</s>` included, by row and round."""


def dialogues(shape, seed=0):
    """Return rows of random rounds, the image behind the first token, and its pixels (B, 3, S, S)."""
    generator = torch.Generator().manual_seed(seed)

    def encoded(number, question, answer):
        start = [BOS, *[IMAGE_TOKEN] * TOKENS_PER_IMAGE] if number == 0 else []
        ids = words(question + answer - 1, generator).tolist()
        return EncodedRound(start + ids[:question], [*ids[question:], EOS])

    rows = [[encoded(number, *sizes) for number, sizes in enumerate(row)] for row in shape]
    return rows, torch.randn(len(rows), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def assert_same(one_pass, loop):
    for ours, reference in zip(one_pass, loop, strict=True):
        assert ours.perplexities == pytest.approx(reference.perplexities, rel=1e-4)
        assert (ours.image_seen, ours.output_seen) == (reference.image_seen, reference.output_seen)
        assert ours.text_seen == reference.text_seen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("shape", [SINGLE, SEVERAL], ids=["single", "several rounds"])
def test_one_pass_equals_the_cached_loop(shape, how, attention):
    model = shared_model(attention=attention)
    rows, pixels = dialogues(shape)
    one_pass = score_dialogues(model, rows, pixels, deciding(how))
    assert_same(one_pass, score_step_by_step(model, rows, pixels, deciding(how)))
    fed = [sum(len(one.answer) - 1 for one in row) for row in rows]
    if how in ("both", "output", "random", "structure"):
        assert 0 < sum(one.output_seen[-1] for one in one_pass) < sum(fed)
    else:
        assert [one.output_seen[-1] for one in one_pass] == fed
    assert {one.image_seen[-1] for one in one_pass} == {IMAGE_KEPT.get(how, TOKENS_PER_IMAGE)}


@pytest.mark.parametrize("shape", [SINGLE, [[(4, 9), (5, 1), (6, 2)], [(7, 5)]]], ids=["single", "an answer is empty"])
def test_dropped_tokens_of_questions_are_counted(shape):
    """The last token of each question stays, although nothing stands between it and the next where no answer is fed."""
    model = build_model(prompt_keep_rate=0.7)
    rows, pixels = dialogues(shape)
    method = deciding("both", model.config.sparsity)
    loop = score_step_by_step(model, rows, pixels, method)
    one_pass = score_dialogues(model, rows, pixels, method)
    assert_same(one_pass, loop)
    below = model.config.sparsity.sparse_layer
    for row, sizes, one in zip(rows, shape, loop, strict=True):
        every = 1 + sizes[0][0], 1 + sum(question for question, _ in sizes)
        for seen, text in zip(one.text_seen, every, strict=True):
            assert set(seen[:below]) == {text} and len(set(seen[below:])) == 1 and seen[-1] <= text
        assert sum(one.text_seen[1]) >= sum(one.text_seen[0]) and one.text_seen[1][-1] > len(row)
    assert any(one.text_seen[1][-1] < one.text_seen[1][0] for one in loop)


@pytest.mark.parametrize("shape", [SINGLE, SEVERAL], ids=["single", "several rounds"])
def test_one_pass_with_a_window_equals_the_cached_loop(shape):
    model, plain = shared_model(), deciding("both")
    method = replace(plain, output_window=3, output_sinks=1)
    rows, pixels = dialogues(shape)
    one_pass = score_dialogues(model, rows, pixels, method)
    assert_same(one_pass, score_step_by_step(model, rows, pixels, method))
    without = score_dialogues(model, rows, pixels, plain)
    assert all(one.output_seen[-1] >= other.output_seen[-1] for one, other in zip(one_pass, without, strict=True))
    assert [one.perplexities for one in one_pass] != [one.perplexities for one in without]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_one_pass_equals_the_cached_loop_on_random_dialogues(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    shape = [[(draw(2, 12), draw(1, 40)) for _ in range(draw(1, 6))] for _ in range(draw(1, 5))]
    rows, pixels = dialogues(shape, seed)
    model = shared_model(kv_heads=(2, 4)[seed % 2])
    for how in HOW:
        asked = model, rows, pixels, deciding(how)
        assert_same(score_dialogues(*asked), score_step_by_step(*asked))


@pytest.mark.parametrize("how", HOW)
def test_a_row_does_not_depend_on_its_batch(how):
    rows, pixels = dialogues(SEVERAL)
    model, method = shared_model(), deciding(how)
    together = score_dialogues(model, rows, pixels, method)
    alone = [score_dialogues(model, [row], pixels[i : i + 1], method)[0] for i, row in enumerate(rows)]
    assert_same(together, alone)


def test_the_perplexity_is_that_of_the_training_loss():
    """A single round is what the model's training loss measures."""
    model = shared_model()
    rows, pixels = dialogues([[(5, 17)]])
    one = rows[0][0]
    ids = torch.tensor([one.prompt + one.answer])
    labels = ids.clone()
    labels[:, : len(one.prompt)] = -100
    for how in HOW:
        with torch.no_grad():
            loss = model(input_ids=ids, pixel_values=pixels, labels=labels, method=deciding(how)).lm_loss
        scored = score_dialogues(model, rows, pixels, deciding(how))
        assert scored[0].perplexities == pytest.approx([math.exp(loss)], rel=1e-5)


def test_the_end_token_is_scored_and_never_fed():
    """Another last label changes the perplexity of its own round alone; a token that is fed changes later rounds."""
    rows, pixels = dialogues([[(4, 6), (3, 8)]])
    first, second = rows[0]
    before = score_dialogues(shared_model(), rows, pixels, deciding("none"))[0].perplexities
    other_end = [[EncodedRound(first.prompt, [*first.answer[:-1], 7]), second]]
    after = score_dialogues(shared_model(), other_end, pixels, deciding("none"))[0].perplexities
    assert after[0] != pytest.approx(before[0]) and after[1] == pytest.approx(before[1])
    other_token = [[EncodedRound(first.prompt, [*first.answer[:-2], 7, EOS]), second]]
    fed_other = score_dialogues(shared_model(), other_token, pixels, deciding("none"))[0].perplexities
    assert fed_other[1] != pytest.approx(before[1])


def test_separators():
    tokenizer = character_tokenizer()
    rounds = [("First?", " One. "), ("Second?", " Two. ")]

    def text(ids):
        return "".join(tokenizer.convert_ids_to_tokens(ids))

    official = encode_dialogue(tokenizer, rounds, 2, IMAGE_TOKEN)
    assert text(official[0].prompt) == f"<s>{SYSTEM} USER: <image><image>\nFirst? ASSISTANT:"
    assert text(official[0].answer) == "One.</s>"  # the first answer is stripped, later ones are not
    assert text(official[1].prompt) == "USER:Second?ASSISTANT:"
    assert text(official[1].answer) == " Two. </s>"
    template = encode_dialogue(tokenizer, rounds, 2, IMAGE_TOKEN, "template")
    assert template[0] == official[0] and template[1].answer == official[1].answer
    assert text(template[1].prompt) == "</s>USER: Second? ASSISTANT:"


def test_a_tokenizer_without_the_end_token_is_refused():
    tokenizer = character_tokenizer()
    tokenizer.eos_token = "<pad>"
    with pytest.raises(ValueError, match="becomes token 2, not the end token 0"):
        encode_dialogue(tokenizer, [("Q?", "A.")], 2, IMAGE_TOKEN)


def test_an_attention_without_masks_of_its_own_is_refused():
    model = build_model()
    rows, pixels = dialogues([[(2, 3)]])
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' cannot decode on an admission cache, nor score answers"):
        score_dialogues(model, rows, pixels, deciding("both"))


TIMES = 8


@pytest.mark.slow
def test_one_pass_is_at_least_eight_times_faster_and_equal(tmp_path):
    found = measure_ppl_speed(repeats=3)
    assert found.difference < 1e-4
    assert found.ratio >= TIMES, found.describe()
    written = json.loads(write_speed(found, tmp_path / "speed.json").read_text())
    assert written["ratio"] == found.ratio and written["environment"]["torch"]


def test_the_committed_measurement():
    written = json.loads((ROOT / "docs" / "results" / "ppl_speed.json").read_text())
    sizes = {"hidden": 256, "layers": 8, "image_tokens": 576, "answer_tokens": 256, "batch": 1}
    assert written["sizes"].items() >= sizes.items() and written["device"] == "cpu"
    assert written["ratio"] == pytest.approx(written["loop_s"] / written["one_pass_s"]) and written["ratio"] >= TIMES
    assert abs(written["perplexity"] / written["loop_perplexity"] - 1) < 1e-4
    assert {"seed", "date", "environment"} <= set(written)


def test_no_repeats_is_refused():
    with pytest.raises(ValueError, match="repeats=0 is not possible"):
        measure_ppl_speed(repeats=0)


EVICTING = {
    "h2o": {"heavy_rate": 0.2, "recent_rate": 0.2}, "knorm": {}, "random_window": {}, "snapkv": {"window": 3},
    "streaming_llm": {"window": 9}, "tova": {"keep_rate": 0.4},
}  # fmt: skip
KEEPS_ALL = {
    "knorm": {"keep_rate": 1.0}, "streaming_llm": {"window": 1000}, "tova": {"keep_rate": 1.0, "shares_of": "tokens"},
}  # fmt: skip


@pytest.mark.parametrize("name", KEEPS_ALL)
def test_a_method_that_could_evict_and_keeps_all_scores_as_dense(name):
    """Token by token on a cache of its own, and what the heads hold is every token that was fed."""
    model = shared_model()
    rows, pixels = dialogues(SEVERAL)
    dense = score_dialogues(model, rows, pixels, get_method("dense"))
    found = score_dialogues(model, rows, pixels, get_method(name, **KEEPS_ALL[name]))
    text = model.config.text_config
    heads = text.num_hidden_layers * text.num_key_value_heads
    assert_same(found, dense)
    for row, one in zip(rows, found, strict=True):
        fed = sum(len(its.prompt) + len(its.answer) - 1 for its in row)
        assert one.heads_hold == (heads * len(row[0].prompt), heads * fed)
    assert {one.heads_hold for one in dense} == {None}


@torch.no_grad()
@pytest.mark.parametrize("name", EVICTING)
def test_evicting_perplexity_is_that_of_steps_on_a_cache(name):
    """Each row alone, a call for the prompt and one for each token of its answer, on a cache made by hand."""
    model, method = shared_model(), get_method(name, **EVICTING[name])
    rows, pixels = dialogues(SINGLE)
    found = score_dialogues(model, rows, pixels, method)
    for (row,), pixel, one in zip(rows, pixels, found, strict=True):
        cache = AdmissionCache.for_method(method, model.config.text_config.num_hidden_layers, 8)
        nll, opened = [], None
        for said, token in enumerate(row.answer):
            ids = row.prompt if said == 0 else row.answer[said - 1 : said]
            fed = len(row.prompt) + said
            output = torch.arange(fed)[None] >= len(row.prompt)
            more = {"pixel_values": pixel[None]} if said == 0 else {}
            logits = model(
                input_ids=torch.tensor([ids]), cache=cache, use_cache=True, method=method, output_mask=output, **more
            ).logits
            opened = int(cache.head_lengths().sum()) if opened is None else opened
            nll.append(-torch.log_softmax(logits[0, -1].double(), -1)[token].item())
        assert one.perplexities[0] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
        assert one.heads_hold == (opened, int(cache.head_lengths().sum()))


@pytest.mark.parametrize("name", EVICTING)
def test_a_dialogue_under_eviction_is_scored_as_alone(name):
    """Ragged rows of several rounds; rows that have ended keep what they hold."""
    model, method = shared_model(), get_method(name, **EVICTING[name])
    rows, pixels = dialogues(SEVERAL)
    for place, one in enumerate(score_dialogues(model, rows, pixels, method)):
        (alone,) = score_dialogues(model, rows[place : place + 1], pixels[place : place + 1], method)
        assert_same([one], [alone])
        assert one.heads_hold == alone.heads_hold
