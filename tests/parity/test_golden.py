"""The published code's recorded numbers: prefill, decoding, and a training step with its noise and gradients."""

import pytest
import torch

from dynamic_llava.engine import attention
from dynamic_llava.methods import dynamic
from dynamic_llava.sparsity.noise import fold_key
from tests.golden_model import (
    OFFICIAL_IMAGE,
    TOKENS_PER_IMAGE,
    expand,
    facts,
    golden_model,
    our_name,
    our_value,
    recording,
)
from tests.sft_builders import take_step, trainer_around

LOGITS = {"rtol": 0, "atol": 2e-5}
IMAGE_START = 4
"""Every recorded prompt has four ids, then the image."""


@pytest.fixture(scope="module")
def model():
    return golden_model()


def prompt(recorded, prefix="", rows=slice(None)):
    ids = expand(recorded[f"{prefix}input_ids"][rows])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": recorded[f"{prefix}pixel_values"][rows],
    }


@pytest.mark.parametrize("case", ["b1", "b2"])
@torch.no_grad()
def test_prefill(model, case):
    recorded, known = recording("prefill"), facts("prefill")[case]
    out = model(**prompt(recorded, f"{case}."), use_cache=True)
    for row, wanted in enumerate(recorded[f"{case}.keep_index"]):
        assert torch.equal(out.sparsity.image_indices[row][0], wanted)
        kept = out.sparsity.keep_mask[row].nonzero().flatten()
        assert kept.tolist() == known["position_ids_after"][row]
        torch.testing.assert_close(out.logits[row, kept], recorded[f"{case}.logits"][row], **LOGITS)
    lengths = known["cache_lengths"]
    assert out.sparsity.dense_cache_lengths.tolist() == [lengths[0]] * len(out.logits)
    assert out.sparsity.cache_lengths.tolist() == [lengths[-1]] * len(out.logits)
    assert [int(layer.slots.lengths[0]) for layer in out.past_key_values.layers] == lengths


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@torch.no_grad()
def test_greedy_decoding(model, use_cache):
    recorded, known = recording("decode_cached"), facts("decode")["cached"]
    tokens = recorded["tokens"][0]
    out = model.generate(
        **prompt(recorded),
        max_new_tokens=len(tokens) + 1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        use_cache=use_cache,
    )
    start = out.sequences.shape[1] - len(tokens) - 1
    assert torch.equal(out.sequences[0, start:-1], tokens)
    torch.testing.assert_close(torch.stack(out.logits, 1), recorded["logits"], **LOGITS)
    assert torch.equal(out.sparsity.output_decisions[0].long(), recorded["keep"][0])
    if use_cache:
        lengths = known["cache_lengths"]
        assert out.sparsity.dense_cache_lengths.tolist() == [lengths[0]]
        assert out.sparsity.cache_lengths.tolist() == [lengths[-1]]
        compare_cache(out.past_key_values, recorded)


def compare_cache(cache, recorded):
    """Kept image tokens first, then the prompt, then the kept output: slot by slot, rotated keys included."""
    for index in (0, 2, 5):
        layer = cache.layers[index]
        filled = int(layer.slots.lengths[0])
        for ours, name in ((layer.keys, "k"), (layer.values, "v")):
            torch.testing.assert_close(ours[:, :, :filled], recorded[f"final_cache.{name}.layer{index}"], **LOGITS)


def teacher_forced(model, inputs, tokens):
    """Prefill, then feed `tokens` (B, T) one by one; return logits (B, T + 1, V) and admissions (B, T)."""
    out = model(**inputs, use_cache=True)
    logits, admitted = [out.logits[:, -1]], []
    mask = inputs["attention_mask"]
    for token in tokens.T:
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        out = model(input_ids=token[:, None], attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[:, -1])
        admitted.append(out.sparsity.keep_mask[:, -1])
    return torch.stack(logits, 1), torch.stack(admitted, 1).long(), out.sparsity


@torch.no_grad()
def test_a_batch_gives_what_the_published_code_gives_one_by_one(model):
    recorded = recording("decode_batch_equal_len")
    logits, admitted, record = teacher_forced(model, prompt(recorded), recorded["tokens"])
    torch.testing.assert_close(logits, recorded["solo_logits"], **LOGITS)
    assert torch.equal(admitted, recorded["solo_keep"])
    prompt_length = recorded["input_ids"].shape[1] - 1 + TOKENS_PER_IMAGE
    kept = prompt_length - TOKENS_PER_IMAGE + TOKENS_PER_IMAGE // 4 + recorded["solo_keep"].sum(1)
    assert record.cache_lengths.tolist() == kept.tolist()
    # What the published code gives for the batch is wrong (its README): we must not reproduce that.
    assert (logits - recorded["official_batched_logits_WRONG"]).abs().max() > 0.1


@pytest.mark.parametrize("row", range(3))
@torch.no_grad()
def test_solo_runs(model, row):
    recorded, rows = recording("decode_batch_equal_len"), slice(row, row + 1)
    logits, admitted, _ = teacher_forced(model, prompt(recorded, rows=rows), recorded["tokens"][rows])
    torch.testing.assert_close(logits, recorded["solo_logits"][rows], **LOGITS)
    assert torch.equal(admitted, recorded["solo_keep"][rows])


def recorded_softmax_attention(query, key, value, keep_mask, *, padding_mask=None, scale=None, implementation="auto"):
    """The attention of the recordings, epsilon included (tests/golden/README.md: softmax_with_policy).

    The epsilon leaks weight to dropped and future keys, so it exists here only.
    """
    tokens, eps = query.shape[2], 1e-6
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~causal, -torch.inf)
    itself = torch.eye(tokens)
    weight = keep_mask[:, None, None, :] + (1 - keep_mask[:, None, None, :]) * itself
    numerator = torch.exp(scores - scores.amax(-1, keepdim=True)) * weight
    return (numerator + eps / tokens) / (numerator.sum(-1, keepdim=True) + eps) @ value


@pytest.fixture
def training_model(model, monkeypatch):
    """The model in training mode with attention and a frozen vision tower as recorded; undone afterwards."""
    monkeypatch.setattr(attention, "masked_softmax_attention", recorded_softmax_attention)
    model.train()
    model.model.vision_tower.requires_grad_(False)
    yield model
    model.eval()
    model.requires_grad_(True)
    model.zero_grad(set_to_none=True)


def replay_noise(monkeypatch, uniform_image, uniform_text, sample_key):
    """Give the recorded Gumbel noise, (keep, drop) turned to (drop, keep), to the samples with these keys (3,)."""
    image, text = (-torch.log(-torch.log(u)).flip(-1) for u in (uniform_image, uniform_text))
    row_of = {int(key): row for row, key in enumerate(fold_key(sample_key, 0))}  # a sample's only image
    row_of |= {int(key): row for row, key in enumerate(fold_key(sample_key, -1))}  # its output tokens

    def recorded_noise(key, index, channels=2):
        rows = torch.tensor([row_of[int(one)] for one in key])
        if index.dim() == 1:  # image tokens: the place within the image
            return image[rows]
        # Output tokens: (T, 1) ranks; those of answers that are too short to be decided on are never used.
        rank = index.clamp(0, text.shape[1] - 1)
        return text[rows].gather(1, rank[..., None].expand(-1, -1, 2))

    monkeypatch.setattr(dynamic, "gumbel_noise", recorded_noise)


def training_inputs(recorded):
    ids = recorded["input_ids"]
    mask = expand(ids, recorded["attention_mask"].long(), filler=1)
    labels = expand(ids, recorded["labels"], filler=-100)
    assert torch.equal(labels, recorded["expanded_labels"])
    assert (ids == OFFICIAL_IMAGE).nonzero()[:, 1].eq(IMAGE_START).all()
    return {
        "input_ids": expand(ids),
        "attention_mask": mask,
        "labels": labels,
        "pixel_values": recorded["pixel_values"],
    }


@pytest.mark.parametrize("case", ["tau1.0", "tau0.3"])
def test_training_step(training_model, monkeypatch, case):
    recorded, known = recording("training"), facts("training")[case]
    key = torch.arange(3)
    replay_noise(monkeypatch, recorded[f"{case}.u_image"], recorded[f"{case}.u_text"], key)
    out = training_model(**training_inputs(recorded), tau=known["tau"], sample_key=key)
    compare_masks([out], recorded, case)
    real = real_tokens(recorded)
    torch.testing.assert_close(out.logits[real], recorded[f"{case}.logits"][real], **LOGITS)
    terms = ("loss", "lm_loss", "image_keep_loss", "output_keep_loss")
    compare_losses({name: out[name].item() for name in terms}, known)
    out.loss.backward()
    gradients = {name: p.grad for name, p in training_model.named_parameters() if p.grad is not None}
    compare_gradients(gradients, recorded, known, case)


@pytest.mark.parametrize("case", ["tau1.0", "tau0.3"])
def test_training_step_through_the_trainer(training_model, monkeypatch, tmp_path, case):
    """The Trainer's loss path gives the recorded numbers, with the batch whole or accumulated in parts."""
    recorded, known = recording("training"), facts("training")[case]
    inputs = training_inputs(recorded)
    inputs |= {"output_mask": inputs["labels"] != -100, "sample_ids": torch.arange(3)}
    whole = {}
    for split in ([3], [1, 2], [1, 1, 1]):
        trainer = trainer_around(training_model, tmp_path, tau_start=known["tau"], gradient_accumulation=len(split))
        key = trainer.sample_key(inputs["sample_ids"])
        replay_noise(monkeypatch, recorded[f"{case}.u_image"], recorded[f"{case}.u_text"], key)
        rows = zip(*(tensor.split(split) for tensor in inputs.values()), strict=True)
        parts = [dict(zip(inputs, tensors, strict=True)) for tensors in rows]
        terms, outputs, gradients = take_step(trainer, parts)
        compare_masks(outputs, recorded, case)
        compare_losses(terms, known)
        compare_gradients(gradients, recorded, known, case)
        whole = whole or gradients
        assert gradients.keys() == whole.keys()
        for name, wanted in whole.items():
            error = (gradients[name] - wanted).norm()
            assert error <= 1e-6 * wanted.norm(), f"{split}, {name}: relative error {error / wanted.norm():.1e}"


def real_tokens(recorded):
    """(B, N) bool: no padding."""
    return expand(recorded["input_ids"], recorded["attention_mask"].long(), filler=1).bool()


def compare_masks(outputs, recorded, case):
    """Hard masks exact, of one batch or of its parts."""
    real, mask = real_tokens(recorded), torch.cat([out.sparsity.keep_mask.detach() for out in outputs])
    assert torch.equal(mask[real], recorded[f"{case}.policy"][real])


def compare_losses(terms, known):
    close = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(terms["lm_loss"], known["lm_loss_ce"], **close)
    torch.testing.assert_close(terms["image_keep_loss"], known["image_mask_loss_unweighted"], **close)
    torch.testing.assert_close(terms["output_keep_loss"], known["text_mask_loss_unweighted"], **close)
    torch.testing.assert_close(terms["loss"], known["total_loss"], **close)


def compare_gradients(gradients, recorded, known, case):
    compared = 0
    for name, wanted in recorded.items():
        if name.startswith(f"{case}.grad."):
            official = name.removeprefix(f"{case}.grad.")
            error = (gradients[our_name(official)] - our_value(official, wanted)).norm() / wanted.norm()
            assert error < 1e-4, f"{official}: relative error {error:.1e}"
            compared += 1
    assert compared == 15
    assert {our_name(official) for official in known["grad_norms"]} == gradients.keys()
    for official, norm in known["grad_norms"].items():
        found = gradients[our_name(official)].norm().item()
        torch.testing.assert_close(found, norm, rtol=1e-4, atol=1e-6, msg=f"norm of {official}")


def test_masks_of_the_product_agree_without_the_epsilon(model):
    """The product's own attention reproduces the recorded training logits up to the size of that epsilon."""
    recorded = recording("training")
    inputs = training_inputs(recorded)
    with torch.no_grad():
        keep = recorded["tau1.0.policy"]
        out = model(**inputs, keep_mask=keep)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(out.logits[real], recorded["tau1.0.logits"][real], rtol=0, atol=1e-4)
