"""The training forward: sampled decisions, which answers they concern, where gradients go, what must not matter."""

import pytest
import torch
from hypothesis import strategies as st

from tests.builders import (
    TOKENS_PER_IMAGE,
    assert_same_logits,
    build_model,
    collate,
    fixed_rows,
    make_row,
    predictors,
    prompt_segments,
    rows,
)
from tests.properties import few_or_many, for_all


def training_inputs(batch, side="right", keys=None):
    """Return a training call: labels at output tokens, one noise key per sample."""
    inputs = collate(batch, side)
    inputs.pop("keep_mask")
    output = inputs.pop("output_mask")
    labels = torch.where(output, inputs["input_ids"], -100)
    keys = torch.arange(len(batch)) if keys is None else keys
    return {**inputs, "labels": labels, "tau": 0.7, "sample_key": keys}


def gradients(model, **call):
    """Return the loss and every gradient of one training step."""
    model.train().zero_grad(set_to_none=True)
    out = model(**call)
    out.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return out, found


def assert_same_gradients(actual, expected, tolerance=1e-4):
    assert actual.keys() == expected.keys()
    largest = max(value.norm() for value in expected.values())
    for name, wanted in expected.items():
        error = (actual[name] - wanted).norm()
        assert error <= tolerance * max(wanted.norm(), 1e-3 * largest), f"{name}: {error / wanted.norm():.1e}"


@few_or_many
def test_the_attention_implementation_changes_no_gradient(examples):
    reference, chunked = build_model(2, masked_softmax="reference"), build_model(2, masked_softmax="chunked")

    @for_all(examples, rows(outputs=(4, 9)), st.sampled_from(["left", "right"]))
    def check(batch, side):
        call = training_inputs(batch, side)
        one, expected = gradients(reference, **call)
        two, actual = gradients(chunked, **call)
        assert torch.equal(one.sparsity.keep_mask, two.sparsity.keep_mask)
        torch.testing.assert_close(two.loss, one.loss, rtol=1e-5, atol=0)
        assert_same_gradients(actual, expected)


@few_or_many
def test_noise_and_decisions_belong_to_the_sample(examples):
    """With equal keys a sample is decided about alike alone and in any batch, padded on either side."""
    model = build_model().train()

    @for_all(examples, rows(least_rows=2, outputs=(4, 9)), st.sampled_from(["left", "right"]))
    @torch.no_grad()
    def check(batch, side):
        keys = torch.arange(len(batch)) * 1001 + 7
        together = training_inputs(batch, side, keys)
        out = model(**together)
        for index, row in enumerate(batch):
            alone = model(**training_inputs([row], "right", keys[index : index + 1]))
            real = together["attention_mask"][index].bool()
            assert torch.equal(out.sparsity.keep_mask[index][real], alone.sparsity.keep_mask[0])
            assert_same_logits(out.logits[index][real], alone.logits[0], what=f"row {index}")


def test_accumulated_parts_equal_the_whole_batch():
    """Two halves with the global denominators sum to one batch: losses and gradients."""
    model, batch = build_model(), fixed_rows(seed=50, output=6)
    keys = torch.arange(4)
    labelled = sum(int(row.output.sum()) for row in batch)
    counts = {"num_items_in_batch": labelled, "num_samples_in_batch": len(batch)}
    whole, expected = gradients(model, **training_inputs(batch, keys=keys), **counts)
    plain, _ = gradients(model, **training_inputs(batch, keys=keys))
    torch.testing.assert_close(whole.loss, plain.loss)
    first, one = gradients(model, **training_inputs(batch[:2], keys=keys[:2]), **counts)
    second, two = gradients(model, **training_inputs(batch[2:], keys=keys[2:]), **counts)
    torch.testing.assert_close(first.loss + second.loss, whole.loss)
    assert_same_gradients({name: one[name] + two[name] for name in one}, expected)


@pytest.mark.parametrize("reentrant", [False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    call = training_inputs(fixed_rows(seed=51))
    plain, expected = gradients(build_model(), **call)
    model = build_model()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    saved, actual = gradients(model, **call)
    assert torch.equal(saved.loss, plain.loss)
    for name, wanted in expected.items():
        assert torch.equal(actual[name], wanted), name


def test_short_answers_are_not_sparsified():
    """LEN_OT is 4 here: an answer of 3 tokens is kept whole, one of 4 is decided about."""
    batch = [make_row([*prompt_segments(1, [2, 3]), ("output", count)], seed=count) for count in (3, 4)]
    out = build_model().train()(**training_inputs(batch))
    output = training_inputs(batch)["labels"] != -100
    assert out.sparsity.keep_mask[0][output[0]].eq(1).all()
    assert not out.sparsity.sparsified_output[0].any()
    assert torch.equal(out.sparsity.sparsified_output[1], output[1])
    # The short answer counts in the batch reduction: the sum is divided by both samples.
    rate = out.sparsity.keep_mask[1][output[1]].mean()
    torch.testing.assert_close(out.output_keep_loss, (rate - 0.5).square() / 2)


@pytest.mark.parametrize(("segments", "first"), [("last", False), ("all", True)])
def test_which_answers_of_a_conversation_are_output(segments, first):
    turns = [("text", 3), ("image", 0), ("text", 2), ("output", 6), ("text", 3), ("output", 5)]
    batch = [make_row(turns, seed=1)]
    call = training_inputs(batch)
    out = build_model(output_segments=segments).train()(**call)
    answers = call["labels"][0] != -100
    start = int(answers.nonzero()[0])
    assert bool(out.sparsity.sparsified_output[0, start]) == first
    assert out.sparsity.sparsified_output[0, -5:].all()
    if not first:
        assert out.sparsity.layout.prompt[0, start : start + 6].all()
    assert out.lm_loss > 0  # every labelled token is learned in both cases


def test_the_keep_rate_terms_are_those_of_eq_10():
    batch = fixed_rows(seed=52, output=6)
    call = training_inputs(batch)
    for reduction in ("batch", "applicable"):
        out = build_model(keep_rate_reduction=reduction).train()(**call)
        mask, layout = out.sparsity.keep_mask, out.sparsity.layout
        images = [mask[i][layout.is_image[i]].mean() for i in range(4) if layout.is_image[i].any()]
        share = len(batch) if reduction == "batch" else len(images)
        expected = sum((rate - 0.25).square() for rate in images) / share
        torch.testing.assert_close(out.image_keep_loss, expected)
        answers = torch.stack([mask[i][layout.output[i]].mean() for i in range(4)])
        torch.testing.assert_close(out.output_keep_loss, (answers - 0.5).square().mean())
        total = out.lm_loss + 100 * (out.image_keep_loss + out.output_keep_loss)
        torch.testing.assert_close(out.loss, total)


def test_target_rates_can_be_set_per_call():
    call = training_inputs(fixed_rows(seed=53, output=6)[:1])
    model = build_model().train()
    rate = model(**call).sparsity
    out = model(**call, image_keep_rate=0.9, output_keep_rate=0.8)
    torch.testing.assert_close(out.image_keep_loss, (rate.image_keep_rate - 0.9).square())
    torch.testing.assert_close(out.output_keep_loss, (rate.output_keep_rate - 0.8).square())
    with pytest.raises(ValueError, match=r"output_keep_rate=1\.5 is not a keep rate"):
        model(**call, output_keep_rate=1.5)


@pytest.mark.parametrize("images", [0, 1])
def test_both_predictors_always_have_a_gradient(images):
    """Otherwise ranks of a distributed run whose batches hold no image, or no answer, would hang."""
    batch = [make_row([*prompt_segments(images, [2, 3]), ("output", 2)], seed=3)]
    model = build_model()
    _, found = gradients(model, **training_inputs(batch))
    names = {name for name, _ in model.named_parameters() if "_predictor" in name}
    assert names <= found.keys()
    assert all(torch.isfinite(found[name]).all() for name in names)


def test_a_batch_without_images_uses_the_same_modules():
    """Otherwise a process whose batch holds text alone would leave the others waiting (ZeRO-3, a trained projector)."""
    batch = [make_row([*prompt_segments(0, [2, 3]), ("output", 2)], seed=3)]
    model = build_model()
    used = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: used.add(name))
    _, found = gradients(model, **training_inputs(batch))
    with_text = used.copy()
    used.clear()
    gradients(model, **training_inputs([make_row([*prompt_segments(1, [2, 3]), ("output", 2)], seed=3)]))
    assert with_text == used
    projector = [name for name, _ in model.named_parameters() if "multi_modal_projector" in name]
    assert projector and all(found[name].abs().sum() == 0 for name in projector)
    model.eval()
    alone = {name: value for name, value in training_inputs(batch).items() if name != "tau"}
    used.clear()
    assert torch.isfinite(model(**alone).lm_loss) and not any("vision_tower" in name for name in used)


def test_predictors_learn_from_the_task_alone():
    """The gradient into the keep mask reaches both predictors without any regulariser."""
    model = build_model(keep_rate_weight=0.0)
    out, found = gradients(model, **training_inputs(fixed_rows(seed=54, output=8)))
    for predictor in predictors(model):
        parameter = predictor.head[-1].weight
        name = next(n for n, p in model.named_parameters() if p is parameter)
        assert found[name].norm() > 0, name
    assert out.sparsity.mask_gradient > 0


def test_the_gradient_clip_bounds_what_enters_the_mask_and_nothing_else():
    call = training_inputs(fixed_rows(seed=55, output=8))
    free_model, tight_model = build_model(keep_rate_weight=0.0), build_model(keep_rate_weight=0.0, mask_grad_clip=1e-6)
    free, before = gradients(free_model, **call)
    tight, after = gradients(tight_model, **call)
    assert torch.equal(free.loss, tight.loss)
    names = [name for name in before if "_predictor" in name]
    assert sum(after[name].norm() for name in names) < 1e-2 * sum(before[name].norm() for name in names)
    # Weights above the decision do not feel it.
    assert_same_gradients({"lm_head.weight": after["lm_head.weight"]}, {"lm_head.weight": before["lm_head.weight"]})
    assert tight.sparsity.mask_gradient == free.sparsity.mask_gradient


@pytest.mark.parametrize("mode", ["both", "image", "output", "none"])
def test_modes_of_training(mode):
    batch = fixed_rows(seed=56, output=8)
    model = build_model().train()
    out = model(**training_inputs(batch), sparsity=mode)
    if mode == "none":
        assert out.sparsity is None and out.image_keep_loss is None
        assert torch.equal(out.loss, out.lm_loss)
        return
    mask, layout = out.sparsity.keep_mask, out.sparsity.layout
    assert mask[layout.prompt].eq(1).all()
    assert (0 < mask[layout.is_image].mean() < 1) == (mode in ("both", "image"))
    assert (0 < mask[layout.output].mean() < 1) == (mode in ("both", "output"))
    assert (out.image_keep_loss > 0) == (mode in ("both", "image"))
    assert (out.output_keep_loss > 0) == (mode in ("both", "output"))


def test_a_batch_without_labels_to_learn_is_zero_and_not_nan():
    batch = [make_row(prompt_segments(1, [2, 3]), seed=9)]
    out, found = gradients(build_model(), **training_inputs(batch))
    assert out.lm_loss == 0
    assert all(torch.isfinite(value).all() for value in found.values())


def test_eval_with_labels_decides_hard_and_without_noise():
    call = training_inputs(fixed_rows(seed=57, output=6))
    call.pop("tau")
    model = build_model().eval()
    with torch.no_grad():
        one = model(**call)
        two = model(**{**call, "sample_key": call["sample_key"] + 5})
    assert torch.equal(one.sparsity.keep_mask, two.sparsity.keep_mask)
    kept = [len(image) for row in one.sparsity.image_indices for image in row]
    assert set(kept) == {TOKENS_PER_IMAGE // 4}
