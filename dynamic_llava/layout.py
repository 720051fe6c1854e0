"""What every token of a batch is, and how the kept ones are gathered.

Shape suffixes: B rows, N tokens of a row, K tokens of the longest packed row, I images of the whole batch, n tokens of
one image, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """The kind of each token (docs/method.md, section 1); every mask is (B, N) bool and rows never refer to each other.

    A valid token that is neither image nor output is a prompt token and is never dropped.
    """

    valid: Tensor
    """(B, N) bool: a real token, not padding."""
    image: Tensor
    """(B, N) bool: an image token."""
    output: Tensor
    """(B, N) bool: a token of an answer."""
    tokens_per_image: int
    """n: every image fills this many consecutive image tokens."""

    @classmethod
    def build(
        cls,
        image: Tensor,
        attention_mask: Tensor | None,
        output_mask: Tensor | None,
        tokens_per_image: int,
    ) -> "TokenLayout":
        """Lay out a chunk of N tokens.

        `image` is (B, N) bool. On a live cache the masks are longer than the chunk: their last N columns belong to it.
        Raises ValueError when a mask is shorter than the chunk or has another batch size.
        """
        valid = torch.ones_like(image) if attention_mask is None else _tail("attention_mask", attention_mask, image)
        output = torch.zeros_like(image) if output_mask is None else _tail("output_mask", output_mask, image)
        return cls(valid, image & ~output & valid, output & valid, tokens_per_image)

    @property
    def prompt(self) -> Tensor:
        """(B, N) bool: tokens that are never dropped."""
        return self.valid & ~self.image & ~self.output

    def images_before(self) -> Tensor:
        """(I,) int64: for each image of the batch in row order, how many images precede it in its own row."""
        counts_B = self.image.sum(1) // self.tokens_per_image
        starts_B = counts_B.cumsum(0) - counts_B
        row_I = self.image_rows()
        return torch.arange(row_I.shape[0], device=row_I.device) - starts_B[row_I]

    def image_rows(self) -> Tensor:
        """(I,) int64: the row each image belongs to."""
        counts_B = self.image.sum(1) // self.tokens_per_image
        return torch.arange(counts_B.shape[0], device=counts_B.device).repeat_interleave(counts_B)

    def gather_images(self, values_BN: Tensor) -> Tensor:
        """Collect (B, N, ...) at image tokens into (I, n, ...), one entry per image in row order."""
        return values_BN[self.image].unflatten(0, (-1, self.tokens_per_image))

    def scatter_images(self, values_In: Tensor, into_BN: Tensor) -> Tensor:
        """Return `into_BN` with its image tokens replaced by (I, n) values; differentiable in both."""
        return into_BN.masked_scatter(self.image, values_In.to(into_BN.dtype))

    def output_rank(self) -> Tensor:
        """(B, N) int64: the index of each output token among its row's output tokens (undefined elsewhere)."""
        return self.output.cumsum(1) - 1

    def answer_lengths(self) -> Tensor:
        """(B, N) int64: at each output token the length of the answer (run of output tokens) it belongs to, else 0."""
        answer_BN = self._answer_starts().cumsum(1) * self.output
        sizes = torch.zeros(
            answer_BN.shape[0], answer_BN.shape[1] + 1, dtype=torch.long, device=answer_BN.device
        ).scatter_add(1, answer_BN, self.output.long())
        return sizes.gather(1, answer_BN) * self.output

    def answer_places(self) -> tuple[Tensor, Tensor]:
        """(T,), (T,) int64: each output token's answer, counted over the batch, and its index within it; row order."""
        starts_T = self._answer_starts()[self.output]
        answer_T = starts_T.cumsum(0) - 1
        return answer_T, torch.arange(len(answer_T), device=answer_T.device) - starts_T.nonzero()[:, 0][answer_T]

    def _answer_starts(self) -> Tensor:
        return self.output & ~torch.nn.functional.pad(self.output, (1, 0))[:, :-1]

    def last_valid(self) -> Tensor:
        """(B,) int64: index of each row's last real token (0 for a row of padding)."""
        return _last_true(self.valid)

    def question_end(self) -> Tensor:
        """(B,) int64: the last prompt token before the row's first output token, else the last real token."""
        before = self.prompt & (self.output.cumsum(1) == 0)
        return torch.where(before.any(1), _last_true(before), self.last_valid())


def _tail(name: str, mask: Tensor, like: Tensor) -> Tensor:
    if mask.dim() != 2 or mask.shape[0] != like.shape[0] or mask.shape[1] < like.shape[1]:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)} but the tokens have shape {tuple(like.shape)}; "
            "give one row per sample and at least one column per token"
        )
    return mask[:, mask.shape[1] - like.shape[1] :].to(device=like.device, dtype=torch.bool)


def _last_true(mask: Tensor) -> Tensor:
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, columns, 0).amax(1)


@dataclass(frozen=True)
class Packing:
    """The gather of the kept tokens of each row, in their order, aligned to the left."""

    index: Tensor
    """(B, K) int64: where each packed token comes from."""
    valid: Tensor
    """(B, K) bool: False on the filler behind a row's kept tokens."""

    @classmethod
    def of(cls, keep: Tensor) -> "Packing":
        """Pack the tokens where `keep` (B, N) bool is True; K is the largest number kept in a row (at least 1)."""
        longest = max(int(keep.sum(1).max()), 1)
        index = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
        return cls(index, keep.gather(1, index))

    def take(self, values: Tensor) -> Tensor:
        """Gather (B, N) or (B, N, D) into (B, K) or (B, K, D)."""
        if values.dim() == 2:
            return values.gather(1, self.index)
        return values.gather(1, self.index[..., None].expand(-1, -1, values.shape[-1]))

    def put(self, packed: Tensor, length: int) -> Tensor:
        """Scatter (B, K, D) back to (B, length, D); tokens that were not packed are zero."""
        source = packed * self.valid[..., None].to(packed.dtype)
        full = packed.new_zeros(packed.shape[0], length, packed.shape[-1])
        return full.scatter(1, self.index[..., None].expand_as(source), source)


def after_end(input_ids: Tensor, output_mask: Tensor, end_ids: Tensor) -> Tensor:
    """Mark output tokens that follow an end token inside the same answer: fillers of rows that finished early.

    `input_ids` and `output_mask` are (B, N), `end_ids` (E,); returns (B, N) bool.
    """
    ends = torch.isin(input_ids, end_ids) & output_mask
    before = ends.cumsum(1) - ends.long()
    starts = output_mask & ~torch.nn.functional.pad(output_mask, (1, 0))[:, :-1]
    at_start = torch.where(starts, before, 0).cummax(1).values
    return output_mask & (before > at_start)
