"""Positions of a row may be ahead of its columns: tokens without position_ids go on from the row's last position."""

import copy

import pytest
import torch

from dynamic_llava.engine.decoder import FAMILIES
from dynamic_llava.methods import METHODS
from tests.builders import assert_same_logits, fixed_rows, method_of, new_model_of, prompts

AHEAD = torch.tensor([[3], [0], [11], [1]])
"""How far the positions of each of the four rows are ahead of its own count of tokens."""
SPARSE = [name for name, method in METHODS.items() if not method().is_dense]
PAIRS = [(family, name) for family in FAMILIES for name in SPARSE if family == "llama" or name in ("dynamic", "h2o")]
"""Every method on one family, one of each kind of cache on every family."""


def opened(model, method):
    """Return the cache of four ragged prompts, padded on the left, their masks, and the position behind each row."""
    inputs = prompts(fixed_rows(seed=70, output=0))
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0) + AHEAD
    out = model(**inputs, position_ids=positions, use_cache=True, method=method)
    return out.cache, inputs["attention_mask"], positions[:, -1:] + 1


@pytest.mark.parametrize("count", [1, 3], ids=["a step", "a turn"])
@pytest.mark.parametrize(("family", "name"), PAIRS)
@torch.no_grad()
def test_a_cache_knows_how_far_its_rows_are_ahead(family, name, count):
    model, method = new_model_of(name, 2, family=family).eval(), method_of(name)
    cache, mask, following = opened(model, method)
    ids = torch.randint(5, 100, (4, count), generator=torch.Generator().manual_seed(1))

    def said(rows, **positions):
        twin = copy.deepcopy(cache)
        twin.batch_select_indices(rows)
        kind = {"attention_mask": torch.nn.functional.pad(mask[rows], (0, count), value=1)}
        return model(input_ids=ids[rows], **kind, **positions, cache=twin, use_cache=True, method=method).logits

    for rows in (torch.arange(4), torch.tensor([2, 0, 2])):
        known = following[rows] + torch.arange(count)
        assert_same_logits(said(rows), said(rows, position_ids=known), 1e-6)
        assert (said(rows) - said(rows, position_ids=known - AHEAD[rows])).abs().amax() > 1e-3
