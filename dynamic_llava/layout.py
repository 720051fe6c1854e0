"""What every token of a batch is, and how the kept ones are gathered.

Shape suffixes: B rows, N tokens of a row, C computed tokens of the longest packed row, I images of the whole batch,
n image tokens of one image, T output tokens, D hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class TokenLayout:
    """The kind of each token (docs/method.md, section 1), of every row by itself.

    A valid token that is neither image nor newline nor output is a prompt token and, unless a method decides on
    questions too, never dropped. The tokens of an image follow one another; two images may be neighbours, and each may
    have a length of its own. Newline tokens (LLaVA-NeXT) stand among those of an image, never first, and are none of
    them: no method is asked about them, so they stay, and no budget, rate or length of an image counts them.
    """

    valid: Tensor
    """(B, N) bool: a real token, not padding."""
    image: Tensor
    """(B, N) int64: at an image token, and at a newline of an image, the number of the image, which counts the images
    of the batch row by row; -1 elsewhere."""
    output: Tensor
    """(B, N) bool: a token of an answer."""
    newline: Tensor | None = None
    """(B, N) bool: the newline tokens; None where images have none."""

    @classmethod
    def build(
        cls,
        image: Tensor,
        attention_mask: Tensor | None,
        output_mask: Tensor | None,
        image_lengths: int | Sequence[int] | None = None,
        past: int = 0,
        newlines: Tensor | None = None,
    ) -> "TokenLayout":
        """Lay out a chunk of N tokens behind `past` tokens of a live cache.

        `image` is (B, N) bool, the tokens that stand for images; `image_lengths` holds the tokens of each image in row
        order, or is one number for all, or None where no token is one of an image, whatever `image` says. `newlines`
        (T,) bool, T tokens of all images in row order, tells which of them are newlines. The masks are (B, N), or
        (B, past + N). Raises ValueError for a mask of another shape.
        """
        valid = torch.ones_like(image)
        if attention_mask is not None:
            valid = chunk_of("attention_mask", attention_mask, image, past).to(image)
        output = torch.zeros_like(image)
        if output_mask is not None:
            output = chunk_of("output_mask", output_mask, image, past).to(image) & valid
        if image_lengths is None:
            return cls(valid, torch.full(image.shape, -1, device=image.device), output)
        image = image & ~output & valid
        return cls(valid, _numbered(image, image_lengths), output, _spread(image, newlines))

    @classmethod
    def of_starts(
        cls, valid: Tensor, image: Tensor, starts: Tensor, output: Tensor, newline: Tensor | None = None
    ) -> "TokenLayout":
        """Lay out tokens given as masks (B, N) bool.

        `image` marks image tokens and their newlines, `starts` the first token of each image.
        """
        number_BN = starts.flatten().cumsum(0).view(starts.shape) - 1
        return cls(valid, torch.where(image, number_BN, -1), output, newline)

    @cached_property
    def is_image(self) -> Tensor:
        """(B, N) bool: an image token."""
        return self.in_image if self.newline is None else self.in_image & ~self.newline

    @cached_property
    def in_image(self) -> Tensor:
        """(B, N) bool: an image token or a newline among them."""
        return self.image >= 0

    @property
    def prompt(self) -> Tensor:
        """(B, N) bool: tokens that are neither of an image nor output."""
        return self.valid & ~self.in_image & ~self.output

    def questions(self, seen_images: Tensor | None = None, among: Tensor | None = None) -> Tensor:
        """(B, N) bool: prompt tokens behind the row's first image; each run of them is a question.

        seen_images (B,) int64 counts the images of each row before this chunk. `among` (B, N) bool limits what may be
        part of a question.
        """
        behind = self.is_image.cumsum(1) > 0
        if seen_images is not None:
            behind = behind | (seen_images > 0)[:, None]
        asked = self.prompt & behind
        return asked if among is None else asked & among

    @cached_property
    def image_starts(self) -> Tensor:
        """(B, N) bool: the first token of each image."""
        return self.image > F.pad(self.image, (1, 0), value=-1)[:, :-1]

    def image_lengths(self) -> Tensor:
        """(I,) int64: the tokens of each image, in row order."""
        return torch.bincount(self.image[self.is_image])

    def images_before(self) -> Tensor:
        """(I,) int64: for each image of the batch in row order, how many images precede it in its own row."""
        counts_B = self.image_starts.sum(1)
        starts_B = counts_B.cumsum(0) - counts_B
        row_I = self.image_rows()
        return torch.arange(row_I.shape[0], device=row_I.device) - starts_B[row_I]

    def image_rows(self) -> Tensor:
        """(I,) int64: the row each image belongs to."""
        return self.image_starts.nonzero()[:, 0]

    @cached_property
    def image_valid(self) -> Tensor:
        """(I, n) bool, n tokens of the longest image: False at the padding behind the tokens of a shorter one."""
        lengths_I = self.image_lengths()
        place_n = torch.arange(int(lengths_I.max()) if len(lengths_I) else 0, device=lengths_I.device)
        return place_n < lengths_I[:, None]

    def gather_images(self, values_BN: Tensor) -> Tensor:
        """Collect (B, N, ...) at image tokens into (I, n, ...), one entry per image in row order.

        n is the longest image's number of tokens; zeros stand behind a shorter one, as `image_valid` says.
        """
        values_T, valid_In = values_BN[self.is_image], self.image_valid
        if len(values_T) == valid_In.numel():
            return values_T.view(*valid_In.shape, *values_T.shape[1:])
        padded = values_T.new_zeros(*valid_In.shape, *values_T.shape[1:])
        return padded.index_put((valid_In,), values_T)

    def scatter_images(self, values_In: Tensor, into_BN: Tensor) -> Tensor:
        """Return `into_BN` with its image tokens replaced by (I, n) values; differentiable in both.

        Values at the padding of shorter images go nowhere.
        """
        values_T = values_In[self.image_valid].to(into_BN.dtype)
        return into_BN.masked_scatter(self.is_image, values_T)

    def select_rows(self, choose: Callable[[Tensor], Tensor]) -> "TokenLayout":
        """Return the layout of a choice of rows (reordered, repeated, selected); images are numbered anew."""
        chosen = (choose(mask) for mask in (self.valid, self.in_image, self.image_starts, self.output))
        return replace(TokenLayout.of_starts(*chosen), newline=None if self.newline is None else choose(self.newline))

    @staticmethod
    def joined(layouts: "Sequence[TokenLayout]") -> "TokenLayout":
        """Return the layout of several chunks of the same rows, one behind the other; images are numbered anew."""
        masks = zip(*((one.valid, one.in_image, one.image_starts, one.output) for one in layouts), strict=True)
        newline = None
        if any(one.newline is not None for one in layouts):
            each = [torch.zeros_like(one.valid) if one.newline is None else one.newline for one in layouts]
            newline = torch.cat(each, dim=1)
        return replace(TokenLayout.of_starts(*(torch.cat(parts, dim=1) for parts in masks)), newline=newline)

    def packed(self, packing: "Packing") -> "TokenLayout":
        """Return the layout of the packed tokens, with filler as padding; images keep their numbers."""
        image = torch.where(packing.valid, packing.take(self.image), -1)
        newline = None if self.newline is None else packing.take(self.newline) & packing.valid
        valid, output = packing.take(self.valid) & packing.valid, packing.take(self.output) & packing.valid
        return TokenLayout(valid, image, output, newline)

    def output_rank(self) -> Tensor:
        """(B, N) int64: the index of each output token among its row's output tokens (undefined elsewhere)."""
        return self.output.cumsum(1) - 1

    def ranks(self, outputs: Tensor | None = None, begins: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, N) int64 each: the index of every output token in its row, and in its answer (undefined elsewhere).

        An answer is a run of output tokens with no prompt or image token in it; padding does not end it. Behind a live
        cache: outputs (B,) int64, output tokens before the chunk, and begins (B,), those before the answer under way.
        """
        others_BN, rank_BN = self.valid & ~self.output, self.output_rank()
        if outputs is not None:
            rank_BN = rank_BN + outputs[:, None]
        begins_BN = torch.where(others_BN, rank_BN + 1, 0).cummax(1).values
        return rank_BN, rank_BN - (begins_BN if begins is None else begins_BN.maximum(begins[:, None]))

    def answer_lengths(self) -> Tensor:
        """(B, N) int64: at each output token the length of the answer (run of output tokens) it belongs to, else 0."""
        return run_lengths(self.output)

    def answer_places(self) -> tuple[Tensor, Tensor]:
        """(T,), (T,) int64: each output token's answer, counted over the batch, and its index within it; row order."""
        return run_places(self.output)

    def newest(self) -> Tensor:
        """(B, N) bool: each row's last real token; none in a row of padding."""
        columns = torch.arange(self.valid.shape[1], device=self.valid.device)
        return self.valid & (columns == _last_true(self.valid)[:, None])

    def computed(self, keep: Tensor, *, every_step: bool = False) -> Tensor:
        """(B, N) bool: which tokens layers from the sparse one on compute, given the kept ones, `keep` (B, N) bool.

        The newest token of a step takes part in it whatever was decided about it (Sec. 3.3.2). That is each row's last
        real token; with `every_step` also every output token, and the last token of every run of image tokens, behind
        which an answer may begin. A token that is computed but not kept is seen by itself alone.
        """
        computed = keep | self.newest()
        if every_step:
            image_ends = self.in_image & ~F.pad(self.in_image, (0, 1))[:, 1:]
            computed = computed | self.output | image_ends
        return computed

    def same_image(self) -> Tensor:
        """(B, N, N) bool: pairs of tokens of one image, newlines among them, each with itself too."""
        return self.in_image[:, :, None] & (self.image[:, :, None] == self.image[:, None])

    def question_end(self) -> Tensor:
        """(B,) int64: the last real token before the row's first output token; 0 where there is none."""
        return _last_true(self.valid & (self.output.cumsum(1) == 0))

    def late_images(self) -> Tensor:
        """(B, N) bool: the image tokens behind the row's first output token."""
        return self.is_image & (self.output.cumsum(1) > 0)


def run_lengths(mask: Tensor) -> Tensor:
    """(B, N) int64: at each True the length of the run of them that it is part of, else 0."""
    run_BN = _run_starts(mask).cumsum(1) * mask
    sizes = torch.zeros(run_BN.shape[0], run_BN.shape[1] + 1, dtype=torch.long, device=run_BN.device)
    return sizes.scatter_add(1, run_BN, mask.long()).gather(1, run_BN) * mask


def run_places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(T,), (T,) int64: of each True in row order, its run, counted over the batch, and its index within it."""
    starts_T = _run_starts(mask)[mask]
    run_T = starts_T.cumsum(0) - 1
    return run_T, torch.arange(len(run_T), device=run_T.device) - starts_T.nonzero()[:, 0][run_T]


def without_last(mask: Tensor) -> Tensor:
    """(B, N) bool: `mask` without the last of each run of True."""
    return mask & F.pad(mask, (0, 1))[:, 1:]


def _run_starts(mask: Tensor) -> Tensor:
    return mask & ~F.pad(mask, (1, 0))[:, :-1]


def chunk_of(name: str, mask: Tensor, like: Tensor, past: int = 0) -> Tensor:
    """Return the columns of a mask (B, N) or (B, past + N) that belong to a chunk of tokens, `like` (B, N).

    Raises ValueError, which calls the mask `name`, for a mask of another shape.
    """
    rows, tokens = like.shape
    if tuple(mask.shape) not in ((rows, tokens), (rows, past + tokens)):
        behind = f", behind {past} in the cache" if past else ""
        allowed = f"{rows, tokens} or {rows, past + tokens}" if past else str((rows, tokens))
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)} but the tokens have shape {rows, tokens}{behind}; give one value "
            f"per token: {allowed}"
        )
    return mask[:, mask.shape[1] - tokens :]


def _numbered(image_BN: Tensor, lengths: int | Sequence[int]) -> Tensor:
    """(B, N) int64: which image each image token belongs to when `lengths` tokens at a time are one; -1 elsewhere."""
    place_BN = image_BN.flatten().cumsum(0).view(image_BN.shape) - 1
    if isinstance(lengths, int):
        number_BN = place_BN // lengths
    else:
        ends_I = torch.tensor(lengths, dtype=torch.int64, device=image_BN.device).cumsum(0)
        number_BN = torch.searchsorted(ends_I, place_BN, right=True)
    return torch.where(image_BN, number_BN, -1)


def _spread(image_BN: Tensor, newlines_T: Tensor | None) -> Tensor | None:
    """(B, N) bool: newlines at the tokens of images, of which there may be more or fewer than in newlines_T."""
    if newlines_T is None or not len(newlines_T):
        return None
    place_BN = (image_BN.flatten().cumsum(0).view(image_BN.shape) - 1).clamp(0, len(newlines_T) - 1)
    return image_BN & newlines_T.to(image_BN.device)[place_BN]


def _last_true(mask: Tensor) -> Tensor:
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, columns, 0).amax(1)


@dataclass(frozen=True)
class Packing:
    """The gather of the kept tokens of each row, in their order, aligned to the left."""

    index: Tensor
    """(B, C) int64: where each packed token comes from."""
    valid: Tensor
    """(B, C) bool: False on the filler behind a row's kept tokens."""

    @classmethod
    def of(cls, keep: Tensor) -> "Packing":
        """Pack the tokens where `keep` (B, N) bool is True; K is the largest number kept in a row (at least 1)."""
        longest = max(int(keep.sum(1).max()), 1)
        index = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
        return cls(index, keep.gather(1, index))

    def take(self, values: Tensor) -> Tensor:
        """Gather (B, N) or (B, N, D) into (B, C) or (B, C, D)."""
        if values.dim() == 2:
            return values.gather(1, self.index)
        return values.gather(1, self.index[..., None].expand(-1, -1, values.shape[-1]))

    def put(self, packed: Tensor, length: int) -> Tensor:
        """Scatter (B, C, D) back to (B, length, D); tokens that were not packed are zero."""
        source = packed * self.valid[..., None].to(packed.dtype)
        full = packed.new_zeros(packed.shape[0], length, packed.shape[-1])
        return full.scatter(1, self.index[..., None].expand_as(source), source)


def after_end(input_ids: Tensor, output_mask: Tensor, end_ids: Tensor) -> Tensor:
    """Mark output tokens that follow an end token inside the same answer: fillers of rows that finished early.

    `input_ids` and `output_mask` are (B, N), `end_ids` (E,); returns (B, N) bool.
    """
    ends = torch.isin(input_ids, end_ids) & output_mask
    before = ends.cumsum(1) - ends.long()
    starts = output_mask & ~F.pad(output_mask, (1, 0))[:, :-1]
    at_start = torch.where(starts, before, 0).cummax(1).values
    return output_mask & (before > at_start)
