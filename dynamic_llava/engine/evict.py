"""Eviction: layers whose key heads keep tokens of their own, for methods that define `evict`.

Such a layer has slots, and lengths, of its own. One stage of one pass is an `Eviction`, which the stage's layers are
given as their cache and as an argument of attention, so that everything happens around a layer's own attention: before
it tokens are stored; after it the method is shown what the layer's heads hold, and the gaps are closed. What it sees is
recomputed from the layer's queries and keys (`attention_mass`), and only where the method asks. Methods that do not
evict never come here.
Shape suffixes: B rows, K key heads, G query heads per key head, H query heads, N tokens, Q new tokens, W slots, d head
size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from dynamic_llava.engine.attention import cache_mask
from dynamic_llava.engine.cache import AdmissionCache, AdmissionLayer
from dynamic_llava.layout import TokenLayout
from dynamic_llava.methods import Method, SlotEvidence, Slots
from dynamic_llava.sparsity.cache import AdmissionSlots, SlotStorage, TokenSlots, write_token

Attend = Callable[..., tuple[Tensor, Tensor | None]]
"""Attention of a layer, given its mask and, for a single token, the slots that are filled."""
PART_NUMBERS = 1 << 24
"""Attention weights that are alive at a time, 64 MiB of them."""


class HeadLayer(AdmissionLayer):
    """Keys and values of one decoder layer, and what a method sees of its tokens, in slots of each key head."""

    def __init__(self, slots: AdmissionSlots, cache: AdmissionCache) -> None:
        super().__init__(slots, cache)
        self.seen: dict[SlotEvidence, SlotStorage] = {}
        """What is kept of each stored token beside its key and value, (B, K, W, 1)."""
        self.tokens: Tensor | None = None
        """(B,) int64: tokens that the layer has been given, evicted ones included."""
        self.outputs: Tensor | None = None
        """(B,) int64: output tokens among them."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Store the opening chunk, (B, K, N, d) each; each head begins with what its group of layers has opened."""
        group = self.slots
        self.slots = AdmissionSlots(group.block, heads=key_states.shape[1])
        self.slots.open(group.open_lengths(), key_states.shape[2], group.packing)
        super().lazy_initialization(key_states, value_states)

    def storages(self) -> tuple[SlotStorage, ...]:
        """Keys, values, and what a method sees of them; none before the first chunk."""
        return (*super().storages(), *self.seen.values())

    def given(self, admit_BQ: Tensor, output_BQ: Tensor) -> None:
        """Count the tokens of a chunk that stay, (B, Q) bool."""
        tokens_B, outputs_B = admit_BQ.sum(1), (admit_BQ & output_BQ).sum(1)
        self.tokens = tokens_B if self.tokens is None else self.tokens + tokens_B
        self.outputs = outputs_B if self.outputs is None else self.outputs + outputs_B

    def shown(self) -> Slots:
        """What a method is shown of the layer."""
        assert self.tokens is not None and self.outputs is not None
        seen = {kind: storage.grown()[..., 0] for kind, storage in self.seen.items()}
        return Slots(self.slots.filled(), self.tokens, self.outputs, seen)

    def receive(self, received: dict[SlotEvidence, Tensor]) -> None:
        """Note the attention that the slots have received from a chunk in flight, (B, K, W) each."""
        for kind, received_BKW in received.items():
            storage = self.seen[kind]
            if kind == "mass":
                held_BKW = storage.grown()[..., 0].masked_fill(~self.slots.filled(), 0.0)
                received_BKW = held_BKW + received_BKW
            storage.data = received_BKW[..., None]

    def evict(self, stay_BKW: Tensor, *, shrink: bool) -> None:
        """Give up stored tokens for good, and close the gaps; stay_BKW (B, K, W) bool."""
        order_BKW = self.slots.evict(stay_BKW, shrink=shrink)
        for storage in self.storages():
            storage.take(order_BKW)
        self._show()

    def commit(self, admit_BQ: Tensor) -> None:
        """Admit tokens of the chunk in flight, (B, Q) bool."""
        source_BKQ, target_BKQ = self.slots.commit_chunk(admit_BQ)
        for storage in self.storages():
            storage.move(source_BKQ, target_BKQ)

    def move(self, source_BQ: Tensor, target_BQ: Tensor) -> None:
        """Do nothing: what the group's layers move together, each head has moved for itself (`commit`)."""

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seen, self.tokens, self.outputs = {}, None, None

    def _select_rows(self, choose: Callable[[Tensor], Tensor]) -> None:
        super()._select_rows(choose)
        if self.is_initialized and self.tokens is not None and self.outputs is not None:
            self.slots.select_rows(choose)
            self.tokens, self.outputs = choose(self.tokens), choose(self.outputs)


class Eviction(ABC):
    """One stage of one pass on a cache of `HeadLayer`s: what its layers store, and what leaves them afterwards."""

    def __init__(
        self, method: Method, cache: AdmissionCache, layout: TokenLayout, kept_BQ: Tensor, implementation: str
    ) -> None:
        """layout: the stage's tokens; kept_BQ (B, Q) bool: which of them stay; implementation: of attention."""
        self.method, self.cache, self.layout, self.implementation = method, cache, layout, implementation
        self.kept = kept_BQ & layout.valid
        self._facts: dict[int, dict[SlotEvidence, Tensor]] = {}  # by layer, between its `update` and its `attend`

    @abstractmethod
    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the tokens' keys and values, (B, K, Q, d) each; returns those that attention reads."""

    @abstractmethod
    def attend(
        self, attend: Attend, layer_idx: int, query: Tensor, key: Tensor, scaling: float, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from (B, H, Q, d) to keys as `update` gave them, and evict from the layer; returns what `attend` does.

        `mask` is the one that the layer was given.
        """

    def _received(self, query: Tensor, key: Tensor, visible: Tensor, scaling: float) -> dict[SlotEvidence, Tensor]:
        """(B, K, W) each: attention that the keys receive in this pass, where the method sees it."""
        found: dict[SlotEvidence, Tensor] = {}
        query, valid_BQ = query.to(key.dtype), self.layout.valid
        if "mass" in self.method.evict_sees:
            found["mass"] = attention_mass(query, key, visible, counts=valid_BQ, scale=scaling)
        if "latest" in self.method.evict_sees:
            last_BQ = latest(valid_BQ, self.method.latest_queries)
            found["latest"] = attention_mass(
                query.gather(2, last_BQ[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])),
                key,
                visible.gather(2, last_BQ[:, None, :, None].expand(-1, visible.shape[1], -1, visible.shape[3])),
                counts=valid_BQ.gather(1, last_BQ),
                scale=scaling,
            )
        return found

    def _facts_of(self, layer: HeadLayer, key: Tensor) -> dict[SlotEvidence, Tensor]:
        """(B, K, Q, 1) each: what the method sees of the chunk's tokens and never changes; key (B, K, Q, d)."""
        facts: dict[SlotEvidence, Tensor] = {}
        every_head = (-1, key.shape[1], -1, -1)
        if "place" in self.method.evict_sees:
            before_BQ = self.kept.cumsum(1) - self.kept.to(torch.int64)
            before_BQ = before_BQ if layer.tokens is None else before_BQ + layer.tokens[:, None]
            facts["place"] = before_BQ[:, None, :, None].expand(every_head)
        if "output" in self.method.evict_sees:
            facts["output"] = self.layout.output[:, None, :, None].expand(every_head)
        if "key_norm" in self.method.evict_sees:
            facts["key_norm"] = key.float().norm(dim=-1, keepdim=True)
        return facts

    def _head_mask(self, visible_BKQW: Tensor, query: Tensor) -> Tensor:
        """(B, H, Q, W): what each query head sees, as the mask that attention takes."""
        groups = query.shape[1] // visible_BKQW.shape[1]
        return cache_mask(visible_BKQW.repeat_interleave(groups, dim=1), self.implementation, query.dtype)

    def _evict(self, layer_idx: int, layer: HeadLayer, *, shrink: bool) -> None:
        """Ask the method. Rows without a token in this pass are left alone, whatever it says."""
        layer.given(self.kept, self.layout.output)
        slots = layer.shown()
        stay_BKW = self.method.evict(layer_idx, slots)
        if stay_BKW is None:
            return
        if stay_BKW.dtype != torch.bool or stay_BKW.shape != slots.filled.shape:
            raise ValueError(
                f"method {self.method.name!r} answered evict with {stay_BKW.dtype} of shape {tuple(stay_BKW.shape)}; "
                f"let it return bool of shape {tuple(slots.filled.shape)} (rows, key heads, slots), or None"
            )
        idle_B = ~self.layout.valid.any(1)
        layer.evict(stay_BKW | idle_B[:, None, None], shrink=shrink)


class Opening(Eviction):
    """The chunk that opens a cache: its tokens attend to each other, then each head keeps its own."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        valid_BQ = self.layout.valid
        causal_QQ = torch.ones(valid_BQ.shape[1], valid_BQ.shape[1], dtype=torch.bool, device=valid_BQ.device).tril()
        self._visible = (valid_BQ[:, None] & causal_QQ)[:, None]
        self._gone_B = valid_BQ.sum(1) > self.kept.sum(1)  # the newest token took part, and is not kept

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the chunk; returns it."""
        self._facts[layer_idx] = self._facts_of(self.cache.layers[layer_idx], key)
        return self.cache.layers[layer_idx].update(key, value)  # type: ignore[no-any-return]

    def attend(
        self, attend: Attend, layer_idx: int, query: Tensor, key: Tensor, scaling: float, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend by the mask that the layer was given."""
        out, layer = attend(mask), self.cache.layers[layer_idx]
        seen = {kind: sums[..., None] for kind, sums in self._received(query, key, self._visible, scaling).items()}
        seen |= self._facts.pop(layer_idx)
        layer.seen = {kind: SlotStorage(layer.slots, values) for kind, values in seen.items()}
        layer.slots.retract_last(self._gone_B)
        self._evict(layer_idx, layer, shrink=True)
        return out


class Chunk(Eviction):
    """Several tokens on a live cache: each sees what its head holds, the kept tokens before it, and itself."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._visible: dict[int, Tensor] = {}  # as _facts

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the tokens behind what each head holds; returns the storages, (B, K, W, d) each."""
        layer = self.cache.layers[layer_idx]
        self._visible[layer_idx] = layer.slots.place_chunk(self.layout.valid, self.kept)
        self._facts[layer_idx] = self._facts_of(layer, key)
        return layer.update(key, value)  # type: ignore[no-any-return]

    def attend(
        self, attend: Attend, layer_idx: int, query: Tensor, key: Tensor, scaling: float, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend by a mask of each key head."""
        layer, visible_BKQW = self.cache.layers[layer_idx], self._visible.pop(layer_idx)
        out = attend(self._head_mask(visible_BKQW, query))
        layer.receive(self._received(query, key, visible_BKQW, scaling))
        for kind, new_BKQ1 in self._facts.pop(layer_idx).items():
            layer.seen[kind].write(new_BKQ1)
        layer.commit(self.kept)
        self._evict(layer_idx, layer, shrink=True)
        return out


class Token(Eviction):
    """One new token of each row on a live cache."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the token behind what each head holds; returns the storages, (B, K, W, d) each, in value's dtype."""
        layer = self.cache.layers[layer_idx]
        layer.slots.reserve(1)
        self._facts[layer_idx] = self._facts_of(layer, key)
        keys, values = layer.grow()
        places = TokenSlots(layer.slots.open_lengths()).places(key.shape[1])
        return write_token(keys, places, key).to(value.dtype), write_token(values, places, value).to(value.dtype)

    def attend(
        self, attend: Attend, layer_idx: int, query: Tensor, key: Tensor, scaling: float, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to the filled slots of each key head, and to the token itself."""
        layer = self.cache.layers[layer_idx]
        slots = TokenSlots(layer.slots.open_lengths())
        visible_BK1W = slots.visible(layer.slots.capacity)
        if self.implementation == "sdpa":
            out = attend(None, filled=slots.lengths, visible=visible_BK1W)
        else:
            out = attend(self._head_mask(visible_BK1W, query))
        layer.receive(self._received(query, key, visible_BK1W, scaling))
        places = slots.places(key.shape[1])
        for kind, new_BK11 in self._facts.pop(layer_idx).items():
            write_token(layer.seen[kind].grown(), places, new_BK11)
        slots.admit(self.kept[:, 0])
        self._evict(layer_idx, layer, shrink=False)
        return out


def let_evict(cache: AdmissionCache, method: Method) -> None:
    """Let an empty cache keep tokens by key head if the method evicts, and by row if it does not.

    ValueError for a live cache of the other kind, for one that has not noted what the method sees of its tokens, and
    for a method whose setting `layer` says that it evicts from a layer on that is not there.
    """
    first, layers = method.evicts_from, len(cache.layers)
    if method.evicts and isinstance(first, int) and first >= layers:
        raise ValueError(
            f"method {method.name!r} evicts from layer {first} on, and this language model has {layers} layers, so "
            f"nothing would be evicted; give a `layer` from 0 to {layers - 1}"
        )
    if not cache.is_live:
        if cache.evicts is not method.evicts:
            kind = HeadLayer if method.evicts else AdmissionLayer
            cache.layers = [kind(layer.slots, cache) for layer in cache.layers]
            cache.evicts = method.evicts
        return
    if cache.evicts is not method.evicts:
        other = "one that evicts" if cache.evicts else "one that does not"
        raise ValueError(
            f"method {method.name!r} {'evicts' if method.evicts else 'does not evict'} stored tokens, and the cache "
            f"was opened by {other}; continue with the method that it was opened with, or start with a new cache"
        )
    missing = method.evict_sees - cache.layers[0].seen.keys() if method.evicts else frozenset()
    if missing:
        raise ValueError(
            f"method {method.name!r} evicts by {', '.join(sorted(missing))}, which the method that opened this cache "
            "did not ask for; continue with that method, or start with a new cache"
        )


def check_eviction(method: Method, *, cached: bool) -> None:
    """Raise ValueError for a method that evicts in a pass without a cache, or by what cannot be seen."""
    if method.evicts and (
        isinstance(method.evict_sees, str) or not set(method.evict_sees) <= set(get_args(SlotEvidence))
    ):
        raise ValueError(
            f"method {method.name!r} evicts by {method.evict_sees!r}; let evict_sees be a frozenset of names among "
            f"{', '.join(get_args(SlotEvidence))}"
        )
    if method.evicts and method.drop_delay:
        raise ValueError(
            f"method {method.name!r} evicts stored tokens, and drops output tokens {method.drop_delay} steps late: "
            "what is evicted is gone at once; let it do one of the two"
        )
    if method.evicts and not cached:
        raise ValueError(
            f"method {method.name!r} evicts stored tokens, so that what a token sees depends on the steps before it: "
            "it neither trains, nor scores answers in one pass, nor decodes without a cache. Leave out labels, and let "
            "the call use its cache (use_cache=True), as generate does"
        )


def check_search(method: Method, layers: int) -> None:
    """Raise ValueError for a beam search by a method that evicts and drops tokens at cuts too."""
    if method.evicts and method.cuts(layers):
        raise ValueError(
            f"method {method.name!r} evicts stored tokens and decides at cuts: what it decided about a finished beam "
            "cannot be told without the tokens that were evicted; generate with num_beams=1"
        )


def attention_mass(
    query: Tensor, keys: Tensor, seen: Tensor, *, counts: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Sum the attention weights that each key receives over queries and the query heads of a key head.

    query (B, H, Q, d); keys (B, K, W, d), K dividing H; seen: bool, which key each query attends to, broadcastable to
    (B, K, Q, W); counts (B, Q) bool: queries that are summed, all by default; scale: 1 / sqrt(d) by default. Returns
    (B, K, W) float32. A query that attends to nothing adds nothing. No gradient is recorded. Raises ValueError.
    """
    if query.dim() != 4 or keys.dim() != 4 or query.shape[1] % keys.shape[1] or query.shape[::3] != keys.shape[::3]:
        raise ValueError(
            f"query {tuple(query.shape)} and keys {tuple(keys.shape)} do not fit; give (B, H, Q, d) and (B, K, W, d), "
            "K dividing H"
        )
    batch, heads, queries, _ = query.shape
    key_heads, slots = keys.shape[1:3]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    seen_BKQW = seen.expand(batch, key_heads, queries, slots)
    counts_BQ = torch.ones_like(query[:, 0, :, 0], dtype=torch.bool) if counts is None else counts
    mass_BKW = torch.zeros(batch, key_heads, slots, dtype=torch.float32, device=query.device)
    with torch.no_grad():
        for part in torch.arange(queries).split(max(1, PART_NUMBERS // (batch * heads * slots))):
            cut = slice(int(part[0]), int(part[-1]) + 1)
            query_BKGQd = query[:, :, cut].unflatten(1, (key_heads, -1))
            scores_BKGQW = (query_BKGQd @ keys[:, :, None].transpose(3, 4)).float() * scale
            hidden_BK1QW = ~seen_BKQW[:, :, None, cut]
            weights_BKGQW = scores_BKGQW.masked_fill(hidden_BK1QW, -torch.inf).softmax(-1).nan_to_num(0.0)
            mass_BKW += torch.einsum("bkgqw,bq->bkw", weights_BKGQW, counts_BQ[:, cut].float())
    return mass_BKW


def latest(valid_BQ: Tensor, count: int) -> Tensor:
    """(B, Q) int64: the places of each row's last `count` valid tokens, of others where it has fewer; Q <= count."""
    place_Q = torch.arange(1, valid_BQ.shape[1] + 1, device=valid_BQ.device)
    return (place_Q * valid_BQ).topk(min(count, valid_BQ.shape[1])).indices
