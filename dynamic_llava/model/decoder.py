"""The sparse decoder, over any family of transformers': layers from the sparse one on see only kept tokens.

Six passes, one decision:

dense   every layer, every token: the parent's own forward, which is called without a plan
masked  every layer, every token; from the sparse layer on MaskedSoftmax hides dropped tokens (training, scoring), or
        training sets them to zero vectors (the ablation of Table 7)
score   as masked, with inference's decisions; dropped image tokens, which nobody sees, are removed
drop    from the sparse layer on only the kept tokens are computed (prefill, and decoding without a cache)
step    one new token per row on a live cache (online admission, Eq. 6)
turn    a chunk of several tokens on a live cache (a later user turn)

Shape suffixes: B rows, N tokens, K packed tokens, Q new tokens, W cache slots, D hidden size.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from dynamic_llava.config import SparsityConfig, check_sparse_layer
from dynamic_llava.layout import Packing, TokenLayout
from dynamic_llava.methods import Method
from dynamic_llava.model.attention import AttentionRow, cache_mask, register, serve_sparsely
from dynamic_llava.model.cache import AdmissionCache, check_attention, check_cache
from dynamic_llava.model.cache_names import CACHE
from dynamic_llava.model.decide import (
    Past,
    check_question,
    check_training,
    hard_keep_mask,
    sampled_keep_mask,
    samples,
)
from dynamic_llava.model.learned import attach, check_weights, initialize_rest, learned_of
from dynamic_llava.model.outputs import DynamicModelOutput, SparsityRecord
from dynamic_llava.model.plan import Plan
from dynamic_llava.model.step import compiled_step, decode_step
from dynamic_llava.sparsity.decisions import entering_mask

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the tokens' positions, (B, N, d) each."""


class SparseDecoder:
    """What a decoder of transformers' gets to be sparse: the method's learned parts, and a loop with a sparse layer.

    A base of the families' classes (families.py), before transformers' own model class.
    """

    learner: Method | None = None
    """The method whose weights the decoder holds, as the checkpoint's settings describe it; None while it is made."""

    def __init__(self, config: Any, sparsity: SparsityConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.sparsity = sparsity
        serve_sparsely(self.layers, config)
        attach(self, sparsity, config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        initialize_rest(self, module)

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
    ) -> DynamicModelOutput:
        """Run the pass that `plan` and the cache call for; (B, N, D) in, DynamicModelOutput out."""
        if position_ids is None:
            position_ids = _next_positions(inputs_embeds, cache)
        elif isinstance(cache, AdmissionCache) and not cache.is_live:
            cache.positions_ahead = _positions_ahead(position_ids, plan.layout)
        if not plan.method.is_dense or plan.keep_mask is not None:
            check_sparse_layer(plan.cut.layer, self.config.num_hidden_layers)
        assert self.learner is not None
        if plan.keep_mask is None:
            check_weights(plan.method, self.learner)
        if self.training and plan.keep_mask is None and (plan.masked or torch.is_grad_enabled()):
            check_training(plan.method)
        if plan.answers_only:
            return self._score_pass(inputs_embeds, plan, attention_mask, position_ids, kwargs)
        if plan.masked:
            return self._masked_pass(inputs_embeds, plan, attention_mask, position_ids, kwargs)
        if cache is None and use_cache:
            cache = AdmissionCache(self.config.num_hidden_layers, plan.cut.layer, self.sparsity.cache_block)
        if cache is not None:
            check_cache(cache, plan.cut.layer, inputs_embeds.shape[0], self.config._attn_implementation)
        if cache is None or not cache.is_live:
            return self._drop_pass(inputs_embeds, plan, attention_mask, position_ids, cache, kwargs)
        if inputs_embeds.shape[1] == 1 and not plan.has_images:
            return self._step_pass(inputs_embeds, plan, position_ids, cache, kwargs)
        return self._turn_pass(inputs_embeds, plan, position_ids, cache, kwargs)

    def _masked_pass(
        self,
        hidden_BND: Tensor,
        plan: Plan,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        kwargs: dict[str, Any],
    ) -> DynamicModelOutput:
        mask = create_causal_mask(self.config, hidden_BND, attention_mask, None, position_ids)
        rotation = self.rotary_emb(hidden_BND, position_ids=position_ids)
        hidden_BND, row_BN = self._early_layers(hidden_BND, plan, mask, rotation, None, kwargs)
        keep_BN, decided_BN = self._masked_decision(hidden_BND, plan, row_BN)
        record = SparsityRecord(layout=plan.layout, keep_mask=keep_BN, sparsified_output=decided_BN)
        entering_BN = entering_mask(keep_BN, self.sparsity.mask_grad_clip, plan.loss_scale)
        record.entering_mask = entering_BN
        if self.training and self.sparsity.dropped_tokens == "zero_vectors":
            hidden_BND = self._zeroing_layers(hidden_BND, plan, entering_BN, mask, rotation, kwargs)
        else:
            padding_mask = None if attention_mask is None else plan.layout.valid
            hidden_BND = self._hiding_layers(hidden_BND, plan, entering_BN, padding_mask, rotation, kwargs)
        return DynamicModelOutput(last_hidden_state=self.norm(hidden_BND), sparsity=record)

    def _hiding_layers(
        self,
        hidden_BND: Tensor,
        plan: Plan,
        keep_BN: Tensor,
        padding_mask: Tensor | None,
        rotation: Rotation,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Run layers l.. on every token; MaskedSoftmax (Eq. 7) hides a dropped one from all others."""
        for layer in self.layers[plan.cut.layer :]:
            hidden_BND = layer(
                hidden_BND,
                keep_BN,
                position_embeddings=rotation,
                padding_mask=padding_mask,
                masked_softmax=self.sparsity.masked_softmax,
                **kwargs,
            )
        return hidden_BND

    def _zeroing_layers(
        self,
        hidden_BND: Tensor,
        plan: Plan,
        keep_BN: Tensor,
        mask: Tensor | None,
        rotation: Rotation,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Run layers l.. as a dense model does, a dropped token being a zero vector on entering each of them.

        Our reading of Table 7's "w/o MaskedSoftmax", in training alone: inference and scoring drop and hide as ever.
        A zero vector has zero key, query and value: as a key it still takes its share exp(0) of every later token's
        softmax, as a query it averages the values of its past. What the layer so writes into its residual stream is
        zeroed again before the next one, because the decision holds for all layers l..L-1: zeroed once, the token would
        be back, for all to see, from layer l+1 on. What the last layer writes stays: the loss of a dropped output token
        counts and is finite, but the token predicts its successor without knowing itself, which is what the paper holds
        against this way of training (Sec. 3.3.3).
        M has the gradient of the products, <d loss / d (M h), h> summed over the layers; at a dropped token it passes
        RMSNorm at zero, where the slope is 1 / sqrt(eps) whatever the size of h.
        """
        keep_BN1 = keep_BN[..., None].to(hidden_BND.dtype)
        for layer in self.layers[plan.cut.layer :]:
            hidden_BND = layer(hidden_BND * keep_BN1, attention_mask=mask, position_embeddings=rotation, **kwargs)
        return hidden_BND

    def _masked_decision(self, hidden_BND: Tensor, plan: Plan, row_BN: Tensor | None) -> tuple[Tensor, Tensor]:
        if plan.keep_mask is not None:
            return torch.where(plan.layout.valid, plan.keep_mask, 0).to(plan.keep_mask.dtype), plan.layout.output
        if self.training and samples(plan.method):
            return sampled_keep_mask(plan, learned_of(self), hidden_BND, row_BN)
        return hard_keep_mask(plan, learned_of(self), hidden_BND, row_BN), plan.layout.output

    def _score_pass(
        self,
        hidden_BND: Tensor,
        plan: Plan,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        kwargs: dict[str, Any],
    ) -> DynamicModelOutput:
        check_attention(self.config._attn_implementation)
        layout = plan.layout
        mask = create_causal_mask(self.config, hidden_BND, attention_mask, None, position_ids)
        rotation = self.rotary_emb(hidden_BND, position_ids=position_ids)
        hidden_BND, row_BN = self._early_layers(hidden_BND, plan, mask, rotation, None, kwargs)
        keep_BN = self._hard_decision(hidden_BND, plan, row_BN, Past())
        packing = Packing.of(layout.computed(keep_BN, every_step=True))
        hidden_BKD, keep_BK = packing.take(hidden_BND), packing.take(keep_BN) & packing.valid
        rotation = _packed(packing, rotation)
        itself_KK = torch.eye(keep_BK.shape[1], dtype=torch.bool, device=keep_BK.device)
        mask = self._cache_mask((keep_BK[:, None] | itself_KK).tril(), hidden_BKD.dtype)
        hidden_BKD = self._late_layers(hidden_BKD, plan, mask, rotation, None, kwargs)
        hidden_BND = packing.put(self.norm(hidden_BKD), hidden_BND.shape[1])
        return DynamicModelOutput(last_hidden_state=hidden_BND, sparsity=SparsityRecord(layout, keep_BN, layout.output))

    def _drop_pass(
        self,
        hidden_BND: Tensor,
        plan: Plan,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        cache: AdmissionCache | None,
        kwargs: dict[str, Any],
    ) -> DynamicModelOutput:
        layout, length = plan.layout, hidden_BND.shape[1]
        mask = create_causal_mask(self.config, hidden_BND, attention_mask, None, position_ids)
        rotation = self.rotary_emb(hidden_BND, position_ids=position_ids)
        if cache is not None:
            valid_BN = None if attention_mask is None else layout.valid
            cache.open_dense(valid_BN, hidden_BND.shape[0], length, hidden_BND.device)
        hidden_BND, row_BN = self._early_layers(hidden_BND, plan, mask, rotation, cache, kwargs)
        keep_BN = self._hard_decision(hidden_BND, plan, row_BN, Past())
        packing = Packing.of(layout.computed(keep_BN))
        hidden_BKD = packing.take(hidden_BND)
        rotation = _packed(packing, rotation)
        mask = create_causal_mask(self.config, hidden_BKD, None, None)  # filler lies behind every kept token
        if cache is not None:
            cache.sparse.open(packing.valid.sum(1), hidden_BKD.shape[1])
        hidden_BKD = self._late_layers(hidden_BKD, plan, mask, rotation, cache, kwargs)
        record = SparsityRecord(layout=layout, keep_mask=keep_BN, sparsified_output=layout.output)
        if cache is not None:
            cache.sparse.retract_last(packing.valid.sum(1) > keep_BN.sum(1))
            record = _noted(record, cache)
        return DynamicModelOutput(
            last_hidden_state=packing.put(self.norm(hidden_BKD), length), cache=cache, sparsity=record
        )

    def _step_pass(
        self, hidden_B1D: Tensor, plan: Plan, position_ids: Tensor, cache: AdmissionCache, kwargs: dict[str, Any]
    ) -> DynamicModelOutput:
        inputs = hidden_B1D, plan, position_ids, cache.seen_outputs, cache.begin_step()
        run = compiled_step if plan.compile else decode_step
        hidden_B1D, admit_B = run(self, *inputs, **kwargs)
        record = SparsityRecord(layout=plan.layout, keep_mask=admit_B[:, None], sparsified_output=plan.layout.output)
        return DynamicModelOutput(last_hidden_state=hidden_B1D, cache=cache, sparsity=_noted(record, cache))

    def _turn_pass(
        self, hidden_BQD: Tensor, plan: Plan, position_ids: Tensor, cache: AdmissionCache, kwargs: dict[str, Any]
    ) -> DynamicModelOutput:
        layout, length = plan.layout, hidden_BQD.shape[1]
        if plan.reads_attention:
            check_question(plan.method, layout.is_image)
        rotation = self.rotary_emb(hidden_BQD, position_ids=position_ids)
        mask = self._cache_mask(cache.dense.place_chunk(layout.valid, layout.valid), hidden_BQD.dtype)
        for layer in self.layers[: plan.cut.layer]:
            hidden_BQD = layer(
                hidden_BQD, attention_mask=mask, position_embeddings=rotation, **{CACHE: cache}, **kwargs
            )
        past = Past(images=cache.seen_images, outputs=cache.seen_outputs)
        keep_BQ = self._hard_decision(hidden_BQD, plan, None, past)
        packing = Packing.of(layout.computed(keep_BQ, every_step=True))
        hidden_BKD, admit_BK = packing.take(hidden_BQD), packing.take(keep_BQ) & packing.valid
        rotation = _packed(packing, rotation)
        mask = self._cache_mask(cache.sparse.place_chunk(packing.valid, admit_BK), hidden_BKD.dtype)
        hidden_BKD = self._late_layers(hidden_BKD, plan, mask, rotation, cache, kwargs)
        cache.commit_chunk(layout.valid, admit_BK)
        record = SparsityRecord(layout=layout, keep_mask=keep_BQ, sparsified_output=layout.output)
        return DynamicModelOutput(
            last_hidden_state=packing.put(self.norm(hidden_BKD), length),
            cache=cache,
            sparsity=_noted(record, cache),
        )

    def _early_layers(
        self,
        hidden_BND: Tensor,
        plan: Plan,
        mask: Tensor | None,
        rotation: Rotation,
        cache: AdmissionCache | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Run layers 0..l-1 on a whole sequence; also return the attention row (B, N) if the method wants one."""
        row = None
        if plan.reads_attention:
            check_question(plan.method, plan.layout.late_images())
        for index, layer in enumerate(self.layers[: plan.cut.layer]):
            if plan.reads_attention and index == plan.cut.layer - 1:
                row = AttentionRow(plan.layout.question_end(), plan.layout.valid)
                kwargs = {**kwargs, "row": row}
            hidden_BND = layer(
                hidden_BND, attention_mask=mask, position_embeddings=rotation, **{CACHE: cache}, **kwargs
            )
        return hidden_BND, None if row is None else row.weights

    def _late_layers(
        self,
        hidden_BKD: Tensor,
        plan: Plan,
        mask: Tensor | None,
        rotation: Rotation,
        cache: AdmissionCache | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        # No position_ids here: with gaps in them, attention back ends would take one row for several packed sequences.
        for layer in self.layers[plan.cut.layer :]:
            hidden_BKD = layer(
                hidden_BKD, attention_mask=mask, position_embeddings=rotation, **{CACHE: cache}, **kwargs
            )
        return hidden_BKD

    def _hard_decision(self, hidden_BND: Tensor, plan: Plan, row_BN: Tensor | None, past: Past) -> Tensor:
        if plan.keep_mask is not None:
            return plan.keep_mask.bool() & plan.layout.valid
        return hard_keep_mask(plan, learned_of(self), hidden_BND, row_BN, past)

    def _cache_mask(self, visible_BQW: Tensor, dtype: torch.dtype) -> Tensor:
        return cache_mask(visible_BQW, self.config._attn_implementation, dtype)


def _packed(packing: Packing, rotation: Rotation) -> Rotation:
    """Return the rotations of the packed tokens. Positions are never packed: a family may make anything of them."""
    rows = packing.index.shape[0]
    cos, sin = (packing.take(part_BNd.expand(rows, -1, -1)) for part_BNd in rotation)
    return cos, sin


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


def _noted(record: SparsityRecord, cache: AdmissionCache) -> SparsityRecord:
    """Let the cache take note of a pass; returns the pass's record with the lengths of the cache after it."""
    cache.note(record.layout, record.keep_mask)
    sparse_B, dense_B = cache.lengths()
    return replace(record, cache_lengths=sparse_B, dense_cache_lengths=dense_B)
