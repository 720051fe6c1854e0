"""Attention as a function: what layers of any family hand to transformers' attention interface, under names of our own.

Every layer projects, norms and rotates its queries, keys and values itself and gives them to the function that its
configuration names; keyword arguments of ours come along from the layer's own. `serve_sparsely` lets a decoder's layers
ask for `sparse_<name>` instead of `<name>`, and nothing else about them changes; masks are made, and users read and set
the implementation, by the plain name. Without our keywords `sparse_<name>` is `<name>` itself.

Shape suffixes: B rows, N tokens, Q new tokens, W slots, H query heads, K key heads, d head size.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip import modeling_clip
from transformers.models.llama.modeling_llama import eager_attention_forward

from dynamic_llava.engine.question import QuestionReading
from dynamic_llava.engine.tower import TowerReading
from dynamic_llava.sparsity.masked_softmax import masked_softmax_attention
from dynamic_llava.sparsity.ragged_attention import ragged_attention
from dynamic_llava.sparsity.window import Band

PREFIX = "sparse_"
"""Begins our name of every attention implementation."""
READS_NAME = "flash"
"""Part of the names of implementations that look up a kernel by the name in the configuration of the module."""
LIVE_CACHE_ATTENTION = ("sdpa", "eager")
"""Attention implementations that can read a cache whose rows have different lengths."""
_REGISTERED: set[str] = set()


def sparse_attention(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    masked_softmax: str | None = None,
    padding_mask: Tensor | None = None,
    band: Band | None = None,
    filled: Tensor | None = None,
    visible: Tensor | None = None,
    question: QuestionReading | None = None,
    tower: TowerReading | None = None,
    evicting: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend from queries (B, H, N, d), keys and values (B, K, N, d); returns (B, N, H, d), and weights as `base` does.

    masked_softmax names an implementation of MaskedSoftmax (Eq. 7): dropped tokens are masked by it. attention_mask is
    then the keep mask, (B, N) float, 1 = kept, its gradient is exact, and padding_mask is (B, N) bool, True = real
    token; both belong to a whole sequence, and so does band: which tokens see which whatever the keep mask says. (The
    keep mask is a layer's second positional argument because a reentrant checkpoint gives gradients to positional
    arguments alone.) filled is (B,) int64: one new token of each row (N = 1) attends to the slots that its row of an
    admission cache had filled before it, and to itself; (B, K) where key heads have filled different ones. question is
    read on the way, and, in the vision tower's layers, tower. evicting is the `engine.evict.Eviction` of a method that
    evicts. With none of them this is the implementation `base` itself.
    ValueError for a dropout with one of the first two.
    """
    scaling = kwargs["scaling"]
    if question is not None:
        question.read(query.to(value.dtype), key.to(value.dtype), scaling)
    if tower is not None:
        tower.read(module, query, key, scaling)
    if evicting is not None:
        plainly = partial(sparse_attention, base, module, query, key, value, **kwargs)
        return evicting.attend(plainly, module.layer_idx, query, key, scaling, attention_mask)  # type: ignore[no-any-return]
    if masked_softmax is None and filled is None:
        clip = isinstance(module, modeling_clip.CLIPAttention)
        eager = modeling_clip.eager_attention_forward if clip else eager_attention_forward
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)
        named = Plainly(module) if READS_NAME in base else module
        return attend(named, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    if kwargs.get("dropout"):
        raise ValueError(
            f"attention_dropout={kwargs['dropout']} is not supported with MaskedSoftmax, nor on an admission cache; "
            "set it to 0"
        )
    # Under autocast the rotary embedding leaves queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if masked_softmax is None:
        return ragged_attention(query, key, value, filled, visible=visible, scale=scaling).transpose(1, 2), None
    out_BHNd = masked_softmax_attention(
        query,
        key,
        value,
        attention_mask,
        padding_mask=padding_mask,
        scale=scaling,
        implementation=masked_softmax,
        **({} if band is None else {"band": band}),
    )
    return out_BHNd.transpose(1, 2), None


class SparseNames:
    """A configuration as its attention modules see it: with our name of the attention implementation.

    Every other value is the configuration's own, and so is a later choice of another implementation.
    """

    def __init__(self, plain: Any) -> None:
        self.plain = plain

    @property
    def _attn_implementation(self) -> str:
        return PREFIX + self.plain._attn_implementation

    def __getattr__(self, name: str) -> Any:
        if name == "plain" or name.startswith("__"):  # while it is copied
            raise AttributeError(name)
        return getattr(self.plain, name)


class TowerNames(SparseNames):
    """The same for a vision tower, which nobody but its attention modules knows to be asked by our name."""

    @property
    def _attn_implementation(self) -> str:
        name: str = self.plain._attn_implementation
        register(name)
        return PREFIX + name


class Plainly:
    """An attention module that calls its implementation by transformers' name, for kernels that are looked up by it."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self.config = module, module.config.plain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def serve_sparsely(layers: nn.ModuleList, config: Any, names: type[SparseNames] = SparseNames) -> None:
    """Let the attention of a decoder's or tower's layers ask for our name of what `config` names."""
    named = names(config)
    for layer in layers:
        layer.self_attn.config = named


def register(base: str) -> None:
    """Put our name of the attention implementation `base` into transformers' interface, with the masks of `base`."""
    if base not in _REGISTERED:
        AttentionInterface.register(PREFIX + base, partial(sparse_attention, base))
        masks = ALL_MASK_ATTENTION_FUNCTIONS.get(base)
        if masks is not None:
            AttentionMaskInterface.register(PREFIX + base, masks)
        _REGISTERED.add(base)


def cache_mask(visible: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """Return (B, Q, W) or (B, H, Q, W) bool as the 4D mask of an implementation: bool for sdpa, additive for eager."""
    visible = visible[:, None] if visible.dim() == 3 else visible
    if implementation == "sdpa":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def check_masks(implementation: str, method: str) -> None:
    """Raise ValueError unless attention takes a mask of its own for each token, as cuts within images need."""
    if implementation not in LIVE_CACHE_ATTENTION:
        raise ValueError(
            f"method {method!r} hides an image from what follows it and not from itself, and "
            f"attn_implementation={implementation!r} takes no such mask; load the model with one of "
            f"{', '.join(map(repr, LIVE_CACHE_ATTENTION))}"
        )


def check_attention(implementation: str) -> None:
    """Raise ValueError unless the attention implementation takes a mask per row, as ragged caches and scoring need, and
    as a window over output tokens does.
    """
    if implementation not in LIVE_CACHE_ATTENTION:
        raise ValueError(
            f"attn_implementation={implementation!r} cannot decode on an admission cache, nor score answers in one "
            "pass, nor hide tokens behind a window; load the model with one of "
            f"{', '.join(map(repr, LIVE_CACHE_ATTENTION))}, or, without a window, pass use_cache=False"
        )


for _name in ("eager", "sdpa"):
    register(_name)
