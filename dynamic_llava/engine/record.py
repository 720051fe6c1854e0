"""What a pass of the language model returns: hidden states, the cache, and the record of what was kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from dynamic_llava.layout import TokenLayout


@dataclass(frozen=True)
class RowRecord:
    """What one row kept, as plain numbers."""

    image_indices: list[list[int]]
    """Per image: the kept tokens' offsets within the image, ascending."""
    output_decisions: list[bool]
    """One per output token that was fed, in order: whether it stays."""
    cache_length: int | None
    """Tokens in the cache of the last layer; None without a cache."""
    dense_cache_length: int | None
    """Tokens in the cache of the first layer; None without a cache."""


@dataclass(repr=False)
class SparsityRecord:
    """The record: which tokens a pass kept; what outputs call `sparsity`. N are the tokens of the pass.

    After `generate`, N is the number of tokens that were fed, those of earlier calls on the same cache included: all
    columns of `sequences` but the last, which no pass has seen yet.
    """

    layout: TokenLayout
    """The kind of each token."""
    until: Tensor
    """(B, N) int64: the first layer that no longer sees the token; the number of layers where all see it, 0 at padding.
    What a layer sees, stores and attends to follows from it, whatever the method, before anything is evicted; with a
    `window` its tokens are seen besides. Of a cut within images: the first layer in which its own image alone sees it.
    """
    layers: int
    """L: layers of the language model."""
    keep_mask: Tensor
    """(B, N): M of Eq. 7, 1 (True) where a token is kept to the end, so at every prompt token that no method decides
    on, and 0 at padding; bool, or float in training. With a cache, and no window, its row sums are `cache_lengths`."""
    sparsified_output: Tensor
    """(B, N) bool: output tokens that a decision was made for."""
    cache_lengths: Tensor | None = None
    """(B,) int64: tokens in the cache of the last layer; None without a cache."""
    dense_cache_lengths: Tensor | None = None
    """(B,) int64: tokens in the cache of the first layer."""
    head_lengths: Tensor | None = None
    """(B, L, K) int64: tokens that each key head of each layer still holds; None without a cache, and for a method that
    evicts nothing. `until` and the other lengths count the tokens that a layer was given."""
    window: int = 0
    """Output tokens that a row holds and shows to its next token whatever was decided: its last ones."""
    entering_masks: tuple[Tensor, ...] = ()
    """(B, N) float of each cut: the keep mask as it entered the attention behind it, in a masked pass."""
    asked: Tensor | None = None
    """(B, N) bool: prompt tokens that a masked pass has decided on; None of other passes."""

    @property
    def sparsified_prompt(self) -> Tensor:
        """(B, N) bool: prompt tokens that a masked pass has decided on; none elsewhere."""
        return torch.zeros_like(self.layout.valid) if self.asked is None else self.asked

    @property
    def mask_gradient(self) -> Tensor | None:
        """() float: largest magnitude, before clipping, of the gradient that entered the keep mask from the attention.

        Times what the loss was multiplied by. None before a backward pass.
        """
        gradients = [mask.grad for mask in self.entering_masks if mask.grad is not None]
        return torch.stack([gradient.abs().amax() for gradient in gradients]).amax() if gradients else None

    def seen_by(self, layer: int) -> Tensor:
        """(B, N) bool: the tokens that a layer shows the next token, which are those that it stores in a cache."""
        return self._held_until > layer

    @property
    def _held_until(self) -> Tensor:
        """(B, N) int64: `until`, and the number of layers at the tokens of the window, which all layers hold."""
        if not self.window:
            return self.until
        last_BN = self.layout.output_rank() >= self.layout.output.sum(1, keepdim=True) - self.window
        return self.until.masked_fill(self.layout.output & last_BN, self.layers)

    def tokens_per_layer(self, where: Tensor | None = None) -> Tensor:
        """(B, L) int64: how many tokens each layer sees, so how many slots of a cache it fills.

        where (B, N) bool counts some of the tokens alone, such as those of images.
        """
        until_BN = self._held_until if where is None else self._held_until.where(where, 0)
        layers_L = torch.arange(self.layers, device=until_BN.device)
        return (until_BN[:, None] > layers_L[:, None]).sum(-1)

    @property
    def image_keep_rate(self) -> Tensor:
        """() float: share of image tokens kept; nan without images."""
        return _mean_where(self.keep_mask, self.layout.is_image)

    @property
    def output_keep_rate(self) -> Tensor:
        """() float: share kept of the output tokens that were decided about; nan without any."""
        return _mean_where(self.keep_mask, self.sparsified_output)

    @property
    def prompt_keep_rate(self) -> Tensor:
        """() float: share kept of the prompt tokens that a masked pass decided about; nan without any."""
        return _mean_where(self.keep_mask, self.sparsified_prompt)

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
            until=torch.cat([record.until for record in records], dim=1),
            keep_mask=torch.cat([record.keep_mask for record in records], dim=1),
            sparsified_output=torch.cat([record.sparsified_output for record in records], dim=1),
            asked=None,
        )

    def select_rows(self, choose: Callable[[Tensor], Tensor]) -> "SparsityRecord":
        """Return the record of a choice of rows (reordered, repeated, selected)."""
        return replace(
            self,
            layout=self.layout.select_rows(choose),
            until=choose(self.until),
            keep_mask=choose(self.keep_mask),
            sparsified_output=choose(self.sparsified_output),
            asked=None if self.asked is None else choose(self.asked),
            cache_lengths=None if self.cache_lengths is None else choose(self.cache_lengths),
            dense_cache_lengths=None if self.dense_cache_lengths is None else choose(self.dense_cache_lengths),
            head_lengths=None if self.head_lengths is None else choose(self.head_lengths),
        )

    def __repr__(self) -> str:
        lengths = self.layout.image_lengths().tolist()
        lines = [f"SparsityRecord of {self.keep_mask.shape[0]} x {self.keep_mask.shape[1]} tokens"]
        prompt_BN = self.layout.prompt
        prompts = [counts.tolist() for counts in ((prompt_BN & (self.until == self.layers)).sum(1), prompt_BN.sum(1))]
        for number, (row, stayed, asked) in enumerate(zip(self.rows, *prompts, strict=True)):
            parts = []
            if row.image_indices:
                its, lengths = lengths[: len(row.image_indices)], lengths[len(row.image_indices) :]
                parts.append(f"kept {_shares([*map(len, row.image_indices)], its)} tokens per image")
            if stayed < asked:
                parts.append(f"kept {stayed} of {asked} prompt tokens")
            if row.output_decisions:
                parts.append(f"kept {sum(row.output_decisions)} of {len(row.output_decisions)} output tokens")
            if row.cache_length is not None:
                parts.append(f"cache {row.cache_length} tokens, below the sparse layer {row.dense_cache_length}")
            if self.head_lengths is not None:
                fewest, most = self.head_lengths[number].aminmax()
                parts.append(f"heads hold {int(fewest)} to {int(most)} of them")
            lines.append(f"  row {number}: {'; '.join(parts) or 'prompt tokens only'}")
        return "\n".join(lines)


def _shares(kept: Sequence[int], lengths: Sequence[int]) -> str:
    """Write "4, 5 of 16", or, where images differ in length, "4 of 16, 2 of 9"."""
    if len({*lengths}) == 1:
        return f"{', '.join(map(str, kept))} of {lengths[0]}"
    return ", ".join(f"{count} of {length}" for count, length in zip(kept, lengths, strict=True))


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    return (values.detach().float() * where).sum() / where.sum()


@dataclass
class DecoderOutput(ModelOutput):
    """Output of a sparse decoder; fields as in transformers, plus the record."""

    last_hidden_state: Tensor | None = None
    """(B, N, D) in input order; rows of tokens that were not computed to the end are zero."""
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    """Per layer; the tokens that the layer computed, packed where tokens were removed."""
    attentions: tuple[Tensor, ...] | None = None
    sparsity: SparsityRecord | None = None
    """The record of the pass."""
