"""What the comparison of training attentions runs: both passes, all gradients, the same inputs for every way."""

import pytest
import torch

from dynamic_llava.profile import attention
from dynamic_llava.profile.timing import Timing


def test_every_way_takes_all_gradients_of_the_same_inputs(monkeypatch):
    seen = {}

    def run_once(ways, device, rounds):
        seen.update({name: way() for name, way in ways.items()})
        seconds = {"plain": 2.0, "reference": 8.0, "chunked": 3.0}
        return {name: Timing(seconds[name], 0.0, 0.0, rounds) for name in ways}

    monkeypatch.setattr(attention, "time_in_turn", run_once)
    found = attention.attention_ratios(
        ("reference", "chunked"), torch.device("cpu"), torch.float32, tokens=150, batch=2, heads=2, width=16
    )
    assert found == {"reference": 4.0, "chunked": 1.5}
    assert [len(gradients) for gradients in seen.values()] == [3, 4, 4]
    for ours, wanted in zip(seen["chunked"], seen["reference"], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    assert seen["chunked"][3].abs().max() > 0
    with pytest.raises(ValueError, match="cannot run here"):
        attention.attention_ratios(("triton",), torch.device("cpu"), torch.float32, tokens=8)
