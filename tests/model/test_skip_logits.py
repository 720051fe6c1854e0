"""skip_logits: the head on learned tokens alone gives the loss and every gradient of the head on all of them.

The loss is computed in float32, whatever the model's format, and the two ways sum it in another order.
"""

import pytest
import torch

from dynamic_llava.config import DistillConfig
from tests.builders import VOCABULARY, build_model, collate, fixed_rows
from tests.live_memory import measure_step
from tests.sft_builders import take_step, trainer_around

WAYS = {
    "dense": {"sparsity": "none"},
    "both": {},
    "image": {"sparsity": "image"},
    "a rival": {"method": "fastv"},
    "distilled": {"distill": DistillConfig(weight=2.0)},
    "counted elsewhere": {"num_items_in_batch": torch.tensor(40)},
}


def batch(model, **more):
    """Return a training call in the model's format on rows of two, one and no image, some tokens unlearned."""
    inputs = collate(fixed_rows())
    del inputs["keep_mask"]
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    labels[:, ::3] = -100
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return {**inputs, "labels": labels, "tau": 0.7, "sample_key": torch.arange(len(labels)), **more}


def learn(model, inputs):
    """Return the outputs of a training call and the gradient of every parameter that has one."""
    model.zero_grad(set_to_none=True)
    out = model(**inputs)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shifted", [False, True], ids=["labels", "shift_labels"])
def test_loss_and_gradients_are_those_of_all_logits(way, shifted):
    model = build_model().double().train()
    inputs = batch(model, **WAYS[way])
    if shifted:
        inputs["shift_labels"] = inputs["labels"].roll(1, dims=0)
    (whole, wanted), (alone, found) = (learn(model, {**inputs, "skip_logits": skips}) for skips in (False, True))
    assert whole.logits is not None and alone.logits is None
    assert (whole.distill_loss is None) == ("distill" not in inputs)
    for name in ("loss", "lm_loss", "distill_loss"):
        torch.testing.assert_close(getattr(alone, name), getattr(whole, name), rtol=1e-6, atol=0)
    assert found.keys() == wanted.keys() and len(found) > 10
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 1e-6 * wanted[name].norm(), name


@pytest.mark.parametrize("way", ["dense", "both"])
def test_a_batch_without_learned_tokens_reaches_the_head(way):
    """Its loss is 0 and its gradients are zeros, not missing ones, which DDP and ZeRO would wait for."""
    model = build_model().train()
    inputs = batch(model, **WAYS[way], skip_logits=True)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    out, gradients = learn(model, inputs)
    assert out.lm_loss.item() == 0
    assert not gradients["lm_head.weight"].any()


def test_a_loss_of_ones_own_gets_the_learned_tokens_as_one_row():
    model = build_model().train()
    seen = {}

    def own(logits, labels, vocab_size, shift_labels, **more):
        seen.update(logits=logits, labels=labels, shift_labels=shift_labels, words=vocab_size)
        return logits.logsumexp(-1).mean()

    model.loss_function = own
    inputs = batch(model)
    out = model(**inputs, skip_logits=True)
    learned = inputs["labels"][:, 1:]
    learned = learned[learned != -100]
    assert seen["logits"].shape == (1, len(learned), seen["words"])
    assert torch.equal(seen["shift_labels"], learned[None]) and torch.equal(seen["labels"], learned[None])
    assert torch.equal(out.lm_loss, seen["logits"].logsumexp(-1).mean())


@pytest.mark.parametrize("way", ["dense", "both"])
def test_labels_are_needed(way):
    model = build_model().train()
    inputs = batch(model, **WAYS[way])
    del inputs["labels"]
    with pytest.raises(ValueError, match=r"skip_logits.*give labels"):
        model(**inputs, skip_logits=True)


def test_the_trainer_asks_for_no_logits(tmp_path):
    """What the calculated memory and FLOPs rest on."""
    model = build_model().train()
    inputs = batch(model)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values", "output_mask", "labels")}
    trainer = trainer_around(model, tmp_path)
    _, (out,), _ = take_step(trainer, [{**inputs, "sample_ids": torch.arange(len(inputs["labels"]))}])
    assert out.lm_loss.item() > 0 and out.logits is None


def test_an_unlearned_token_keeps_no_words():
    """Between forward and backward pass a learned token's log-probabilities are alive, and an unlearned one's not."""
    model = build_model().train()
    ids = torch.full((1, 200), VOCABULARY - 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kept = []
    for unlearned in (1, 150):
        labels = torch.where(torch.arange(200) < unlearned, -100, ids)
        kept.append(measure_step(model, {**inputs, "labels": labels}, autocast=False, sparsity="none")[0])
    assert kept[0] - kept[1] >= 149 * 4 * VOCABULARY
