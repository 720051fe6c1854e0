"""What the comparison of training attentions runs: both passes, all gradients, the same inputs for every way."""

import pytest
import torch

from dynamic_llava.profile import operations
from dynamic_llava.profile.measuring import Timing

CPU = torch.device("cpu")


def test_every_way_takes_all_gradients_of_the_same_inputs(monkeypatch):
    seen = {}

    def run_once(ways, device, rounds, calls):
        seen.update({name: way() for name, way in ways.items()})
        seconds = {"plain": 2.0, "reference": 8.0, "chunked": 3.0}
        return {name: Timing(seconds[name], 0.0, 0.0, rounds, 0.0) for name in ways}

    monkeypatch.setattr(operations, "time_in_turn", run_once)
    sizes = {"tokens": 150, "batch": 2, "heads": 2, "width": 16}
    rows = operations.attention_rows(("reference", "chunked"), CPU, torch.float32, **sizes)
    assert {row["implementation"]: row["ratio"] for row in rows} == {"reference": 4.0, "chunked": 1.5}
    assert [len(gradients) for gradients in seen.values()] == [3, 4, 4]
    for ours, wanted in zip(seen["chunked"], seen["reference"], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    assert seen["chunked"][3].abs().max() > 0
    with pytest.raises(ValueError, match="cannot run here"):
        list(operations.attention_rows(("triton",), CPU, torch.float32, tokens=8))


def test_one_way_that_cannot_run_leaves_the_others_their_rows():
    sizes = {"batch": 2, "slots": 40, "heads": 2, "width": 16}
    rows = list(operations.ragged_rows(("triton", "sdpa"), CPU, torch.float32, **sizes))
    failed, masked, plain = rows
    assert failed["seconds"] is None and "triton cannot run here" in failed["failed"]
    assert masked["bytes"] == (21 + 40) * 2 * 2 * 16 * 4 and plain["bytes"] == 2 * 40 * 2 * 2 * 16 * 4
    assert all(row["seconds"] > 0 and row["rate"] == row["bytes"] / row["seconds"] for row in (masked, plain))
