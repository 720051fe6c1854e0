"""Slots of rows and of key heads against a list per row and head from which nothing is ever removed, only crossed out.

A token's key and value hold its number, so a storage can be read back. Shape suffixes as in sparsity/cache.py.
"""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st

from dynamic_llava.engine.evict import attention_mass, latest
from dynamic_llava.layout import Packing
from dynamic_llava.sparsity.cache import AdmissionSlots, SlotStorage, TokenSlots, write_token
from dynamic_llava.sparsity.ragged_attention import ragged_attention
from tests.properties import few_or_many, for_all

HEADS, GROUPS, SIZE = 2, 2, 4


@dataclass
class Both:
    """A layer in slots, and every token that it was ever given: (B, N) numbers and (B, K, N) which still are there."""

    slots: AdmissionSlots
    numbers: torch.Tensor
    alive: torch.Tensor
    keys: SlotStorage | None = None
    values: SlotStorage | None = None

    def contents(self, numbers_BN):
        return numbers_BN[:, None, :, None].expand(-1, HEADS, -1, SIZE) / torch.arange(1, 1 + SIZE)

    def add(self, numbers_BN, admit_BN):
        self.numbers = torch.cat([self.numbers, numbers_BN], 1)
        self.alive = torch.cat([self.alive, admit_BN[:, None].expand(-1, HEADS, -1)], 2)

    def open(self, valid_BN, numbers_BN):
        packing = Packing.of(valid_BN)
        self.slots.open(valid_BN.sum(1), valid_BN.shape[1], packing)
        self.keys, self.values = (SlotStorage(self.slots, self.contents(numbers_BN)) for _ in range(2))
        self.add(numbers_BN, valid_BN)

    def chunk(self, valid_BQ, admit_BQ, numbers_BQ):
        """A chunk of several tokens; every token sees what the list says, in the list's order."""
        seen = self.slots.place_chunk(valid_BQ, admit_BQ)
        stored = self.keys.write(self.contents(numbers_BQ))[..., 0]
        self.values.write(self.contents(numbers_BQ))
        seen = seen if seen.dim() == 4 else seen[:, None].expand(-1, HEADS, -1, -1)
        for row, head, query in torch.cartesian_prod(*map(torch.arange, seen.shape[:3])).tolist():
            if valid_BQ[row, query]:
                past = self.numbers[row, self.alive[row, head]].tolist()
                among = numbers_BQ[row, : query + 1][admit_BQ[row, : query + 1] & valid_BQ[row, : query + 1]].tolist()
                itself = int(numbers_BQ[row, query])
                expected = [*past, *among, *([] if admit_BQ[row, query] else [itself])]
                assert sorted(stored[row, head][seen[row, head, query]].tolist()) == sorted(expected)
        for_both = self.slots.commit_chunk(admit_BQ & valid_BQ)
        self.keys.move(*for_both)
        self.values.move(*for_both)
        self.add(numbers_BQ, admit_BQ & valid_BQ)

    def step(self, admit_B, numbers_B, query_BH1D):
        """One token of each row: its attention, and the mass it leaves, are those over the list."""
        self.slots.reserve(1)
        keys, values = self.keys.grown(), self.values.grown()
        token = TokenSlots(self.slots.open_lengths())
        for storage in (keys, values):
            write_token(storage, token.places(HEADS), self.contents(numbers_B[:, None]))
        visible = token.visible(self.slots.capacity)
        visible = visible if visible.dim() == 4 else visible[:, None]
        out = ragged_attention(query_BH1D, keys, values, token.lengths)
        mass = attention_mass(query_BH1D, keys, visible)
        self.add(numbers_B[:, None], torch.ones_like(admit_B)[:, None])
        full = self.contents(self.numbers)
        scores = query_BH1D.unflatten(1, (HEADS, GROUPS)) @ full[:, :, None].transpose(3, 4) / SIZE**0.5
        weights = scores.masked_fill(~self.alive[:, :, None, None], -torch.inf).softmax(-1)
        torch.testing.assert_close(out, (weights @ full[:, :, None]).flatten(1, 2))
        expected = weights.sum((2, 3))
        for row, head in torch.cartesian_prod(*map(torch.arange, mass.shape[:2])).tolist():
            alive, place = self.alive[row, head], visible[row].expand(HEADS, 1, -1)[head, 0]
            torch.testing.assert_close(mass[row, head, place], expected[row, head, alive])
            assert not mass[row, head, ~place].any()
        token.admit(admit_B)
        self.alive[:, :, -1] &= admit_B[:, None]

    def evict(self, stay_BKN, shrink):
        """Cross out tokens: stay_BKN is over all tokens ever given."""
        filled = self.slots.filled()
        stay = torch.zeros_like(filled)
        for row, head in torch.cartesian_prod(*map(torch.arange, filled.shape[:2])).tolist():
            stay[row, head, : int(filled[row, head].sum())] = stay_BKN[row, head, self.alive[row, head]]
        stay |= ~filled & (torch.rand(filled.shape) < 0.5)  # what is said about unfilled slots means nothing
        order = self.slots.evict(stay, shrink=shrink)
        self.keys.take(order)
        self.values.take(order)
        self.alive &= stay_BKN
        if shrink:
            assert self.keys.data.shape[2] == max(1, int(self.alive.sum(-1).max()))

    def select(self, rows):
        for part in (self.slots, self.keys, self.values):
            part.select_rows(lambda data: data[rows])
        self.numbers, self.alive = self.numbers[rows], self.alive[rows]

    def check(self):
        lengths = self.slots.open_lengths()
        lengths = lengths if lengths.dim() == 2 else lengths[:, None].expand(-1, HEADS)
        assert torch.equal(lengths, self.alive.sum(-1))
        for storage in (self.keys, self.values):
            for row, head in torch.cartesian_prod(*map(torch.arange, lengths.shape)).tolist():
                stored = storage.data[row, head, : int(lengths[row, head]), 0]
                assert stored.tolist() == self.numbers[row, self.alive[row, head]].tolist()


WHAT = st.lists(st.sampled_from(["step", "chunk", "evict", "shrink", "rows"]), min_size=1, max_size=14)


@few_or_many
def test_slots_hold_what_a_list_from_which_nothing_is_removed_holds(examples):
    @for_all(examples, st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 7), st.booleans(), WHAT)
    def check(seed, batch, tokens, per_head, what):
        torch.manual_seed(seed)
        numbers = iter(range(1, 10_000))

        def fresh(*shape):
            count = torch.Size(shape).numel()
            return torch.tensor([next(numbers) for _ in range(count)], dtype=torch.float32).view(shape)

        empty = torch.zeros(batch, 0), torch.zeros(batch, HEADS, 0, dtype=torch.bool)
        both = Both(AdmissionSlots(4, HEADS if per_head else None), *empty)
        valid = torch.rand(batch, tokens) < 0.8
        valid[:, -1] = True
        both.open(valid, fresh(batch, tokens))
        for kind in what:
            batch = both.numbers.shape[0]
            if kind == "step":
                query = torch.randn(batch, HEADS * GROUPS, 1, SIZE) / 50
                both.step(torch.rand(batch) < 0.7, fresh(batch), query)
            elif kind == "chunk":
                count = int(torch.randint(1, 6, ()))
                both.chunk(torch.rand(batch, count) < 0.8, torch.rand(batch, count) < 0.6, fresh(batch, count))
            elif kind == "rows":
                both.select(torch.randint(0, batch, (int(torch.randint(1, 4, ())),)))
            elif per_head:
                both.evict(torch.rand(both.alive.shape) < 0.7, shrink=kind == "shrink")
            both.check()


def test_lengths_are_read_once_a_block_even_where_every_step_evicts(monkeypatch):
    """With a budget just below the capacity, where a tight growth would read at each step."""
    slots, reads = AdmissionSlots(8, heads=HEADS), []
    slots.open(torch.tensor([8, 8]), 8)
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: reads.append(1) or self.item())
    for _ in range(64):
        slots.reserve(1)
        TokenSlots(slots.open_lengths()).admit(torch.ones(2, dtype=torch.bool))
        slots.evict(torch.arange(slots.capacity).expand(2, HEADS, -1) < 8, shrink=False)
    assert slots.capacity <= 24 and len(reads) <= 64 // 8 + 1


@pytest.mark.parametrize(
    ("heads", "stay"),
    [(None, torch.ones(2, 8)), (HEADS, torch.ones(2, HEADS, 8)), (HEADS, torch.ones(2, 8, dtype=torch.bool))],
    ids=["lengths of rows", "numbers", "no heads"],
)
def test_only_slots_of_heads_are_evicted_by_a_mask_of_their_shape(heads, stay):
    slots = AdmissionSlots(8, heads)
    slots.open(torch.tensor([8, 8]), 8)
    with pytest.raises(ValueError, match="heads=K"):
        slots.evict(stay, shrink=False)


@few_or_many
def test_mass_is_the_sum_of_the_attention_weights(examples, monkeypatch):
    """Whatever the parts in which the queries go; queries that do not count, and see nothing, add nothing."""

    @for_all(
        examples, st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 400)
    )
    def check(seed, batch, queries, slots, numbers):
        torch.manual_seed(seed)
        monkeypatch.setattr("dynamic_llava.engine.evict.PART_NUMBERS", numbers)
        query, keys = torch.randn(batch, 6, queries, SIZE), torch.randn(batch, 2, slots, SIZE)
        seen, counts = torch.rand(batch, 2, queries, slots) < 0.6, torch.rand(batch, queries) < 0.8
        scores = query @ keys.repeat_interleave(3, 1).transpose(2, 3) * 0.7
        weights = scores.masked_fill(~seen.repeat_interleave(3, 1), -torch.inf).softmax(-1).nan_to_num(0)
        expected = (weights * counts[:, None, :, None]).sum(2).unflatten(1, (2, 3)).sum(2)
        torch.testing.assert_close(attention_mass(query, keys, seen, counts=counts, scale=0.7), expected)


@few_or_many
def test_latest_are_the_last_valid_tokens(examples):
    @for_all(examples, st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 9), st.integers(1, 5))
    def check(seed, rows, tokens, count):
        torch.manual_seed(seed)
        valid = torch.rand(rows, tokens) < 0.6
        places = latest(valid, count)
        assert places.shape == (rows, min(count, tokens))
        for real, found in zip(valid, places, strict=True):
            assert sorted(found[real[found]].tolist()) == real.nonzero()[:, 0].tolist()[-count:]


def test_mass_of_queries_and_keys_that_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="K dividing H"):
        attention_mass(torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 5, 4), torch.ones(1, dtype=torch.bool))
