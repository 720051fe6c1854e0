"""A window over output tokens: MaskedSoftmax against Eq. 7 written out pair by pair, and slots against lists.

Shape suffixes as in sparsity/window.py.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamic_llava.layout import TokenLayout
from dynamic_llava.sparsity import masked_softmax_attention
from dynamic_llava.sparsity.cache import SlotStorage, write_token
from dynamic_llava.sparsity.kernels import chunked
from dynamic_llava.sparsity.window import NEVER, Band, WindowSlots
from tests.properties import few_or_many, for_all
from tests.sparsity.equation_7 import assert_equal, attention, dtypes, every, make, results, set_tiles
from tests.sparsity.implementations import INTERPRETED

HEADS, SIZE = 2, 3


@pytest.fixture(autouse=True)
def few_large_tiles(request, monkeypatch):
    if INTERPRETED and "triton" in request.node.name:
        set_tiles(monkeypatch, 64, 64)


def layout_of(valid, output):
    return TokenLayout(valid, torch.full(valid.shape, -1), output & valid)


def sees_by_window(valid, output, window):
    """(B, N, N) bool, by counting: output token j is one of the last `window` before token i."""
    inside = torch.zeros(*valid.shape, valid.shape[1], dtype=torch.bool)
    for row, (real, said) in enumerate(zip(valid.tolist(), (output & valid).tolist(), strict=True)):
        before = []
        for i in range(len(real)):
            for j in before[max(0, len(before) - window) :]:
                inside[row, i, j] = True
            if said[i]:
                before.append(i)
    return inside


def written_out(query, key, value, mask, *, valid, inside):
    """Eq. 7 with G pair by pair, without any stabilisation, for float64."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    tokens = query.shape[2]
    seen = torch.where(inside | torch.eye(tokens, dtype=torch.bool), 1.0, mask[:, None])
    causal = torch.ones(tokens, tokens).tril() * valid[:, None]
    weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).exp() * (seen * causal)[:, None]
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, torch.inf) @ value


@every
@settings(max_examples=6 if INTERPRETED else 25)
@given(st.data())
def test_equals_equation_7_with_a_window(implementation, data):
    batch, key_heads, groups = (data.draw(st.integers(1, 2)) for _ in range(3))
    tokens, size, window = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 9)), data.draw(st.integers(0, 20))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    inputs, upstream = make(batch, key_heads * groups, key_heads, tokens, size, keep=data.draw(st.floats(0, 1)))
    valid, output = torch.rand(batch, tokens) < 0.9, torch.rand(batch, tokens) < data.draw(st.sampled_from([0.5, 0.95]))
    inside = sees_by_window(valid, output, window)
    expected = results(lambda *x: written_out(*x, valid=valid, inside=inside), inputs, upstream)
    band = Band.of(layout_of(valid, output), window)
    for dtype in dtypes(implementation):

        def function(*leaves):
            return masked_softmax_attention(*leaves, padding_mask=valid, band=band, implementation=implementation)

        assert_equal(results(function, inputs, upstream, dtype), expected, 5e-5 if dtype == torch.float32 else 1e-11)


@every
def test_within_the_window_the_mask_has_no_gradient_and_no_effect(implementation):
    inputs, upstream = make(batch=1, tokens=40)
    output = torch.arange(40)[None] >= 10
    band = Band.of(layout_of(torch.ones_like(output), output), 7)
    dtype = dtypes(implementation)[-1]
    within = torch.zeros(1, 4, 40, 16, dtype=torch.float64)
    within[:, :, 15:18] = upstream[:, :, 15:18]  # tokens 10 to 17 are in the window of these three, or themselves
    *_, d_mask = results(attention(implementation, band=band), inputs, within, dtype)
    assert not d_mask[:, 10:].any() and d_mask[:, :10].all()
    query, key, value, mask = (x.to(dtype) for x in inputs)
    out = attention(implementation, band=band)(query, key, value, mask)
    other = attention(implementation, band=band)(query, key, value, mask.index_fill(1, torch.arange(11, 40), 0))
    assert torch.equal(out[:, :, :18], other[:, :, :18]) and not torch.equal(out, other)


@every
@pytest.mark.parametrize("window", [0, 40])
def test_no_window_is_no_band_and_a_long_one_keeps_all(implementation, window):
    inputs, upstream = make(batch=2, tokens=40)
    layout = layout_of(*(torch.ones(2, 40, dtype=torch.bool),) * 2)
    query, key, value, mask = inputs
    plain = (query, key, value, mask if window == 0 else torch.ones_like(mask))
    dtype = dtypes(implementation)[-1]
    expected = results(attention(implementation), plain, upstream, dtype)
    actual = results(attention(implementation, band=Band.of(layout, window)), inputs, upstream, dtype)
    assert_equal(actual[:4], expected[:4], 1e-5, "oqkv")
    if window:
        assert not actual[4].any()
    else:
        assert_equal(actual[4:], expected[4:], 1e-5, "m")


@every
def test_gradcheck_with_a_window(implementation, monkeypatch):
    if torch.float64 not in dtypes(implementation):
        pytest.skip("numerical derivatives need float64")
    monkeypatch.setattr(chunked, "BLOCK_ROWS", 2)
    monkeypatch.setattr(chunked, "CPU_PART", 1)
    (query, key, value, _), _ = make(batch=1, heads=2, key_heads=1, tokens=5, size=3, spread=1.0)
    output = torch.tensor([[False, True, True, True, True]])
    band = Band.of(layout_of(torch.ones_like(output), output), 1)
    leaves = [x.requires_grad_() for x in (query, key, value, torch.rand(1, 5, dtype=torch.float64) * 0.7 + 0.2)]
    assert torch.autograd.gradcheck(attention(implementation, band=band), leaves)


def test_a_band_that_does_not_fit_is_refused():
    (query, key, value, mask), _ = make(tokens=9)
    good = torch.zeros(2, 9, dtype=torch.int64)
    for band in (Band(good, good[:, :8]), Band(good.int(), good)):
        with pytest.raises(ValueError, match="one entry per token"):
            masked_softmax_attention(query, key, value, mask, band=band)


class Listed:
    """Slots with a window, and of every row the list of all tokens it was ever given: (number, is output, admitted)."""

    def __init__(self, window, rows):
        self.window, self.rows = window, [[] for _ in range(rows)]
        self.slots, self.storage = WindowSlots(4, window), None

    def held(self, row):
        """The numbers that a row's next token sees, by counting from the end."""
        said = [number for number, output, _ in row if output]
        last = said[max(0, len(said) - self.window) :]
        return sorted(number for number, _, admitted in row if admitted or number in last)

    def contents(self, numbers_BQ):
        return numbers_BQ[:, None, :, None].expand(-1, HEADS, -1, SIZE).float()

    def given(self, chunk):
        """Return valid, output, admit, number, (B, Q) each, of rows of (number, output, admitted), None at padding."""
        valid = torch.tensor([[one is not None for one in row] for row in chunk])
        number, output, admit = torch.tensor([[one or (0, 0, 0) for one in row] for row in chunk]).movedim(-1, 0)
        return valid, output.bool(), admit.bool(), number

    def open(self, chunk):
        valid, output, admit, number = self.given(chunk)
        self.slots.open(valid.sum(1), valid.shape[1])
        self.storage = SlotStorage(self.slots, self.contents(number))
        self.rows = [[one for one in row if one is not None] for row in chunk]
        band = Band.of(layout_of(valid, output), self.window)
        until = torch.where(admit, torch.iinfo(torch.int64).max, band.until).masked_fill(~valid, NEVER)
        self.storage.move(*self.slots.settle(until, (valid & output).sum(1)))

    def chunk(self, chunk):
        valid, output, admit, number = self.given(chunk)
        past = torch.tensor([sum(said for _, said, _ in row) for row in self.rows])
        band = Band.of(layout_of(valid, output), self.window, past)
        bands = (band,) if bool((output & valid).any()) else ()
        seen_BQW = self.slots.place_chunk(valid, admit, *bands)
        stored = self.storage.write(self.contents(number))[:, 0, :, 0]
        for place in range(valid.shape[1]):
            for row, its in enumerate(self.rows):
                if valid[row, place]:
                    expected = [*self.held(its), int(number[row, place])]
                    assert sorted(stored[row][seen_BQW[row, place]].tolist()) == sorted(expected)
                    its.append(chunk[row][place])
        self.storage.move(*self.slots.commit_chunk(admit & valid))

    def step(self, column):
        valid, output, admit, number = (values[:, 0] for values in self.given([[one] for one in column]))
        self.slots.reserve(1)
        token, keys = self.slots.token(), self.storage.grown()
        write_token(keys, token.places(HEADS), self.contents(number[:, None]))
        seen_BW = token.visible(self.slots.capacity)[:, 0]
        for row, its in enumerate(self.rows):
            if valid[row]:
                assert sorted(keys[row, 0, seen_BW[row], 0].tolist()) == [*self.held(its), int(number[row])]
                its.append(column[row])
        token.step(admit & valid, valid, output & valid)

    def select(self, rows):
        self.slots.select_rows(lambda values: values[rows])
        self.storage.select_rows(lambda values: values[rows])
        self.rows = [list(self.rows[row]) for row in rows]

    def check(self):
        assert self.slots.open_lengths().tolist() == [len(self.held(row)) for row in self.rows]


WHAT = st.lists(st.sampled_from(["step", "step", "step", "chunk", "rows"]), min_size=1, max_size=16)


@few_or_many
def test_slots_hold_what_was_admitted_and_the_last_output_tokens(examples):
    @for_all(examples, st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), WHAT)
    def check(seed, rows, tokens, window, what):
        torch.manual_seed(seed)
        numbers = iter(range(1, 10_000))

        def drawn():
            kind, admitted = torch.rand(2).tolist()
            return None if kind < 0.2 else (next(numbers), kind < 0.75, kind >= 0.75 or admitted < 0.5)

        listed = Listed(window, rows)
        width = [tokens, *torch.randint(1, tokens + 1, (rows - 1,)).tolist()]
        opening = [[drawn() or (next(numbers), False, True) for _ in range(own)] for own in width]
        listed.open([row + [None] * (tokens - len(row)) for row in opening])
        listed.check()
        for kind in what:
            if kind == "step":
                listed.step([drawn() for _ in listed.rows])
            elif kind == "chunk":
                count = int(torch.randint(1, 6, ()))
                listed.chunk([[drawn() for _ in range(count)] for _ in listed.rows])
            else:
                listed.select(torch.randint(0, len(listed.rows), (int(torch.randint(1, 4, ())),)).tolist())
            listed.check()


def test_a_long_answer_of_dropped_tokens_needs_no_more_slots_than_its_window():
    slots = WindowSlots(8, 5)
    slots.open(torch.tensor([3]), 3)
    for _ in range(200):
        slots.reserve(1)
        slots.token().step(*(torch.tensor([value]) for value in (False, True, True)))
    assert slots.open_lengths().tolist() == [3 + 5] and slots.capacity <= 3 + 5 + 1 + 8
