"""One cached decoding step (Eq. 6), as a function of tensors: eager, or compiled into one graph.

The compiled graph has no breaks and reads nothing on the host. Storages keep their shape until a block of slots is used
up; the number of slots is a dynamic dimension, so growth compiles nothing anew. On an accelerator the kernels of a step
are recorded and replayed as one: storages and lengths are marked as tensors with a fixed address, so nothing is copied
before a replay, and after a growth the same compiled code is recorded again for the new storages.
Shape suffixes: B rows, W slots, K key heads, D hidden size, d head size.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from transformers.utils.output_capturing import capture_outputs

from dynamic_llava.engine.attention import cache_mask
from dynamic_llava.engine.cache import CACHE, StepCache
from dynamic_llava.engine.decide import Past, admit_token
from dynamic_llava.engine.evict import Token
from dynamic_llava.engine.learned import learned_of
from dynamic_llava.engine.plan import Plan, Stage, stages_of
from dynamic_llava.sparsity.window import WindowToken

GRAPHS = 256
"""Most graphs in one process, one for each model, batch size and method; torch's own limit, 8, ends in an error."""
_TAKES_LIMIT = "recompile_limit" in inspect.signature(torch.compile).parameters
SLOTS_DIMENSION = 2
"""Dimension of a storage (B, K, W, d) that grows."""
CAPTURES = ("output_attentions", "output_hidden_states")
"""What transformers captures of a decoder when it is asked to."""
_NOTICE_HOOKS = {"skip_nnmodule_hook_guards": False}
"""A forward hook that a module is given, or loses, makes a graph of its own; torch's default is not to look."""


def decode_step(
    decoder: Any,
    hidden_B1D: Tensor,
    plan: Plan,
    position_ids: Tensor,
    past: Past,
    step: StepCache,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Run one token of each row through `decoder`, a SparseDecoder, on a live cache.

    Returns the normed hidden states (B, 1, D) and `until`, (B, 1) int64: the first layer that will not see the token.
    Keys, values and lengths of the cache change in place. Nothing is read on the host, nothing concatenated along the
    cache.
    """
    rotation = decoder.rotary_emb(hidden_B1D, position_ids=position_ids)
    valid_B, layers = plan.layout.valid[:, 0], len(decoder.layers)
    admit_B, until_B = valid_B, torch.where(valid_B, layers, 0)
    for stage in stages_of(plan.cuts, layers):
        if stage.first == plan.output_layer:
            admit_B = admit_token(plan, learned_of(decoder), hidden_B1D, past)
            until_B = torch.where(valid_B & ~admit_B, stage.first, until_B)
        given = _given(decoder, plan, stage, hidden_B1D, step, admit_B)
        for layer in decoder.layers[stage.first : stage.end]:
            hidden_B1D = layer(hidden_B1D, position_embeddings=rotation, **given, **kwargs)
        slots = step.groups[stage.number]
        if isinstance(slots, WindowToken):
            slots.step(admit_B, valid_B, plan.layout.output[:, 0])
        else:
            slots.admit(admit_B)
    return decoder.norm(hidden_B1D), until_B[:, None]


def _given(
    decoder: Any, plan: Plan, stage: Stage, hidden_B1D: Tensor, step: StepCache, admit_B: Tensor
) -> dict[str, Any]:
    """Return the arguments of a stage's layers: the cache, and what the token sees of it."""
    implementation = decoder.config._attn_implementation
    if step.evicted is not None:
        token = Token(plan.method, step.evicted, plan.layout, admit_B[:, None], implementation)
        return {CACHE: token, "evicting": token}
    slots, cache = step.groups[stage.number], step.of_stage(stage)
    visible_B1W = slots.visible(step.keys[stage.first].shape[2])
    if implementation == "sdpa":
        return {CACHE: cache, "filled": slots.lengths, "visible": visible_B1W}
    return {CACHE: cache, "attention_mask": cache_mask(visible_B1W, implementation, hidden_B1D.dtype)}


@torch.compiler.disable  # a model that is compiled as a whole calls it between two graphs
def compiled_step(
    decoder: Any,
    hidden_B1D: Tensor,
    plan: Plan,
    position_ids: Tensor,
    past: Past,
    step: StepCache,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Run `decode_step` compiled; the first call for a model and a batch size compiles, which takes a while.

    Returns tensors that later steps leave alone. Raises ValueError where gradients are recorded, for arguments of
    layers, which a graph has no use for, and for hooks that it cannot follow.
    """
    _check(decoder, kwargs)
    _mark(step)
    replayed = hidden_B1D.device.type != "cpu"
    if replayed:
        torch.compiler.cudagraph_mark_step_begin()
    hidden_B1D, until_B1 = _compiled(replayed)(decoder, hidden_B1D, plan, position_ids, past, step)
    # A replay overwrites the outputs of the one before, and the record keeps the decisions of every step.
    return hidden_B1D, until_B1.clone() if replayed else until_B1


def _check(decoder: Any, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for what a compiled step cannot serve."""
    if torch.is_grad_enabled():
        raise ValueError(
            "compile=True serves inference, but gradients are being recorded; call it in torch.no_grad() or "
            "torch.inference_mode(), or use generate"
        )
    captured = {name: getattr(decoder.config, name, False) for name in CAPTURES}
    given = sorted(name for name, value in {**captured, **kwargs}.items() if value)
    if given:
        raise ValueError(
            f"a compiled step has no use for {given}, of the call or of the configuration; leave them out, or leave "
            "out compile=True"
        )
    if "_hf_hook" in vars(decoder.norm):
        raise ValueError(
            "compile=True serves a model that stays on one device, and accelerate moves weights or states of this one "
            "(device_map, offloading); load it onto one device, or leave out compile=True"
        )
    if _has_any_global_hook():
        raise ValueError(
            "compile=True serves hooks of single modules, and PyTorch holds a hook for all modules "
            "(register_module_forward_hook and the like), which a graph would not notice to come or go; remove it, or "
            "leave out compile=True"
        )


@capture_outputs
def _uncaptured(decoder: Any, *inputs: Any, **_: Any) -> tuple[Tensor, Tensor]:
    return decode_step(decoder, *inputs)


def traced_step(decoder: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
    """Run `decode_step` as it is compiled: while nothing is captured, whatever the configuration says.

    A model that was once asked for hidden states or attentions keeps the hooks of transformers' that capture them. They
    look for the capture in progress, and a compiler can follow them only to one that begins in its graph, so an empty
    one does.
    """
    return _uncaptured(decoder, *inputs, return_dict=True, **dict.fromkeys(CAPTURES, False))


def as_one_graph(**how: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return `traced_step` compiled without breaks; `how` goes to torch.compile."""
    limit: dict[str, Any] = {"recompile_limit": GRAPHS}
    more = limit if _TAKES_LIMIT else {}
    compiled = torch.compile(traced_step, fullgraph=True, dynamic=False, **how, **more)
    # Other functions are compiled by the same settings, so ours hold during our calls alone; before torch 2.13 the
    # limit is such a setting.
    return torch._dynamo.config.patch({**_NOTICE_HOOKS, **({} if _TAKES_LIMIT else limit)})(compiled)


@cache
def _compiled(replayed: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    return as_one_graph(options=compile_options(replayed))


def compile_options(replayed: bool) -> dict[str, Any]:
    """Return the compiler's settings for a step of one token per row.

    `replayed` is for accelerators: kernels are recorded once and replayed, matrix-vector products are tuned. On a CPU
    the products of a single row with matrices up to 2,048 wide are loops of the compiler's own.
    """
    if replayed:
        from torch._inductor import list_mode_options  # seconds of imports that eager decoding does not need

        # Only tuned matrix-vector products read the weights at the memory's speed.
        return {**list_mode_options("reduce-overhead"), "coordinate_descent_tuning": True}
    # For one row a BLAS reads such matrices far below the memory's speed.
    return {"post_grad_fusion_options": {"decompose_mm_pass": {}}}


def _mark(step: StepCache) -> None:
    """Tell the compiler what changes and what stays; after a growth the storages are new tensors."""
    for tensor in (*step.keys, *step.values):
        if not hasattr(tensor, "_dynamo_dynamic_indices"):
            torch._dynamo.mark_dynamic(tensor, SLOTS_DIMENSION)
            torch._dynamo.mark_static_address(tensor)
    for slots in step.groups:
        for tensor in vars(slots).values():
            torch._dynamo.mark_static_address(tensor)
