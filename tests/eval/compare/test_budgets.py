"""Equal budgets: what a knob is turned to, counted on records and in caches, and what cannot be given."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from dynamic_llava.eval.answering import prompt_inputs, read_ahead
from dynamic_llava.eval.compare.budgets import EqualBudget, Probed, turn
from dynamic_llava.eval.compare.contenders import Probing
from dynamic_llava.eval.predict import QueryBatch, generate_answers
from dynamic_llava.eval.run import LoadedModel
from dynamic_llava.methods import METHODS, Dense, Method, get_method
from tests.builders import TOKENS_PER_IMAGE
from tests.eval.compare.compare_builders import compare, results
from tests.eval.compare.conftest import Worded
from tests.eval.run_builders import lines_of

PRUNING = ("divprune", "dynamic", "fastv", "pyramiddrop", "random", "structure", "tome")
SOME = ("h2o", "streaming_llm", "dynamic")
"""Methods of different knobs: two rates, a count, and a rate of image tokens."""
OTHERS = ("knorm", "random_window", "snapkv:window=2", "tova", "fastv", "divprune")


@dataclass(frozen=True)
class Stored(Method):
    """Keeps so many tokens; what its two rates leave of a prompt of 100."""

    name: ClassVar[str] = "stored"

    old: float = 0.1
    new: float = 0.3
    window: int = 5

    def knobs(self, budget):
        return ("old", "new") if budget == "kv-bytes" else ("window",)


def probe(method):
    """One image whose tokens are the window, up to 40; ten bytes for each token that the rates leave."""
    return Probed((min(method.window, 40),), 10 * int(100 * (method.old + method.new) + 1e-9), 100)


def test_a_rate_is_turned_to_the_most_that_does_not_exceed_the_bytes():
    for amount, held in ((500, 500), (505, 500), (1000, 1000), (10, 10)):
        fitted = EqualBudget("kv-bytes", amount).fit(Stored(), probe)
        assert fitted.held == held and probe(fitted.method).kv_bytes == held
        assert fitted.method.new == pytest.approx(3 * fitted.method.old, abs=1e-5), "rates keep their proportion"
    assert set(fitted.turned) == {"old", "new"} and fitted.turned["old"][0] == 0.1
    assert "old 0.1 -> " in fitted.describe()


def test_a_count_is_turned_to_the_least_that_reaches_the_tokens():
    for amount in (1, 17, 40):
        assert EqualBudget("image-tokens", amount).fit(Stored(), probe).method.window == amount


@pytest.mark.parametrize("text", ["image-tokens", "image-tokens=", "image-tokens=0", "kv-bytes=1.5", "kv=3", "=3"])
def test_budgets_that_are_none(text):
    with pytest.raises(ValueError, match="give image-tokens=NUMBER or kv-bytes=NUMBER, a whole number above 0"):
        EqualBudget.read(text)


def test_what_a_method_cannot_be_given_is_refused():
    with pytest.raises(ValueError, match=r"its window can leave 1 to 40 here; choose an amount between them"):
        EqualBudget.read("image-tokens=41").fit(Stored(), probe)
    with pytest.raises(ValueError, match="its old and new can leave"):
        EqualBudget.read("kv-bytes=1001").fit(Stored(), probe)
    with pytest.raises(ValueError, match="has no setting that image-tokens are kept by"):
        EqualBudget.read("image-tokens=3").fit(get_method("tova"), probe)

    def in_twos(method):
        return replace(probe(method), image_tokens=(method.window // 2 * 2 or 1,))

    with pytest.raises(ValueError, match="the nearest that its window can leave are 2, 4; choose one of them"):
        EqualBudget.read("image-tokens=3").fit(Stored(), in_twos)
    with pytest.raises(ValueError, match="needs questions with an image"):
        EqualBudget.read("image-tokens=3").fit(Stored(), lambda method: replace(probe(method), image_tokens=()))


@pytest.mark.parametrize("name", ["average_pool", "downsample"])
@torch.no_grad()
def test_a_budget_that_is_no_square_names_the_nearest_squares(loaded, asked, name):
    probing = Probing(loaded, asked[:2], 2)
    assert EqualBudget("image-tokens", 9).fit(get_method(name), probing).held == 9
    by_chance = get_method("random", layer=0, output_keep_rate=None)
    assert EqualBudget("image-tokens", 9).fit(by_chance, probing).held == 9
    with pytest.raises(ValueError, match=f"{name} .*the nearest that its side_keep_rate can leave are 4, 9; choose"):
        EqualBudget("image-tokens", 5).fit(get_method(name), probing)


def test_knobs_of_inner_methods_are_turned():
    mixed = get_method("mixed", image_by="fastv", output_by="random")
    assert mixed.knobs("image-tokens") == ("image_by.image_keep_rate",)
    turned = turn(mixed, {"image_by.image_keep_rate": 0.5}, 0.125)
    assert turned.image_by == get_method("fastv", image_keep_rate=0.125) and turned.output_by == mixed.output_by


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_says_its_knobs_by_settings_that_it_has(name):
    """Numbers that a turn changes, or a rule that it replaces; none has what keeps all, or leaves images to others."""
    method = get_method(name)
    found = {kind: method.knobs(kind) for kind in ("image-tokens", "kv-bytes")}
    for names in found.values():
        for one in names:
            value = getattr(method, one)
            assert (isinstance(value, int | float) and not isinstance(value, bool)) or value == "outliers"
        if names:
            assert turn(method, {one: getattr(method, one) for one in names}, 1) != method
    assert any(found.values()) == (name not in ("dense", "mixed", "voco_llama")), "its tokens are those of its training"
    assert not (method.evicts and found["image-tokens"])


def test_a_rule_in_words_gives_way_to_a_share(loaded, asked):
    with torch.no_grad():
        fitted = EqualBudget("image-tokens", 5).fit(get_method("trim"), Probing(loaded, asked[:2], 2))
    assert fitted.held == 5 and fitted.describe() == f"image_keep_rate outliers -> {fitted.method.image_keep_rate:g}"


def test_settings_that_turn_nothing_are_no_knobs():
    assert not get_method("dynamic", image_selection="threshold").knobs("image-tokens")
    assert not get_method("dynamic", sparsity="output").knobs("kv-bytes")
    assert not get_method("random", image_keep_rate=None).knobs("image-tokens")
    assert not get_method("tova", shares_of="outputs").knobs("kv-bytes")


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return LoadedModel.load(str(checkpoint), get_method("dynamic"), "auto")


@pytest.fixture(scope="module")
def asked(checkpoint):
    return [one for one in Worded().questions(checkpoint) if one.image is not None]


def prefill_bytes(loaded, questions, method):
    """Return the mean bytes of the filled slots of each prompt, as they lie in the cache when its prefill ends."""
    batch, _ = next(read_ahead(questions, range(len(questions)), len(questions), loaded.processor))
    query = QueryBatch(tuple(range(len(batch))), prompt_inputs(loaded.processor, batch))
    said = generate_answers(loaded.model, loaded.processor, [query], max_new_tokens=1, switches={"method": method})
    return sum(one.cache_bytes for one in said) / len(said)


@torch.no_grad()
@pytest.mark.parametrize("name", [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_bytes_are_those_in_the_cache_and_one_turn_more_exceeds_them(loaded, asked, name):
    name, _, window = name.partition(":window=")
    method = get_method(name, **({"window": int(window)} if window else {}))
    dense = prefill_bytes(loaded, asked, Dense())
    share = 0.97 if name in ("dynamic", "fastv", "divprune") else 0.6
    equal = EqualBudget("kv-bytes", int(share * dense))
    fitted = equal.fit(method, Probing(loaded, asked, 4))
    held = prefill_bytes(loaded, asked, fitted.method)
    assert held == fitted.held <= equal.amount < dense
    knobs = {one: getattr(fitted.method, one) for one in fitted.turned}
    whole = all(isinstance(value, int) for value in knobs.values())
    step = 1 if whole else 2e-4
    assert prefill_bytes(loaded, asked, turn(fitted.method, knobs, sum(knobs.values()) + step)) > equal.amount


@pytest.mark.parametrize("names", [PRUNING[2:4], pytest.param(PRUNING, marks=pytest.mark.slow)])
def test_image_tokens_are_equal_on_the_record_of_every_answer(checkpoint, tmp_path, names):
    """Of all methods that have a knob for them, whatever they had before; the dense one keeps all."""
    out = tmp_path / "out"
    assert compare(checkpoint, ",".join(["dense", *names]), out, "--equal", "image-tokens=5", "--limit", 3) == 0
    found = results(out)
    for row, method in zip(found["tasks"]["toy"]["rows"], found["methods"], strict=True):
        kept = {one for line in lines_of(out / row["answers"]) for one in line["metadata"]["image_kept"]}
        assert kept == {TOKENS_PER_IMAGE if row["method"] == "dense" else 5}
        assert (method["set"] is None) == (row["method"] == "dense")
    page = " ".join((out / "compare.md").read_text().split())
    assert "Equal budget: every method but the dense one is given `image-tokens=5`" in page
    assert "set by the budget: `image_keep_rate 0.5 -> 0.3125`" in page
