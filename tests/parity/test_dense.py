"""With nothing dropped the model IS transformers' LLaVA: the same logits to the last bit, the same generations."""

import copy
from dataclasses import dataclass

import pytest
import torch
from transformers.generation import GenerationMixin

from dynamic_llava import get_method
from tests.builders import (
    assert_same_logits,
    build_model,
    collate,
    dense_twin,
    fixed_rows,
    make_row,
    prompt_segments,
    prompts,
)

MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "beam": {"num_beams": 3, "do_sample": False},
    "beam-sample": {"num_beams": 3, "do_sample": True},
    "several": {"num_return_sequences": 3, "do_sample": True},
    "uncached": {"use_cache": False, "do_sample": False},
}
EXPANDS_ROWS_OF_IMAGES = hasattr(GenerationMixin, "_expand_multimodal_outputs")
"""Earlier transformers repeat images one by one for beams, which mixes up rows that hold several; ours never do."""
KEEP_EVERYTHING = {
    "none": {"sparsity": "none"},
    "dense": {"method": "dense"},
    "all kept": {"image_keep_rate": 1.0, "output_threshold": float("-inf")},
    "random keeps all": {"method": get_method("random", image_keep_rate=None, output_keep_rate=None)},
}


@dataclass(frozen=True)
class Pair:
    ours: torch.nn.Module
    theirs: torch.nn.Module


@pytest.fixture(scope="module", params=[(4, "sdpa"), (2, "sdpa"), (4, "eager"), (2, "eager")], ids=str)
def pair(request):
    ours = build_model(*request.param)
    return Pair(ours, dense_twin(ours))


def without_switches(inputs):
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}


@pytest.mark.parametrize("switches", KEEP_EVERYTHING.values(), ids=KEEP_EVERYTHING)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_prefill_logits_are_identical(pair, side, switches):
    inputs = without_switches(collate(fixed_rows(seed=1), side))
    expected = pair.theirs(**inputs).logits
    actual = pair.ours(**inputs, **switches).logits
    real = inputs["attention_mask"].bool()
    assert (actual - expected)[real].abs().max() == 0


@torch.no_grad()
def test_one_unpadded_row_is_identical_without_a_mask(pair):
    inputs = collate(fixed_rows()[:1])
    call = {"input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"]}
    expected = pair.theirs(**call).logits
    for switches in KEEP_EVERYTHING.values():
        assert (pair.ours(**call, **switches).logits - expected).abs().max() == 0


@torch.no_grad()
def test_loss_with_labels_is_identical(pair):
    inputs = without_switches(collate(fixed_rows(seed=2), "right"))
    labels = torch.where(collate(fixed_rows(seed=2), "right")["output_mask"], inputs["input_ids"], -100)
    expected = pair.theirs(**inputs, labels=labels)
    actual = pair.ours(**inputs, labels=labels, sparsity="none")
    real = inputs["attention_mask"].bool()
    assert (actual.logits - expected.logits)[real].abs().max() == 0
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-6, atol=0)


@torch.no_grad()
def test_the_masked_forward_with_everything_kept_agrees(pair):
    """MaskedSoftmax with M = 1 is the ordinary softmax; it is another computation, so not to the last bit."""
    inputs = without_switches(collate(fixed_rows(seed=3), "left"))
    expected = pair.theirs(**inputs).logits
    ones = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    actual = pair.ours(**inputs, labels=inputs["input_ids"], output_mask=~ones, keep_mask=ones).logits
    real = inputs["attention_mask"].bool()
    assert_same_logits(actual[real], expected[real], tolerance=1e-5)


@pytest.mark.parametrize("switches", KEEP_EVERYTHING.values(), ids=KEEP_EVERYTHING)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@torch.no_grad()
def test_generations_are_identical(pair, mode, switches):
    rows = fixed_rows(seed=4, output=0)
    if {"num_beams", "num_return_sequences"} & set(mode) and not EXPANDS_ROWS_OF_IMAGES:
        rows = rows[:2]  # one image, and none
    call = {**prompts(rows), **mode, "max_new_tokens": 6}
    torch.manual_seed(7)
    expected = pair.theirs.generate(**call)
    torch.manual_seed(7)
    assert torch.equal(pair.ours.generate(**call, **switches), expected)


@torch.no_grad()
def test_text_alone_is_identical(pair):
    inputs = prompts([fixed_rows()[1]])
    assert inputs.pop("pixel_values") is None  # transformers' own generate cannot take the None
    expected = pair.theirs.generate(**inputs, max_new_tokens=6, do_sample=False)
    for switches in KEEP_EVERYTHING.values():
        assert torch.equal(pair.ours.generate(**inputs, **switches, max_new_tokens=6, do_sample=False), expected)


@torch.no_grad()
def test_rows_ending_early_are_identical(pair):
    inputs = prompts(fixed_rows(seed=5, output=0))
    call = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    free = pair.theirs.generate(**inputs, **call)
    end = int(free[2, inputs["input_ids"].shape[1] + 1])
    expected = pair.theirs.generate(**inputs, **call, eos_token_id=end)
    for switches in KEEP_EVERYTHING.values():
        assert torch.equal(pair.ours.generate(**inputs, **switches, **call, eos_token_id=end), expected)


def test_sparse_settings_do_change_the_result(pair):
    """The comparisons above would be empty if switches did nothing."""
    inputs = prompts(fixed_rows(seed=6, output=0))
    call = {**inputs, "max_new_tokens": 6, "do_sample": False}
    dense = pair.ours.generate(**call, sparsity="none")
    assert not torch.equal(pair.ours.generate(**call), dense)


IMAGES = {"none": [0], "one": [1], "two": [2], "three": [3], "ragged": [1, 0, 3, 2]}
"""Images of each row of a batch."""


def rows_with(images, seed):
    """Return a row for each number of images, of unequal length."""
    return [
        make_row([*prompt_segments(count, [2 + row, *[1 + row % 2] * count]), ("output", 3)], seed + row)
        for row, count in enumerate(images)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
@torch.no_grad()
def test_logits_are_identical_for_every_shape_and_precision(pair, images, dtype):
    """Heads and attention come from `pair`; both padding sides, prefill and the cached steps behind it."""
    ours, theirs = copy.deepcopy(pair.ours).to(dtype), copy.deepcopy(pair.theirs).to(dtype)
    for side in ("left", "right"):
        inputs = without_switches(collate(rows_with(images, seed=50), side))
        real = inputs["attention_mask"].bool()
        expected, actual = theirs(**inputs).logits, ours(**inputs, sparsity="none").logits
        assert actual.dtype == expected.dtype == dtype
        assert torch.equal(actual[real], expected[real]), side
    call = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    inputs = {name: value for name, value in prompts(rows_with(images, seed=60)).items() if value is not None}
    expected, actual = theirs.generate(**inputs, **call), ours.generate(**inputs, **call, sparsity="none")
    assert torch.equal(actual.sequences, expected.sequences)
    assert torch.equal(torch.stack(actual.logits), torch.stack(expected.logits))


@torch.no_grad()
def test_identity_is_not_for_want_of_a_difference(pair):
    """Another padding side or number of images does change the logits that are compared above."""
    one, two = (without_switches(collate(rows_with([count], seed=50))) for count in (1, 2))
    last = [pair.theirs(**inputs).logits[:, -1] for inputs in (one, two)]
    assert not torch.equal(*last)
    assert not torch.equal(pair.ours(**two).logits[:, -1], last[1])
