"""The Trainer's loss path, gradient by gradient: splits of a batch, samples without labels, rows without an image."""

import pytest
import torch

from dynamic_llava.sparsity import RELAXATIONS
from tests.builders import build_model, collate, fixed_rows, make_row, prompt_segments
from tests.sft_builders import take_step, trainer_around


def batch_of(rows, sample_ids, learned=True):
    """Return the rows as the collator gives them: only rows with an image have output tokens; labels, or none."""
    batch = collate(rows)
    batch.pop("keep_mask")
    has_image = torch.tensor([len(row.pixels) > 0 for row in rows])
    batch["labels"] = torch.where(batch["output_mask"] & learned, batch["input_ids"], -100)
    batch["output_mask"] = batch["output_mask"] & has_image[:, None] & learned
    batch["sample_ids"] = torch.tensor(sample_ids)
    return {name: tensor for name, tensor in batch.items() if tensor is not None}


def model_to_train(**settings):
    """Return a tiny random model whose vision tower is frozen, as it always is."""
    model = build_model(**settings)
    model.model.vision_tower.requires_grad_(False)
    return model


def predictor_gradients(gradients):
    return {name: value for name, value in gradients.items() if "_predictor" in name}


def assert_equal(actual, expected, tolerance=5e-6):
    """Up to float32, relative to the norm of a part's gradient: a predictor's last bias may have 0 by symmetry."""
    assert actual.keys() == expected.keys() and expected
    parts = {}
    for name in expected:
        part = next((part for part in ("image_predictor", "output_predictor") if part in name), "model")
        parts.setdefault(part, []).append(name)
    for part, names in parts.items():
        norm = torch.stack([expected[name].norm() for name in names]).norm()
        for name in names:
            error = (actual[name] - expected[name]).norm()
            assert error <= tolerance * norm, f"{name}: {error:.1e} where the {part} has {norm:.1e}"


VARIANTS = {
    "paper": {},
    "applicable, absolute": {"keep_rate_reduction": "applicable", "keep_rate_distance": "absolute"},
    "all answers": {"output_segments": "all"},
    "zero vectors": {"dropped_tokens": "zero_vectors"},
    "sigmoid_st": {"relaxation": "sigmoid_st"},
    "soft_topk": {"relaxation": "soft_topk"},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_a_step_does_not_depend_on_how_its_batch_is_split(tmp_path, settings):
    """Three samples with answers of 9, 3 (under LEN_OT) and 6 tokens: gradients, both regularisers included."""
    rows = [
        make_row([*prompt_segments(images, [1, 2, 3][: images + 1]), ("output", length)], seed=length)
        for images, length in ((1, 9), (2, 3), (1, 6))
    ]
    model = model_to_train(**settings)
    trainer, batch = trainer_around(model, tmp_path), batch_of(rows, [0, 1, 2])
    whole = take_step(trainer, [batch])
    key = trainer.sample_key(batch.pop("sample_ids"))
    own = model(**batch, tau=trainer.tau(), sample_key=key)
    for name in ("loss", "lm_loss", "image_keep_loss", "output_keep_loss"):
        assert whole[0][name] == pytest.approx(own[name].item(), rel=1e-6), f"{name} is not the model's own mean"
    assert own.output_keep_loss > 0 and (own.image_keep_loss > 0 or settings.get("relaxation") == "soft_topk")
    for split in ([[0], [1, 2]], [[0], [1], [2]]):
        parts = [batch_of([rows[place] for place in part], part) for part in split]
        terms, outputs, gradients = take_step(trainer_around(model, tmp_path, gradient_accumulation=len(split)), parts)
        assert terms == pytest.approx(whole[0], rel=1e-6, abs=1e-7)
        assert [out.sparsity.keep_mask.shape[0] for out in outputs] == [len(part) for part in split]
        assert_equal(gradients, whole[2])


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_text_only_rows_leave_the_others_sparse(tmp_path, relaxation):
    """A mixed batch: the other rows decide as without them, and the predictors' gradient is theirs alone."""
    rows = fixed_rows(seed=80, output=8)  # the second one has no image
    model = model_to_train(relaxation=relaxation)
    sparse = batch_of([rows[0], rows[2], rows[3]], [0, 2, 3])
    text, mixed = batch_of(rows[1:2], [1]), batch_of(rows, [0, 1, 2, 3])
    trainer = trainer_around(model, tmp_path)
    _, (together,), expected = take_step(trainer, [mixed])

    found = {}
    for name, batch in (("sparse", sparse), ("text", text)):
        # The step holds both batches, so both are divided by its counts; one is sent on alone.
        _, tokens = trainer.get_batch_samples(iter([sparse, text]), 2, trainer.args.device)
        trainer.training_step(model, batch, tokens)
        found[name] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
    assert_equal(predictor_gradients(found["sparse"]), predictor_gradients(expected))
    assert all(value.abs().max() == 0 for value in predictor_gradients(found["text"]).values())
    assert found["text"]["lm_head.weight"].norm() > 0, "a text-only row is learned, densely"
    mask, layout = together.sparsity.keep_mask, together.sparsity.layout
    assert mask[1][layout.valid[1]].eq(1).all()
    for tokens in (layout.is_image, layout.output):
        assert 0 < mask[tokens & layout.is_image.any(1)[:, None]].mean() < 1


@pytest.mark.parametrize("dropped_tokens", ["masked_softmax", "zero_vectors"])
def test_a_step_without_any_label_is_zero_and_never_nan(tmp_path, dropped_tokens):
    """Every label ignored, by truncation: no loss and no gradient beside Eq. 10's on the images that are there."""
    batch = batch_of(fixed_rows(seed=81, output=8), [0, 1, 2, 3], learned=False)
    for weight in (0.0, 100.0):
        model = model_to_train(keep_rate_weight=weight, dropped_tokens=dropped_tokens)
        terms, _, gradients = take_step(trainer_around(model, tmp_path), [batch])
        assert terms["lm_loss"] == terms["output_keep_loss"] == 0 and terms["image_keep_loss"] > 0
        assert terms["loss"] == pytest.approx(weight * terms["image_keep_loss"])
        assert all(torch.isfinite(value).all() for value in gradients.values())
        assert predictor_gradients(gradients), "every rank has a gradient for both predictors"
        reached = {name for name, value in gradients.items() if value.abs().max() > 0}
        assert bool(reached) == (weight > 0)
        assert not any("output_predictor" in name or "layers.2" in name or "lm_head" in name for name in reached)


def test_a_sample_without_labels_adds_nothing_to_the_others(tmp_path):
    rows = fixed_rows(seed=82, output=8)
    model = model_to_train(keep_rate_weight=0.0)
    terms, _, expected = take_step(trainer_around(model, tmp_path), [batch_of([rows[0], rows[3]], [0, 3])])
    mixed = batch_of([rows[0], rows[2], rows[3]], [0, 2, 3])
    mixed["labels"][1], mixed["output_mask"][1] = -100, False
    more_terms, _, gradients = take_step(trainer_around(model, tmp_path), [mixed])
    assert more_terms["lm_loss"] == pytest.approx(terms["lm_loss"], rel=1e-6) and terms["lm_loss"] > 0
    assert_equal(gradients, expected)
