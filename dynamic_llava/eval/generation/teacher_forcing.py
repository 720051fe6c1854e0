"""Perplexity of reference answers: one masked forward pass for whole dialogues, and the loop that it must equal.

Dropped answer tokens are masked instead of removed, so every token is scored under the decisions that decoding would
have taken. Shape suffixes: B rows, N tokens of the longest row, T answer tokens of a row, V vocabulary, L
layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynamic_llava.eval.generation.dialogues import EncodedRound
from dynamic_llava.eval.generation.live import LiveDialogues
from dynamic_llava.eval.predict import NOT_FINITE, NotFinite, seen_in_layers
from dynamic_llava.methods import Method

LARGEST = 700.0
"""A mean cross entropy beyond it is no finite perplexity in float64; NaN is not below it."""


@dataclass(frozen=True)
class Scored:
    """What scoring one dialogue gave."""

    perplexities: tuple[float, ...]
    """Per round exp(mean cross entropy over the answer's tokens and its `</s>`)."""
    image_seen: list[int]
    """Per layer the image tokens that it saw."""
    output_seen: list[int]
    """Per layer the fed answer tokens, of all rounds, that it saw."""


@torch.no_grad()
def score_dialogues(
    model: Any,
    rows: Sequence[Sequence[EncodedRound]],
    pixel_values: Tensor,
    method: Method,
    filler: int = 0,
    sample_key: Tensor | None = None,
) -> list[Scored]:
    """Score every round of each row in ONE forward pass over right-padded rows, filled up with the id `filler`.

    pixel_values is (B, 3, S, S), one image a row; sample_key (B,) int64 as in `LiveDialogues`. The head runs only where
    a token is predicted. A method that looks at the question's attention is asked round by round where a first answer
    feeds no token: in one pass such a question has no end.
    """
    model.eval()
    device, layers = model.device, model.config.text_config.num_hidden_layers
    looks = any(cut.sees for cut in method.cuts(layers))
    if looks and any(len(row) > 1 and len(row[0].answer) == 1 for row in rows):
        return score_step_by_step(model, rows, pixel_values, method, sample_key)
    fed = [_fed(row) for row in rows]
    width = max(len(ids) for ids, _, _ in fed)
    ids_BN = torch.tensor([ids + [filler] * (width - len(ids)) for ids, _, _ in fed], device=device)
    valid_BN = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _, _ in fed], device=device)
    output_BN = torch.tensor([out + [False] * (width - len(out)) for _, out, _ in fed], device=device)
    result = model.model(
        input_ids=ids_BN,
        pixel_values=pixel_values.to(device, model.dtype),
        attention_mask=valid_BN,
        output_mask=output_BN,
        method=method,
        answers_only=not method.is_dense,
        sample_key=None if sample_key is None else sample_key.to(device),
        use_cache=False,
    )
    image_BN = (ids_BN == model.config.image_token_id) & ~output_BN
    image_BL, output_BL = (seen_in_layers(result.sparsity, where, layers).tolist() for where in (image_BN, output_BN))
    scored = []
    for number, (row, (_, _, places)) in enumerate(zip(rows, fed, strict=True)):
        logits_TV = model.lm_head(result.last_hidden_state[number, torch.tensor(places, device=device)]).float()
        labels_T = torch.tensor([token for one in row for token in one.answer], device=device)
        nll_T = torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="none")
        means = [part.double().mean().item() for part in nll_T.split([len(one.answer) for one in row])]
        if not all(mean < LARGEST for mean in means):
            raise NotFinite(NOT_FINITE)
        scored.append(Scored(tuple(map(math.exp, means)), image_BL[number], output_BL[number]))
    return scored


@torch.no_grad()
def score_step_by_step(
    model: Any,
    rows: Sequence[Sequence[EncodedRound]],
    pixel_values: Tensor,
    method: Method,
    sample_key: Tensor | None = None,
) -> list[Scored]:
    """Score as the paper's scripts do: a call per prompt, then a call per answer token, on one live cache.

    The reference for `score_dialogues`, and what its speed is measured against.
    """
    model.eval()
    live = LiveDialogues(model, pixel_values, method, sample_key)
    nll: list[list[list[Tensor]]] = [[[] for _ in row] for row in rows]
    for number in range(max(map(len, rows))):
        now = [row[number] if number < len(row) else EncodedRound([], []) for row in rows]
        logits_BV = live.feed([one.prompt for one in now], output=False)
        for step in range(max(len(one.answer) for one in now)):
            if step:
                chunks = [one.answer[step - 1 : step] if step < len(one.answer) else [] for one in now]
                logits_BV = live.feed(chunks, output=True)
            labels_B = torch.tensor([one.answer[step] if step < len(one.answer) else 0 for one in now])
            nll_B = torch.nn.functional.cross_entropy(logits_BV, labels_B.to(logits_BV.device), reduction="none")
            for place, one in enumerate(now):
                if step < len(one.answer):
                    nll[place][number].append(nll_B[place])
    seen = zip(live.image_seen.tolist(), live.output_seen.tolist(), strict=True)
    return [
        Scored(tuple(math.exp(torch.stack(one).double().mean().item()) for one in row), image, output)
        for row, (image, output) in zip(nll, seen, strict=True)
    ]


def _fed(row: Sequence[EncodedRound]) -> tuple[list[int], list[bool], list[int]]:
    """Return the ids that are fed, which of them are output, and the place whose logits predict each answer token."""
    ids: list[int] = []
    output: list[bool] = []
    places: list[int] = []
    for one in row:
        ids += one.prompt + one.answer[:-1]
        output += [False] * len(one.prompt) + [True] * (len(one.answer) - 1)
        places += range(len(ids) - len(one.answer), len(ids))
    return ids, output, places
