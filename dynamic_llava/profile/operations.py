"""Single operations of the method, timed alone: its two attentions, and its predictors.

The attentions are held against torch's own: MaskedSoftmax (Eq. 7) in training, ragged attention in decoding. What the
predictors cost of a pass at full size is measured on the layers of one size and scaled to their number. A 7B model
needs no room for this: a prefill is its early layers on the whole prompt and its late layers on the kept tokens, so one
layer is timed at both lengths and multiplied; a step is that of two layers, one of each kind, times half their number.
The head is left out of both.
Shape suffixes: B rows, N tokens, C computed tokens, T output tokens, I images, n image tokens, D hidden size.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dynamic_llava.layout import Packing
from dynamic_llava.methods import Cut, ImageTokens, OutputTokens
from dynamic_llava.profile.measuring import (
    Timing,
    attempt,
    describe,
    output_predictor_work,
    prefill_work,
    seconds_of,
    step_work,
    summary,
    time_in_turn,
)
from dynamic_llava.profile.presets import Preset, small_shape
from dynamic_llava.profile.results import Column, Report, Rows
from dynamic_llava.profile.workload import BEFORE_IMAGE, build_model, method_of, sparse_decoding
from dynamic_llava.sparsity import masked_softmax_attention
from dynamic_llava.sparsity.ragged_attention import ragged_attention


def attention_rows(
    implementations: Sequence[Any],
    device: torch.device,
    dtype: torch.dtype,
    *,
    tokens: int,
    keep_rate: float = 0.5,
    batch: int = 1,
    heads: int = 8,
    width: int = 64,
    rounds: int = 3,
    calls: int = 1,
) -> Rows:
    """Yield each implementation's time of both passes, all gradients included, beside plain causal attention's.

    Plain attention is FlashAttention-2 on an accelerator, and what torch chooses on a CPU; all of them take turns.
    """
    torch.manual_seed(0)
    query, key, value, upstream = (
        torch.randn(batch, heads, tokens, width, device=device, dtype=dtype) for _ in range(4)
    )
    keep = (torch.rand(batch, tokens, device=device) < keep_rate).float()
    inputs = [tensor.requires_grad_() for tensor in (query, key, value, keep)]

    def plain() -> Tensor:
        with nullcontext() if device.type == "cpu" else sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(query, key, value, is_causal=True)

    def masked(implementation: Any) -> Callable[[], Tensor]:
        return lambda: masked_softmax_attention(query, key, value, keep, implementation=implementation)

    timed = {"plain": _both_passes(plain, inputs[:3], upstream)}
    timed |= {name: _both_passes(masked(name), inputs, upstream) for name in implementations}
    times = time_in_turn(timed, device, rounds, calls=calls)
    for name in implementations:
        yield {
            "tokens": tokens,
            "batch": batch,
            "keep_rate": keep_rate,
            "implementation": name,
            "seconds": times[name].median,
            "low": times[name].low,
            "high": times[name].high,
            "plain": times["plain"].median,
            "ratio": times[name].median / times["plain"].median,
        }


def attention_report(device: torch.device, dtype: torch.dtype, heads: int, width: int) -> Report:
    """Return the head of the table of attention_rows."""
    plain = "torch's own" if device.type == "cpu" else "FlashAttention-2"
    columns = (
        Column("tokens", "tokens"),
        Column("batch", "rows"),
        Column("keep_rate", "kept", ".0%"),
        Column("implementation", "implementation"),
        Column("seconds", "MaskedSoftmax, ms", ".3f", 1e3),
        Column("low", "quartile, ms", ".3f", 1e3),
        Column("high", "quartile, ms", ".3f", 1e3),
        Column("plain", f"{plain}, ms", ".3f", 1e3),
        Column("ratio", "ratio", ".2f"),
    )
    notes = (f"Forward and backward, {dtype}, {heads} heads of {width}; {plain} is causal and without a mask.",)
    return Report("attention", "Training attention, both passes", columns, [], notes)


def _both_passes(attend: Callable[[], Tensor], inputs: list[Tensor], upstream: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(attend(), inputs, upstream)


def ragged_rows(
    implementations: Sequence[Any],
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch: int,
    slots: int,
    heads: int,
    width: int,
    rounds: int = 5,
    calls: int = 1,
) -> Rows:
    """Yield the time of attention from one token per row to rows filled by a half to all, each row when it is measured.

    "plain" is torch's attention over rows that are all filled, without a mask. Bytes are keys and values of filled
    slots, which is what has to be read. On an accelerator each is timed twice, the second time as a recorded graph of
    all calls: there the host costs nothing, as in a compiled step.
    """
    torch.manual_seed(0)
    query = torch.randn(batch, heads, 1, width, device=device, dtype=dtype)
    keys, values = torch.randn(2, batch, heads, slots, width, device=device, dtype=dtype)
    lengths = torch.linspace(slots // 2, slots - 1, batch, device=device).long()
    filled, one = int((lengths + 1).sum()), 2 * heads * width * dtype.itemsize
    timed: dict[str, Callable[[], Any]] = {
        name: partial(ragged_attention, query, keys, values, lengths, implementation=name) for name in implementations
    }
    timed["plain"] = partial(scaled_dot_product_attention, query, keys, values)
    ways = ("eager",) if device.type == "cpu" else ("eager", "recorded")
    for name, call in timed.items():
        moved = one * (batch * slots if name == "plain" else filled)
        for way in ways:
            row = {"batch": batch, "slots": slots, "implementation": name, "way": way, "bytes": moved, "seconds": None}
            with torch.no_grad():
                timing = attempt((name, batch, slots), partial(_one, call, device, rounds, calls, way == "recorded"))
            if isinstance(timing, Exception):
                engine = f"{name}, {way}"
                yield row | {
                    "phase": "ragged",
                    "way": f"{batch} x {slots}",
                    "engine": engine,
                    "failed": describe(timing),
                }
                continue
            spread = {"seconds": timing.median, "low": timing.low, "high": timing.high}
            yield row | spread | {"rate": moved / timing.median}


def _one(call: Callable[[], Any], device: torch.device, rounds: int, calls: int, recorded: bool) -> Timing:
    if not recorded:
        return time_in_turn({"one": call}, device, rounds, calls=calls, warmup=2)["one"]
    call()
    module = torch.get_device_module(device)
    graph = module.CUDAGraph()
    with module.graph(graph):
        for _ in range(calls):
            call()
    timing = time_in_turn({"one": graph.replay}, device, rounds, warmup=2)["one"]
    spread = {name: getattr(timing, name) / calls for name in ("median", "low", "high", "mean")}
    return replace(timing, calls=timing.calls * calls, **spread)


def new_length_rows(device: torch.device, dtype: torch.dtype, heads: int, width: int, lengths: int = 8) -> Rows:
    """Yield the time of torch's own attention over keys of a length that it has not met before, and of one that it has.

    An answer grows by a token in every step, and prompts have any length: a backend that plans for each length anew
    pays for it there. "decoding" is one query without a mask; "prefill" is causal.
    """
    cudnn, *others = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
    backends = {
        "torch's choice": nullcontext,
        "cuDNN": partial(sdpa_kernel, cudnn),
        "others": partial(sdpa_kernel, others),
    }
    first = 515
    for phase in ("decoding", "prefill"):
        for name, backend in backends.items():
            row = {"phase": phase, "backend": name, "new": None, "known": None}
            try:
                with torch.no_grad(), backend():
                    times = [_at_length(device, dtype, heads, width, first + more, phase) for more in range(lengths)]
            except RuntimeError as error:
                yield row | {"failed": describe(error)}
                continue
            new, known = zip(*times, strict=True)
            yield row | {"new": summary([*new[1:]]).median, "known": summary([*known[1:]]).median}
        first += 2 * lengths


def _at_length(
    device: torch.device, dtype: torch.dtype, heads: int, width: int, length: int, phase: str
) -> tuple[float, float]:
    query = torch.randn(1, heads, 1 if phase == "decoding" else length, width, device=device, dtype=dtype)
    keys, values = torch.randn(2, 1, heads, length, width, device=device, dtype=dtype)
    call = partial(scaled_dot_product_attention, query, keys, values, is_causal=phase == "prefill")
    return seconds_of(call, device), seconds_of(call, device)


def new_length_report(dtype: torch.dtype, heads: int, width: int) -> Report:
    """Return the head of the table of new_length_rows."""
    columns = (
        Column("phase", "phase"),
        Column("backend", "backend"),
        Column("new", "a new length, ms", ".3f", 1e3),
        Column("known", "again, ms", ".3f", 1e3),
        Column("failed", ""),
    )
    notes = (f"torch's scaled_dot_product_attention, {dtype}, batch 1, {heads} heads of {width}, about 520 keys.",)
    return Report("lengths", "What a length costs that attention has not met before", columns, [], notes)


def ragged_report(dtype: torch.dtype, heads: int, width: int) -> Report:
    """Return the head of the table of ragged_rows."""
    columns = (
        Column("batch", "rows"),
        Column("slots", "slots"),
        Column("implementation", "implementation"),
        Column("way", "way"),
        Column("seconds", "ms", ".4f", 1e3),
        Column("low", "quartile, ms", ".4f", 1e3),
        Column("high", "quartile, ms", ".4f", 1e3),
        Column("bytes", "MB", ".2f", 1e-6),
        Column("rate", "GB/s", ".1f", 1e-9),
        Column("failed", ""),
    )
    notes = (
        f"{dtype}, {heads} heads of {width}; rows are filled by a half to all. plain: all slots of all rows, no mask.",
    )
    return Report("ragged", "Attention of one new token per row", columns, [], notes)


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
    timed = _prefill_calls(model, small) | _step_calls(model, small, outputs)
    times = time_in_turn(timed, device, rounds)
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
    kept_BCD = hidden_BND[:, : preset.kept_prompt].contiguous()
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

    return {"whole": lambda: layer(hidden_BND), "kept": lambda: layer(kept_BCD), "image predictor": select}


def _step_calls(model: Any, preset: Preset, outputs: int) -> dict[str, Any]:
    hidden_TD = torch.randn(1, model.config.text_config.hidden_size, device=model.device, dtype=model.dtype)
    method, learned = method_of(preset, "both"), model.model.language_model
    zero_T = torch.zeros(1, dtype=torch.int64, device=model.device)
    return {
        "step": sparse_decoding(model, preset, "both", outputs).step,
        "output predictor": lambda: method.keep_output(OutputTokens(hidden_TD, zero_T, zero_T), learned),
    }
