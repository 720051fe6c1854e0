"""Calibration of a trained checkpoint on held data: what is stored in it, and how well keep rates are met."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from dynamic_llava.config import DataConfig, ModelConfig
from dynamic_llava.config.calibration import threshold_at
from dynamic_llava.data import Collator, SftDataset
from dynamic_llava.data.prepare import base_processor
from dynamic_llava.eval.shard import own_device
from dynamic_llava.files import replace_file
from dynamic_llava.model import DynamicLlavaForConditionalGeneration
from dynamic_llava.model.margins import Margins, calibration_of, margins_of, quantiles_of

RATES = (0.75, 0.5, 0.35, 0.2, 0.1)
"""Keep rates that are tried on every second sample, with the quantiles of the others."""


def calibrate(
    folder: Path,
    data: str,
    *,
    image_folder: str = "",
    samples: int = 500,
    batch_size: int = 8,
    min_length: int | None = None,
    text_only: Literal["skip", "sparse"] = "skip",
) -> str:
    """Measure the margins of a checkpoint's predictors on held data and store their quantiles in its config.json.

    Returns a table of asked and realised keep rates. min_length: shorter answers are left out; None is the model's
    output_min_length. text_only: samples without an image are left out, or looked at as the others (data.text_only).
    ValueError or FileNotFoundError for a folder without trained predictors of Dynamic-LLaVA, unusable data, and data
    without two answers that are long enough; WriteError where config.json cannot be written.
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
    dataset = SftDataset(DataConfig(json=data, image_folder=image_folder, text_only=text_only), processor)
    chosen = Subset(dataset, range(min(samples, len(dataset))))
    collator = Collator(processor, settings.output_segments, sparse_text=text_only == "sparse")
    batches = DataLoader(chosen, batch_size, collate_fn=collator)
    least = settings.output_min_length if min_length is None else min_length
    found = margins_of(model, batches, least)
    if len(found.get("output", ())) < 2:
        raise ValueError(
            f"{data} has {len(found.get('output', ()))} answers of {least} tokens among {len(chosen)} samples, and two "
            "are needed; give more --samples, or a lower --min-length"
        )
    _store(folder / "config.json", calibration_of(found))
    return "\n".join([f"{folder}: calibrated by {len(chosen)} samples of {data}", "", *_table(found)])


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
    config.setdefault("sparsity", {})["calibration"] = dict(quantiles)
    replace_file(path, json.dumps(config, indent=2) + "\n")
