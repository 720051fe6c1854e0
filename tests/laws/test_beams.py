"""Beam search reorders rows at every step: cached must equal uncached, and every beam its own teacher-forced pass."""

import pytest
import torch
from hypothesis import strategies as st

from tests.builders import assert_same_logits, collate, fixed_rows, prompts, rows, shared_model
from tests.laws.test_paths import KV_HEADS
from tests.properties import few_or_many, for_all

CALL = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True}


@few_or_many
def test_beam_search_cached_equals_uncached(examples):
    @for_all(examples, rows(outputs=(0, 0), most_rows=3), KV_HEADS, st.integers(2, 4))
    @torch.no_grad()
    def check(batch, kv_heads, beams):
        model, inputs = shared_model(kv_heads), prompts(batch)
        call = {**CALL, "num_beams": beams, "num_return_sequences": 2, "do_sample": False}
        cached = model.generate(**inputs, **call)
        uncached = model.generate(**inputs, **call, use_cache=False)
        assert torch.equal(cached.sequences, uncached.sequences)
        assert_same_logits(cached.sequences_scores, uncached.sequences_scores)


@pytest.mark.parametrize(
    "call",
    [
        {"num_beams": 3, "num_return_sequences": 3, "do_sample": False},
        {"num_return_sequences": 3, "do_sample": True},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
    ],
    ids=["beam", "sample", "beam-sample"],
)
@torch.no_grad()
def test_the_record_belongs_to_the_sequences_that_are_returned(call):
    """Decisions recomputed on each returned sequence by one masked forward are those of the record."""
    model, inputs = shared_model(), prompts(fixed_rows(seed=6, output=0))
    torch.manual_seed(1)
    out = model.generate(**inputs, **CALL, **call)
    width, copies = inputs["input_ids"].shape[1], call["num_return_sequences"]
    output = torch.zeros_like(out.sequences, dtype=torch.bool)
    output[:, width:] = True
    mask = inputs["attention_mask"].repeat_interleave(copies, 0)
    mask = torch.nn.functional.pad(mask, (0, output.shape[1] - width), value=1)
    per_row = (inputs["input_ids"] == model.config.image_token_id).sum(1) // model.config.image_seq_length
    pixels = inputs["pixel_values"].split(per_row.tolist())
    teacher = model(
        input_ids=out.sequences,
        attention_mask=mask,
        pixel_values=torch.cat([image for image in pixels for _ in range(copies)]),
        output_mask=output,
        labels=out.sequences,
    )
    for decided, row in zip(out.sparsity.output_decisions, teacher.sparsity.keep_mask[:, width:-1], strict=True):
        assert torch.equal(decided, row.bool())
    kept = teacher.sparsity.keep_mask.bool() & mask.bool()
    assert out.sparsity.cache_lengths.tolist() == kept[:, :-1].sum(1).tolist()


@torch.no_grad()
def test_beams_over_a_conversation_with_an_earlier_answer():
    """Given output tokens are decided about as well, in the search and in its record."""
    model, batch = shared_model(), fixed_rows(seed=7, output=6)
    inputs = collate(batch, "left")
    inputs.pop("keep_mask")
    question = torch.randint(4, 100, (len(batch), 3))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], question], 1)
    inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    inputs["output_mask"] = torch.nn.functional.pad(inputs["output_mask"], (0, 3), value=False)
    call = {**CALL, "num_beams": 3, "do_sample": False}
    cached, uncached = (model.generate(**inputs, **call, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    assert all(len(decided) == 6 + call["max_new_tokens"] - 1 for decided in cached.sparsity.output_decisions)
    start, real = inputs["input_ids"].shape[1], inputs["attention_mask"].bool()
    prefill = model(**inputs).sparsity
    assert torch.equal(cached.sparsity.keep_mask[:, :start][real].bool(), prefill.keep_mask[real])
