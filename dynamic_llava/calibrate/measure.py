"""The margins of a model's predictors on held data, and their quantiles, stored with the model.

Margins do not depend on what is dropped: predictors judge what enters the sparse layer, and every layer before it sees
all tokens. So one pass over the data serves every threshold.
Shape suffixes: B rows, N tokens, T output tokens, I images, n image tokens.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from dynamic_llava.config import DataConfig, ModelConfig
from dynamic_llava.config.calibration import threshold_at
from dynamic_llava.data import Collator, SftDataset
from dynamic_llava.data.prepare import base_processor
from dynamic_llava.eval.shard import own_device
from dynamic_llava.files import replace_file
from dynamic_llava.methods import Cut, Dynamic, ImageTokens, OutputTokens
from dynamic_llava.model import DynamicLlavaForConditionalGeneration
from dynamic_llava.sparsity import keep_margin

QUANTILES = 101
"""One for each percent of the tokens, from the smallest margin to the largest."""
RATES = (0.75, 0.5, 0.35, 0.2, 0.1)
"""Keep rates that are tried on every second sample, with the quantiles of the others."""
Margins = dict[str, list[Tensor]]
"""Kind ("image", "output") -> margins (T,) float32 on the CPU, one tensor for each sample that has any, in order."""


@dataclass(frozen=True)
class Listening(Dynamic):
    """Dynamic-LLaVA that notes the margins it decides by."""

    heard: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool: all. Their margins are noted."""
        self.heard["image"] = keep_margin(learned.image_predictor(images.hidden, images.valid))
        return torch.ones_like(images.valid)

    def keep_output(self, outputs: OutputTokens, learned: Any) -> Tensor:
        """(T,) bool: all. Their margins are noted, infinite at sinks, which stay at any rate."""
        margin_T = keep_margin(learned.output_predictor(outputs.hidden))
        self.heard["output"] = margin_T.masked_fill(outputs.place < self.output_sinks, torch.inf)
        return torch.ones_like(margin_T, dtype=torch.bool)


def calibrate(
    folder: Path,
    data: str,
    *,
    image_folder: str = "",
    samples: int = 500,
    batch_size: int = 8,
    min_length: int | None = None,
) -> str:
    """Measure the margins of a checkpoint's predictors on held data and store their quantiles in its config.json.

    Returns a table of asked and realised keep rates. min_length: shorter answers are left out; None is the model's
    output_min_length. ValueError or FileNotFoundError for a folder without trained predictors of Dynamic-LLaVA,
    unusable data, and data without two answers that are long enough; WriteError where config.json cannot be written.
    """
    for name, value in (("--samples", samples), ("--batch-size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} {value} is not possible; give 1 or more")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; give a checkpoint's folder, a hub's downloaded first")
    model = DynamicLlavaForConditionalGeneration.from_pretrained(folder).eval().to(own_device())
    settings = model.config.sparsity
    if settings.method is not None or model.config.untrained_predictors:
        found = f"method {settings.method!r}, untrained: {', '.join(model.config.untrained_predictors) or 'nothing'}"
        raise ValueError(f"{folder} holds no trained predictors of Dynamic-LLaVA ({found}); give one that does")
    processor = base_processor(ModelConfig(str(folder)), settings)
    dataset = SftDataset(DataConfig(json=data, image_folder=image_folder), processor)
    chosen = Subset(dataset, range(min(samples, len(dataset))))
    batches = DataLoader(chosen, batch_size, collate_fn=Collator(dataset.processor, settings.output_segments))
    least = settings.output_min_length if min_length is None else min_length
    found = margins_of(model, batches, least)
    if len(found.get("output", ())) < 2:
        raise ValueError(
            f"{data} has {len(found.get('output', ()))} answers of {least} tokens among {len(chosen)} samples, and two "
            "are needed; give more --samples, or a lower --min-length"
        )
    _store(folder / "config.json", {kind: quantiles_of(each) for kind, each in found.items()})
    return "\n".join([f"{folder}: calibrated by {len(chosen)} samples of {data}", "", *_table(found)])


@torch.no_grad()
def margins_of(model: Any, batches: Iterable[Mapping[str, Any]], min_length: int) -> Margins:
    """Return the margins of image tokens, and of the output tokens in answers of `min_length` tokens.

    batches: as `data.Collator` makes them. The model decides nothing.
    """
    found: Margins = {}
    inputs = ("input_ids", "attention_mask", "pixel_values", "output_mask")
    for batch in batches:
        listening = Listening(**Dynamic.settings_from(model.config.sparsity))
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


def realised(margins: Sequence[Tensor], rate: float) -> float:
    """Return the share kept of every second sample at a rate whose threshold the other samples choose."""
    threshold = threshold_at(quantiles_of(margins[::2]), rate)
    return float((torch.cat([*margins[1::2]]) > threshold).double().mean())


def _table(found: Margins) -> list[str]:
    """One half of the samples chooses the threshold, the other half is looked at."""
    kinds = [kind for kind, margins in found.items() if len(margins) > 1]
    lines = [
        f"| asked | {' | '.join(f'{kind} tokens kept of the other samples' for kind in kinds)} |",
        f"|--:|{'--:|' * len(kinds)}",
    ]
    for rate in RATES:
        lines.append(f"| {rate:.0%} | {' | '.join(f'{realised(found[kind], rate):.1%}' for kind in kinds)} |")
    by_sign = (f"{kind} {float((torch.cat(found[kind]) > 0).double().mean()):.1%}" for kind in kinds)
    return [*lines, "", f"Without a rate, by the margin's sign: {', '.join(by_sign)}."]


def _store(path: Path, quantiles: Mapping[str, Sequence[float]]) -> None:
    """Write the quantiles into a checkpoint's config.json, all else as it stands there."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.setdefault("sparsity", {})["calibration"] = {
        kind: [round(one, 6) for one in values] for kind, values in quantiles.items()
    }
    replace_file(path, json.dumps(config, indent=2) + "\n")
