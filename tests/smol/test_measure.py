"""What a row is made of: one pass and steps see the same, numbers are those of their definitions."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dynamic_llava.checkpoints.assemble import assemble
from dynamic_llava.methods import Dense, Dynamic
from dynamic_llava.methods.h2o import H2O
from dynamic_llava.methods.knorm import KNorm
from dynamic_llava.methods.random_window import RandomWindow
from dynamic_llava.methods.tova import TOVA
from dynamic_llava.model import DynamicLlavaForConditionalGeneration
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.smol.measure import (
    HeldAnswer,
    Reference,
    Seen,
    _step_by_step,
    agreement,
    answer_greedily,
    compare,
    margins_on,
    read_held,
    reference_of,
    see,
)
from dynamic_llava.smol.prompts import Request
from dynamic_llava.smol.rules import LastTokens, fed_margins, pairs
from dynamic_llava.smol.world import _said
from tests.smol.worlds import job_of, write_language

LAYER = 1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, its processor, and answers of several lengths."""
    folder = tmp_path_factory.mktemp("smol")
    language = write_language(folder / "language")
    base = assemble(language, folder / "base", text_only=True, say=lambda line: None)
    sparsity = {**vars(job_of(folder, language).sparsity), "sparse_layer": LAYER}
    torch.manual_seed(3)
    model = DynamicLlavaForConditionalGeneration.from_pretrained(base, sparsity=sparsity).eval()
    rng = np.random.default_rng(0)
    answers = [
        HeldAnswer(f"a{number}", rng.integers(20, 300, prompt).tolist(), rng.integers(20, 300, answer).tolist())
        for number, (prompt, answer) in enumerate([(5, 14), (9, 3), (7, 20), (5, 1)])
    ]
    return model, DynamicLlavaProcessor.from_pretrained(base), answers


WINDOWS = {
    "dense": Dense(),
    "learned": Dynamic(LAYER, sparsity="output"),
    "learned, window": Dynamic(LAYER, sparsity="output", output_window=3),
    "random": LastTokens(LAYER, keep_rate=0.5),
    "sinks and window": LastTokens(LAYER, window=2, sinks=1),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_batch_sees_what_each_answer_sees_alone(world, name):
    model, _, answers = world
    together = see(model, answers, WINDOWS[name], LAYER, 3)
    alone = [see(model, [one], WINDOWS[name], LAYER, 1) for one in answers]
    for number, its in enumerate(alone):
        if "random" not in name or number in (0, 3):  # draws belong to an answer's place
            torch.testing.assert_close(together.hidden[number], its.hidden[0], rtol=0, atol=2e-5)
            assert together.visible[number] == its.visible[0]
        assert together.hidden[number].shape == (len(answers[number].answer), 32)


def test_visible_pairs_are_those_of_the_rule(world):
    model, _, answers = world
    seen = see(model, answers, LastTokens(LAYER, window=2, sinks=1), LAYER, 4)
    for one, found in zip(answers, seen.visible, strict=True):
        assert found == sum(j == 0 or i - j <= 2 for i in range(one.fed) for j in range(i))
    everything = see(model, answers, Dense(), LAYER, 4)
    assert everything.visible == [pairs(one.fed) for one in answers]


def test_a_window_alone_is_what_evicting_all_older_tokens_is(world):
    """One pass with a mask against a cache that drops, of two independent methods: the last two tokens stay."""
    model, _, answers = world
    one_pass = see(model, answers, LastTokens(LAYER, window=2), LAYER, 4)
    steps = see(model, answers, RandomWindow(0.0, 2, "outputs", LAYER), LAYER, 4)
    for number in range(len(answers)):
        torch.testing.assert_close(one_pass.hidden[number], steps.hidden[number], rtol=0, atol=2e-5)
    assert one_pass.visible == steps.visible


@pytest.mark.parametrize("method", [H2O(0.5, 0.5, "outputs", LAYER), TOVA(1.0, 1, "outputs"), KNorm(1.0, 1, "outputs")])
def test_what_evicts_nothing_is_dense_step_by_step(world, method):
    model, _, answers = world
    dense, steps = see(model, answers, Dense(), LAYER, 4), _step_by_step(model, answers, method, LAYER)
    for number in range(len(answers)):
        torch.testing.assert_close(dense.hidden[number], steps.hidden[number], rtol=0, atol=2e-5)
    assert steps.visible == pytest.approx(dense.visible)


HELD = {
    "H2O": (H2O(0.25, 0.25, "outputs", LAYER), lambda t: t // 2 - t // 4 + max(1, t // 4)),
    "KNorm": (KNorm(0.5, 1, "outputs", LAYER), lambda t: max(1, t // 2)),
}
"""Methods, and how many of t output tokens they hold: the share, and at least the newest."""


@pytest.mark.parametrize("name", HELD)
def test_shares_of_outputs_hold_their_budget(world, name):
    model, _, answers = world
    method, held = HELD[name]
    seen = see(model, answers, method, LAYER, 2)
    for one, found in zip(answers, seen.visible, strict=True):
        assert found == sum(map(held, range(1, one.fed)))


def test_likelihood_divergence_and_agreement_are_their_definitions():
    rng = np.random.default_rng(1)
    answers = [HeldAnswer("a", [1], rng.integers(0, 50, 300).tolist()), HeldAnswer("b", [1], [4])]
    head, dense_head = (torch.from_numpy(rng.normal(size=(50, 8))) for _ in range(2))
    hidden, dense = ([torch.from_numpy(rng.normal(size=(len(one.answer), 8))) for one in answers] for _ in range(2))
    found = compare(Seen(hidden, [3.0, 0.0]), head, Reference(dense, dense_head, []), answers)
    for one, own, other, its in zip(answers, hidden, dense, found, strict=True):
        p, q = (
            np.exp(x) / np.exp(x).sum(1, keepdims=True)
            for x in ((other @ dense_head.T).numpy(), (own @ head.T).numpy())
        )
        assert its["nll"] == pytest.approx(-sum(math.log(q[t, w]) for t, w in enumerate(one.answer)), rel=1e-5)
        assert its["kl"] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-4)
        assert its["same"] == (p.argmax(1) == q.argmax(1)).sum()
    assert (found[0]["tokens"], found[0]["pairs"], found[0]["visible"], found[1]["pairs"]) == (
        300,
        298 * 299 / 2,
        3.0,
        0,
    )
    assert agreement([[1, 2, 3, 4], [9, 2, 3, 4], [1, 2, 3, 4]], [[1, 2, 0, 4], [1, 2, 3, 4], [1, 2, 3, 4]]) == [
        0.5,
        0,
        1,
    ]


def test_the_reference_is_dense(world):
    model, processor, answers = world
    reference = reference_of(model, processor, answers, 2, 5)
    rows = compare(see(model, answers, Dense(), LAYER, 4), model.lm_head.weight, reference, answers)
    assert all(abs(row["kl"]) < 1e-6 and row["same"] == row["tokens"] for row in rows)
    said, seconds = answer_greedily(model, processor, answers, Dense(), 5)
    assert said == reference.greedy and seconds > 0 and all(len(one) == 5 for one in said)
    with torch.no_grad():  # of the parent's own forward
        ids = torch.tensor([answers[2].prompt + answers[2].answer[:-1]])
        logits = model(input_ids=ids, sparsity="none").logits[0, len(answers[2].prompt) - 1 :]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(answers[2].answer), reduction="sum")
    assert rows[2]["nll"] == pytest.approx(nll.item(), rel=1e-4)


def test_margins_are_those_that_decide(world, tmp_path):
    model, processor, _ = world
    samples = [_said(Request(f"p{n}", f"What is {n}?", True), "a red circle " * (n + 2)) for n in range(3)]
    (tmp_path / "held.json").write_text(json.dumps(samples))
    answers = read_held(tmp_path / "held.json", processor, 300)
    assert [one.id for one in answers] == ["p0", "p1", "p2"]
    assert processor.tokenizer.decode(answers[0].answer).startswith("a red circle")
    assert answers[0].answer[-1] == processor.end_token_id
    margins = fed_margins(margins_on(model, tmp_path / "held.json", processor, 2, 300))
    assert [len(one) for one in margins] == [one.fed for one in answers]
    threshold = float(np.median(np.concatenate(margins)))
    method = replace(WINDOWS["learned"], output_threshold=threshold)
    seen = see(model, answers, method, LAYER, 3)
    for one, its, found in zip(answers, margins, seen.visible, strict=True):
        assert found == sum((its > threshold) * np.arange(one.fed)[::-1])
    with pytest.raises(ValueError, match=r"raise data.max_length, which is 20"):
        read_held(tmp_path / "held.json", processor, 20)
