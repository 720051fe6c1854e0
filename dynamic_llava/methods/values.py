"""Reading the value of a setting, text or what YAML and JSON make of it, by the type of its field."""

import math
import re
import types
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin

from dynamic_llava.methods.base import Method

NOTHING = ("none", "null")
"""Texts that stand for None."""


class UnreadableValue(ValueError):
    """A value that cannot be read as its setting's type; the message goes on behind the words "setting=value"."""


def read_value(value: Any, kind: Any, read_method: Callable[[Any], Method]) -> Any:
    """Return a value as its type `kind` has it. UnreadableValue, which says what is allowed, where it cannot be.

    Types: bool, int, float, str, Literal, None, tuples, Method (read by `read_method`), and unions of them. Values of
    any other type are taken as they are, if they are of it.
    """
    origin: Any = get_origin(kind)
    parts = get_args(kind)
    if origin in (Union, types.UnionType):
        return _read_union(value, parts, read_method)
    if kind is Any:
        return value
    if kind in (None, type(None)):
        if value is None or (isinstance(value, str) and value.lower() in NOTHING):
            return None
        raise UnreadableValue("is not none")
    if origin == Literal:
        return _read_literal(value, parts)
    if origin is tuple:
        return _read_tuple(value, parts, read_method)
    if isinstance(kind, type) and issubclass(kind, Method):
        return _read_inner(value, kind, read_method)
    if kind in _PLAIN:
        return _PLAIN[kind](value)
    if isinstance(origin or kind, type) and isinstance(value, origin or kind):
        return value
    raise UnreadableValue(f"is no {_name(kind)}; build the Method object in Python, and give that")


def _read_union(value: Any, kinds: tuple[Any, ...], read_method: Callable[[Any], Method]) -> Any:
    """Return the value as the first of `kinds` that takes it: allowed words, then None, then others, free text last."""
    order = {Literal: 0, type(None): 1, str: 3}
    refusal = ""
    for kind in sorted(kinds, key=lambda kind: order.get(get_origin(kind) or kind, 2)):
        try:
            return read_value(value, kind, read_method)
        except UnreadableValue as error:
            refusal = refusal or ("" if kind is type(None) else str(error))
    raise UnreadableValue(refusal + (", or none" if type(None) in kinds else ""))


def _read_literal(value: Any, allowed: tuple[Any, ...]) -> Any:
    for one in allowed:
        same = type(value) is type(one) and value == one
        if same or (isinstance(value, str) and not isinstance(one, str) and value.lower() == str(one).lower()):
            return one
    near = get_close_matches(str(value), list(map(str, allowed)), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UnreadableValue(f"is not known; {hint}choose one of {', '.join(map(repr, allowed))}")


def _read_tuple(value: Any, kinds: tuple[Any, ...], read_method: Callable[[Any], Method]) -> tuple[Any, ...]:
    """Return a tuple of a list, or of text with commas or spaces between values (lmms-eval splits at commas)."""
    parts = [part for part in re.split(r"[,\s]+", value.strip("()[] ")) if part] if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)):
        parts = [parts]  # a single number, which YAML and command lines make no list of
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(parts)
    if len(parts) != len(kinds):
        raise UnreadableValue(f"has {len(parts)} values; give {len(kinds)}, with commas between them")
    return tuple(read_value(part, kind, read_method) for part, kind in zip(parts, kinds, strict=True))


def _read_inner(value: Any, kind: type[Method], read_method: Callable[[Any], Method]) -> Method:
    if not isinstance(value, (Method, str, Mapping)):
        raise UnreadableValue("names no method; give a name, or a mapping {name: ..., setting: ...}")
    found = read_method(value)
    if not isinstance(found, kind):
        raise UnreadableValue(f"is no {kind.__name__}; give a method that is one")
    return found


def _read_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise UnreadableValue("is neither true nor false")


def _read_int(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value.strip()):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    raise UnreadableValue("is not a whole number; give one")


def _read_float(value: Any) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise UnreadableValue("is not a number; give one") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise UnreadableValue("is not a number; give one")
    return float(value)


def _read_text(value: Any) -> str:
    if not isinstance(value, str):
        raise UnreadableValue("is not text; give text")
    return value


_PLAIN: dict[Any, Callable[[Any], Any]] = {bool: _read_bool, int: _read_int, float: _read_float, str: _read_text}


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", None) or str(kind)
