"""The rows as data, and the selections composed for them."""

from types import SimpleNamespace

import pytest
import torch

from dynamic_llava.config import SparsityConfig
from dynamic_llava.methods import Cut, Dense, FastV, ImageTokens, OutputTokens, Random, Structure
from dynamic_llava.tiny.job.rows import REFERENCE, Mixed, TopKOutput, equal_keep_rows, first_rows

LEARNED = SimpleNamespace(
    image_predictor=lambda hidden: hidden[..., :2], output_predictor=lambda hidden: hidden[..., :2]
)


def outputs_of(*margins):
    """Whole answers whose keep margins are given."""
    rows = [torch.tensor(values) for values in margins]
    hidden = torch.cat([torch.stack([torch.zeros_like(row), row], dim=1) for row in rows])
    rank = torch.cat([torch.arange(len(row)) for row in rows])
    return OutputTokens(hidden=hidden, rank=rank, key=torch.zeros_like(rank))


def test_top_k_keeps_the_same_share_of_every_answer():
    method = TopKOutput(output_keep_rate=0.5)
    kept = method.keep_output(outputs_of([0.1, 0.9, 0.5, 0.2], [-3.0, -1.0, -2.0, -4.0, -5.0]), LEARNED)
    assert kept.tolist() == [False, True, True, False, False, True, True, False, False]


def test_top_k_gives_ties_to_the_earlier_token():
    assert TopKOutput(output_keep_rate=0.5).keep_output(outputs_of([1.0, 1.0, 1.0, 1.0]), LEARNED).tolist() == [
        True, True, False, False,
    ]  # fmt: skip


def test_top_k_refuses_single_tokens():
    tokens = OutputTokens(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="whole answers"):
        TopKOutput().keep_output(tokens, LEARNED)


def test_mixed_takes_each_decision_from_its_method():
    mixed = Mixed(image_by=Random(image_keep_rate=0.5), output_by=Structure(output_keep_rate=0.5))
    images = ImageTokens(torch.zeros(2, 8, 4), torch.ones(2, 8, dtype=torch.bool), torch.arange(2))
    cut = Cut(2)
    outputs = outputs_of([0.0] * 6)
    assert torch.equal(mixed.keep_image(cut, images, LEARNED), mixed.image_by.keep_image(cut, images, LEARNED))
    assert torch.equal(mixed.keep_output(outputs, LEARNED), mixed.output_by.keep_output(outputs, LEARNED))
    assert mixed.keep_image(cut, images, LEARNED).sum(1).tolist() == [4, 4]
    assert not mixed.is_dense
    assert Mixed(layer=3, image_by=FastV()).cuts(6) == (Cut(3, frozenset({"question_row"}), output=True),)


def test_rows_are_distinct_and_hold_the_settings():
    settings = SparsityConfig(sparse_layer=3, image_keep_rate=0.25)
    rows = first_rows(settings) + equal_keep_rows(settings, 0.46789)
    assert len({row.key for row in rows}) == len(rows) == len({row.title for row in rows})
    methods = {row.key: row.switches["method"] for row in rows if "method" in row.switches}
    assert {method.layer for method in methods.values()} == {3}
    assert methods["fastv"].image_keep_rate == methods["random_image"].image_keep_rate == 0.25
    assert methods["inside_random"].image_by.image_keep_rate == 0.25
    assert methods["no_image"].image_keep_rate == 0
    for key in ("random_output", "alternate_output"):
        assert methods[key].output_keep_rate == 0.4679 and methods[key].image_keep_rate is None
    for key in ("inside_random", "inside_alternate"):
        assert methods[key].output_by.output_keep_rate == 0.4679
    assert methods["inside_topk"].output_keep_rate == 0.4679


def test_learned_rows_are_those_where_the_image_predictor_runs():
    settings = SparsityConfig()
    rows = first_rows(settings) + equal_keep_rows(settings, 0.5)
    learned = {row.key for row in rows if row.learned}
    assert learned == {
        "dynamic_image", REFERENCE, "uncached", "inside_random", "inside_alternate", "inside_topk",
    }  # fmt: skip
    assert not any(isinstance(row.switches.get("method"), Dense) for row in rows)


def test_rows_of_models_that_were_not_trained_are_left_out():
    keys = {row.key for row in first_rows(SparsityConfig(), dynamic_image=False, uncached=False)}
    assert "dynamic_image" not in keys and "uncached" not in keys and REFERENCE in keys
