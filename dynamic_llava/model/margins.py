"""The margins of Dynamic-LLaVA's predictors on some data, and the quantiles by which a keep rate chooses a threshold.

Margins do not depend on what is dropped: predictors judge what enters the sparse layer, and every layer before it sees
all tokens. So one pass over the data serves every threshold.
Shape suffixes: B rows, N tokens, T output tokens, I images, n image tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamic_llava.config import SparsityMode
from dynamic_llava.files import brief
from dynamic_llava.methods import Cut, Dynamic, ImageTokens, OutputTokens
from dynamic_llava.sparsity import keep_margin

QUANTILES = 101
"""One for each percent of the tokens, from the smallest margin to the largest."""
DIGITS = 6
"""Decimals of a stored quantile."""
Margins = dict[str, list[Tensor]]
"""Kind ("image", "output") -> margins (T,) float32 on the CPU, one tensor for each sample that has any, in order."""


@dataclass(frozen=True)
class Listening(Dynamic):
    """Dynamic-LLaVA that notes the margins it decides by."""

    heard: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool: all. Their margins are noted, where images are sparsified."""
        if self.sparsifies_image:
            self.heard["image"] = keep_margin(learned.image_predictor(images.hidden, images.valid))
        return torch.ones_like(images.valid)

    def keep_output(self, outputs: OutputTokens, learned: Any) -> Tensor:
        """(T,) bool: all. Their margins are noted, infinite at sinks, which stay at any rate."""
        margin_T = keep_margin(learned.output_predictor(outputs.hidden))
        self.heard["output"] = margin_T.masked_fill(outputs.place < self.output_sinks, torch.inf)
        return torch.ones_like(margin_T, dtype=torch.bool)


@torch.no_grad()
def margins_of(
    model: Any, batches: Iterable[Mapping[str, Any]], min_length: int, sparsity: SparsityMode = "both"
) -> Margins:
    """Return the margins of image tokens, and of the output tokens in answers of `min_length` tokens.

    batches: as `data.Collator` makes them. The model decides nothing. sparsity: whose predictors are asked. ValueError
    for a sample whose image cannot be decoded.
    """
    found: Margins = {}
    inputs = ("input_ids", "attention_mask", "pixel_values", "output_mask")
    for batch in batches:
        if batch.get("unread"):
            first = batch["unread"][0]
            raise ValueError(
                f"sample {brief(first.id)} (index {first.index}): {first.why}; mend the image, or leave it out"
            )
        listening = Listening(**Dynamic.settings_from(model.config.sparsity), sparsity=sparsity)
        given = {name: batch[name].to(model.device) for name in inputs if _holds(batch.get(name))}
        layout = model(**given, method=listening, use_cache=False, logits_to_keep=1).sparsity.layout
        where = {"image": layout.image_valid, "output": layout.output}
        for kind, margin in listening.heard.items():
            chosen_BN = torch.zeros_like(where[kind], dtype=margin.dtype)
            spread_BN = margin if kind == "image" else chosen_BN.masked_scatter(layout.output, margin)
            counts_BN = where[kind] if kind == "image" else layout.output & (layout.answer_lengths() >= min_length)
            rows = [margin_N[counts_N].float().cpu() for margin_N, counts_N in zip(spread_BN, counts_BN, strict=True)]
            found.setdefault(kind, []).extend(row for row in rows if len(row))
    return found


def _holds(tensor: Tensor | None) -> bool:
    return tensor is not None and len(tensor) > 0


def quantiles_of(margins: Sequence[Tensor]) -> list[float]:
    """Return the quantiles of all margins together, ascending, sinks as high as the highest of the others.

    ValueError where one is not finite, and where all are of sinks.
    """
    values = torch.cat([*margins]).double().numpy()
    decided = values[values != np.inf]
    if not len(decided):
        raise ValueError("every token of these answers is a sink, so none tells a margin; give longer answers")
    if not np.isfinite(decided).all():
        raise ValueError("the predictors answer with numbers that are not finite; train the model again")
    values = np.minimum(values, decided.max())
    return [float(value) for value in np.quantile(values, np.linspace(0, 1, QUANTILES))]


def calibration_of(margins: Margins) -> dict[str, list[float]]:
    """Return what a checkpoint's settings hold of margins (config/calibration.py). ValueError as `quantiles_of`."""
    return {kind: [round(one, DIGITS) for one in quantiles_of(each)] for kind, each in margins.items()}
