"""On top of every projector methods keep their laws: rows are islands, cached is uncached, budgets count its tokens."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from dynamic_llava import METHODS, DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, get_method
from dynamic_llava.methods import read_method
from dynamic_llava.projectors import PROJECTORS
from dynamic_llava.sparsity import budget
from tests.builders import (
    IMAGE_SIZE,
    PAD,
    PATCH,
    TOKENS_PER_IMAGE,
    assert_same_logits,
    fixed_rows,
    predictors,
    prompts,
    tiny_config,
)

STEPS = 5
CALL = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
OTHERS = [name for name, projector in PROJECTORS.items() if not projector.per_patch]
BY_TOKENS = ("dynamic", "fastv", "divprune", "tome", "h2o")
BY_PATCHES = [name for name in METHODS if name != "mixed" and any(cut.reads_tower for cut in get_method(name).cuts(6))]
"""Methods that are shown the vision tower's patches, for which these projectors' tokens are not."""


@lru_cache(maxsize=1)
def model_of(projector):
    """Return a random model of images that become as many tokens as those of other tests, and its images' size."""
    values = {key: value for key, value in tiny_config().to_dict().items() if key != "model_type"}
    size = IMAGE_SIZE * PROJECTORS[projector].scale
    values["vision_config"]["image_size"] = size
    torch.manual_seed(0)
    model = DynamicLlavaForConditionalGeneration(DynamicLlavaConfig(**values, projector=projector)).eval()
    with torch.no_grad():
        for part in (*predictors(model), model.model.multi_modal_projector):
            for weight in part.parameters():
                weight.normal_(std=0.3) if weight.dim() > 1 else weight.add_(0.1)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD
    assert model.model.tokens_per_image == TOKENS_PER_IMAGE and size % PATCH == 0
    return model, size


def batch_of(size):
    """Four ragged rows of none to three images."""
    rows = fixed_rows(seed=20, output=0)
    times = size // IMAGE_SIZE
    grown = [row.pixels.repeat_interleave(times, 2).repeat_interleave(times, 3) for row in rows]
    return [replace(row, pixels=pixels) for row, pixels in zip(rows, grown, strict=True)]


def answer(model, inputs, method, keys, **more):
    return model.generate(**inputs, **CALL, method=method, sample_key=keys, **more)


@pytest.mark.parametrize("projector", OTHERS)
@pytest.mark.parametrize(
    "method", [BY_TOKENS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in BY_TOKENS[1:])]
)
@torch.no_grad()
def test_a_row_alone_is_the_row_in_its_batch_and_cached_is_uncached(projector, method):
    model, size = model_of(projector)
    batch = batch_of(size)
    inputs, keys = prompts(batch), torch.arange(len(batch)) + 5
    together = answer(model, inputs, method, keys)
    logits = torch.stack(together.logits, 1)
    for index in (0, 2):
        alone = answer(model, prompts(batch[index : index + 1]), method, keys[index : index + 1])
        assert_same_logits(torch.stack(alone.logits, 1)[0], logits[index], what=f"row {index}")
        for one, other in zip(alone.sparsity.image_indices[0], together.sparsity.image_indices[index], strict=True):
            assert torch.equal(one, other)
    chosen = read_method(method, model.config.sparsity)
    if not chosen.evicts:  # what a token sees there depends on the steps before it
        assert_same_logits(torch.stack(answer(model, inputs, method, keys, use_cache=False).logits, 1), logits)
    kept = {len(image) for row in together.sparsity.image_indices for image in row}
    assert kept == {TOKENS_PER_IMAGE if chosen.evicts else budget(chosen.image_keep_rate, TOKENS_PER_IMAGE)}


@pytest.mark.parametrize("projector", OTHERS)
@torch.no_grad()
def test_methods_that_decide_about_patches_are_refused_where_tokens_are_none(projector):
    model, size = model_of(projector)
    inputs = prompts(batch_of(size)[:1])
    assert {"vispruner", "visionzip", "hired", "prumerge_plus", "holov", "scope", "hiprune"} <= set(BY_PATCHES)
    for method in BY_PATCHES:
        with pytest.raises(ValueError, match=f"projector='{projector}'.*`per_patch`.*, or a method.*divprune"):
            model(**inputs, method=method)
