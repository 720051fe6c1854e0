"""A window over the output tokens: each is still seen for some steps when it has been dropped (docs/method.md, 9).

The step of a token is the number of output tokens that its row has before it. A token is seen by those whose step is at
most its `until`, whatever was decided about it: w more than its own step for an output token, NEVER for others. In a
cache, where decisions have been taken, `until` is ALWAYS at a token that stays.
`WindowSlots` holds what was admitted, and the last w output tokens. The next token is written to slot `free`: the one
of a token that was not admitted and has left the window, if there is one, else the slot behind the last. So the filled
slots of a row, once its new token is written, are 0 .. length, as they are without a window.
Shape suffixes: B rows, N tokens, C computed tokens, Q new tokens, K key heads, W slots, w steps of a window.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dynamic_llava.layout import Packing, TokenLayout
from dynamic_llava.sparsity.cache import AdmissionSlots, TokenSlots

NEVER, ALWAYS = -1, torch.iinfo(torch.int64).max


class Band(NamedTuple):
    """Which tokens see which whatever was decided: token i sees j where step[i] <= until[j], as far as it is causal."""

    step: Tensor
    """(B, N) int64: output tokens of the row before each token."""
    until: Tensor
    """(B, N) int64: the last step at which the token is seen; NEVER where decisions hold at once."""

    @classmethod
    def of(cls, layout: TokenLayout, window: int, past_B: Tensor | None = None) -> "Band":
        """Return the band of a chunk's tokens; past_B (B,) int64: output tokens of each row before the chunk."""
        step_BN = layout.output.cumsum(1) - layout.output.to(torch.int64)
        step_BN = step_BN if past_B is None else step_BN + past_B[:, None]
        return cls(step_BN, torch.where(layout.output, step_BN + window, NEVER))

    def take(self, column_BC: Tensor) -> "Band":
        """Return the band of some tokens, those of the columns (B, C) int64."""
        return Band(self.step.gather(1, column_BC), self.until.gather(1, column_BC))

    def real(self, padding_mask: Tensor | None) -> "Band":
        """Return the band without that of padding, (B, N) bool, True at real tokens, which nobody sees."""
        return self if padding_mask is None else Band(self.step, self.until.where(padding_mask, NEVER))

    def pairs(self) -> Tensor:
        """(B, N, N) bool: whether token i is in the band of token j."""
        return self.until[:, None] >= self.step[:, :, None]


class WindowSlots(AdmissionSlots):
    """The bookkeeping of one group of layers that holds the last `window` output tokens whatever was decided."""

    def __init__(self, block: int, window: int) -> None:
        super().__init__(block)
        self.window = window
        self.free: Tensor | None = None
        """(B,) int64: the slot of the next token; below the length where a token has left the window."""
        self.pending: Tensor | None = None
        """(B, window) int64: slot of the token of each step, modulo the window, that was not admitted; -1: none."""
        self.steps: Tensor | None = None
        """(B,) int64: output tokens seen so far."""
        self._until: Tensor | None = None  # (B, W) int64, of every slot, while a chunk is in flight

    def open(self, lengths_B: Tensor, tokens: int, packing: Packing | None = None) -> None:
        """Begin with a chunk of tokens that all stay, until `settle` says otherwise."""
        super().open(lengths_B, tokens, packing)
        lengths_B = self.open_lengths()
        self.free, self.steps = lengths_B.clone(), torch.zeros_like(lengths_B)
        self.pending = lengths_B.new_full((len(lengths_B), self.window), NEVER)

    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return `free`, `pending` and `steps`. RuntimeError before a first chunk has been stored."""
        if self.free is None or self.pending is None or self.steps is None:
            raise RuntimeError("the cache is empty; open it with a first chunk")
        return self.free, self.pending, self.steps

    def place_chunk(  # type: ignore[override]  # no cut within images comes with a window
        self, valid_BQ: Tensor, admit_BQ: Tensor, band: Band | None = None
    ) -> Tensor:
        """Reserve slots for a chunk; returns what each of its tokens sees, (B, Q, W) bool.

        A token sees what is held at its step, such tokens before it in the chunk, and itself. Without a band no token
        of the chunk is an output token.
        """
        count = valid_BQ.shape[1]
        self.reserve(count + 2)  # a slot that may be free below the length, and a spare one for padding
        free_B, pending_Bw, steps_B = self.state()
        if band is None:
            band = Band(steps_B[:, None].expand_as(valid_BQ), torch.full_like(valid_BQ, NEVER, dtype=torch.int64))
        begin_B1 = (self.open_lengths() + (free_B < self.open_lengths()))[:, None]
        slots_W = torch.arange(self.capacity, device=valid_BQ.device)
        until_BW = torch.where((slots_W < begin_B1) & (slots_W != free_B[:, None]), ALWAYS, NEVER)
        place_w = torch.arange(self.window, device=valid_BQ.device)
        latest_B1 = steps_B[:, None] - 1
        step_Bw = latest_B1 - (latest_B1 - place_w) % self.window
        until_BW = _put(until_BW, pending_Bw, step_Bw + self.window)
        self.write = torch.where(valid_BQ, begin_B1 + valid_BQ.cumsum(1) - 1, self.capacity - 1)
        until_BQ = torch.where(admit_BQ, ALWAYS, band.until).masked_fill(~valid_BQ, NEVER)
        self._until = until_BW.scatter(1, self.write, until_BQ)
        write_BQ1 = self.write[..., None]
        held_BQW = (self._until[:, None] >= band.step[..., None]) & (slots_W < write_BQ1)
        self.steps = torch.where(valid_BQ, band.step + (band.until != NEVER), 0).amax(1).maximum(steps_B)
        return held_BQW | (slots_W == write_BQ1)

    def commit_chunk(self, admit_BQ: Tensor) -> tuple[Tensor, Tensor]:
        """Give up what the next token will not see; returns (from, to) slots (B, Q') for the storages to move.

        admit_BQ is that of `place_chunk`.
        """
        if self.write is None or self._until is None:
            raise RuntimeError("commit_chunk needs a chunk in flight; call place_chunk first")
        self.write = None
        return self._close_gaps(self._until, admit_BQ.shape[1] + self.window + 1)

    def settle(self, until_BC: Tensor, steps_B: Tensor) -> tuple[Tensor, Tensor]:
        """Give up tokens of the opening chunk, in whose order the slots are; returns (from, to) as `commit_chunk`.

        until_BC (B, C) int64: the last step at which each is seen; steps_B (B,) int64: output tokens of each row.
        """
        self.steps = steps_B.clone()
        return self._close_gaps(until_BC, until_BC.shape[1])

    def _close_gaps(self, until_BW: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Fill the slots that are given up by the last tokens that are held, of which at most `most` move."""
        *_, steps_B = self.state()
        stays_BW = until_BW >= steps_B[:, None]
        lengths_B1 = stays_BW.sum(1, keepdim=True)
        before_BW = torch.arange(self.capacity, device=stays_BW.device) < lengths_B1
        moves_BW, gap_BW = stays_BW & ~before_BW, before_BW & ~stays_BW
        source_BQ, target_BQ = (
            (~chosen_BW).to(torch.uint8).argsort(dim=1, stable=True)[:, :most] for chosen_BW in (moves_BW, gap_BW)
        )
        # As many gaps as tokens that move. The last slot is no gap, and what is moved onto itself stays.
        real_BQ = torch.arange(source_BQ.shape[1], device=stays_BW.device) < gap_BW.sum(1, keepdim=True)
        source_BQ, target_BQ = (torch.where(real_BQ, slots, self.capacity - 1) for slots in (source_BQ, target_BQ))
        until_BW = until_BW.scatter(1, target_BQ, until_BW.gather(1, source_BQ))
        waits_BW = before_BW & (until_BW != ALWAYS)
        place_BW = torch.where(waits_BW, until_BW % self.window, self.window)
        slots_BW = torch.arange(self.capacity, device=stays_BW.device).expand_as(place_BW)
        empty_Bw = lengths_B1.new_full((len(lengths_B1), self.window), NEVER)
        self.pending = _put(empty_Bw, place_BW, slots_BW)
        self.lengths, self.free, self._until = lengths_B1[:, 0].contiguous(), lengths_B1[:, 0].clone(), None
        return source_BQ, target_BQ

    def retract_last(self, drop_B: Tensor) -> None:
        """Give up each chosen row's last filled slot: an opening chunk that ended in a token that was not kept."""
        super().retract_last(drop_B)
        self.free = self.open_lengths().clone()

    def select_rows(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Apply a choice of rows (reorder, repeat, select) to the bookkeeping."""
        super().select_rows(choose)
        if self.is_open:
            self.free, self.pending, self.steps = map(choose, self.state())

    def token(self) -> "WindowToken":
        """Return the slots as a step of one token per row uses them, and changes them in place."""
        return WindowToken(self.open_lengths(), *self.state())


@dataclass(frozen=True)
class WindowToken(TokenSlots):
    """One new token per row: it is written to the free slot, and stays if it is admitted, or for the window's steps."""

    free: Tensor
    """(B,) int64, as in `WindowSlots`; all of them are changed in place by `step`."""
    pending: Tensor
    """(B, window) int64."""
    steps: Tensor
    """(B,) int64."""

    def places(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the index of the token in a storage of so many key heads."""
        rows_B1, heads_K, _ = super().places(heads)
        return rows_B1, heads_K, self.free[:, None]

    def step(self, admit_B: Tensor, valid_B: Tensor, output_B: Tensor) -> None:
        """Go on behind the token, after the last layer has used it: all (B,) bool, whether it was admitted, and is."""
        turn_B1 = (self.steps % self.pending.shape[1])[:, None]
        leaving_B = self.pending.gather(1, turn_B1)[:, 0]
        gives_up_B = output_B & (leaving_B != NEVER)
        stays_B = (admit_B | output_B) & valid_B
        waits_B = torch.where(admit_B, NEVER, self.free)
        self.pending.scatter_(1, turn_B1, torch.where(output_B, waits_B, leaving_B)[:, None])
        self.lengths.add_(stays_B).sub_(gives_up_B.to(self.lengths.dtype))
        self.free.copy_(torch.where(gives_up_B, leaving_B, torch.where(stays_B, self.lengths, self.free)))
        self.steps.add_(output_B)


def _put(into_BW: Tensor, place_Bw: Tensor, values_Bw: Tensor) -> Tensor:
    """Return into_BW with values at places of its rows, (B, w) int64; those outside of it are left out."""
    spare = into_BW.shape[1]
    inside_Bw = (place_Bw >= 0) & (place_Bw < spare)
    padded_BW = torch.cat([into_BW, into_BW[:, :1]], dim=1)
    return padded_BW.scatter(1, torch.where(inside_Bw, place_Bw, spare), values_Bw)[:, :spare]
