"""What the predictors cost of a pass at full size: measured on the layers of one size, scaled to their number.

A 7B model needs no room for this: a prefill is its early layers on the whole prompt and its late layers on the kept
tokens, so one layer is timed at both lengths and multiplied; a step is that of two layers, one of each kind, times half
their number. The head is left out of both.
Shape suffixes: B rows, N tokens, K kept tokens, T output tokens, n tokens of one image, D hidden size.
"""

from dataclasses import replace
from typing import Any

import torch

from dynamic_llava.layout import Packing
from dynamic_llava.methods import Cut, ImageTokens, OutputTokens
from dynamic_llava.profile.presets import Preset, small_shape
from dynamic_llava.profile.report import Column, Report
from dynamic_llava.profile.timing import time_in_turn
from dynamic_llava.profile.work import output_predictor_work, prefill_work, step_work
from dynamic_llava.profile.workload import BEFORE_IMAGE, build_model, method_of, sparse_decoding


@torch.no_grad()
def predictor_shares(preset: Preset, device: torch.device, dtype: torch.dtype, rounds: int = 3) -> Report:
    """Time predictors and selection against the layers of the preset's size, batch 1; returns shares of pass and step.

    Needs the memory of two decoder layers.
    """
    decoder = replace(preset.shape.decoder, layers=2, vocab=64)
    small = replace(preset, batch=1, shape=replace(small_shape(1024, 2), decoder=decoder), sparse_layer=1)
    model = build_model(small, device, dtype)
    early, late = preset.sparse_layer, preset.shape.decoder.layers - preset.sparse_layer
    outputs = preset.outputs[0] // 2
    ways = _prefill_calls(model, small) | _step_calls(model, small, outputs)
    times = time_in_turn(ways, device, rounds)
    prefill = early * times["whole"].median + late * times["kept"].median
    step = (early + late) / small.shape.decoder.layers * times["step"].median
    value_bytes, one = dtype.itemsize, replace(preset, batch=1)
    extra, all_bytes = output_predictor_work(one, value_bytes), step_work(one, "both", value_bytes, outputs).bytes
    prefill_flops = prefill_work(one, "both", value_bytes).flops
    rows = [
        {
            "preset": preset.name,
            "what": "image predictor and selection, of a prefill",
            "seconds": times["image predictor"].median,
            "of": prefill,
            "share": times["image predictor"].median / (prefill + times["image predictor"].median),
            "calculated": 1 - (prefill_flops - _predictor_flops(one, value_bytes)) / prefill_flops,
        },
        {
            "preset": preset.name,
            "what": f"output predictor, of a step after {outputs} tokens",
            "seconds": times["output predictor"].median,
            "of": step,
            "share": times["output predictor"].median / (step + times["output predictor"].median),
            "calculated": extra.bytes / all_bytes,
        },
    ]
    columns = (
        Column("what", "what"),
        Column("seconds", "ms", ".3f", 1e3),
        Column("of", "of ms", ".1f", 1e3),
        Column("share", "measured share", ".3%"),
        Column("calculated", "share by calculation", ".3%"),
    )
    notes = (
        f"Batch 1, {dtype}: one layer of this size timed at {preset.prompt} and {preset.kept_prompt} tokens, times "
        f"{early} and {late}; a step of two layers, times {(early + late) // 2}.",
        "By calculation: of the FLOPs in a prefill, of the bytes in a step.",
    )
    return Report("shares", f"What the predictors cost, {preset.name}", columns, rows, notes)


def _predictor_flops(preset: Preset, value_bytes: int) -> int:
    """FLOPs of the image predictor alone: a prefill with predictors less one of a model that keeps as much."""
    dense = prefill_work(replace(preset, image_keep_rate=1.0), "dense", value_bytes).flops
    return prefill_work(replace(preset, image_keep_rate=1.0), "both", value_bytes).flops - dense


def _prefill_calls(model: Any, preset: Preset) -> dict[str, Any]:
    decoder, n = model.model.language_model, preset.shape.tokens_per_image
    hidden_BND = torch.randn(1, preset.prompt, decoder.config.hidden_size, device=model.device, dtype=model.dtype)
    kept_BKD = hidden_BND[:, : preset.kept_prompt].contiguous()
    method, learned = method_of(preset, "both"), model.model.language_model
    image = slice(BEFORE_IMAGE, BEFORE_IMAGE + n)

    def layer(hidden: torch.Tensor) -> Any:
        places = torch.arange(hidden.shape[1], device=hidden.device)[None]
        return decoder.layers[0](hidden, position_embeddings=decoder.rotary_emb(hidden, position_ids=places))

    def select() -> torch.Tensor:
        key = torch.zeros(1, dtype=torch.int64, device=model.device)
        hidden_InD = hidden_BND[:, image]
        images = ImageTokens(hidden_InD, torch.ones_like(hidden_InD[..., 0], dtype=torch.bool), key)
        keep_In = method.keep_image(Cut(method.layer), images, learned)
        keep_BN = torch.ones(hidden_BND.shape[:2], dtype=torch.bool, device=model.device)
        keep_BN[:, image] = keep_In
        return Packing.of(keep_BN).take(hidden_BND)

    return {"whole": lambda: layer(hidden_BND), "kept": lambda: layer(kept_BKD), "image predictor": select}


def _step_calls(model: Any, preset: Preset, outputs: int) -> dict[str, Any]:
    hidden_TD = torch.randn(1, model.config.text_config.hidden_size, device=model.device, dtype=model.dtype)
    method, learned = method_of(preset, "both"), model.model.language_model
    zero_T = torch.zeros(1, dtype=torch.int64, device=model.device)
    return {
        "step": sparse_decoding(model, preset, "both", outputs).step,
        "output predictor": lambda: method.keep_output(OutputTokens(hidden_TD, zero_T, zero_T), learned),
    }
