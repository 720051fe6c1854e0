"""Methods behind the same hooks (base.py): Dynamic-LLaVA and its rivals. A new one is one file and one row here."""

from typing import Any

from dynamic_llava.methods.base import Choice, Cut, Evidence, ImageTokens, Method, OneCut, OutputTokens
from dynamic_llava.methods.dense import Dense
from dynamic_llava.methods.dynamic import Dynamic
from dynamic_llava.methods.fastv import FastV
from dynamic_llava.methods.random import Random
from dynamic_llava.methods.structure import Structure

METHODS: dict[str, type[Method]] = {method.name: method for method in (Dense, Dynamic, FastV, Random, Structure)}
"""Registered name -> class."""


def get_method(name: str, **settings: Any) -> Method:
    """Build the method registered under `name` with its settings; ValueError for an unknown name or setting."""
    if name not in METHODS:
        raise ValueError(f"method {name!r} is not known; choose one of {', '.join(map(repr, METHODS))}")
    try:
        return METHODS[name](**settings)
    except TypeError as error:
        known = ", ".join(METHODS[name].__dataclass_fields__)
        raise ValueError(
            f"method {name!r} cannot be built from {settings}: {error}; its settings are {known}"
        ) from error


__all__ = [
    "METHODS",
    "Choice",
    "Cut",
    "Dense",
    "Dynamic",
    "Evidence",
    "FastV",
    "ImageTokens",
    "Method",
    "OneCut",
    "OutputTokens",
    "Random",
    "Structure",
    "get_method",
]
