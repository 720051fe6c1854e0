"""A window and sinks over output tokens hold every law, in worlds made for them."""

import copy
from dataclasses import replace

import pytest
import torch

from dynamic_llava.config import SparsityConfig
from dynamic_llava.engine.cache import AdmissionCache
from dynamic_llava.eval.identity import method_settings
from dynamic_llava.methods import Dynamic, get_method
from tests.builders import assert_same_logits
from tests.parity.test_families import world_of
from tests.world_laws import QUICK_LAWS, Laws
from tests.worlds import Unjudged

ROWS = (
    (
        (("text", 2), ("image", 2), ("text", 1), ("output", 4)),
        (("output", 2), ("text", 1), ("output", 1)),
        (("output", 3),),
    ),
    ((("output", 3), ("text", 1), ("output", 2), ("image", 2)), (), (("output", 1), ("text", 2), ("output", 4))),
)
"""An answer goes on behind a turn, and behind a turn that a row sits out; one turn ends in an image."""
ALL_KEPT = 100


def window_world(window, sinks=0, **more):
    world = world_of("llama", "dynamic", **more)
    return replace(world, shape=replace(world.shape, output_window=window, output_sinks=sinks), rows=ROWS)


@pytest.mark.parametrize(
    ("window", "sinks", "more"),
    [
        (3, 2, {"side": "right"}),
        pytest.param(1, 0, {}, marks=pytest.mark.slow),
        pytest.param(2, 0, {"attention": "eager", "lengths": "any", "seed": 5}, marks=pytest.mark.slow),
        pytest.param(ALL_KEPT, 0, {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@torch.no_grad()
def test_every_law(window, sinks, more):
    laws, judged = Laws(window_world(window, sinks, **more)), []
    for law in QUICK_LAWS:
        try:
            getattr(laws, law)()
            judged.append(law)
        except Unjudged:
            pass
    assert {"dropping_equals_masking", "scoring_equals_masking", "a_live_cache_equals_masking"} <= {*judged}, judged
    assert not laws.keep[laws.batch["output_mask"]].all(), "nothing is dropped"


@pytest.mark.slow
@torch.no_grad()
def test_compiled_steps_answer_as_eager_ones():
    Laws(window_world(2, 1)).compiled_steps_answer_as_eager_ones()


@torch.no_grad()
def test_a_window_as_long_as_the_answers_keeps_all():
    """And a shorter one does not; the logits are those with every output token kept."""
    laws = Laws(window_world(ALL_KEPT))
    everything = laws.keep | laws.batch["output_mask"]
    kept = laws.model(**laws.batch, labels=laws.batch["input_ids"], keep_mask=everything).logits
    assert_same_logits(laws.expected[laws.real], kept[laws.real])
    shorter = Laws(window_world(1)).expected
    assert (shorter - kept)[laws.real].abs().max() > 1e-2 * kept.abs().max()


@torch.no_grad()
def test_sinks_are_the_first_tokens_of_each_answer():
    """Answers begin behind prompt tokens and images, not behind padding nor at the beginning of a turn."""
    without, laws = Laws(window_world(0, 0)), Laws(window_world(0, 2))
    for row, turns in enumerate(ROWS):
        kinds, place, sinks = ["text"], 0, []
        for kind, count in (piece for turn in turns for piece in turn):
            kinds += [kind] * count
        for kind in kinds:
            place = place + 1 if kind == "output" else 0
            sinks += [place <= 2] if kind == "output" else []
        decided, plain = (one.record.output_decisions[row].tolist() for one in (laws, without))
        assert decided == [kept or sink for kept, sink in zip(plain, sinks, strict=True)]


@torch.no_grad()
def test_the_cache_holds_what_was_admitted_and_the_window():
    window = 3
    laws = Laws(window_world(window))
    *_, (_, out, cache) = laws.turns(laws.parts, laws.switches)
    record, output = cache.record, cache.record.layout.output
    for row in range(laws.rows):
        dropped = [not kept for kept in record.output_decisions[row].tolist()]
        held = int(record.keep_mask[row].sum()) + sum(dropped[-window:])
        assert int(out.sparsity.cache_lengths[row]) == held == int(record.tokens_per_layer()[row, -1])
    assert int(output.sum()) > laws.rows * window
    every = torch.ones_like(record.keep_mask)
    assert torch.equal(record.tokens_per_layer(every), record.tokens_per_layer())


def test_training_keeps_sinks_and_learns_from_beyond_the_window():
    """The mask's gradient is the same by both implementations, and none within a window over whole answers."""
    for window in (2, ALL_KEPT):
        laws, gradients = Laws(window_world(window, 2)), []
        model, output = copy.deepcopy(laws.model).train(), laws.batch["output_mask"]
        call = {**laws.batch, "labels": laws.batch["input_ids"], "sample_key": laws.switches["sample_key"]}
        sampled = model(**call)
        sampled.loss.backward()
        keep = sampled.sparsity.keep_mask.detach()
        _, place = sampled.sparsity.layout.ranks()
        assert (keep[output & (place < 2)] == 1).all() and not keep[output].all()
        for implementation in ("reference", "chunked"):
            decoder = model.model.language_model
            decoder.settings = replace(decoder.settings, masked_softmax=implementation)
            mask = keep.clone().requires_grad_()
            model(**call, keep_mask=mask).logits.square().mean().backward()  # the loss has a keep-rate term too
            gradients.append(mask.grad)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
        assert gradients[0][output].any() == (window != ALL_KEPT) and gradients[0][~output].any()
        assert all(one.grad is not None for one in decoder.output_predictor.parameters())


def test_what_has_no_window_is_refused():
    laws = Laws(window_world(2))
    _, _, cache = next(laws.turns(laws.parts, laws.switches))
    with pytest.raises(ValueError, match="opened with a window of 2 output tokens and this call asks for 0"):
        next(laws.turns(laws.parts, {"method": get_method("dynamic", layer=2, output_window=0)}, cache, first=1))
    with pytest.raises(ValueError, match="give output_by an output_window of 0"):
        get_method("mixed", output_by={"name": "dynamic", "output_window": 2}, evict_by="h2o")
    assert AdmissionCache.for_method(get_method("dynamic", output_window=2, sparsity="image"), 4).window == 0


def test_without_a_window_settings_and_answers_are_recorded_as_ever():
    """A checkpoint's config.json, and what answers depend on, have no word of what the paper has not."""
    plain, own = SparsityConfig(), SparsityConfig(output_window=2, output_sinks=1)
    names = {"output_window", "output_sinks"}
    assert not names & set(plain.to_dict()) and names <= set(own.to_dict())
    assert SparsityConfig.from_dict(own.to_dict()) == own and SparsityConfig.from_dict(plain.to_dict()) == plain
    half = Dynamic(image_keep_rate=0.5)
    assert not names & set(method_settings(half, plain)["method"])
    assert names <= set(method_settings(replace(half, output_window=2, output_sinks=1), plain)["method"])
