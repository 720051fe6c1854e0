"""The per-call switches of forward and generate, resolved into one method object."""

from dataclasses import replace
from typing import Any

from dynamic_llava.config import SparsityConfig, SparsityMode, check_keep_rate
from dynamic_llava.config.calibration import threshold_at
from dynamic_llava.methods import (
    Dense,
    Dynamic,
    Method,
    Spelling,
    checkpoint_method,
    method_class,
    read_method,
    said_settings,
    settings_of,
)


def choose_method(
    config: SparsityConfig,
    *,
    sparsity: SparsityMode | None = None,
    method: Spelling | None = None,
    image_keep_rate: float | None = None,
    output_threshold: float | None = None,
    output_keep_rate: float | None = None,
) -> Method:
    """Return the method that a call asks for; by default Dynamic-LLaVA with the checkpoint's settings.

    `method` is spelled as in methods/registry.py; `sparsity` and `output_threshold` are short for settings of
    Dynamic-LLaVA, the keep rates for those of any method which has them. Where Dynamic-LLaVA decides by a threshold, a
    keep rate chooses it, by the margins that the checkpoint has been calibrated with. Raises ValueError for an unknown
    method, setting or value, and for switches that contradict one another.
    """
    switches = {"sparsity": sparsity, "image_keep_rate": image_keep_rate, "output_threshold": output_threshold}
    switches["output_keep_rate"] = output_keep_rate
    given = {name: value for name, value in switches.items() if value is not None}
    if isinstance(method, Method):
        if given:
            raise ValueError(
                f"{sorted(given)} were given together with the method object {method}; set them on the object instead"
            )
        return method
    if method is None:
        # Most calls, every step of a generation among them: nothing is parsed, so that a compiler can follow.
        return _own_method(config, given) if config.method is not None else _dynamic(config, given)
    said = said_settings(method)
    kind = method_class(said["name"])
    short = sorted(set(given) & {"sparsity", "output_threshold"})
    if short and not issubclass(kind, Dynamic):
        raise ValueError(
            f"{', '.join(f'{name}={given[name]!r}' for name in short)} and method {said['name']!r} contradict each "
            f"other: {' and '.join(short)} are short for settings of Dynamic-LLaVA. Leave one of them out; a method's "
            "own settings are given with it"
        )
    for name in sorted(set(given) & set(said)):
        raise ValueError(
            f"{name}={given[name]!r} and method {said!r} both say {name}; leave one of them out, whatever the values"
        )
    chosen = read_method(said, config)
    if unknown := sorted(set(given) - set(settings_of(chosen))):
        raise ValueError(
            f"{unknown[0]}={given[unknown[0]]!r} means nothing to method {said['name']!r}, whose settings are "
            f"{', '.join(settings_of(chosen))}; leave it out"
        )
    return _switched(chosen, given, config) if isinstance(chosen, Dynamic) else replace(chosen, **given)


def _dynamic(config: SparsityConfig, given: dict[str, Any]) -> Dynamic:
    """Return Dynamic-LLaVA with a checkpoint's settings and a call's switches."""
    return _switched(Dynamic.from_config(config), given, config)


def _switched(method: Dynamic, given: dict[str, Any], config: SparsityConfig) -> Dynamic:
    """Return Dynamic-LLaVA with a call's switches; a keep rate where a threshold decides is that threshold."""
    method = replace(method, **{name: value for name, value in given.items() if name not in _RATES})
    _refuse_idle_switches(method, given)
    for name in (one for one in _RATES if one in given):
        method = at_keep_rate(method, name, given[name], config)
    return method


def at_keep_rate(method: Dynamic, name: str, rate: float, config: SparsityConfig) -> Dynamic:
    """Return Dynamic-LLaVA with one of its keep rates; where a threshold decides, with the threshold of that rate.

    name: image_keep_rate or output_keep_rate. ValueError for no rate, and for a checkpoint without a calibration.
    """
    kind, selection, threshold, otherwise = _RATES[name]
    if getattr(method, selection) != "threshold":
        return replace(method, **{name: rate})
    check_keep_rate(name, rate)
    quantiles = (config.calibration or {}).get(kind)
    if quantiles is None:
        raise ValueError(
            f"{name}={rate} where a threshold decides ({selection}='threshold') needs the margins of the {kind} "
            f"predictor, and this checkpoint has not been calibrated: run python -m dynamic_llava.calibrate MODEL "
            f"--data FILE, or {otherwise}"
        )
    return replace(method, **{threshold: threshold_at(quantiles, rate)})


_RATES = {
    "image_keep_rate": ("image", "image_selection", "image_threshold", "set image_selection='topk'"),
    "output_keep_rate": ("output", "output_selection", "output_threshold", "give output_threshold"),
}
"""A keep rate of Dynamic-LLaVA -> whose margins, which setting says what decides, the threshold's name, and what a call
can do that has no margins."""


def _own_method(config: SparsityConfig, given: dict[str, Any]) -> Method:
    """Return the learned method of a checkpoint, or, with sparsity="none", the dense one."""
    if given == {"sparsity": "none"}:
        return Dense()
    if given not in ({}, {"sparsity": "both"}):
        raise ValueError(
            f"{sorted(given)} are switches of Dynamic-LLaVA, and this checkpoint's method is {config.method!r}; leave "
            "them out, or give `method` with other settings"
        )
    return checkpoint_method(config)


def check_temperature(tau: Any) -> None:
    """Raise ValueError unless the temperature is None or one positive number."""
    if tau is None:
        return
    shape = tuple(getattr(tau, "shape", ()))
    if shape or isinstance(tau, (str, bool)) or not tau > 0:
        given = f"has shape {shape}" if shape else f"is {tau!r}"
        raise ValueError(f"tau {given}; the temperature is one number above 0 for the whole batch")


def check_compile(compile: bool, method: Method, *, cached: bool) -> None:
    """Raise ValueError for compile=True in a call without the sparse cached steps that it is for."""
    if not compile:
        return
    if method.is_dense:
        raise ValueError(
            "compile=True compiles decoding on an admission cache, and a dense call has no admission cache; "
            "leave it out and use transformers' cache_implementation='static'"
        )
    if method.evicts:
        raise ValueError(
            f"compile=True compiles steps whose layers share their slots, and method {method.name!r} evicts tokens "
            "from each layer and key head apart; leave it out"
        )
    if not cached:
        raise ValueError("compile=True compiles cached decoding steps; leave it out, or let the call use its cache")


def _refuse_idle_switches(method: Dynamic, given: dict[str, Any]) -> None:
    """Raise ValueError for a switch that this call would not use."""
    if "image_keep_rate" in given and not method.sparsifies_image:
        raise ValueError(f"image_keep_rate has no use with sparsity={method.sparsity!r}; leave one of them out")
    for name in ("output_threshold", "output_keep_rate"):
        if name in given and not method.sparsifies_output:
            raise ValueError(f"{name} has no use with sparsity={method.sparsity!r}; leave one of them out")
    if "output_threshold" in given and "output_keep_rate" in given:
        raise ValueError("output_threshold and output_keep_rate both say where the threshold is; leave one of them out")
