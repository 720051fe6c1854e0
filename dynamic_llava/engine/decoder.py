"""The sparse decoder, which chooses the pass that a call needs and runs it; FAMILIES has a row for each it carries.

A family's layers must hand keyword arguments on to transformers' attention interface, and see every earlier token.
Shape suffixes: B rows, N tokens, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from dynamic_llava.config import SparsityConfig
from dynamic_llava.engine.attention import register, serve_sparsely
from dynamic_llava.engine.cache import AdmissionCache, check_cache
from dynamic_llava.engine.decide import Flight, check_training
from dynamic_llava.engine.evict import check_eviction, let_evict
from dynamic_llava.engine.learned import attach, check_weights, initialize_rest, learned_of
from dynamic_llava.engine.paths import DropPath, MaskedPath, Path, ScorePath, TurnPath, run_stages
from dynamic_llava.engine.plan import Plan
from dynamic_llava.engine.record import DecoderOutput, SparsityRecord
from dynamic_llava.engine.step import compiled_step, decode_step
from dynamic_llava.layout import TokenLayout
from dynamic_llava.methods import Method


class SparseDecoder:
    """What a decoder of transformers' gets to be sparse: a method's weights, and passes whose layers see what is kept.

    A base of the families' classes (FAMILIES), before transformers' own model class.
    """

    learner: Method | None = None
    """The method whose weights the decoder holds, as the checkpoint's settings describe it; None while it is made."""

    def __init__(self, config: Any, settings: SparsityConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.settings = settings
        serve_sparsely(self.layers, config)
        attach(self, settings, config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        initialize_rest(self, module)

    def added_image_tokens(self, count: int) -> Tensor:
        """(n, D): the `count` learned tokens that stand behind those of each image."""
        return learned_of(self)(count)  # type: ignore[no-any-return]

    def forward(self, *args: Any, plan: Plan | None = None, **kwargs: Any) -> Any:
        """Run the sparse pass of `plan`, or, without one, the parent's own forward with its own arguments."""
        register(self.config._attn_implementation)
        return super().forward(*args, **kwargs) if plan is None else self._sparse_forward(plan=plan, **kwargs)

    @merge_with_config_defaults
    @capture_outputs
    def _sparse_forward(
        self,
        inputs_embeds: Tensor,
        plan: Plan,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> DecoderOutput:
        """Run the pass that `plan` and the cache call for; (B, N, D) in, DecoderOutput out."""
        told = position_ids is not None
        if position_ids is None:
            position_ids = _next_positions(inputs_embeds, cache)
        assert self.learner is not None
        if plan.keep_mask is None:
            check_weights(plan.method, self.learner)
        if self.training and plan.keep_mask is None and (plan.masked or torch.is_grad_enabled()):
            check_training(plan.method)
        check_eviction(plan.method, cached=bool(use_cache or cache is not None) and not plan.masked)
        given = self, plan, attention_mask, position_ids
        if plan.answers_only or plan.masked:
            path: Path = ScorePath(*given) if plan.answers_only else MaskedPath(*given)
            return self._run(path, inputs_embeds, None, kwargs)
        cuts = [cut.layer for cut in plan.cuts]
        if cache is None and use_cache:
            cache = AdmissionCache(self.config.num_hidden_layers, cuts, self.settings.cache_block, plan.window)
        if cache is not None:
            check_cache(cache, cuts, plan.window, inputs_embeds.shape[0], self.config._attn_implementation)
            let_evict(cache, plan.method)
        if cache is None or not cache.is_live:
            if cache is not None and told:
                cache.positions_ahead = _positions_ahead(position_ids, plan.layout)
            return self._run(DropPath(*given, cache=cache), inputs_embeds, cache, kwargs)
        if inputs_embeds.shape[1] == 1 and not plan.has_images:
            return self._step(inputs_embeds, plan, position_ids, cache, kwargs)
        return self._run(TurnPath(*given, cache=cache), inputs_embeds, cache, kwargs)

    def _run(
        self, path: Path, hidden_BND: Tensor, cache: AdmissionCache | None, kwargs: dict[str, Any]
    ) -> DecoderOutput:
        """Run a pass over a chunk of tokens."""
        layout, layers = path.plan.layout, len(self.layers)
        rotation = self.rotary_emb(hidden_BND, position_ids=path.position_ids)
        flight, until_BN = run_stages(path, Flight.of(hidden_BND, layout, rotation), kwargs)
        record = SparsityRecord(layout, until_BN, layers, until_BN == layers, layout.output, window=path.plan.window)
        if isinstance(path, MaskedPath):
            record.keep_mask, record.sparsified_output = path.keep, path.decided & ~layout.prompt
            record.asked = path.decided & layout.prompt
            record.entering_masks = tuple(path.entering)
        if isinstance(path, TurnPath):
            path.cache.commit_chunk(path.admits)
        return DecoderOutput(
            last_hidden_state=flight.put(self.norm(flight.hidden), hidden_BND.shape[1]),
            cache=cache,
            sparsity=_noted(record, cache),
        )

    def _step(
        self, hidden_B1D: Tensor, plan: Plan, position_ids: Tensor, cache: AdmissionCache, kwargs: dict[str, Any]
    ) -> DecoderOutput:
        """Run one new token of each row on a live cache."""
        inputs = hidden_B1D, plan, position_ids, cache.past, cache.begin_step()
        hidden_B1D, until_B1 = (compiled_step if plan.compile else decode_step)(self, *inputs, **kwargs)
        layers = len(self.layers)
        record = SparsityRecord(
            plan.layout, until_B1, layers, until_B1 == layers, plan.layout.output, window=plan.window
        )
        return DecoderOutput(last_hidden_state=hidden_B1D, cache=cache, sparsity=_noted(record, cache))


def _next_positions(hidden_BND: Tensor, cache: Cache | None) -> Tensor:
    """(1 or B, N) int64: positions of tokens that come with none: their columns, and what the cache's row is ahead."""
    seen = cache.get_seq_length() if cache is not None else 0
    columns_1N = (torch.arange(hidden_BND.shape[1], device=hidden_BND.device) + seen)[None]
    ahead_B1 = cache.positions_ahead if isinstance(cache, AdmissionCache) else None
    return columns_1N if ahead_B1 is None else columns_1N + ahead_B1


def _positions_ahead(position_ids: Tensor, layout: TokenLayout) -> Tensor:
    """(B, 1) int64: how far the position behind each row's last real token is ahead of the column behind the chunk."""
    last_B1 = torch.where(layout.newest(), position_ids, -1).amax(1, keepdim=True)
    return last_B1 + 1 - layout.valid.shape[1]


def _noted(record: SparsityRecord, cache: AdmissionCache | None) -> SparsityRecord:
    """Let the cache take note of a pass; returns the pass's record with the lengths of the cache after it."""
    if cache is not None:
        cache.note(record.layout, record.until)
        record.cache_lengths, record.dense_cache_lengths = cache.lengths()
        record.head_lengths = cache.head_lengths()
    return record


class DynamicLlamaModel(SparseDecoder, LlamaModel):
    """Sparse Llama, the decoder of LLaVA-1.5 (Vicuna)."""


class DynamicMistralModel(SparseDecoder, MistralModel):
    """Sparse Mistral without a sliding window, as from version 0.2 on."""


class DynamicQwen2Model(SparseDecoder, Qwen2Model):
    """Sparse Qwen2 (and Qwen2.5): queries, keys and values have biases."""


class DynamicQwen3Model(SparseDecoder, Qwen3Model):
    """Sparse Qwen3: queries and keys are normed, and a head's width is its own."""


FAMILIES: dict[str, type[SparseDecoder]] = {
    "llama": DynamicLlamaModel,
    "mistral": DynamicMistralModel,
    "qwen2": DynamicQwen2Model,
    "qwen3": DynamicQwen3Model,
}
"""model_type of a text_config -> the decoder that carries it."""
