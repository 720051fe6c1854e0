"""Composed and stated selections: two methods' decisions in one, and exact output keep rates."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from dynamic_llava.methods import (
    H2O,
    Cut,
    Dynamic,
    FastV,
    ImageTokens,
    Mixed,
    OneCut,
    OutputTokens,
    Random,
    Structure,
    print_method,
    read_method,
)
from dynamic_llava.sparsity.decisions import budget
from tests.builders import fixed_rows, prompts, shared_model

LEARNED = SimpleNamespace(
    image_predictor=lambda hidden: hidden[..., :2], output_predictor=lambda hidden: hidden[..., :2]
)


TOP_K = Dynamic(output_selection="topk", output_keep_rate=0.5)


def outputs_of(*margins):
    """Whole answers whose keep margins are given."""
    rows = [torch.tensor(values) for values in margins]
    hidden = torch.cat([torch.stack([torch.zeros_like(row), row], dim=1) for row in rows])
    rank = torch.cat([torch.arange(len(row)) for row in rows])
    return OutputTokens(hidden=hidden, rank=rank, key=torch.zeros_like(rank))


def test_top_k_keeps_the_same_share_of_every_answer():
    method = TOP_K
    kept = method.keep_output(outputs_of([0.1, 0.9, 0.5, 0.2], [-3.0, -1.0, -2.0, -4.0, -5.0]), LEARNED)
    assert kept.tolist() == [False, True, True, False, False, True, True, False, False]


def test_top_k_gives_ties_to_the_earlier_token():
    assert TOP_K.keep_output(outputs_of([1.0, 1.0, 1.0, 1.0]), LEARNED).tolist() == [
        True, True, False, False,
    ]  # fmt: skip


def test_top_k_refuses_single_tokens():
    tokens = OutputTokens(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="whole answers"):
        TOP_K.keep_output(tokens, LEARNED)


def test_mixed_takes_each_decision_from_its_method():
    mixed = Mixed(image_by=Random(image_keep_rate=0.5), output_by=Structure(output_keep_rate=0.5))
    images = ImageTokens(torch.zeros(2, 8, 4), torch.ones(2, 8, dtype=torch.bool), torch.arange(2))
    cut = Cut(2)
    outputs = outputs_of([0.0] * 6)
    assert torch.equal(mixed.keep_image(cut, images, LEARNED), mixed.image_by.keep_image(cut, images, LEARNED))
    assert torch.equal(mixed.keep_output(outputs, LEARNED), mixed.output_by.keep_output(outputs, LEARNED))
    assert mixed.keep_image(cut, images, LEARNED).sum(1).tolist() == [4, 4]
    assert not mixed.is_dense
    assert Mixed(image_by=FastV(layer=3)).cuts(6) == (Cut(3, frozenset({"question_row"})),)
    assert Mixed(image_by=FastV(layer=3), output_by=Random(layer=3)).cuts(6)[0].output
    assert Mixed().is_dense and Mixed(output_by=Dynamic(sparsity="none")).is_dense
    with pytest.raises(ValueError, match="image_by decides at layer 3 and output_by at layer 2"):
        Mixed(image_by=FastV(layer=3), output_by=Random())


def test_random_keeps_sinks_and_says_how_long_a_window_is():
    outputs = outputs_of([0.0] * 6, [0.0] * 3)
    sinks = Random(image_keep_rate=None, output_keep_rate=0, output_sinks=2, output_window=5)
    assert sinks.keep_output(outputs, LEARNED).tolist() == [True, True] + 4 * [False] + [True, True, False]
    assert sinks.drop_delay == Mixed(output_by=sinks).drop_delay == 5
    chance = Random(output_keep_rate=0.5)
    drawn = chance.keep_output(outputs, LEARNED)
    both = Random(output_keep_rate=0.5, output_sinks=1).keep_output(outputs, LEARNED)
    assert torch.equal(both, drawn | (outputs.rank == 0)) and chance.drop_delay == 0
    assert Random(output_keep_rate=None, output_window=5).drop_delay == 0  # nothing is dropped, so nothing late
    later = OutputTokens(outputs.hidden, outputs.rank + 9, outputs.key, outputs.rank)  # a second answer of its row
    assert sinks.keep_output(later, LEARNED).tolist() == sinks.keep_output(outputs, LEARNED).tolist()
    for name in ("output_sinks", "output_window"):
        with pytest.raises(ValueError, match=f"{name}=-1 is no number of"):
            Random(**{name: -1})


FASTV_H2O = {
    "name": "mixed",
    "image_by": {"name": "fastv", "layer": 3, "image_keep_rate": 0.25},
    "evict_by": {"name": "h2o", "shares_of": "outputs", "heavy_rate": 0.25, "recent_rate": 0.25},
}
"""The paper's FastV+H2O, as docs/methods.md spells it."""


@torch.no_grad()
def test_fastv_and_h2o_drop_image_tokens_and_evict_half_of_an_answer():
    """Seven tokens are fed: three of them stay, the newest and two heavy ones; of the prompt all that FastV keeps."""
    model, inputs = shared_model(), prompts(fixed_rows(seed=20, output=0))
    call = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(**inputs, **call, method=FASTV_H2O)
    plain = model.generate(**inputs, **call, method=FASTV_H2O["image_by"])
    width = inputs["input_ids"].shape[1]
    assert torch.equal(out.sparsity.until[:, :width], plain.sparsity.until[:, :width])
    prompt = out.sparsity.tokens_per_layer(~out.sparsity.layout.output)
    assert torch.equal(out.sparsity.head_lengths, (prompt + 3)[..., None].expand_as(out.sparsity.head_lengths))
    method = read_method(FASTV_H2O)
    assert method.knobs("image-tokens") == method.knobs("kv-bytes") == ("image_by.image_keep_rate",)
    assert read_method(print_method(method)) == method and method.training_free and not method.is_dense
    assert Mixed(evict_by=H2O()).knobs("kv-bytes") == ("evict_by.heavy_rate", "evict_by.recent_rate")
    with pytest.raises(ValueError, match=r"'h2o' evicts stored tokens.*give such a method as evict_by"):
        Mixed(image_by=EvictingCut())
    with pytest.raises(ValueError, match="evict_by='fastv' evicts nothing"):
        Mixed(evict_by=FastV())
    with pytest.raises(ValueError, match="'mixed' evicts from layer 9 on, and this language model has 6 layers"):
        model.generate(**inputs, **call, method=Mixed(evict_by=H2O(layer=9)))


@dataclass(frozen=True)
class EvictingCut(OneCut):
    name: ClassVar[str] = "h2o"

    def evict(self, layer, slots):
        return None


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.29, 1.0, 0])
def test_a_stated_rate_is_kept_exactly_token_by_token(rate):
    """The predictor is asked for every token, and what it says changes nothing."""
    asked = []
    predictors = SimpleNamespace(
        output_predictor=lambda hidden: asked.append(len(hidden)) or torch.randn(len(hidden), 2)
    )
    method, rank = Dynamic(output_selection="spread", output_keep_rate=rate), torch.arange(200)
    tokens = OutputTokens(torch.zeros(200, 2), rank, torch.zeros_like(rank))
    kept = method.keep_output(tokens, predictors)
    assert kept.cumsum(0).tolist() == [budget(rate, count, minimum=0) for count in range(1, 201)] and asked == [200]
    alone = [OutputTokens(torch.zeros(1, 2), rank[i : i + 1], tokens.key[:1]) for i in range(200)]
    assert torch.equal(torch.cat([method.keep_output(one, predictors) for one in alone]), kept)


@pytest.mark.parametrize("settings", [{"output_selection": "topk"}, {"output_keep_rate": 0.5}])
def test_a_rate_belongs_to_the_selections_that_have_one(settings):
    with pytest.raises(ValueError, match="topk and spread need a rate, and threshold has none"):
        Dynamic(**settings)
