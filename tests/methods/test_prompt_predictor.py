"""The predictor of prompt tokens (Table 9): what a question is, decisions on every path, loss, costs, checkpoint."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.config import DataConfig, ModelConfig, SparsityConfig, TrainConfig
from dynamic_llava.costs import kv_bytes, llava_shape, prefill_flops, training_flops
from dynamic_llava.engine.decide import asked_by, decided_tokens
from dynamic_llava.engine.learned import learned_costs
from dynamic_llava.eval.efficiency import Counted, mean_kv_bytes, prefill_costs
from dynamic_llava.eval.identity import LATER, method_settings
from dynamic_llava.layout import TokenLayout, run_lengths, without_last
from dynamic_llava.methods import Dynamic, get_method, print_method, read_method
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.run import run
from tests.builders import (
    HIDDEN,
    IMAGE_TOKEN,
    TINY_SPARSITY,
    assert_same_logits,
    build_model,
    collate,
    make_row,
    prompts,
    tiny_config,
    unpad,
)
from tests.sft_builders import write_checkpoint, write_data

SETTINGS = {"prompt_keep_rate": 0.7, "prompt_min_length": 3}
CALL = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
PARTS = ["image_predictor", "output_predictor", "prompt_predictor"]
LAYER = TINY_SPARSITY.sparse_layer
TURNS = [
    [("text", 3), ("image", 0), ("text", 9), ("output", 5), ("text", 6), ("output", 4)],
    [("text", 7), ("output", 3), ("text", 5), ("output", 6)],
    [("image", 0), ("text", 4), ("image", 0), ("text", 1), ("output", 4), ("text", 8), ("output", 2)],
]


@pytest.fixture(scope="module")
def model():
    """A model whose prompt predictor keeps about half; nothing may write to it."""
    return build_model(2, **SETTINGS)


def without_decisions(batch, side="right"):
    return {name: value for name, value in collate(batch, side).items() if name != "keep_mask"}


def asked_in(row):
    """What is decided on, token by token: plain prompt behind an image, whose next token is plain prompt too."""
    plain = [not (output or token == IMAGE_TOKEN) for token, output in zip(row.ids.tolist(), row.output, strict=True)]
    first = row.ids.tolist().index(IMAGE_TOKEN) if IMAGE_TOKEN in row.ids.tolist() else len(plain)
    return [n > first and plain[n] and n + 1 < len(plain) and plain[n + 1] for n in range(len(plain))]


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_decided_on(side):
    rows = [make_row(turns, seed) for seed, turns in enumerate(TURNS)]
    inputs = collate(rows, side)
    image = inputs["input_ids"] == IMAGE_TOKEN
    layout = TokenLayout.build(image, inputs["attention_mask"], inputs["output_mask"], 16)
    found = unpad(without_last(layout.questions()), inputs["attention_mask"])
    assert [row.tolist() for row in found] == [asked_in(row) for row in rows]
    assert any(map(any, (row.tolist() for row in found))) and not found[1].any(), "a row without an image keeps all"
    later = without_last(layout.questions(seen_images=torch.tensor([0, 1, 0])))
    assert unpad(later, inputs["attention_mask"])[1].sum() == (1 + 7 - 1) + (5 - 1)


def test_training_decides_on_long_questions_behind_the_last_earlier_answer():
    row = make_row([("image", 0), ("text", 6), ("output", 3), ("text", 5), ("output", 4)], 0)
    labels = torch.where(row.output, row.ids, -100)[None]
    last = torch.zeros_like(labels, dtype=torch.bool)
    last[:, -4:] = True
    layout = TokenLayout.build(row.ids[None] == IMAGE_TOKEN, None, last, 16)
    asked = asked_by(labels, last)
    start = len(row.ids) - 4 - 5
    assert asked[0].tolist() == [n >= start for n in range(len(row.ids))]
    for least, many in ((5, 4), (6, 0)):
        settings = replace(TINY_SPARSITY, prompt_keep_rate=0.7, prompt_min_length=least)
        decided = decided_tokens(layout, settings, asked, prompt=True)
        assert (decided & layout.output).equal(last)
        assert (decided & layout.prompt).sum() == many and not decided[0, start + 4]
    assert run_lengths(layout.questions(among=asked))[0, start] == 5
    every = asked_by(labels, row.output[None])
    assert every.all(), "where all answers are output, all questions are decided on"


@torch.no_grad()
def margins_of(model, hidden_ND):
    """The prompt predictor, step by step."""
    net = model.model.language_model.prompt_predictor
    x = net.down[0](hidden_ND) @ net.down[1].weight.T + net.down[1].bias
    for linear in (net.head[0], net.head[2], net.head[4]):
        x = torch.nn.functional.gelu(x) @ linear.weight.T + linear.bias
    return x[:, 1] - x[:, 0]


@torch.no_grad()
def test_decisions_are_the_sign_of_its_logits(model):
    for seed, turns in enumerate(TURNS):
        row = make_row(turns, seed)
        inputs = without_decisions([row])
        out = model(**inputs, labels=inputs["input_ids"], output_hidden_states=True)
        margin = margins_of(model, out.hidden_states[LAYER][0])
        asked = torch.tensor(asked_in(row))
        wanted = torch.where(asked, margin > 0, True)
        plain = ~(row.output | (row.ids == IMAGE_TOKEN))
        assert out.sparsity.keep_mask[0][plain].bool().equal(wanted[plain])
        assert out.sparsity.sparsified_prompt[0].equal(asked) and not out.sparsity.sparsified_output[0][plain].any()
        assert out.sparsity.until[0][plain].equal(torch.where(wanted, 6, LAYER)[plain])
        dropped = (~wanted).sum()
        assert (dropped > 0) == bool(asked.any()) and dropped < max(asked.sum(), 1)
        assert ("prompt tokens" in repr(out.sparsity).split("row 0: ")[1]) == bool(dropped)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_dropping_equals_masking_and_a_row_alone(model, side):
    rows = [make_row(turns[:-1], seed) for seed, turns in enumerate(TURNS)]
    inputs = without_decisions(rows, side)
    masked = model(**inputs, labels=inputs["input_ids"])
    dropped = model(**inputs, use_cache=True)
    present = dropped.sparsity.keep_mask
    assert present.equal(masked.sparsity.keep_mask.bool())
    assert_same_logits(dropped.logits[present], masked.logits[present])
    assert dropped.sparsity.cache_lengths.equal(present.sum(1)) and (present.sum(1) < present.shape[1]).any()
    for index, row in enumerate(rows):
        alone = model(**without_decisions([row]), use_cache=False)
        assert alone.sparsity.keep_mask[0].equal(unpad(present, inputs["attention_mask"])[index])
        kept = alone.sparsity.keep_mask[0]
        found = unpad(dropped.logits, inputs["attention_mask"])[index]
        assert_same_logits(found[kept], alone.logits[0][kept])


@torch.no_grad()
def test_cached_decoding_equals_decoding_without_a_cache(model):
    batch = prompts([make_row(turns[:-1], seed) for seed, turns in enumerate(TURNS)])
    cached, uncached = model.generate(**batch, **CALL), model.generate(**batch, **CALL, use_cache=False)
    image_alone = model.generate(**batch, **CALL, sparsity="image")
    assert cached.sequences.equal(uncached.sequences)
    assert_same_logits(torch.stack(cached.logits), torch.stack(uncached.logits))
    assert cached.sparsity.keep_mask.equal(uncached.sparsity.keep_mask)
    plain = cached.sparsity.layout.prompt
    assert (plain & ~cached.sparsity.keep_mask).any()
    assert not (plain & ~image_alone.sparsity.keep_mask).any(), "image alone leaves prompt tokens alone"


@torch.no_grad()
def test_mixed_decides_on_questions_as_its_method_of_images_does(model):
    batch = prompts([make_row(turns[:-1], seed) for seed, turns in enumerate(TURNS)])
    alone, settings = model(**batch, use_cache=True).sparsity, model.config.sparsity
    without = {"name": "dynamic", "prompt_threshold": None}
    for image_by, same in (("dynamic", True), (without, False), (None, False)):
        mixed = {"name": "mixed", "image_by": image_by, "output_by": {"name": "random", "output_keep_rate": 0.5}}
        record = model(**batch, use_cache=True, method=mixed).sparsity
        asked = record.layout.prompt & ~alone.keep_mask
        assert asked.any() and (~record.keep_mask[asked]).all() == same and record.keep_mask[asked].any() != same
        assert not (record.layout.prompt & alone.keep_mask & ~record.keep_mask).any()
        assert read_method(print_method(read_method(mixed, settings)), settings) == read_method(mixed, settings)


def test_answers_of_before_are_of_the_same_settings(model):
    """Where no prompt token is dropped, answers do not depend on the threshold, and their record has no word of it."""
    plain, own = SparsityConfig(), model.config.sparsity
    half = Dynamic(image_keep_rate=0.5)
    assert method_settings(half, plain)["method"] == {
        name: value for name, value in print_method(half).items() if name not in LATER
    }
    mixed = get_method("mixed", image_by=half)
    assert "prompt_threshold" not in method_settings(mixed, plain)["method"]["image_by"]
    assert method_settings(Dynamic.from_config(own), own) == {"sparsity": "both"}
    assert method_settings(replace(Dynamic.from_config(own), prompt_threshold=1.0), own)["method"]["prompt_threshold"]


@torch.no_grad()
def test_turns_on_a_live_cache_equal_the_whole_conversation(model):
    """The second turn's question is decided on too, although its image is in the cache."""
    rows = [make_row(turns, seed) for seed, turns in enumerate(TURNS)]
    for row in rows:
        inputs = without_decisions([row])
        whole = model(**inputs, labels=inputs["input_ids"])
        output = row.output.int()
        ends = [int(n) + 1 for n in ((output[:-1] - output[1:]) == 1).nonzero()] + [len(row.ids)]
        cache, start = None, 0
        for end in ends:
            part = {name: value[:, start:end] for name, value in inputs.items() if name in ("input_ids", "output_mask")}
            pixels = inputs["pixel_values"] if start == 0 else None
            out = model(**part, pixel_values=pixels, cache=cache, use_cache=True)
            cache, kept = out.cache, out.sparsity.keep_mask[0]
            assert_same_logits(out.logits[0][kept], whole.logits[0, start:end][kept])
            start = end
        assert cache.record.keep_mask.equal(whole.sparsity.keep_mask.bool())
        assert out.sparsity.cache_lengths[0] == whole.sparsity.keep_mask.sum()


def test_training_samples_it_and_aims_at_its_rate(model):
    learner = DynamicLlavaForConditionalGeneration(tiny_config(**SETTINGS)).train()
    rows = [make_row(turns, seed) for seed, turns in enumerate(TURNS)]
    inputs = without_decisions(rows)
    labels = inputs["input_ids"].masked_fill(~inputs["output_mask"], -100)
    out = learner(**inputs, labels=labels, sample_key=torch.arange(3), tau=0.7)
    record = out.sparsity
    where = record.sparsified_prompt
    assert unpad(where, inputs["attention_mask"])[0].tolist() == asked_in(rows[0])
    rates = [record.keep_mask[b][where[b]].mean() if where[b].any() else None for b in range(3)]
    expected = sum((rate - 0.7) ** 2 for rate in rates if rate is not None) / 3
    torch.testing.assert_close(out.method_losses["prompt_keep_loss"], expected)
    torch.testing.assert_close(out.loss, out.lm_loss + 100 * sum(out.method_losses.values()))
    assert bool((record.keep_mask[record.layout.prompt & ~where] == 1).all())
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in learner.model.language_model.prompt_predictor.parameters())
    alone = learner(**without_decisions(rows[2:]), labels=torch.where(rows[2].output, rows[2].ids, -100)[None],
                    sample_key=torch.tensor([2]), tau=0.7)  # fmt: skip
    assert alone.sparsity.keep_mask[0].equal(unpad(record.keep_mask, inputs["attention_mask"])[2])
    for text in (rows[1:2], rows[:1]):  # without a question, and with one: every weight has a gradient
        learner.zero_grad(set_to_none=True)
        given = without_decisions(text)
        learner(**given, labels=given["input_ids"].masked_fill(~given["output_mask"], -100)).loss.backward()
        assert all(p.grad is not None for p in learner.model.language_model.prompt_predictor.parameters())


def test_it_is_off_by_default_and_leaves_everything_as_it_was():
    plain = SparsityConfig()
    assert not {name for name in plain.to_dict() if name.startswith("prompt")}
    assert Dynamic.from_config(plain).prompt_threshold is None and Dynamic().parts == tuple(PARTS[:2])
    assert set(learned_costs(plain, HIDDEN)) == set(PARTS[:2])
    model = DynamicLlavaForConditionalGeneration(tiny_config())
    assert not any("prompt_predictor" in name for name in model.state_dict())
    inputs = without_decisions([make_row(TURNS[0], 0)])
    with pytest.raises(ValueError, match="weights of its own"):
        model.eval()(**inputs, method={"name": "dynamic", "prompt_threshold": 0})
    with pytest.raises(ValueError, match="prompt_keep_rate"):
        SparsityConfig(prompt_keep_rate=0)


def test_what_it_costs(model):
    settings = replace(TINY_SPARSITY, **SETTINGS)
    costs, shape = learned_costs(settings, HIDDEN), llava_shape(model.config)
    built = model.model.language_model.prompt_predictor
    assert costs["prompt_predictor"].parameters == sum(p.numel() for p in built.parameters())
    assert costs["prompt_predictor"].flops == 2 * sum(p.numel() for p in built.parameters() if p.dim() > 1)
    train = TrainConfig()
    with_it = training_flops(shape, settings, costs, train)
    without = training_flops(shape, settings, {name: costs[name] for name in PARTS[:2]}, train)
    tokens, outputs = 40, 9
    more = with_it.of_batch(2, tokens, 2, outputs, 0) - without.of_batch(2, tokens, 2, outputs, 0)
    assert more == 3 * costs["prompt_predictor"].flops * (2 * tokens - outputs - 2 * 16)


def test_a_run_trains_saves_and_loads_it(tmp_path):
    write_checkpoint(tmp_path / "base", dense=True)
    write_data(tmp_path, samples=6)
    trained = run(
        RunConfig(
            name="run",
            output_folder=str(tmp_path / "runs"),
            model=ModelConfig(base=str(tmp_path / "base")),
            data=DataConfig(json=str(tmp_path / "data.json"), image_folder=str(tmp_path / "images"), max_length=400),
            sparsity=replace(
                TINY_SPARSITY, prompt_keep_rate=0.7, prompt_min_length=2, keep_rate_reduction="applicable"
            ),
            train=TrainConfig(batch_size=3, max_steps=2, predictor_learning_rate=1e-2, log_every=1),
        )
    )
    for line in trained.history:
        assert 0 < line["prompt_keep_rate"] <= 1 and line["prompt_keep_loss"] >= 0
        terms = sum(line[f"{kind}_keep_loss"] for kind in ("image", "output", "prompt"))
        assert line["loss"] == pytest.approx(line["lm_loss"] + 100 * terms, rel=1e-4)
    stored = json.loads((trained.folder / "config.json").read_text())
    assert stored["sparsity"]["prompt_keep_rate"] == 0.7 and stored["untrained_predictors"] == []
    weights = load_file(trained.folder / "model.safetensors")
    assert any(name.startswith("model.language_model.prompt_predictor.") for name in weights)
    model = DynamicLlavaForConditionalGeneration.from_pretrained(trained.folder).eval()
    own = model.state_dict()
    assert all(own[name].equal(value) for name, value in weights.items() if "prompt_predictor" in name)
    assert model.config.sparsity.prompt_min_length == 2


def test_what_is_dropped_is_left_out_of_a_prefills_costs(model):
    shape, settings = llava_shape(model.config), replace(TINY_SPARSITY, **SETTINGS)
    said = [Counted(40, (range(4),), (16, 16, 4, 4, 4, 4), 1, 0, None, dropped) for dropped in (0, 5)]
    method = Dynamic.from_config(settings)
    given = {"method": method, "vision": shape.vision}
    whole, less = (prefill_costs(shape.decoder, settings, [one], 16, **given)["prefill_gflop_exact"] for one in said)
    tokens = [[24 + 16] * 2 + [24 + 4 - dropped] * 4 for dropped in (0, 5)]
    spared = prefill_flops(tokens[0], shape.decoder) - prefill_flops(tokens[1], shape.decoder)
    assert (whole - less) * 1e9 == pytest.approx(spared)
    held = [mean_kv_bytes(shape.decoder, method, [one], 16, 2) for one in said]
    assert held[0] - held[1] == kv_bytes(shape.decoder, 5, bytes_per_value=2) * 4 / 6
    plain = prefill_costs(shape.decoder, TINY_SPARSITY, said[:1], 16, method=Dynamic.from_config(TINY_SPARSITY),
                          vision=shape.vision)["prefill_gflop_exact"]  # fmt: skip
    assert (whole - plain) * 1e9 == pytest.approx(24 * learned_costs(settings, HIDDEN)["prompt_predictor"].flops)
