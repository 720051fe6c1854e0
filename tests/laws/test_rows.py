"""Rows are islands: a row gives alone what it gives in any batch, in any order, on any thread."""

from concurrent.futures import ThreadPoolExecutor

import torch
from hypothesis import strategies as st

from tests.builders import assert_same_logits, collate, fixed_rows, prompts, rows, shared_model, unpad
from tests.laws.test_paths import KV_HEADS, SIDES, newest
from tests.properties import few_or_many, for_all

MODES = st.sampled_from(["both", "image", "output", "none"])
CALL = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def without_decisions(inputs):
    return {name: value for name, value in inputs.items() if name != "keep_mask"}


def same_prediction(model, inputs, mode, **labels):
    """Return each row's logits at the places that the pass computed."""
    out = model(**without_decisions(inputs), sparsity=mode, **labels)
    present = inputs["attention_mask"].bool()
    if out.sparsity is not None and not labels:
        present = (out.sparsity.keep_mask.bool() & present) | newest(inputs["attention_mask"])
    return [logits[where] for logits, where in zip(out.logits, present, strict=True)]


@few_or_many
def test_a_row_alone_equals_the_row_in_a_ragged_batch(examples):
    @for_all(examples, rows(least_rows=2), SIDES, KV_HEADS, MODES, st.booleans())
    @torch.no_grad()
    def check(batch, side, kv_heads, mode, masked):
        model, together = shared_model(kv_heads), collate(batch, side)
        labels = {"labels": together["input_ids"]} if masked else {}
        in_batch = same_prediction(model, together, mode, **labels)
        for index, row in enumerate(batch):
            alone = collate([row])
            labels = {"labels": alone["input_ids"]} if masked else {}
            assert_same_logits(in_batch[index], same_prediction(model, alone, mode, **labels)[0], what=f"row {index}")


@few_or_many
def test_permuted_rows_give_permuted_results(examples):
    @for_all(examples, rows(least_rows=3), SIDES, st.randoms(use_true_random=False))
    @torch.no_grad()
    def check(batch, side, random):
        order = list(range(len(batch)))
        random.shuffle(order)
        model = shared_model()
        before = same_prediction(model, collate(batch, side), "both")
        after = same_prediction(model, collate([batch[i] for i in order], side), "both")
        for place, index in enumerate(order):
            assert_same_logits(after[place], before[index], what=f"row {index}")


@torch.no_grad()
def test_padding_content_has_no_influence():
    """Whatever ids stand in padding, and however much of it there is, nothing changes."""
    model, batch = shared_model(), fixed_rows(seed=2)
    width = max(len(row.ids) for row in batch)
    for side in ("left", "right"):
        inputs = collate(batch, side)
        expected = same_prediction(model, inputs, "both")
        wider = collate(batch, side, width + 7)
        padding = ~wider["attention_mask"].bool()
        wider["input_ids"] = torch.where(padding, 77, wider["input_ids"])
        wider["output_mask"] = wider["output_mask"] | padding
        for actual, wanted in zip(same_prediction(model, wider, "both"), expected, strict=True):
            assert_same_logits(actual, wanted, what=side)


@torch.no_grad()
def test_a_masked_batch_records_what_each_row_records_alone():
    model, batch = shared_model(), fixed_rows(seed=8)
    inputs = collate(batch, "left")
    together = model(**without_decisions(inputs), labels=inputs["input_ids"]).sparsity
    keeps = unpad(together.keep_mask.bool(), inputs["attention_mask"])
    for index, row in enumerate(batch):
        alone = collate([row])
        record = model(**without_decisions(alone), labels=alone["input_ids"]).sparsity
        assert torch.equal(record.keep_mask[0].bool(), keeps[index])
        assert torch.equal(record.output_decisions[0], together.output_decisions[index])
        for one, other in zip(record.image_indices[0], together.image_indices[index], strict=True):
            assert torch.equal(one, other)


@few_or_many
def test_generate_alone_equals_generate_in_a_batch(examples):
    @for_all(examples, rows(least_rows=2, outputs=(0, 0)), KV_HEADS, MODES, st.booleans())
    @torch.no_grad()
    def check(batch, kv_heads, mode, use_cache):
        model, call = shared_model(kv_heads), {**CALL, "sparsity": mode, "use_cache": use_cache}
        inputs = prompts(batch)
        together = model.generate(**inputs, **call)
        width = inputs["input_ids"].shape[1]
        for index, row in enumerate(batch):
            alone = model.generate(**prompts([row]), **call)
            answer = together.sequences[index, width:]
            assert torch.equal(alone.sequences[0, len(row.ids) :], answer), f"row {index}"
            logits = torch.stack(together.logits, 1)[index]
            assert_same_logits(logits, torch.stack(alone.logits, 1)[0], what=f"row {index}")
            if mode != "none":
                assert torch.equal(together.sparsity.output_decisions[index], alone.sparsity.output_decisions[0])
                if use_cache:
                    assert together.sparsity.cache_lengths[index] == alone.sparsity.cache_lengths[0]


@torch.no_grad()
def test_rows_that_end_early_do_not_disturb_the_others():
    """A finished row is fed fillers; its record and its neighbours must not notice."""
    model, batch = shared_model(), fixed_rows(seed=4, output=0)
    inputs = prompts(batch)
    free = model.generate(**inputs, **CALL)
    width = inputs["input_ids"].shape[1]
    end = int(free.sequences[1, width + 2])  # row 1 says this word third, at the latest
    ended = model.generate(**inputs, **{**CALL, "output_logits": False}, eos_token_id=end, pad_token_id=0)
    for index in range(len(batch)):
        answer = free.sequences[index, width:].tolist()
        length = answer.index(end) + 1 if end in answer else len(answer)
        shown = ended.sequences[index, width:].tolist()
        assert shown[:length] == answer[:length] and not any(shown[length:])
        decided = ended.sparsity.output_decisions[index]
        count = min(length, len(decided))
        assert torch.equal(decided[:count], free.sparsity.output_decisions[index][:count])


@torch.no_grad()
def test_eight_threads_give_what_one_gives():
    model = shared_model()
    jobs = [prompts(fixed_rows(seed=10 + seed, output=0)) for seed in range(8)]
    modes = ["both", "image", "output", "none"] * 2

    def answer(job):
        inputs, mode = job
        with torch.no_grad():
            return model.generate(**inputs, **CALL, sparsity=mode)

    one = [answer(job) for job in zip(jobs, modes, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        eight = list(pool.map(answer, zip(jobs, modes, strict=True)))
    for single, threaded in zip(one, eight, strict=True):
        assert torch.equal(single.sequences, threaded.sequences)
        assert torch.equal(torch.stack(single.logits), torch.stack(threaded.logits))
