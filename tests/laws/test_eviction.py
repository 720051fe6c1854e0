"""Methods that evict equal a row alone from which nothing is ever removed, only hidden, head by head.

Compared are the logits of every token and the number of tokens that every head of every layer holds.
"""

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import pytest
import torch
from hypothesis import strategies as st

from dynamic_llava.engine.decoder import FAMILIES
from dynamic_llava.methods import (
    H2O,
    TOVA,
    KNorm,
    Method,
    Mixed,
    OneCut,
    RandomWindow,
    SlotEvidence,
    SnapKV,
    StreamingLLM,
    Structure,
)
from dynamic_llava.methods import METHODS as REGISTERED
from tests.builders import (
    IMAGE_TOKEN,
    LAYERS,
    TOKENS_PER_IMAGE,
    assert_same_logits,
    build_model,
    fixed_rows,
    make_row,
    prompts,
    rows,
    shared_model,
)
from tests.laws.test_paths import KV_HEADS, newest
from tests.laws.test_turns import ATTENTION, conversations, cut_into_turns, length, said_until
from tests.never_remove import NeverRemove, h2o, snapkv, streaming_llm, top_slots
from tests.properties import for_all

few_or_many = pytest.mark.parametrize(
    "examples", [pytest.param(8, id="few"), pytest.param(60, id="many", marks=pytest.mark.slow)]
)


@dataclass(frozen=True)
class Snap(Method):
    """A toy of one file: heads keep their newest tokens, and those that the last tokens of the prompt attend to."""

    name: ClassVar[str] = "snap"
    training_free: ClassVar[bool] = True
    evict_sees: ClassVar[frozenset[SlotEvidence]] = frozenset({"latest"})

    keep: int = 6
    window: int = 3

    @property
    def latest_queries(self):
        return self.window

    def evict(self, layer, slots):
        newest = slots.newest(self.window)
        score = slots.seen["latest"].masked_fill(~slots.filled | newest, -1.0)
        best = score.topk(min(self.keep, score.shape[-1]), -1).indices
        return newest | torch.zeros_like(newest).scatter(-1, best, True)


def snap(method):
    def rule(head, told):
        older = sorted(head.alive[: -method.window], key=lambda token: -head.latest[token])
        return [*head.alive[-method.window :], *older[: method.keep]]

    return rule


@dataclass(frozen=True)
class Scattered(Method):
    """A toy whose heads forget tokens of some places, by layer and head; the newest may go, even all of them.

    In layer 0 each forgets its oldest token whenever it is asked.
    """

    name: ClassVar[str] = "scattered"
    training_free: ClassVar[bool] = True
    evict_sees: ClassVar[frozenset[SlotEvidence]] = frozenset({"place"})

    def evict(self, layer, slots):
        if layer == 1:
            return None
        if layer == 0:
            return torch.arange(slots.filled.shape[-1]).expand_as(slots.filled) > 0
        place = slots.seen["place"]
        head = torch.arange(place.shape[1])[:, None]
        return (place * 7 + slots.tokens[:, None, None] + head * 3 + layer) % (2 + layer) > 0


def scattered(method):
    def rule(head, told):
        if told.layer < 2:
            return head.alive[1 - told.layer :]
        shift = told.tokens + told.head * 3 + told.layer
        return [token for token in head.alive if (token * 7 + shift) % (2 + told.layer)]

    return rule


@dataclass(frozen=True)
class WithACut(OneCut):
    """A toy that drops image and output tokens at layer 2, and evicts some of the others in all layers."""

    name: ClassVar[str] = "with a cut"
    training_free: ClassVar[bool] = True
    evict_sees: ClassVar[frozenset[SlotEvidence]] = frozenset({"place"})

    def keep_image(self, cut, images, learned):
        place = torch.arange(images.valid.shape[1])
        return (place % 3 != 0).expand_as(images.valid)

    def keep_output(self, outputs, learned):
        return outputs.rank % 2 == 0

    def evict(self, layer, slots):
        return slots.newest(3) | (slots.seen["place"] % 4 == layer % 4)


def with_a_cut(method):
    def rule(head, told):
        newest = head.alive[-3:]
        return [token for token in head.alive if token in newest or told.place[token] % 4 == told.layer % 4]

    return rule


def kept_at_the_cut(ids, output):
    image, keep = ids == IMAGE_TOKEN, torch.ones_like(output)
    keep[image] = (torch.arange(int(image.sum())) % TOKENS_PER_IMAGE) % 3 != 0
    keep[output] = torch.arange(int(output.sum())) % 2 == 0
    return keep


def kept_by_structure(ids, output):
    image, keep = ids == IMAGE_TOKEN, torch.ones_like(output)
    place = torch.arange(int(image.sum())) % TOKENS_PER_IMAGE
    keep[image] = (place + 1) * 3 // 10 > place * 3 // 10
    return keep


@dataclass(frozen=True)
class Everything(Method):
    """Keeps and stores everything, on a cache of rows."""

    name: ClassVar[str] = "everything"
    training_free: ClassVar[bool] = True


CASES = {
    "h2o": (H2O(heavy_rate=0.2, recent_rate=0.15), h2o),
    "h2o of all tokens": (H2O(heavy_rate=0.25, recent_rate=0.25, shares_of="tokens"), h2o),
    "h2o from layer 3": (H2O(layer=3), h2o),
    "h2o of outputs": (H2O(heavy_rate=0.25, recent_rate=0.25, shares_of="outputs"), h2o),
    "structure and h2o": (
        Mixed(
            image_by=Structure(image_keep_rate=0.3, output_keep_rate=None),
            evict_by=H2O(heavy_rate=0.3, recent_rate=0.1, shares_of="outputs"),
        ),
        lambda method: h2o(method.evict_by),
    ),
    "h2o of nothing": (H2O(heavy_rate=0, recent_rate=0), h2o),
    "streaming_llm": (StreamingLLM(sinks=2, window=5), streaming_llm),
    "tova": (TOVA(keep_rate=0.4), top_slots),
    "tova of all tokens": (TOVA(keep_rate=0.5, recent=3, shares_of="tokens"), top_slots),
    "knorm": (KNorm(keep_rate=0.4, layer=1), top_slots),
    "knorm of outputs": (KNorm(keep_rate=0.3, shares_of="outputs", layer=0), top_slots),
    "random_window": (RandomWindow(recent=4), top_slots),
    "random_window of outputs": (RandomWindow(keep_rate=0.5, recent=2, shares_of="outputs", seed=3), top_slots),
    "a bare window": (RandomWindow(keep_rate=0, recent=5), top_slots),
    "snapkv": (SnapKV(keep_rate=0.5, window=3, kernel=3), snapkv),
    "snapkv without pooling": (SnapKV(keep_rate=0.3, window=2, kernel=1), snapkv),
    "snap": (Snap(), snap),
    "scattered": (Scattered(), scattered),
    "with a cut": (WithACut(), with_a_cut),
}
METHODS = st.sampled_from(sorted(CASES))
model_of = lru_cache(build_model)
MODELS = st.builds(model_of, KV_HEADS, ATTENTION, family=st.sampled_from(sorted(FAMILIES)))
every_family_and_case = pytest.mark.parametrize(
    ("family", "case"),
    [
        pytest.param(family, case, marks=() if (i + j) % len(FAMILIES) == 0 else pytest.mark.slow)
        for i, family in enumerate(FAMILIES)
        for j, case in enumerate(CASES)
    ],
)
"""All; in the fast set every case meets one family."""
CALL = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def reference(model, row, case):
    method, rule = CASES[case]
    keeps = kept_by_structure if isinstance(method, Mixed) else kept_at_the_cut
    cut = {"cut": 2, "keeps": keeps} if method.cuts(LAYERS) else {}
    return NeverRemove(model, row, rule(method), method.latest_queries, **cut)


def test_every_registered_method_that_evicts_is_tried():
    evicting = {name for name, method in REGISTERED.items() if method().evicts}
    assert evicting <= {method.name for method, _ in CASES.values()}


@few_or_many
def test_generation_equals_never_removing(examples):
    @for_all(examples, rows(outputs=(0, 0)), MODELS, METHODS, st.integers(1, 14))
    @torch.no_grad()
    def check(batch, model, case, steps):
        out = model.generate(**prompts(batch), **CALL, max_new_tokens=steps, method=CASES[case][0])
        held = out.sparsity.head_lengths
        for index, row in enumerate(batch):
            never = reference(model, row, case)
            logits = [never.say(len(row.ids))[-1]]
            logits += [never.say(1, token[None])[-1] for token in out.sequences[index, -steps:-1]]
            assert_same_logits(torch.stack(out.logits, 1)[index], torch.stack(logits), what=f"{case}, row {index}")
            assert torch.equal(held[index], never.lengths())


@few_or_many
def test_turns_equal_never_removing(examples):
    """Turns of any tokens on a live cache, padding on either side and inside, rows that say nothing in a turn."""

    @for_all(examples, conversations(), MODELS, METHODS)
    def check(conversation, model, case):
        check_turns(model, case, *conversation)


@every_family_and_case
def test_turns_of_every_kind_equal_never_removing(family, case):
    """An image, an answer whose newest token a cut drops, single tokens, silence, padding before and behind."""
    parts = [
        [[("text", 2), ("image", 0), ("text", 2), ("output", 2)], [("text", 3), ("output", 1)], [("output", 1)]],
        [[("text", 1)], [], [("output", 1)]],
        [[("text", 9), ("output", 1)], [("output", 6), ("image", 0)], []],
    ]
    batch = [make_row([piece for part in row for piece in part], index) for index, row in enumerate(parts)]
    ends = [[0, *torch.tensor([1 + size(row[0]), size(row[1]), size(row[2])]).cumsum(0).tolist()] for row in parts]
    check_turns(model_of(2, family=family), case, batch, ends, ["right", "right", "left"])


def size(part):
    return sum(map(length, part))


@torch.no_grad()
def check_turns(model, case, batch, ends, sides):
    turns, cache = [], None
    never = [reference(model, row, case) for row in batch]
    for number, inputs in enumerate(cut_into_turns(batch, ends, sides)):
        turns.append(inputs)
        past, width = said_until(turns, None), inputs["input_ids"].shape[1]
        out = model(
            input_ids=inputs["input_ids"],
            pixel_values=inputs["pixel_values"],
            position_ids=past["position_ids"][:, -width:],
            attention_mask=past["attention_mask"],
            output_mask=past["output_mask"],
            cache=cache,
            use_cache=True,
            method=CASES[case][0],
        )
        cache = out.cache
        for index in range(len(batch)):
            start, stop = ends[index][number : number + 2]
            if start < stop:
                wanted = never[index].say(stop - start)
                real = inputs["attention_mask"][index].bool()
                computed = out.sparsity.keep_mask[index].bool() | newest(inputs["attention_mask"])[index]
                logits, wanted = out.logits[index][computed], wanted[computed[real]]
                assert_same_logits(logits, wanted, what=f"{case}, turn {number}, row {index}")
                assert torch.equal(cache.head_lengths()[index], never[index].lengths())
            assert int(cache.lengths()[1][index]) == stop


@torch.no_grad()
def continued(model, cache, tokens, method, steps=4):
    """Return the logits of a few more tokens of each row on a live cache, (B, steps, V)."""
    seen = []
    for step in range(steps):
        ids = tokens[:, step : step + 1]
        mask = torch.nn.functional.pad(cache.record.layout.valid, (0, 1), value=True)
        output = torch.nn.functional.pad(cache.record.layout.output, (0, 1), value=True)
        out = model(input_ids=ids, attention_mask=mask, output_mask=output, cache=cache, use_cache=True, method=method)
        seen.append(out.logits)
    return torch.cat(seen, 1)


def opened(model, batch, case):
    inputs = prompts(batch)
    out = model(**inputs, use_cache=True, method=CASES[case][0])
    return out.cache, torch.randint(4, 100, (len(batch), 4), generator=torch.Generator().manual_seed(5))


@every_family_and_case
@torch.no_grad()
def test_a_clone_and_chosen_rows_go_on_alone(family, case):
    """A copied cache, a row repeated and rows in another order give what each row gives alone, and leave no trace."""
    model, batch = model_of(2, family=family), fixed_rows(seed=60, output=0)
    cache, tokens = opened(model, batch, case)
    chosen = torch.tensor([2, 0, 2])
    twin = copy.deepcopy(cache)
    twin.batch_select_indices(chosen)
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    method = CASES[case][0]
    apart = continued(model, twin, tokens[chosen].flip(1), method)
    twice = continued(model, repeated, tokens.repeat_interleave(2, 0), method)
    own = continued(model, cache, tokens, method)
    assert_same_logits(twice, own.repeat_interleave(2, 0))
    for index, row in enumerate(batch):
        for logits, said in [(own[index], tokens[index]), *[(apart[0], tokens[2].flip(0))] * (index == 2)]:
            never = reference(model, row, case)
            never.say(len(row.ids))
            assert_same_logits(logits, torch.cat([never.say(1, token[None]) for token in said]))
    cache.reset()
    assert not cache.is_live and cache.allocated_bytes() == 0
    again = model(**prompts(batch), use_cache=True, cache=cache, method=method).cache
    assert_same_logits(continued(model, again, tokens, method), own)


@pytest.mark.parametrize(
    "call", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=["beams", "sample"]
)
@every_family_and_case
@torch.no_grad()
def test_searched_and_sampled_rows_equal_never_removing(family, case, call):
    model, batch, steps = model_of(2, family=family), fixed_rows(seed=61, output=0), 6
    torch.manual_seed(0)
    call = {**CALL, "output_scores": True, "max_new_tokens": steps, "method": CASES[case][0], **call}
    if "num_beams" in call and CASES[case][0].cuts(LAYERS):
        with pytest.raises(ValueError, match="num_beams=1"):
            model.generate(**prompts(batch), **call)
        return
    out = model.generate(**prompts(batch), **call)
    copies = len(out.sequences) // len(batch)
    for index, sequence in enumerate(out.sequences):
        row = batch[index // copies]
        never = reference(model, row, case)
        logits = [never.say(len(row.ids))[-1]]
        logits += [never.say(1, token[None])[-1] for token in sequence[-steps:-1]]
        logits = torch.stack(logits)
        if copies > 1:
            assert_same_logits(torch.stack(out.logits, 1)[index], logits)
        else:
            score = logits.log_softmax(-1).gather(1, sequence[-steps:, None]).mean()
            assert_same_logits(out.sequences_scores[index], score)
    if not CASES[case][0].cuts(LAYERS):
        assert out.sparsity.keep_mask.bool().equal(out.sparsity.layout.valid)


@torch.no_grad()
def test_what_is_held_is_what_is_stored_and_said():
    """Storage shrinks with the prefill's evictions and stays; lengths of heads are in the record and its choices."""
    model, batch = build_model(2, cache_block=8), fixed_rows(seed=62, output=0)
    dense = model.generate(**prompts(batch), **CALL, max_new_tokens=40, method="structure", image_keep_rate=1.0)
    method = H2O(heavy_rate=0.1, recent_rate=0.1)
    out = model.generate(**prompts(batch), **CALL, max_new_tokens=40, method=method)
    held = out.sparsity.head_lengths
    assert held.shape == (len(batch), LAYERS, 2)
    prompt_B = prompts(batch)["attention_mask"].sum(1)
    heavy_B, recent_B = method.budgets(prompt_B, torch.zeros_like(prompt_B))
    assert torch.equal(held, (heavy_B + recent_B)[:, None, None].expand_as(held))
    # Free slots for the next block of steps, and float32 sums beside keys and values of 16 numbers.
    allowed = (int(held.max()) + 2 * 8) * len(batch) * LAYERS * 2 * (2 * 16 + 1) * 4
    assert out.cache.allocated_bytes() <= allowed < 0.6 * dense.cache.allocated_bytes()
    assert out.sparsity.select_rows(lambda rows: rows[1:2]).head_lengths.shape[0] == 1
    assert dense.sparsity.head_lengths is None
    assert out.cache.record.head_lengths.equal(held) and "heads hold" in repr(out.sparsity)


@pytest.mark.parametrize("name", [name for name, method in REGISTERED.items() if method().evicts])
def test_what_eviction_cannot_serve_is_refused(name):
    model, batch = shared_model(), fixed_rows(seed=63, output=0)
    inputs, method = prompts(batch), REGISTERED[name]()
    ids, answer = inputs["input_ids"], torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    answer[:, -1] = True
    refused = {
        "use_cache=True": [
            lambda: model(**inputs, method=method, use_cache=False),
            lambda: model(**inputs, method=method, labels=ids, output_mask=answer),
            lambda: model.generate(**inputs, method=method, use_cache=False, max_new_tokens=2),
        ],
        "compile": [lambda: model.generate(**inputs, method=method, compile=True, max_new_tokens=2)],
    }
    for message, calls in refused.items():
        for call in calls:
            with pytest.raises(ValueError, match=message), torch.no_grad():
                call()


class Answers(Scattered):
    """Gives one answer, whatever it is asked."""

    answer: ClassVar[object] = None

    def evict(self, layer, slots):
        return type(self).answer(slots.filled)


@pytest.mark.parametrize("answer", [torch.Tensor.float, lambda filled: filled[:, :1], lambda filled: filled[..., :2]])
def test_an_answer_that_is_no_mask_of_the_slots_is_named(answer, monkeypatch):
    monkeypatch.setattr(Answers, "answer", answer)
    with (
        pytest.raises(ValueError, match=r"'scattered' answered evict with .*\(rows, key heads, slots\)"),
        torch.no_grad(),
    ):
        shared_model()(**prompts(fixed_rows(seed=64, output=0)), method=Answers(), use_cache=True)


@torch.no_grad()
def test_a_live_cache_goes_on_with_the_kind_of_method_that_opened_it():
    model, batch = shared_model(), fixed_rows(seed=65, output=0)
    caches = {case: opened(model, batch, case) for case in ("h2o", "streaming_llm")}
    kept = model(**prompts(batch), use_cache=True, method=Everything()).cache
    for cache, method, message in (
        (kept, H2O(), "does not"),
        (caches["h2o"][0], Everything(), "one that evicts"),
        (caches["streaming_llm"][0], H2O(), "mass"),
    ):
        with pytest.raises(ValueError, match=message):
            continued(model, cache, caches["h2o"][1], method)
    # A window may follow on heavy hitters: it asks for nothing more.
    assert torch.isfinite(continued(model, caches["h2o"][0], caches["h2o"][1], StreamingLLM(2, 4))).all()
