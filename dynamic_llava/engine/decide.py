"""Decisions at a cut, on the hidden states that enter its layer: hard at inference, sampled in training.

Shape suffixes: B rows, N tokens, C computed tokens, I images, n image tokens of the longest, T output tokens of the
batch, D hidden size, F feature size, m image tokens left, d head size.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dynamic_llava.config import SparsityConfig
from dynamic_llava.engine.answers import OUTPUTS, PROMPTS, check_answer, check_image_answer
from dynamic_llava.engine.plan import Plan
from dynamic_llava.engine.question import question_of
from dynamic_llava.layout import Packing, TokenLayout, run_lengths, run_places, without_last
from dynamic_llava.methods import (
    TOKEN_EVIDENCE,
    Choice,
    Cut,
    Draw,
    Evidence,
    ImageTokens,
    Method,
    OutputTokens,
    PromptTokens,
    QuestionTokens,
)
from dynamic_llava.sparsity.noise import fold_key

HOOKS = {"keep_image": "sample", "keep_output": "sample_output", "keep_prompt": "sample_prompt"}
"""What a method defines to decide at inference, and to sample the same decision in training."""


@dataclass(frozen=True)
class Past:
    """What each row has seen before this chunk, so that a token gets the same draw on every path.

    All are None where the chunk is the first.
    """

    images: Tensor | None = None
    """(B,) int64: images seen."""
    outputs: Tensor | None = None
    """(B,) int64: output tokens seen."""
    answer_begins: Tensor | None = None
    """(B,) int64: output tokens that were seen before the answer under way, or, after a prompt token, all of them."""


@dataclass(frozen=True)
class Flight:
    """The tokens of a chunk that a stage computes: first all, after a cut that removes tokens some, packed."""

    hidden: Tensor
    """(B, C, D): what enters the next layer."""
    layout: TokenLayout
    """The kind of each; `valid` is False at filler too."""
    kept: Tensor
    """(B, C) bool: what all cuts so far have kept. A token that was dropped may have to be computed all the same."""
    rotation: tuple[Tensor, Tensor]
    """Cosines and sines of the tokens' positions, (1 or B, C, d) each."""
    column: Tensor
    """(B, C) int64: where in the chunk each token stands."""
    is_whole: bool = True
    """Whether no token has been left out, and they stand in their columns."""

    @classmethod
    def of(cls, hidden_BND: Tensor, layout: TokenLayout, rotation: tuple[Tensor, Tensor]) -> "Flight":
        """All tokens of a chunk."""
        columns_N = torch.arange(hidden_BND.shape[1], device=hidden_BND.device)
        return cls(hidden_BND, layout, layout.valid, rotation, columns_N.expand(layout.valid.shape))

    def packed(self, packing: Packing) -> "Flight":
        """Only the packed tokens. Their rotations are packed, not positions: a family may make anything of those."""
        rows = self.column.shape[0]
        cos, sin = (packing.take(part.expand(rows, -1, -1)) for part in self.rotation)
        return Flight(
            hidden=packing.take(self.hidden),
            layout=self.layout.packed(packing),
            kept=packing.take(self.kept) & packing.valid,
            rotation=(cos, sin),
            column=packing.take(self.column),
            is_whole=False,
        )

    def put(self, hidden_BCD: Tensor, length: int) -> Tensor:
        """Put (B, C, D) of these tokens back in their columns, (B, length, D); where no token is left, zeros."""
        if self.is_whole:
            return hidden_BCD
        source_BCD = hidden_BCD * self.layout.valid[..., None].to(hidden_BCD.dtype)
        full_BND = hidden_BCD.new_zeros(hidden_BCD.shape[0], length, hidden_BCD.shape[-1])
        return full_BND.scatter(1, self.column[..., None].expand_as(source_BCD), source_BCD)

    @property
    def standing(self) -> TokenLayout:
        """The layout of what is still kept: other tokens count as padding, and are no image's."""
        return replace(self.layout, valid=self.kept, image=torch.where(self.kept, self.layout.image, -1))

    def asking(self, chunk: TokenLayout) -> TokenLayout:
        """The same, with everything from each row's first answer in the whole chunk on as output."""
        return replace(self.standing, output=(chunk.output.cumsum(1) > 0).gather(1, self.column))


def check_question(method: Method, late_BN: Tensor) -> None:
    """Raise ValueError if a method that decides by the first question has to decide on images behind it.

    late_BN (B, N) bool marks those image tokens: on a live cache any, elsewhere those behind the first output token.
    """
    if bool(late_BN.any()):
        raise ValueError(
            f"method {method.name!r} decides by the row's first question, so it cannot decide on an image of a later "
            "turn; give all images in the first turn, or start a new cache with the whole "
            "conversation as the prompt, earlier answers left out of output_mask"
        )


def decide(
    plan: Plan, cut: Cut, learned: Any, flight: Flight, seen: dict[Evidence, Tensor], past: Past
) -> tuple[Tensor, Tensor]:
    """Decide at inference (Eq. 5, 11); returns what stays, (B, C) bool, and the hidden states, (B, C, D).

    `learned` holds the method's own weights; `seen` holds (B, C) of each evidence. Nothing that an earlier cut has
    dropped comes back; prompt tokens stay but where the cut decides on questions. Hidden states change only where the
    method merges tokens. Decisions that the caller has given hold from the first cut on.
    """
    if plan.keep_mask is not None:
        return plan.keep_mask.gather(1, flight.column).bool() & flight.kept, flight.hidden
    layout, keep_BC, hidden_BCD = flight.standing, flight.kept, flight.hidden
    if bool(layout.is_image.any()):
        answer = plan.method.keep_image(cut, _images(plan, cut, flight, seen, past), learned)
        check_image_answer(plan.method, "keep_image", answer, layout.image_valid)
        keep_In, hidden_BCD = _taken(plan, cut, answer, layout, hidden_BCD)
        keep_BC = layout.scatter_images(keep_In, keep_BC)
    if cut.output and bool(layout.output.any()):
        outputs = _outputs(plan, flight, past)
        keep_T = plan.method.keep_output(outputs, learned)
        check_answer(plan.method, "keep_output", keep_T, outputs.rank.shape, OUTPUTS)
        keep_BC = keep_BC.masked_scatter(layout.output, keep_T)
    asked_BC = asked_prompts(plan, past).gather(1, flight.column) & flight.kept if cut.prompt else None
    if asked_BC is not None and bool(asked_BC.any()):
        prompts = _prompts(plan, flight, asked_BC)
        keep_T = plan.method.keep_prompt(prompts, learned)
        check_answer(plan.method, "keep_prompt", keep_T, prompts.rank.shape, PROMPTS)
        keep_BC = keep_BC.masked_scatter(asked_BC, keep_T)
    return keep_BC, hidden_BCD


def admit_token(plan: Plan, learned: Any, hidden_B1D: Tensor, past: Past) -> Tensor:
    """Decide on the single new token of each row (Eq. 6) behind what it has seen; returns (B,) bool. No host read.

    Called at the one cut that decides on output tokens.
    """
    valid_B, output_B = plan.layout.valid[:, 0], plan.layout.output[:, 0]
    if plan.keep_mask is not None:
        return plan.keep_mask[:, -1].bool() & valid_B
    assert past.outputs is not None and past.answer_begins is not None
    place_B = past.outputs - past.answer_begins
    outputs = OutputTokens(hidden=hidden_B1D[:, 0], rank=past.outputs, key=plan.sample_key, place=place_B)
    keep_B = plan.method.keep_output(outputs, learned)
    check_answer(plan.method, "keep_output", keep_B, place_B.shape, OUTPUTS)
    return (keep_B | ~output_B) & valid_B


def samples(method: Method) -> bool:
    """Whether the method samples its decisions in training mode, with a gradient; others decide as at inference."""
    return any(_definer(method, sample) is not Method for sample in HOOKS.values())


def check_training(method: Method) -> None:
    """Raise ValueError for a method that may have learned something that training would leave without a gradient.

    Each decision must be the engine's default, or be sampled by a class that knows how it is taken at inference, or be
    declared as free of anything to learn.
    """
    if all(_trains(method, keep, sample) for keep, sample in HOOKS.items()):
        return
    own = type(method).__name__
    raise ValueError(
        f"method {method.name!r} ({own}) cannot be used in training mode: its hooks decide by 0 or 1, so nothing that "
        f"it learned would have a gradient. If {own} has nothing to learn, set `training_free: ClassVar[bool] = True` "
        f"in the class {own}; if it has, define `sample` beside keep_image, `sample_output` beside keep_output and "
        "`sample_prompt` beside keep_prompt, or decide in your own training loop and give the decisions as keep_mask, "
        "whose gradient is exact (dynamic_llava.sparsity.gumbel_keep makes such a mask), or call model.eval()"
    )


def _trains(method: Method, keep: str, sample: str) -> bool:
    decides, draws = _definer(method, keep), _definer(method, sample)
    if draws is not Method:
        return issubclass(draws, decides)
    fixed = method.training_free and issubclass(_definer(method, "training_free"), decides)
    return decides is Method or fixed


def _definer(method: Method, name: str) -> type:
    """Return the class that defines an attribute of the method."""
    return next(one for one in type(method).__mro__ if name in vars(one))


def decided_tokens(
    layout: TokenLayout, settings: SparsityConfig, among: Tensor | None = None, *, prompt: bool = False
) -> Tensor:
    """(B, N) bool: the tokens that training decides on: those of answers of `output_min_length` tokens.

    With `prompt` also those of questions of `prompt_min_length` tokens, each but for its last, `among` (B, N) bool.
    """
    decided_BN = layout.output & (layout.answer_lengths() >= settings.output_min_length)
    if prompt:
        asked_BN = layout.questions(among=among)
        decided_BN = decided_BN | without_last(asked_BN) & (run_lengths(asked_BN) >= settings.prompt_min_length)
    return decided_BN


def asked_by(labels: Tensor, output: Tensor) -> Tensor:
    """(B, N) bool: where training may decide on questions: behind the row's last answer that counts as prompt.

    Such an answer is labelled, in labels (B, N) int64, and not of `output` (B, N) bool.
    """
    earlier_BN = (labels != -100) & ~output.bool()
    return earlier_BN.flip(1).cumsum(1).flip(1) == 0


def asked_prompts(plan: Plan, past: Past) -> Tensor:
    """(B, N) bool: the tokens of the chunk's questions, each but for its last, which always stays."""
    return without_last(plan.layout.questions(past.images, plan.asked))


def sample(
    plan: Plan, cut: Cut, learned: Any, flight: Flight, seen: dict[Evidence, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Let the method sample in a training pass, which removes nothing; arguments as of `decide`.

    Returns what stays, (B, N) float32 with a gradient; the hidden states; and (B, N) bool, the output and prompt tokens
    that were decided on. Each hook is called once whatever the batch holds, so that every rank of a distributed run
    gathers, and has a gradient for, all parameters.
    """
    method, layout, hidden_BND = plan.method, flight.standing, flight.hidden
    draw = Draw(tau=plan.tau, settings=plan.settings)
    keep_BN = flight.kept.float()
    if bool(layout.is_image.any()):
        answer = method.sample(cut, _images(plan, cut, flight, seen, Past()), learned, draw)
        check_image_answer(method, "sample", answer, layout.image_valid, sampled=True)
        keep_In, hidden_BND = _taken(plan, cut, answer, layout, hidden_BND)
        keep_BN = layout.scatter_images(keep_In, keep_BN)
    else:
        answer = method.sample(cut, _no_image(plan, cut, hidden_BND), learned, draw)
        keep_In = answer.keep if isinstance(answer, Choice) else answer
        keep_BN = keep_BN + 0.0 * keep_In.float().sum()
    decided_BN = decided_tokens(layout, plan.settings, plan.asked, prompt=cut.prompt)
    if cut.output:
        outputs = _outputs(plan, flight, Past()) if bool(layout.output.any()) else None
        keep_BN = _sampled(plan, "sample_output", outputs, layout.output, (keep_BN, decided_BN), flight, learned, draw)
    else:
        decided_BN = decided_BN & ~layout.output
    if cut.prompt:
        asked_BN = asked_prompts(plan, Past()) & flight.kept
        prompts = _prompts(plan, flight, asked_BN) if bool(asked_BN.any()) else None
        keep_BN = _sampled(plan, "sample_prompt", prompts, asked_BN, (keep_BN, decided_BN), flight, learned, draw)
    return keep_BN, hidden_BND, decided_BN


def _sampled(
    plan: Plan,
    hook: str,
    tokens: OutputTokens | PromptTokens | None,
    where_BN: Tensor,
    so_far: tuple[Tensor, Tensor],
    flight: Flight,
    learned: Any,
    draw: Draw,
) -> Tensor:
    """Return what stays, with a hook's samples at the `tokens`, which stand `where_BN`, as far as they are decided on.

    so_far: what stays without them, and which tokens are decided on, (B, N) each. Without tokens the hook is asked
    about the first of the batch, and its answer counts for nothing.
    """
    (keep_BN, decided_BN), ask = so_far, getattr(plan.method, hook)
    if tokens is None:
        first_1 = torch.zeros(1, dtype=torch.int64, device=keep_BN.device)
        kind = OutputTokens if hook == "sample_output" else PromptTokens
        no_tokens = kind(hidden=flight.hidden[:1, 0], rank=first_1, key=plan.sample_key[:1])
        keep_1 = ask(no_tokens, learned, replace(draw, answer=first_1, place=first_1))
        return keep_BN + 0.0 * keep_1.float().sum()
    set_T, place_T = run_places(where_BN)
    keep_T = ask(tokens, learned, replace(draw, answer=set_T, place=place_T))
    axes = OUTPUTS if hook == "sample_output" else PROMPTS
    check_answer(plan.method, hook, keep_T, set_T.shape, axes, sampled=True)
    return torch.where(decided_BN, keep_BN.masked_scatter(where_BN, keep_T.to(keep_BN.dtype)), keep_BN)


def _images(plan: Plan, cut: Cut, flight: Flight, seen: dict[Evidence, Tensor], past: Past) -> ImageTokens:
    """Return the images of a flight as a method is shown them: of each, the tokens that are still kept."""
    layout, hidden_BCD = flight.standing, flight.hidden
    valid_In = layout.image_valid
    count = len(valid_In)  # the last images may have been dropped whole
    place_I, rows_I = plan.layout.images_before(), plan.layout.image_rows()
    if past.images is not None:
        place_I = place_I + past.images[rows_I]
    key_I = fold_key(plan.sample_key[rows_I], place_I)
    shown: dict[Evidence, Tensor] = {name: layout.gather_images(values_BC) for name, values_BC in seen.items()}
    if cut.reads_tower and plan.tower is not None:
        shown = {name: values.to(hidden_BCD.device) for name, values in plan.tower.seen.items()}
    question = plan.question if "clip_text" in cut.sees else None
    if cut.sees & TOKEN_EVIDENCE:
        question = question_of(flight.asking(plan.layout), rows_I[:count], seen)
    return ImageTokens(
        hidden=shown["tower"] if cut.before_projector else layout.gather_images(hidden_BCD),
        valid=valid_In,
        key=key_I[:count],
        seen={name: values for name, values in shown.items() if name in cut.sees},
        tokens=plan.layout.image_lengths()[:count],
        question=question,
    )


def _no_image(plan: Plan, cut: Cut, hidden_BND: Tensor) -> ImageTokens:
    """Return the first row as if it were an image, for a method that has to be asked although there is none."""
    row_1ND = hidden_BND[:1]
    like = {name: row_1ND[..., 0] if name.endswith(("row", "received")) else row_1ND for name in cut.sees}
    seen = {evidence: torch.zeros_like(values) for evidence, values in like.items()}
    valid_1N = torch.ones(row_1ND.shape[:2], dtype=torch.bool, device=row_1ND.device)
    return ImageTokens(
        hidden=row_1ND,
        valid=valid_1N,
        key=plan.sample_key[:1],
        seen=seen,
        question=QuestionTokens(valid_1N, seen) if cut.sees & TOKEN_EVIDENCE else None,
    )


def _outputs(plan: Plan, flight: Flight, past: Past) -> OutputTokens:
    layout = flight.layout
    ranks = plan.layout.ranks(past.outputs, past.answer_begins)
    rank_BC, place_BC = (values_BN.gather(1, flight.column) for values_BN in ranks)
    return OutputTokens(
        hidden=flight.hidden[layout.output],
        rank=rank_BC[layout.output],
        key=plan.sample_key[:, None].expand_as(rank_BC)[layout.output],
        place=place_BC[layout.output],
    )


def _prompts(plan: Plan, flight: Flight, asked_BC: Tensor) -> PromptTokens:
    rank_BC = asked_BC.cumsum(1) - 1
    return PromptTokens(
        hidden=flight.hidden[asked_BC],
        rank=rank_BC[asked_BC],
        key=plan.sample_key[:, None].expand_as(rank_BC)[asked_BC],
    )


def _taken(
    plan: Plan, cut: Cut, answer: Tensor | Choice, layout: TokenLayout, hidden_BCD: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the keep mask (I, n) of a method's answer, and the hidden states (B, C, D) with its tokens merged.

    Before the projector the tower's features are merged, and of those the projector makes tokens anew.
    """
    if isinstance(answer, Tensor):
        return answer, hidden_BCD
    if answer.into is None and answer.shares is None:
        return answer.keep, hidden_BCD
    # A sampled 0 may be a rounding error away from 0.
    stays_In = answer.keep > 0.5 if answer.keep.is_floating_point() else answer.keep
    keep_In, tokens_InD = stays_In & layout.image_valid, layout.gather_images(hidden_BCD)
    if cut.before_projector:
        assert plan.tower is not None and plan.project is not None
        features_InF = plan.tower.seen["tower"].to(hidden_BCD.device)
        merged_InF, changed_In = _merged(answer, keep_In, layout.image_valid, features_InF)
        projected_1mD = plan.project(merged_InF[changed_In][None]).to(tokens_InD)
        merged_InD = tokens_InD.masked_scatter(changed_In[..., None], projected_1mD)
    else:
        merged_InD, _ = _merged(answer, keep_In, layout.image_valid, tokens_InD)
    return answer.keep, hidden_BCD.masked_scatter(layout.is_image[..., None], merged_InD[layout.image_valid])


def _merged(answer: Choice, keep_In: Tensor, valid_In: Tensor, tokens_InD: Tensor) -> tuple[Tensor, Tensor]:
    """Merge tokens as a choice says; returns (I, n, D), and (I, n) bool, the tokens that have taken in others.

    What becomes of a kept token is the sum of itself and of those that it takes over, each times its weight; without
    weights, their mean; or, with `shares`, a sum over all tokens. Other tokens stay as they are.
    """
    itself_n = torch.arange(keep_In.shape[1], device=keep_In.device)
    if answer.shares is not None:
        shares_Inn = answer.shares.to(tokens_InD).masked_fill(~valid_In[:, None], 0.0)
        changed_In = keep_In & (shares_Inn != torch.eye(len(itself_n)).to(shares_Inn)).any(-1)
        return torch.where(changed_In[..., None], shares_Inn @ tokens_InD, tokens_InD), changed_In
    assert answer.into is not None
    heir_In = torch.where(valid_In & ~keep_In, answer.into, itself_n)
    weight_In = torch.ones_like(tokens_InD[..., 0]) if answer.weight is None else answer.weight.to(tokens_InD.dtype)
    weight_In = weight_In * valid_In
    merged_InD = torch.zeros_like(tokens_InD).scatter_add(
        1, heir_In[..., None].expand_as(tokens_InD), tokens_InD * weight_In[..., None]
    )
    if answer.weight is None:
        merged_InD = merged_InD / torch.zeros_like(weight_In).scatter_add(1, heir_In, weight_In).clamp(min=1)[..., None]
    taken_In = torch.zeros_like(weight_In).scatter_add(1, heir_In, torch.ones_like(weight_In)) > 1
    changed_In = keep_In & (taken_In | (weight_In != 1))
    return torch.where(keep_In[..., None], merged_InD, tokens_InD), changed_In
