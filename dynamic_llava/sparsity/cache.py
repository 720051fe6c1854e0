"""Online KV-cache admission (Sec. 3.3.2, Eq. 6): where each token's keys and values go, and which of them stay.

Every row fills slots 0 .. length-1 of a rectangular storage that grows in blocks. The newest token is always written to
slot `length` of its row, so it can attend to itself; admitting it advances the length by one, dropping it leaves the
slot to be overwritten by the next token. All layers of a group share one `AdmissionSlots`; each has its own storage.
A chunk of several tokens goes through `place_chunk` and `commit_chunk`; a single token through a `TokenSlots`, which is
nothing but tensors, so that a decoding step can be compiled into one graph.
Where stored tokens are evicted later on, each key head of each layer keeps tokens of its own: then a layer has
`AdmissionSlots` of its own, whose lengths are (B, K) instead of (B,). `evict` closes the gaps, in the tokens' order.
Shape suffixes: B rows, N tokens, W slots (capacity), Q new tokens, K key heads, d head size, X rows or rows and
heads, (B,) or (B, K).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamic_llava.layout import Packing, TokenLayout


class AdmissionSlots:
    """The bookkeeping of one group of layers: how many slots each row has filled, and where new tokens are written."""

    def __init__(self, block: int, heads: int | None = None) -> None:
        """Create empty slots; with `heads`, K, each key head has a length: for one layer whose tokens are evicted."""
        self.block, self.heads = block, heads
        self.capacity = 0
        """W: slots per row of every storage of the group."""
        self.lengths: Tensor | None = None
        """(X) int64: filled slots of each row, or of each key head of each row; None until the cache is opened."""
        self.packing: Packing | None = None
        """How the tokens of the opening chunk are gathered into slots; None when they already are in order."""
        self.write: Tensor | None = None
        """(X, Q) int64: slots of the chunk in flight."""
        self._bound = 0  # host-side upper bound of the longest row, so that lengths need not be read at every step

    @property
    def is_open(self) -> bool:
        """Whether a first chunk has been stored; known on the host."""
        return self.lengths is not None

    def open(self, lengths_B: Tensor, tokens: int, packing: Packing | None = None) -> None:
        """Begin with a chunk of `tokens` columns that fills lengths_B slots of each row, gathered by `packing`."""
        self.packing = packing
        self.lengths = self._each(lengths_B).contiguous()  # changed in place later on
        self._bound = tokens if packing is None else packing.index.shape[1]
        self.capacity = self._bound

    def reserve(self, count: int) -> None:
        """Make room for `count` more tokens in every row; the storages grow when they are next asked for their data."""
        if self._bound + count > self.capacity:
            self._bound = int(self.open_lengths().max())  # the one host read, only when a block is used up
            # After evictions the longest row may end just below the capacity; a free block puts the next read off.
            free = count if self.heads is None else count + self.block
            blocks = -(-(self._bound + free) // self.block)
            self.capacity = max(self.capacity, blocks * self.block)
        self._bound += count

    def place_chunk(self, valid_BQ: Tensor, admit_BQ: Tensor, also_BQQ: Tensor | None = None) -> Tensor:
        """Reserve slots for a chunk; returns what each of its tokens sees, (X, Q, W) bool.

        A token sees the filled slots, the admitted tokens before it in the chunk, those that also_BQQ, bool, says of
        the ones before it, and itself. Padding goes to a spare last slot that no valid token sees.
        """
        count = valid_BQ.shape[1]
        self.reserve(count + 1)
        lengths_X, valid_XQ = self.open_lengths(), self._each(valid_BQ)
        rank_XQ = valid_XQ.cumsum(-1) - 1
        self.write = torch.where(valid_XQ, lengths_X[..., None] + rank_XQ, self.capacity - 1)
        past_XW = self.filled()
        itself_QQ = torch.eye(count, dtype=torch.bool, device=valid_BQ.device)
        earlier_QQ = torch.ones_like(itself_QQ).tril(-1)
        seen_BQQ = (admit_BQ & valid_BQ)[:, None]
        seen_BQQ = seen_BQQ if also_BQQ is None else seen_BQQ | also_BQQ
        seen_XQQ = self._each(seen_BQQ & earlier_QQ | itself_QQ)
        among_XQW = past_XW.new_zeros(*past_XW.shape[:-1], count, self.capacity)
        # Several padding tokens share the spare slot: a sum, not a write, so that none of them hides another.
        among_XQW = among_XQW.to(torch.uint8).scatter_add(
            -1, self.write[..., None, :].expand_as(seen_XQQ), seen_XQQ.to(torch.uint8)
        )
        return past_XW[..., None, :] | (among_XQW > 0)

    def commit_chunk(self, admit_BQ: Tensor) -> tuple[Tensor, Tensor]:
        """Admit the chosen tokens of the chunk in flight; returns (from, to) slots (X, Q) for the storages to move."""
        if self.write is None:
            raise RuntimeError("commit_chunk needs a chunk in flight; call place_chunk first")
        lengths_X, admit_XQ = self.open_lengths(), self._each(admit_BQ)
        order_XQ = (~admit_XQ).to(torch.uint8).argsort(dim=-1, stable=True)
        source_XQ = self.write.gather(-1, order_XQ)
        place_Q = torch.arange(admit_BQ.shape[1], device=admit_BQ.device)
        target_XQ = torch.where(
            place_Q < admit_XQ.sum(-1, keepdim=True), lengths_X[..., None] + place_Q, self.capacity - 1
        )
        self.lengths = lengths_X + admit_XQ.sum(-1)
        self.write = None
        return source_XQ, target_XQ

    def filled(self) -> Tensor:
        """(X, W) bool: slots that hold a token."""
        lengths_X = self.open_lengths()
        return torch.arange(self.capacity, device=lengths_X.device) < lengths_X[..., None]

    def evict(self, stay_BKW: Tensor, *, shrink: bool) -> Tensor:
        """Give up the filled slots where stay_BKW, bool, is False; returns the stable order for `SlotStorage.take`.

        The order is (B, K, W') int64: slots that stay come first, from the oldest token to the newest. `shrink` reads
        the longest head on the host and cuts W' to it, for after a prefill; without it nothing is read and W' is W.
        ValueError unless the lengths are per head and stay_BKW has the shape of the slots.
        """
        filled_BKW = self.filled()
        if self.heads is None or stay_BKW.shape != filled_BKW.shape or stay_BKW.dtype != torch.bool:
            raise ValueError(
                f"slots of shape {tuple(filled_BKW.shape)} cannot be evicted by a mask of {stay_BKW.dtype} and shape "
                f"{tuple(stay_BKW.shape)}; give bool of shape (B, K, W), and create the slots with heads=K"
            )
        stay_BKW = stay_BKW & filled_BKW
        self.lengths = stay_BKW.sum(-1)
        order_BKW = (~stay_BKW).to(torch.uint8).argsort(dim=-1, stable=True)
        if not shrink:
            return order_BKW
        self._bound = int(self.lengths.max())
        self.capacity = max(self._bound, 1)
        return order_BKW[..., : self.capacity]

    def retract_last(self, drop_B: Tensor) -> None:
        """Give up each chosen row's last filled slot: an opening chunk that ended in a token that was not admitted."""
        self.lengths = self.open_lengths() - self._each(drop_B.to(torch.int64))

    def select_rows(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Apply a choice of rows (reorder, repeat, select) to the bookkeeping."""
        if self.lengths is not None:
            self.lengths = choose(self.lengths)

    def token(self) -> "TokenSlots":
        """Return the slots as a step of one token per row uses them."""
        return TokenSlots(self.open_lengths())

    def open_lengths(self) -> Tensor:
        """Return the lengths (X). RuntimeError before a first chunk has been stored."""
        if self.lengths is None:
            raise RuntimeError("the cache is empty; open it with a first chunk")
        return self.lengths

    def _each(self, values: Tensor) -> Tensor:
        """(B, ...) for every row, as (X, ...)."""
        return values if self.heads is None else values.unsqueeze(1).expand(-1, self.heads, *values.shape[1:])


@dataclass(frozen=True)
class TokenSlots:
    """One new token per row in one group of layers: it is written behind the filled slots, and stays if admitted."""

    lengths: Tensor
    """(X) int64: filled slots of each row, or of each key head of each row, changed in place by `admit`."""

    def visible(self, capacity: int) -> Tensor:
        """(X, 1, W) bool: the filled slots and the token's own."""
        slots = torch.arange(capacity, device=self.lengths.device)
        return (slots <= self.lengths[..., None])[..., None, :]

    def places(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the index of the token in a storage of so many key heads: one for all storages with these slots."""
        rows_B, heads_K = (torch.arange(size, device=self.lengths.device) for size in (self.lengths.shape[0], heads))
        return rows_B[:, None], heads_K, self.lengths if self.lengths.dim() == 2 else self.lengths[:, None]

    def admit(self, admit_B: Tensor) -> None:
        """Admit or drop the token (Eq. 6), after the last layer has used it; admit_B (B,) bool."""
        self.lengths.add_(admit_B if self.lengths.dim() == 1 else admit_B[:, None])


def write_token(storage_BKWd: Tensor, places: tuple[Tensor, Tensor, Tensor], new_BK1d: Tensor) -> Tensor:
    """Put the tokens' keys or values into their places (`TokenSlots.places`), in place; returns the storage."""
    # The compiler keeps an index_put_ in place; for a scatter_ it would copy the whole storage twice a step.
    return storage_BKWd.index_put_(places, new_BK1d[:, :, 0].to(storage_BKWd.dtype))


class DecisionLog:
    """What was decided about every token that a cache has seen, dropped ones and padding included, in order.

    One tensor for all passes, which grows in blocks: a decoding step adds four bytes a row, and no tensor.
    """

    MOST_LAYERS = 255

    def __init__(self, block: int, layers: int) -> None:
        """Create it empty for a language model of so many layers. ValueError for more than a byte can number."""
        if layers > self.MOST_LAYERS:
            raise ValueError(f"layers={layers}: decisions are kept for language models of {self.MOST_LAYERS} layers")
        self.block, self.layers = block, layers
        self.tokens = 0
        """N: columns so far; known on the host."""
        # (B, W, 4) uint8: valid, image (2 a newline of one), output (or first token of an image), until
        self._kinds: Tensor | None = None
        self._has_newlines = False

    def add(self, layout: TokenLayout, until_BN: Tensor) -> None:
        """Append a chunk and what became of it: until_BN (B, N) int64, the first layer that no longer sees a token."""
        # No token is both image and output, so the two together can mark where an image begins.
        begins_BN = layout.output | layout.image_starts
        image_BN = layout.in_image if layout.newline is None else layout.in_image + layout.newline.to(torch.uint8)
        self._has_newlines = self._has_newlines or layout.newline is not None
        kinds = layout.valid, image_BN, begins_BN, until_BN
        chunk_BN4 = torch.stack([one.to(torch.uint8) for one in kinds], dim=-1)
        end = self.tokens + chunk_BN4.shape[1]
        if self._kinds is None or end > self._kinds.shape[1]:
            self._grow(chunk_BN4, -(-end // self.block) * self.block)
        assert self._kinds is not None
        self._kinds[:, self.tokens : end] = chunk_BN4
        self.tokens = end

    def so_far(self) -> tuple[TokenLayout, Tensor]:
        """Return the layout of all tokens so far and their `until`, (B, N) int64, as copies. RuntimeError before any.

        Later passes and choices of rows leave them alone.
        """
        if self._kinds is None:
            raise RuntimeError("nothing has been decided yet; add a first chunk")
        valid, image, begins, until = self._kinds[:, : self.tokens].movedim(-1, 0).unbind()
        newline = image == 2 if self._has_newlines else None
        valid, image, begins = valid.bool(), image.bool(), begins.bool()
        layout = TokenLayout.of_starts(valid, image, image & begins, begins & ~image, newline)
        return layout, until.to(torch.int64)

    def latest(self) -> Tensor:
        """(B,) bool: whether the newest column stays to the end. RuntimeError before any."""
        if self._kinds is None:
            raise RuntimeError("nothing has been decided yet; add a first chunk")
        return self._kinds[:, self.tokens - 1, 3] == self.layers

    def select_rows(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Apply a choice of rows (reorder, repeat, select)."""
        if self._kinds is not None:
            self._kinds = choose(self._kinds)

    def _grow(self, like_BN4: Tensor, columns: int) -> None:
        grown = like_BN4.new_zeros(like_BN4.shape[0], columns, like_BN4.shape[2])
        if self._kinds is not None:
            grown[:, : self.tokens] = self._kinds[:, : self.tokens]
        self._kinds = grown


class SlotStorage:
    """Keys or values of one layer, (B, K, W, d), written in place; it grows when its group's capacity has grown."""

    def __init__(self, slots: AdmissionSlots, opening_BKNd: Tensor) -> None:
        self.slots = slots
        packing = slots.packing
        if packing is None:
            self.data = opening_BKNd
        else:
            index = packing.index[:, None, :, None].expand(-1, opening_BKNd.shape[1], -1, opening_BKNd.shape[3])
            self.data = opening_BKNd.gather(2, index)

    def grown(self) -> Tensor:
        """Return the data (B, K, W, d), after growing to the group's capacity."""
        if self.data.shape[2] < self.slots.capacity:
            self._grow()
        return self.data

    def write(self, new_BKQd: Tensor) -> Tensor:
        """Store the new tokens in the slots reserved for them; returns the whole storage (B, K, W, d)."""
        if self.slots.write is None:
            raise RuntimeError("no slots are reserved; call place_chunk first")
        index = _per_number(self.slots.write, new_BKQd)
        return self.grown().scatter_(2, index, new_BKQd.to(self.data.dtype))

    def move(self, source_XQ: Tensor, target_XQ: Tensor) -> None:
        """Move admitted tokens of a chunk to the front of its slots."""
        moved = self.data.gather(2, _per_number(source_XQ, self.data))
        self.data.scatter_(2, _per_number(target_XQ, self.data), moved)

    def take(self, order_BKW: Tensor) -> None:
        """Put the slots into the order that `AdmissionSlots.evict` returned."""
        batch, heads, slots, width = self.grown().shape
        first_BK1 = torch.arange(0, batch * heads * slots, slots, device=order_BKW.device).view(batch, heads, 1)
        # Whole vectors are copied, which on a CPU is ten times as fast as a gather number by number.
        taken = self.data.reshape(-1, width).index_select(0, (order_BKW + first_BK1).flatten())
        self.data = taken.view(batch, heads, -1, width)

    def select_rows(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Apply a choice of rows to the storage."""
        self.data = choose(self.data)

    def _grow(self) -> None:
        batch, heads, filled, width = self.data.shape
        grown = self.data.new_zeros(batch, heads, self.slots.capacity, width)
        grown[:, :, :filled] = self.data
        self.data = grown


def _per_number(slots_XQ: Tensor, like_BKWd: Tensor) -> Tensor:
    """(B, K, Q, d) int64: the slots of rows or of heads, repeated for every head and number of a storage."""
    slots_BKQ = slots_XQ if slots_XQ.dim() == 3 else slots_XQ[:, None]
    return slots_BKQ[..., None].expand(-1, like_BKWd.shape[1], -1, like_BKWd.shape[3])
