"""What a forward pass returns: transformers' fields, the loss parts, and the record of what was kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from dynamic_llava.layout import TokenLayout
from dynamic_llava.model.cache_names import EARLIER


@dataclass(frozen=True)
class RowRecord:
    """What one row kept, as plain numbers."""

    image_indices: list[list[int]]
    """Per image: the kept tokens' offsets within the image, ascending."""
    output_decisions: list[bool]
    """One per output token that was fed, in order: whether it stays."""
    cache_length: int | None
    """Tokens in the cache of each sparse layer; None without a cache."""
    dense_cache_length: int | None
    """Tokens in the cache of each layer below the sparse one; None without a cache."""


@dataclass(repr=False)
class SparsityRecord:
    """Which tokens were kept. Shapes: B rows, N tokens of the pass.

    After `generate`, N is the number of tokens that were fed, those of earlier calls on the same cache included: all
    columns of `sequences` but the last, which no pass has seen yet.
    """

    layout: TokenLayout
    """The kind of each token."""
    keep_mask: Tensor
    """(B, N): M of Eq. 7, 1 (True) where a token is kept, so at every prompt token, and 0 at padding; bool, or float
    in training. With a cache its row sums are `cache_lengths`."""
    sparsified_output: Tensor
    """(B, N) bool: output tokens that a decision was made for."""
    cache_lengths: Tensor | None = None
    """(B,) int64: tokens in the cache of each sparse layer; None without a cache."""
    dense_cache_lengths: Tensor | None = None
    """(B,) int64: tokens in the cache of each layer below the sparse one."""
    entering_mask: Tensor | None = None
    """(B, N) float: `keep_mask` as it entered the attention of a masked pass with a gradient; None elsewhere."""

    @property
    def mask_gradient(self) -> Tensor | None:
        """() float: largest magnitude, before clipping, of the gradient that entered the keep mask from the attention.

        Times what the loss was multiplied by. None before a backward pass.
        """
        gradient = None if self.entering_mask is None else self.entering_mask.grad
        return None if gradient is None else gradient.abs().amax()

    @property
    def image_keep_rate(self) -> Tensor:
        """() float: share of image tokens kept; nan without images."""
        return _mean_where(self.keep_mask, self.layout.is_image)

    @property
    def output_keep_rate(self) -> Tensor:
        """() float: share kept of the output tokens that were decided about; nan without any."""
        return _mean_where(self.keep_mask, self.sparsified_output)

    @property
    def image_indices(self) -> list[list[Tensor]]:
        """Per row, per image: the kept tokens' offsets within the image, ascending (int64)."""
        keep_T, lengths = self.keep_mask[self.layout.is_image].bool(), self.layout.image_lengths().tolist()
        rows: list[list[Tensor]] = [[] for _ in range(self.keep_mask.shape[0])]
        for row, keep_n in zip(self.layout.image_rows().tolist(), keep_T.split(lengths), strict=True):
            rows[row].append(keep_n.nonzero().flatten())
        return rows

    @property
    def output_decisions(self) -> list[Tensor]:
        """Per row: one bool per output token, in order; the last token of a generation was never fed, so has none.

        A row that ended while others went on was fed its end token, so it has a decision; the filler behind has none.
        """
        decided = self.layout.output & self.sparsified_output
        return [keep[where].bool() for keep, where in zip(self.keep_mask, decided, strict=True)]

    @property
    def rows(self) -> list[RowRecord]:
        """The record row by row, in plain numbers."""
        indices = [[kept.tolist() for kept in row] for row in self.image_indices]
        decisions = [row.tolist() for row in self.output_decisions]
        lengths = [
            [None] * len(indices) if lengths_B is None else lengths_B.tolist()
            for lengths_B in (self.cache_lengths, self.dense_cache_lengths)
        ]
        return [RowRecord(*row) for row in zip(indices, decisions, *lengths, strict=True)]

    @staticmethod
    def joined(records: "Sequence[SparsityRecord]") -> "SparsityRecord":
        """Return one record of all tokens of several passes over one cache, as of the last; ValueError for none."""
        if not records:
            raise ValueError("there is no record to join: no pass has been run")
        return replace(
            records[-1],
            layout=TokenLayout.joined([record.layout for record in records]),
            keep_mask=torch.cat([record.keep_mask for record in records], dim=1),
            sparsified_output=torch.cat([record.sparsified_output for record in records], dim=1),
        )

    def select_rows(self, choose: Callable[[Tensor], Tensor]) -> "SparsityRecord":
        """Return the record of a choice of rows (reordered, repeated, selected)."""
        return replace(
            self,
            layout=self.layout.select_rows(choose),
            keep_mask=choose(self.keep_mask),
            sparsified_output=choose(self.sparsified_output),
            cache_lengths=None if self.cache_lengths is None else choose(self.cache_lengths),
            dense_cache_lengths=None if self.dense_cache_lengths is None else choose(self.dense_cache_lengths),
        )

    def __repr__(self) -> str:
        lengths = self.layout.image_lengths().tolist()
        lines = [f"SparsityRecord of {self.keep_mask.shape[0]} x {self.keep_mask.shape[1]} tokens"]
        for number, row in enumerate(self.rows):
            parts = []
            if row.image_indices:
                its, lengths = lengths[: len(row.image_indices)], lengths[len(row.image_indices) :]
                parts.append(f"kept {_shares([*map(len, row.image_indices)], its)} tokens per image")
            if row.output_decisions:
                parts.append(f"kept {sum(row.output_decisions)} of {len(row.output_decisions)} output tokens")
            if row.cache_length is not None:
                parts.append(f"cache {row.cache_length} tokens, below the sparse layer {row.dense_cache_length}")
            lines.append(f"  row {number}: {'; '.join(parts) or 'prompt tokens only'}")
        return "\n".join(lines)


def _shares(kept: Sequence[int], lengths: Sequence[int]) -> str:
    """Write "4, 5 of 16", or, where images differ in length, "4 of 16, 2 of 9"."""
    if len({*lengths}) == 1:
        return f"{', '.join(map(str, kept))} of {lengths[0]}"
    return ", ".join(f"{count} of {length}" for count, length in zip(kept, lengths, strict=True))


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    return (values.detach().float() * where).sum() / where.sum()


class LlavaOutput(ModelOutput):
    """The fields `cache` and `image_outputs`, which can be asked for by their earlier names too."""

    @classmethod
    def of(cls, outputs: Mapping[str, Any], **more: Any) -> Any:
        """Return the fields of another model's outputs, whatever its transformers calls them, and `more`.

        The states below the head, which outputs with logits have no field for, are left out.
        """
        given = {**outputs, **more}
        if "logits" in given:
            given.pop("last_hidden_state", None)
        if EARLIER in given:
            given["cache"] = given.pop(EARLIER)
        features = given.pop("image_hidden_states", None)
        if features is not None:
            given["image_outputs"] = BaseModelOutputWithPooling(pooler_output=list(features))
        return cls(**given)

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in their order; those of `image_outputs` as a tuple of their own."""
        return tuple(value.to_tuple() if name == "image_outputs" else value for name, value in self.items())

    @property
    def image_hidden_states(self) -> Tensor | list[Tensor] | None:
        """(I, n, D) projected images, as transformers before 5.24 names them; None where no image was given.

        Images of different lengths are a list of one (n, D) each.
        """
        images = self.image_outputs  # type: ignore[attr-defined]
        features = None if images is None else images.pooler_output
        if features is None or isinstance(features, Tensor) or len({len(one) for one in features}) > 1:
            return features
        return torch.stack(list(features))

    if not hasattr(ModelOutput, EARLIER):

        @property
        def past_key_values(self) -> Cache | None:
            """The cache, by the name that transformers before 5.24 gives it."""
            return self.cache  # type: ignore[attr-defined, no-any-return]

        def __getitem__(self, key: Any) -> Any:
            return super().__getitem__("cache" if key == EARLIER else key)

        def __contains__(self, key: object) -> bool:
            return super().__contains__("cache" if key == EARLIER else key)

        def get(self, key: str, default: Any = None) -> Any:
            """As a dict's, under either name of the cache."""
            return super().get("cache" if key == EARLIER else key, default)


@dataclass
class DynamicModelOutput(LlavaOutput):
    """Output of the language model and of the model without head; fields as in transformers, plus the record."""

    last_hidden_state: Tensor | None = None
    """(B, N, D) in input order; rows of dropped tokens are zero."""
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    """Per layer; from the sparse layer on, the packed kept tokens where tokens were removed."""
    attentions: tuple[Tensor, ...] | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    """Output of the vision tower; `pooler_output` is the projected image features, (n, D) per image."""
    sparsity: SparsityRecord | None = None


@dataclass
class DynamicLlavaOutput(LlavaOutput):
    """Output of DynamicLlavaForConditionalGeneration: transformers' fields in their order, then ours."""

    loss: Tensor | None = None
    """(): lm_loss + the method's loss weight * the sum of its own losses (for Dynamic-LLaVA: lambda, Eq. 10)."""
    logits: Tensor | None = None
    """(B, N, V) in input order; rows of dropped tokens are those of a zero hidden state and carry no prediction."""
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    """Output of the vision tower; `pooler_output` is the projected image features, (n, D) per image."""
    lm_loss: Tensor | None = None
    """(): cross entropy of the labelled tokens."""
    method_losses: dict[str, Tensor] | None = None
    """Name -> () float, unweighted: what the method itself is trained by; None for a dense pass."""
    image_keep_loss: Tensor | None = None
    """(): keep-rate regulariser of the image tokens (Eq. 10), unweighted."""
    output_keep_loss: Tensor | None = None
    """(): keep-rate regulariser of the output tokens (Eq. 10), unweighted."""
    sparsity: SparsityRecord | None = None
    """What was kept; None for a dense pass."""


__all__ = ["DynamicLlavaOutput", "DynamicModelOutput", "RowRecord", "SparsityRecord"]
