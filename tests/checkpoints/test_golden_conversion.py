"""The published code's recorded model, converted as a user would, gives the recorded numbers.

Its 128 words have no <image>, so the conversion adds one; the recorded logits are those of the first 128 words.
"""

import pytest
import torch

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.checkpoints.__main__ import main
from tests.golden_model import FOLDER, IMAGE_TOKEN, expand, facts, recording
from tests.parity.test_golden import teacher_forced

LOGITS = {"rtol": 0, "atol": 2e-5}
WORDS = facts("config")["vocab_size"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden") / "converted"
    assert main(["convert", str(FOLDER), str(folder)]) == 0
    return DynamicLlavaForConditionalGeneration.from_pretrained(folder).eval()


def prompt(model, recorded, prefix="", rows=slice(None)):
    ids = expand(recorded[f"{prefix}input_ids"][rows])
    ids = ids.masked_fill(ids == IMAGE_TOKEN, model.config.image_token_id)  # no recording uses that word
    pixels = recorded[f"{prefix}pixel_values"][rows]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def test_every_setting_comes_from_the_folder(model):
    sparsity = model.config.sparsity
    assert (sparsity.sparse_layer, sparsity.image_keep_rate, sparsity.output_keep_rate) == (2, 0.25, 0.5)
    assert (sparsity.predictor_width, sparsity.predictor_heads, sparsity.predictor_mlp) == (32, 4, 64)
    assert (sparsity.output_min_length, sparsity.keep_rate_weight) == (4, 100.0)
    assert model.config.untrained_predictors == []
    assert model.config.image_token_id == WORDS and model.config.text_config.vocab_size == 192


@pytest.mark.parametrize("case", ["b1", "b2"])
@torch.no_grad()
def test_prefill(model, case):
    recorded, known = recording("prefill"), facts("prefill")[case]
    out = model(**prompt(model, recorded, f"{case}."), use_cache=True)
    for row, wanted in enumerate(recorded[f"{case}.keep_index"]):
        assert torch.equal(out.sparsity.image_indices[row][0], wanted)
        kept = out.sparsity.keep_mask[row].nonzero().flatten()
        assert kept.tolist() == known["position_ids_after"][row]
        torch.testing.assert_close(out.logits[row, kept, :WORDS], recorded[f"{case}.logits"][row], **LOGITS)
    assert [int(layer.slots.lengths[0]) for layer in out.past_key_values.layers] == known["cache_lengths"]


@torch.no_grad()
def test_cached_decoding(model):
    recorded, known = recording("decode_cached"), facts("decode")["cached"]
    tokens = recorded["tokens"][0]
    out = model.generate(
        **prompt(model, recorded),
        max_new_tokens=len(tokens) + 1,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    start = out.sequences.shape[1] - len(tokens) - 1
    assert torch.equal(out.sequences[0, start:-1], tokens)
    logits = torch.stack(out.logits, 1)
    torch.testing.assert_close(logits[..., :WORDS], recorded["logits"], **LOGITS)
    # The words that the conversion added are means of the others, so none of them is ever the most likely one.
    assert (logits[..., WORDS:].amax(-1) < logits[..., :WORDS].amax(-1)).all()
    assert torch.equal(out.sparsity.output_decisions[0].long(), recorded["keep"][0])
    assert out.sparsity.cache_lengths.tolist() == [known["cache_lengths"][-1]]


@torch.no_grad()
def test_a_batch_of_solo_runs(model):
    recorded = recording("decode_batch_equal_len")
    logits, admitted, _ = teacher_forced(model, prompt(model, recorded), recorded["tokens"])
    torch.testing.assert_close(logits[..., :WORDS], recorded["solo_logits"], **LOGITS)
    assert torch.equal(admitted, recorded["solo_keep"])
