"""Where sparsity can pay: the roofline of the bases that people use, by formula. Nothing is run and no weight is read.

A step of the cached decoder has to read the weights and every row's keys and values; a prefill has to do its FLOPs. The
quotient of what the dense model and the sparse one have to do is the largest possible speed-up, whatever the kernels.
Image keep rate 0.2 and half of the output tokens from layer 2 on, the paper's; the language model in bfloat16 alone:
the vision tower, which costs both the same, comes on top.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynamic_llava.costs import (
    BASES,
    DEVICE_PEAKS,
    LLAVA_SHAPES,
    Base,
    DevicePeak,
    decoder_shape,
    device_peak,
    kv_bytes,
    llava_shape,
)
from dynamic_llava.profile.results import Column, Report

BATCHES, OUTPUTS, DEVICE = (1, 8, 32), (2048,), "A100"
BF16 = 2
WORTH = 1.05
"""Least speed-up of a whole answer, of those that are possible at most, from which a row is said to pay."""
OF_PRESETS = ("layers", "dtype", "method", "compiled", "uncached")
"""Options of the measured roofline, which mean nothing to a calculated one."""


def add_bases(parser: argparse.ArgumentParser) -> None:
    """Add the options of the calculated roofline to the command that measures one."""
    parser.add_argument(
        "--base",
        nargs="+",
        metavar="NAME|CONFIG",
        help=f"calculate the limits of a base instead, and run nothing: all, {', '.join(BASES)}, or a config.json; "
        f"then --batch-size takes several, {', '.join(map(str, BATCHES))} unless given, --outputs is {OUTPUTS[0]}, and "
        f"--device, unless given {DEVICE}, is one of {', '.join(DEVICE_PEAKS)} (default: a preset is measured)",
    )
    parser.add_argument("--image-tokens", type=int, help="tokens of an image, with --base (default: the base's usual)")


def bases_asked(options: Any) -> bool:
    """Return whether limits are to be calculated; if not, the batch size is one number from here on.

    ValueError for options that belong to the other kind.
    """
    if options.base is None:
        if options.image_tokens is not None or len(options.batch_size or ()) > 1:
            raise ValueError("--image-tokens, and more than one --batch-size, belong to --base; a preset has its own")
        options.batch_size = options.batch_size and options.batch_size[0]
        return False
    given = [name for name in OF_PRESETS if getattr(options, name)]
    given += ["preset"] if options.preset != "table4" else []
    if given:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{named} have no use beside --base, which measures nothing; leave them out")
    return True


def base_report(options: Any) -> Report:
    """Return the roofline of every base asked for, batch and length."""
    bases = [base for name in options.base for base in _named(name, options.image_tokens)]
    return roofline(bases, options.batch_size or BATCHES, options.outputs or OUTPUTS, options.device or DEVICE)


def roofline(bases: Sequence[Base], batches: Sequence[int], outputs: Sequence[int], device: str) -> Report:
    """Return the limits of each base at each batch and number of generated tokens. ValueError for unknown devices."""
    peak = device_peak(device)
    if peak is None:
        raise ValueError(f"device {device!r} has no peaks here; choose one of {', '.join(DEVICE_PEAKS)}")
    rows = [_row(base, batch, length, peak) for base in bases for length in outputs for batch in batches]
    columns = (
        Column("base", "base"),
        Column("image_tokens", "image tokens"),
        Column("batch", "batch"),
        Column("outputs", "generated"),
        Column("kv_per_token", "KiB a token", ".0f", 2**-10),
        Column("step_bytes_dense", "step dense, GB", ".1f", 1e-9),
        Column("step_bytes", "step I|T, GB", ".1f", 1e-9),
        Column("step_speedup", "steps, times", ".2f"),
        Column("prefill_flops_dense", "prefill dense, TFLOP", ".1f", 1e-12),
        Column("prefill_flops", "prefill I|T, TFLOP", ".1f", 1e-12),
        Column("prefill_speedup", "prefill, times", ".2f"),
        Column("speedup", "answer, times", ".2f"),
        Column("cache_dense", "cache dense, GiB", ".1f", 2**-30),
        Column("cache", "cache I|T, GiB", ".1f", 2**-30),
        Column("pays", "pays"),
    )
    lost = sum(row["pays"] == "no" for row in rows)
    notes = (
        f"Calculated, not measured: an upper limit on one {device} by its data sheet ({peak.tflops:g} TFLOP/s, "
        f"{peak.terabytes:g} TB/s). Steps are those half-way through an answer; an answer is its prefill and steps.",
        f"pays: the whole answer can become at least {WORTH} times as fast. {lost} of {len(rows)} rows do not; what "
        "they still save is the cache, so room for more rows. Whether a row fits into the memory is not asked.",
        "Prompt: 50 tokens of text and one image. 20 % of its tokens and half of the output from layer 2 on.",
    )
    return Report("bases", f"What sparsity can gain at most, by formula, on one {device}", columns, rows, notes)


def _row(base: Base, batch: int, outputs: int, peak: DevicePeak) -> dict[str, Any]:
    from dynamic_llava.profile.measuring import DeviceLimits, prefill_work, step_work  # torch, which names do not need
    from dynamic_llava.profile.presets import Preset

    shape = replace(
        LLAVA_SHAPES["7b"], decoder=base.decoder, tokens_per_image=base.image_tokens
    )  # its tower is not counted
    preset = Preset(base.name, shape, batch, (outputs,), base.about)
    limits = DeviceLimits(peak.terabytes * 1e12, peak.tflops * 1e12)
    steps = {way: step_work(preset, way, BF16, outputs // 2) for way in ("dense", "both")}
    prefills = {way: prefill_work(preset, way, BF16) for way in ("dense", "both")}
    step = {way: limits.seconds(work.bytes, work.flops) for way, work in steps.items()}
    prefill = {way: limits.seconds(work.bytes, work.flops) for way, work in prefills.items()}
    whole = {way: prefill[way] + outputs * step[way] for way in step}
    speedup = whole["dense"] / whole["both"]
    caches = {way: kv_bytes(base.decoder, **preset.groups(way, outputs), batch=batch) for way in step}
    return {
        "base": base.name,
        "image_tokens": base.image_tokens,
        "batch": batch,
        "outputs": outputs,
        "kv_per_token": kv_bytes(base.decoder, 1),
        "step_bytes_dense": steps["dense"].bytes,
        "step_bytes": steps["both"].bytes,
        "step_flops_dense": steps["dense"].flops,
        "step_flops": steps["both"].flops,
        "step_seconds_dense": step["dense"],
        "step_seconds": step["both"],
        "step_speedup": step["dense"] / step["both"],
        "prefill_flops_dense": prefills["dense"].flops,
        "prefill_flops": prefills["both"].flops,
        "prefill_speedup": prefill["dense"] / prefill["both"],
        "speedup": speedup,
        "cache_dense": caches["dense"],
        "cache": caches["both"],
        "pays": "yes" if speedup >= WORTH else "no",
    }


def _named(name: str, image_tokens: int | None) -> list[Base]:
    """Return the bases of a name, or of a config.json; with `image_tokens` in the place of their own number."""
    if name == "all" or name in BASES:
        found = list(BASES.values()) if name == "all" else [BASES[name]]
    elif Path(name).exists():
        found = [_read(Path(name), image_tokens)]
    else:
        raise ValueError(f"base {name!r} is not known; choose all, {', '.join(BASES)}, or give a config.json")
    if image_tokens is None:
        return found
    if image_tokens < 1:
        raise ValueError(f"--image-tokens {image_tokens} is not possible; give 1 or more")
    return [replace(base, image_tokens=image_tokens) for base in found]


def _read(path: Path, image_tokens: int | None) -> Base:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        decoder = decoder_shape(config)
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} is no config.json of a vision-language model: {str(error).splitlines()[0]}") from None
    if image_tokens is None:
        tiled = getattr(config, "image_grid_pinpoints", None) is not None
        if config.model_type not in ("llava", "dynamic_llava") or tiled:
            raise ValueError(f"{path} is of a {config.model_type}, whose images differ in length; give --image-tokens")
        image_tokens = llava_shape(config).tokens_per_image
    return Base(config.model_type, decoder, image_tokens, str(path))
