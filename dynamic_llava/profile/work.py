"""The FLOPs and the bytes of each phase of a preset; profiles hold the measured time of the phase against them."""

from dataclasses import dataclass

from dynamic_llava.config import SparsityConfig
from dynamic_llava.costs import (
    decode_step_bytes,
    flops_decode_step,
    head_flops,
    parameter_counts,
    predictor_flops,
    prefill_flops,
    weight_bytes,
)
from dynamic_llava.profile.presets import Preset, Way


@dataclass(frozen=True)
class Work:
    """What a phase has to do at least."""

    flops: int
    bytes: int
    """Bytes to read: weights once for the whole batch, keys and values of every row."""


def work_of(phase: str, preset: Preset, way: Way, value_bytes: int, outputs: int) -> Work:
    """Return the work of a phase: vision, prefill, step, step without cache. ValueError for another one."""
    if phase == "vision":
        return vision_work(preset, value_bytes)
    if phase in ("prefill", "step without cache"):
        return prefill_work(preset, way, value_bytes, outputs)
    if phase == "step":
        return step_work(preset, way, value_bytes, outputs)
    raise ValueError(f"phase={phase!r} is not known; choose vision, prefill, step or step without cache")


def vision_work(preset: Preset, value_bytes: int) -> Work:
    """Return the work of vision tower and projector on one image per row."""
    shape = preset.shape
    maps = sum(shape.projector_maps)
    flops = preset.batch * (shape.vision.flops + 2 * shape.tokens_per_image * maps)
    parameters = shape.vision.parameters + maps + shape.projector_bias * 2 * shape.decoder.hidden
    return Work(flops, value_bytes * parameters)


def prefill_work(preset: Preset, way: Way, value_bytes: int, outputs: int = 0) -> Work:
    """Return the work of a prefill, or of a step without cache after `outputs` tokens; predictors included."""
    decoder = preset.shape.decoder
    flops = prefill_flops(shape=decoder, **preset.groups(way, outputs), batch=preset.batch)
    if way != "dense":
        decided = outputs if way == "both" else 0
        image_tokens = preset.shape.tokens_per_image
        flops += preset.batch * predictor_flops(decoder.hidden, image_tokens, output_tokens=decided)
    return Work(flops, weight_bytes(decoder, value_bytes))


def step_work(preset: Preset, way: Way, value_bytes: int, outputs: int) -> Work:
    """Return the work of a cached step after `outputs` tokens, the output predictor of _I|T included."""
    decoder, groups = preset.shape.decoder, preset.groups(way, outputs)
    flops = flops_decode_step(shape=decoder, **groups, batch=preset.batch) + head_flops(preset.batch, decoder)
    moved = decode_step_bytes(decoder, **groups, bytes_per_value=value_bytes, batch=preset.batch)
    if way == "both":
        extra = output_predictor_work(preset, value_bytes)
        return Work(flops + extra.flops, moved + extra.bytes)
    return Work(flops, moved)


def output_predictor_work(preset: Preset, value_bytes: int) -> Work:
    """Return what the output predictor adds to a step."""
    parameters = parameter_counts(preset.shape, SparsityConfig())["output_predictor"]
    flops = preset.batch * predictor_flops(preset.shape.decoder.hidden, output_tokens=1)
    return Work(flops, value_bytes * parameters)
