"""The central law (docs/method.md, section 4): with the same decisions, every path gives the same logits.

The masked forward over all tokens is the reference; against it stand physical dropping (prefill), decoding without a
cache, and decoding with one, over random layouts, padded left or right, with multi-head and grouped-query attention.
"""

import pytest
import torch
from hypothesis import strategies as st

from tests.builders import IMAGE_TOKEN, assert_same_logits, collate, fixed_rows, rows, shared_model
from tests.properties import few_or_many, for_all

SIDES = st.sampled_from(["left", "right"])
KV_HEADS = st.sampled_from([4, 2])
PER_TOKEN = ("input_ids", "attention_mask", "output_mask", "keep_mask")


@torch.no_grad()
def masked(model, batch):
    """Return the logits (B, N, V) of the masked forward with the batch's own decisions."""
    return model(**batch, labels=batch["input_ids"]).logits


def newest(attention_mask):
    """Return (B, N) bool: each row's last real token."""
    last = attention_mask.cumsum(1) == attention_mask.sum(1, keepdim=True)
    return last & attention_mask.bool()


def columns(batch, start, stop):
    """Return the batch cut to the columns start..stop; its images go with the prompt."""
    return {name: value[:, start:stop] if name in PER_TOKEN else value for name, value in batch.items()}


@few_or_many
def test_masked_forward_equals_physical_drop(examples):
    @for_all(examples, rows(), SIDES, KV_HEADS)
    @torch.no_grad()
    def check(batch, side, kv_heads):
        model, inputs = shared_model(kv_heads), collate(batch, side)
        expected = masked(model, inputs)
        actual = model(**inputs).logits
        # Dropped tokens are not computed; the newest one always takes part in its own step.
        present = (inputs["keep_mask"] & inputs["attention_mask"].bool()) | newest(inputs["attention_mask"])
        assert_same_logits(actual[present], expected[present])


@few_or_many
def test_masked_forward_equals_scoring_in_one_pass(examples):
    """Scoring removes dropped image tokens, but none that an answer may follow."""

    @for_all(examples, rows(answers=2), SIDES, KV_HEADS)
    @torch.no_grad()
    def check(batch, side, kv_heads):
        model, inputs = shared_model(kv_heads), collate(batch, side)
        hidden = model.model(**inputs, answers_only=True, use_cache=False).last_hidden_state
        image, real = inputs["input_ids"] == IMAGE_TOKEN, inputs["attention_mask"].bool()
        inside = image & torch.nn.functional.pad(image, (0, 1))[:, 1:]
        present = real & (inputs["keep_mask"] | ~inside)
        assert_same_logits(model.lm_head(hidden)[present], masked(model, inputs)[present])


@few_or_many
def test_decoding_without_cache_equals_the_masked_forward(examples):
    @for_all(examples, rows(outputs=(1, 8)), KV_HEADS)
    @torch.no_grad()
    def check(batch, kv_heads):
        model, inputs = shared_model(kv_heads), collate(batch, "left")
        expected = masked(model, inputs)
        width = inputs["input_ids"].shape[1]
        for stop in range(width - min(int(row.output.sum()) for row in batch), width + 1):
            logits = model(**columns(inputs, 0, stop), use_cache=False).logits
            assert_same_logits(logits[:, -1], expected[:, stop - 1], what=f"step up to column {stop}")


@few_or_many
def test_decoding_with_cache_equals_the_masked_forward(examples):
    @for_all(examples, rows(outputs=(1, 8)), KV_HEADS)
    @torch.no_grad()
    def check(batch, kv_heads):
        model, inputs = shared_model(kv_heads), collate(batch, "left")
        expected = masked(model, inputs)
        width = inputs["input_ids"].shape[1]
        start = width - min(int(row.output.sum()) for row in batch)
        cached_steps(model, inputs, expected, start)


def cached_steps(model, inputs, expected, start):
    """Prefill the columns before `start`, feed the others one by one, and compare every step and length."""
    width = inputs["input_ids"].shape[1]
    out = model(**columns(inputs, 0, start), use_cache=True)
    assert_same_logits(out.logits[:, -1], expected[:, start - 1], what="prefill")
    for column in range(start, width):
        out = model(
            input_ids=inputs["input_ids"][:, column : column + 1],
            attention_mask=inputs["attention_mask"][:, : column + 1],
            output_mask=inputs["output_mask"][:, : column + 1],
            keep_mask=inputs["keep_mask"][:, : column + 1],
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        assert_same_logits(out.logits[:, -1], expected[:, column], what=f"step at column {column}")
    kept = (inputs["keep_mask"] & inputs["attention_mask"].bool()).sum(1)
    assert out.sparsity.cache_lengths.tolist() == kept.tolist()
    assert out.sparsity.dense_cache_lengths.tolist() == inputs["attention_mask"].sum(1).tolist()


@torch.no_grad()
def test_long_answers_cross_many_cache_blocks():
    model, inputs = shared_model(), collate(fixed_rows(seed=3, output=40), "left")
    cached_steps(model, inputs, masked(model, inputs), inputs["input_ids"].shape[1] - 40)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_the_laws_hold_with_both_attention_implementations(attention):
    model, inputs = shared_model(2, attention), collate(fixed_rows(seed=5), "left")
    expected = masked(model, inputs)
    actual = model(**inputs).logits
    present = (inputs["keep_mask"] & inputs["attention_mask"].bool()) | newest(inputs["attention_mask"])
    assert_same_logits(actual[present], expected[present])
    cached_steps(model, inputs, expected, inputs["input_ids"].shape[1] - 6)


@few_or_many
def test_the_models_own_decisions_agree_on_every_path(examples):
    """No decisions are given: prefill and steps decide for themselves, as does the one masked forward."""

    @for_all(examples, rows(outputs=(0, 0)), KV_HEADS)
    @torch.no_grad()
    def check(batch, kv_heads):
        model, inputs = shared_model(kv_heads), collate(batch, "left")
        prompt = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        call = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        cached = model.generate(**prompt, **call)
        uncached = model.generate(**prompt, **call, use_cache=False)
        assert torch.equal(cached.sequences, uncached.sequences)
        for one, other in zip(cached.sparsity.output_decisions, uncached.sparsity.output_decisions, strict=True):
            assert torch.equal(one, other)
        start = prompt["input_ids"].shape[1]
        output = torch.zeros_like(cached.sequences, dtype=torch.bool)
        output[:, start:] = True
        mask = torch.nn.functional.pad(prompt["attention_mask"], (0, output.shape[1] - start), value=1)
        teacher = model(
            input_ids=cached.sequences,
            attention_mask=mask,
            pixel_values=prompt["pixel_values"],
            output_mask=output,
            labels=cached.sequences,
        )
        steps = torch.stack(cached.logits, 1)
        assert_same_logits(steps, teacher.logits[:, start - 1 : -1], what="cached")
        assert_same_logits(torch.stack(uncached.logits, 1), teacher.logits[:, start - 1 : -1], what="uncached")
        kept = teacher.sparsity.keep_mask[:, start:-1].bool()
        for decided, row in zip(cached.sparsity.output_decisions, kept, strict=True):
            assert torch.equal(decided, row)
        assert same_indices(cached.sparsity, teacher.sparsity)


def same_indices(one, other):
    pairs = zip(one.image_indices, other.image_indices, strict=True)
    return all(torch.equal(a, b) for row_a, row_b in pairs for a, b in zip(row_a, row_b, strict=True))


def test_the_decisions_of_these_tests_are_mixed():
    """Otherwise the laws above would compare little."""
    model, inputs = shared_model(), collate(fixed_rows(seed=1, output=0), "left")
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    out = model.generate(**prompt, max_new_tokens=24, return_dict_in_generate=True)
    rates = [decisions.float().mean().item() for decisions in out.sparsity.output_decisions]
    assert 0.1 < sum(rates) / len(rates) < 0.9
    assert len({decisions.sum().item() for decisions in out.sparsity.output_decisions}) > 1
