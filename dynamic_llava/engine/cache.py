"""The admission cache (sparsity/cache.py) as a transformers `Cache`: groups of layers, each with its row lengths.

The layers between two cuts of a method are a group. Those below the first cut store every token; the others store
what all cuts up to theirs have kept.
transformers calls the cache `past_key_values` until 5.23 and `cache` from 5.24 on; this library says `cache`, and takes
and gives the earlier name as well, whichever transformers is installed.
Shape suffixes: B rows, K key heads, N tokens, Q new tokens, W slots, L layers, d head size.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from dynamic_llava.engine.attention import check_attention
from dynamic_llava.engine.decide import Past
from dynamic_llava.engine.plan import Stage, cuts_of
from dynamic_llava.engine.record import SparsityRecord
from dynamic_llava.layout import TokenLayout
from dynamic_llava.methods import Method
from dynamic_llava.sparsity.cache import AdmissionSlots, DecisionLog, SlotStorage, TokenSlots, write_token
from dynamic_llava.sparsity.window import WindowSlots

EARLIER = "past_key_values"
CACHE = "cache" if "cache" in inspect.signature(LlamaDecoderLayer.forward).parameters else EARLIER
"""Argument of transformers' layers, and key of the arguments that `generate` hands from step to step."""


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Return the cache that was given under either name. ValueError when both were."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument; give one of them")
    return cache if cache is not None else past_key_values


def rename_cache(kwargs: dict[str, Any]) -> None:
    """Give the cache among keyword arguments, if any, the installed transformers' name. ValueError when it is twice."""
    cache = one_cache(kwargs.pop("cache", None), kwargs.pop(EARLIER, None))
    if cache is not None:
        kwargs[CACHE] = cache


def cache_of(output: Any) -> Cache | None:
    """Return the cache of a model's or of generate's output; None where there is none."""
    return getattr(output, CACHE, None)


def is_live(cache: Cache | None) -> bool:
    """Whether a cache has seen tokens."""
    return cache is not None and cache.get_seq_length() > 0


class AdmissionLayer(CacheLayerMixin):
    """Keys and values of one decoder layer in admission slots."""

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, slots: AdmissionSlots, cache: "AdmissionCache") -> None:
        super().__init__()
        self.slots = slots
        self._cache = cache
        self._keys: SlotStorage | None = None
        self._values: SlotStorage | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Store the opening chunk, (B, K, N, d) each, in the dtype of its values, which is the one to compute in."""
        # Under autocast the rotary embedding leaves keys in float32; attention would round them at every step.
        self.dtype, self.device = value_states.dtype, value_states.device
        self._keys = SlotStorage(self.slots, key_states.to(self.dtype))
        self._values = SlotStorage(self.slots, value_states)
        self.is_initialized = True
        self._show()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new tokens; returns what attention reads: the opening chunk itself, later the whole storage.

        A storage keeps the dtype of its opening chunk; what is read has that of the new values, so that a cache can be
        continued under another autocast than it was opened under.
        """
        if self._keys is None or self._values is None:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        self._keys.write(key_states)
        self._values.write(value_states)
        keys, values = self._show()
        return keys.to(value_states.dtype), values.to(value_states.dtype)

    def grow(self) -> tuple[Tensor, Tensor]:
        """Return keys and values, (B, K, W, d) each, after growing to the group's capacity."""
        if self._keys is None or self._values is None:
            raise RuntimeError("the cache is empty; open it with a first chunk")
        self._keys.grown()
        self._values.grown()
        return self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        """Return keys and values as they now are, and show transformers the same as `keys` and `values`."""
        self.keys, self.values = (storage.data for storage in self.storages()[:2])
        return self.keys, self.values

    def storages(self) -> tuple[SlotStorage, ...]:
        """Keys and values, or none before the first chunk."""
        return () if self._keys is None or self._values is None else (self._keys, self._values)

    def move(self, source_BQ: Tensor, target_BQ: Tensor) -> None:
        """Move admitted tokens of a chunk to the front of its slots."""
        for storage in self.storages():
            storage.move(source_BQ, target_BQ)

    def get_seq_length(self) -> int:
        """Tokens seen so far, padding and dropped ones included: what `generate` slices its inputs by."""
        return self._cache.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots of the storage; the masks themselves are made by the decoder."""
        return max(self.slots.capacity, query_length), 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No maximum (the name that earlier transformers 5 releases ask for)."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self._keys = self._values = self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Choose rows, for beam search; the bookkeeping is reordered by the cache, once for all layers."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._select_rows(lambda data: data.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Choose rows."""
        self._select_rows(lambda data: data[indices.to(data.device)])

    def _select_rows(self, choose: Callable[[Tensor], Tensor]) -> None:
        for storage in self.storages():
            storage.select_rows(choose)
        if self.is_initialized:
            self._show()

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: dropped tokens are gone, so an earlier state cannot be restored."""
        if tokens_to_remove != 0:
            raise ValueError(
                f"cannot remove {tokens_to_remove} tokens: an admission cache has no roll-back; "
                "decode without assistant or prompt look-up, or with sparsity='none'"
            )


@dataclass(frozen=True)
class StepCache:
    """The cache as the layers of a single-token step use it: tensors and nothing else, so that the step can be traced.

    It holds the storages of an AdmissionCache, not copies, and writes to them in place.
    """

    keys: list[Tensor]
    """Per layer (B, K, W, d)."""
    values: list[Tensor]
    """Per layer (B, K, W, d)."""
    groups: list[TokenSlots]
    """Of each group of layers."""
    evicted: "AdmissionCache | None" = None
    """The cache itself where a method evicts from it: each layer then has slots of its own."""

    def of_stage(self, stage: Stage) -> "StageCache":
        """Return the cache as the layers of a stage use it, which are a group."""
        return StageCache(self.keys, self.values, self.groups[stage.number].places(self.keys[stage.first].shape[1]))


@dataclass(frozen=True)
class StageCache:
    """A `StepCache` for the layers of one stage: where the token goes is found out once for all of them."""

    keys: list[Tensor]
    values: list[Tensor]
    places: tuple[Tensor, Tensor, Tensor]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the token's key and value, (B, K, 1, d) each; returns the storages, (B, K, W, d), in value's dtype."""
        keys = write_token(self.keys[layer_idx], self.places, key)
        values = write_token(self.values[layer_idx], self.places, value)
        return keys.to(value.dtype), values.to(value.dtype)


class AdmissionCache(Cache):
    """The live state of one generation; belongs to its caller, never to the model."""

    def __init__(self, num_layers: int, cuts: int | Sequence[int], block: int = 64, window: int = 0) -> None:
        """Create an empty cache for a method that decides at the layers `cuts`, one or several, ascending.

        Layers between two cuts are a group: they store the same tokens. With a window they hold the last `window`
        output tokens whatever was decided. Raises ValueError for a layer out of range.
        """
        self.window = window
        self.cuts = (cuts,) if isinstance(cuts, int) else tuple(cuts)
        if list(self.cuts) != sorted({*self.cuts}) or any(not 0 <= cut < num_layers for cut in self.cuts):
            raise ValueError(
                f"the cuts {self.cuts} do not fit a language model of {num_layers} layers; give layers from 0 to "
                f"{num_layers - 1}, each once, in ascending order"
            )
        self.starts = (0, *(cut for cut in self.cuts if cut))
        """The first layer of each group."""
        self.groups = self._empty_groups(block)
        """Which slots the layers of a group have filled."""
        self.decisions = DecisionLog(block, num_layers)
        """What was decided about every token seen so far."""
        self.seen_outputs: Tensor | None = None
        """(B,) int64: output tokens seen so far in each row."""
        self.seen_images: Tensor | None = None
        """(B,) int64: images seen so far in each row."""
        self.answer_begins: Tensor | None = None
        """(B,) int64: output tokens seen before each row's answer under way."""
        self.positions_ahead: Tensor | None = None
        """(B, 1) int64: how far a row's positions are ahead of its columns, as in the opening chunk; None: 0."""
        self.group_of = [sum(layer >= start for start in self.starts) - 1 for layer in range(num_layers)]
        """Per layer the number of its group."""
        self.evicts = False
        """Whether each key head of each layer keeps tokens of its own (`engine/evict.py`)."""
        super().__init__(layers=[AdmissionLayer(self.groups[group], self) for group in self.group_of])

    @classmethod
    def for_method(cls, method: Method, num_layers: int, block: int = 64) -> "AdmissionCache":
        """Create an empty cache for a method. ValueError where the method cannot decide in so many layers."""
        return cls(num_layers, [cut.layer for cut in cuts_of(method, num_layers)], block, method.drop_delay)

    @property
    def dense(self) -> AdmissionSlots:
        """The slots of the first group: below a method's first cut they hold every token."""
        return self.groups[0]

    @property
    def sparse(self) -> AdmissionSlots:
        """The slots of the last group: they hold what all cuts have kept."""
        return self.groups[-1]

    @property
    def is_live(self) -> bool:
        """Whether a first chunk has been stored; known on the host."""
        return self.dense.is_open

    @property
    def batch_size(self) -> int:
        """Rows of the cache, -1 while it is empty."""
        return -1 if self.dense.lengths is None else self.dense.lengths.shape[0]

    @property
    def seen_tokens(self) -> int:
        """Columns seen so far, padding and dropped tokens included; known on the host."""
        return self.decisions.tokens

    @property
    def past(self) -> Past:
        """What each row has seen so far, as decisions are told."""
        return Past(self.seen_images, self.seen_outputs, self.answer_begins)

    @property
    def record(self) -> SparsityRecord | None:
        """What was kept of all tokens seen so far, calls of `generate` and of `forward` alike; None while empty.

        It is made when asked for, at any time between two passes, and later passes leave it alone.
        """
        if not self.seen_tokens:
            return None
        layout, until = self.decisions.so_far()
        layers = self.decisions.layers
        held = (*self.lengths(), self.head_lengths())
        return SparsityRecord(layout, until, layers, until == layers, layout.output, *held, window=self.window)

    def lengths(self) -> tuple[Tensor, Tensor]:
        """(B,), (B,) int64: tokens in the last layer and in the first; copies, for they change in place."""
        return self.sparse.open_lengths().clone(), self.dense.open_lengths().clone()

    def head_lengths(self) -> Tensor | None:
        """(B, L, K) int64: tokens that each key head of each layer holds; None where nothing is evicted."""
        return torch.stack([layer.slots.open_lengths() for layer in self.layers], 1) if self.evicts else None

    def begin_step(self) -> StepCache:
        """Reserve a slot in every row for one new token; storages grow here, outside the step itself."""
        for slots in self.groups:
            slots.reserve(1)
        keys, values = zip(*(layer.grow() for layer in self.layers), strict=True)
        groups = [slots.token() for slots in self.groups]
        return StepCache(list(keys), list(values), groups, self if self.evicts else None)

    def note(self, layout: TokenLayout, until_BN: Tensor) -> None:
        """Take note of a chunk that has been through all layers, and of what became of it: until_BN (B, N) int64."""
        self.decisions.add(layout, until_BN)
        outputs_B, images_B = layout.output.sum(1), layout.image_starts.sum(1)
        before_B = torch.zeros_like(outputs_B) if self.seen_outputs is None else self.seen_outputs
        others_BN = layout.valid & ~layout.output
        begins_B = torch.where(others_BN, layout.output.cumsum(1) + before_B[:, None], 0).amax(1)
        self.answer_begins = begins_B if self.answer_begins is None else begins_B.maximum(self.answer_begins)
        self.seen_outputs = outputs_B if self.seen_outputs is None else self.seen_outputs + outputs_B
        self.seen_images = images_B if self.seen_images is None else self.seen_images + images_B

    def commit_chunk(self, admits: Sequence[Tensor]) -> None:
        """Admit a chunk's tokens, (B, Q) bool in each group, and close the gaps that dropped tokens left."""
        for number, (slots, admit_BQ) in enumerate(zip(self.groups, admits, strict=True)):
            self.move(number, *slots.commit_chunk(admit_BQ))

    def move(self, number: int, source: Tensor, target: Tensor) -> None:
        """Move tokens of a group from slots to others, (B, Q) int64 each."""
        for group, layer in zip(self.group_of, self.layers, strict=True):
            if group == number:
                layer.move(source, target)

    def _empty_groups(self, block: int) -> list[AdmissionSlots]:
        return [WindowSlots(block, self.window) if self.window else AdmissionSlots(block) for _ in self.starts]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.groups = self._empty_groups(self.dense.block)
        for group, layer in zip(self.group_of, self.layers, strict=True):
            layer.slots = self.groups[group]
        self.decisions = DecisionLog(self.dense.block, self.decisions.layers)
        self.seen_outputs = self.seen_images = self.answer_begins = self.positions_ahead = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Choose rows, for beam search."""
        super().reorder_cache(beam_idx)
        self._select_rows(lambda values: values[beam_idx.to(values.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._select_rows(lambda values: values.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Choose rows."""
        super().batch_select_indices(indices)
        self._select_rows(lambda values: values[indices.to(values.device)])

    def _select_rows(self, choose: Callable[[Tensor], Tensor]) -> None:
        for part in (*self.groups, self.decisions):
            part.select_rows(choose)
        for name in ("seen_outputs", "seen_images", "answer_begins", "positions_ahead"):
            if getattr(self, name) is not None:
                setattr(self, name, choose(getattr(self, name)))

    def allocated_bytes(self) -> int:
        """Bytes of key and value storage, all layers; where a method evicts, of what it sees of the tokens too."""
        return sum(
            storage.data.numel() * storage.data.element_size() for layer in self.layers for storage in layer.storages()
        )


def check_cache(cache: Cache, cuts: Sequence[int], window: int, rows: int, implementation: str) -> None:
    """Raise ValueError unless a sparse call with these cuts, window and rows opened `cache`, and attention reads it."""
    if not isinstance(cache, AdmissionCache):
        raise ValueError(
            f"cache is a {type(cache).__name__}; sparse decoding needs the AdmissionCache that a sparse call "
            "returns, or sparsity='none'"
        )
    if cache.cuts != tuple(cuts):
        raise ValueError(
            f"the cache was opened with {_named(cache.cuts)} and this call asks for {_named(cuts)}; continue with the "
            "method it was opened with"
        )
    if cache.window != window:
        raise ValueError(
            f"the cache was opened with a window of {cache.window} output tokens and this call asks for {window}; "
            "continue with the method it was opened with"
        )
    if cache.is_live and cache.batch_size != rows:
        raise ValueError(
            f"the cache holds {cache.batch_size} rows and this call has {rows}; give every row of the cache its next "
            "tokens, or choose rows with cache.batch_select_indices or cache.batch_repeat_interleave"
        )
    check_attention(implementation)


def _named(cuts: Sequence[int]) -> str:
    layers = f"sparse layer{'s' if len(cuts) > 1 else ''} {', '.join(map(str, cuts))}"
    return layers if cuts else "no sparse layer"


def check_dense_cache(cache: Cache | None) -> None:
    """Raise ValueError for the cache of a sparse call in a dense one."""
    if isinstance(cache, AdmissionCache):
        raise ValueError(
            "this cache was opened by a sparse call, so it lacks tokens; continue with the sparsity that it was opened "
            "with, or give the whole conversation without a cache"
        )
