"""The methods of a comparison, as one argument of a command line spells them.

    METHODS = METHOD ("," METHOD)*
    METHOD  = NAME [":" SETTING "=" VALUE ("," SETTING "=" VALUE)*]
    NAME    = a registered name, or package.module:Class
    VALUE   = text without a comma, or any text in round brackets

The list is cut at the commas outside of brackets, and each part says itself what it is: one without "=" is a method;
one with a ":" before its first "=" is a method and its first setting, which stands behind the last such ":"; any other
is one more setting of the method before it. So "fastv:layer=3,keep=0.25,my_module:Mine" is two methods. Names and
values are read by methods/registry.py. `keep` is short for the one rate that a method says its budget is kept by.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from dynamic_llava.config import SparsityConfig, nested_method
from dynamic_llava.eval.compare.budgets import held_setting
from dynamic_llava.methods import METHODS, Method, method_class, read_method, settings_of
from dynamic_llava.methods.base import BudgetKind

KEEP = "keep"
"""A setting's short name."""
BRACKETS = {"(": 1, ")": -1}


@dataclass(frozen=True)
class SpelledMethod:
    """One method of the list."""

    label: str
    """As it was spelled; its name in tables."""
    said: Mapping[str, Any]
    """The mapping that methods/registry.py reads, but for `keep`."""

    def read(self, config: SparsityConfig) -> Method:
        """Return the method on a checkpoint of these settings. ValueError as `read_method`, and for an unclear `keep`.

        What is not said is the checkpoint's, where it has it.
        """
        said = dict(self.said)
        if KEEP not in said or KEEP in settings_of(method_class(said["name"])):
            return read_method(said, config)
        value = said.pop(KEEP)
        plain = read_method(said, config)
        rates = [name for name in _knobs(plain) if isinstance(held_setting(plain, name), float)]
        if len(rates) != 1:
            several = f"several rates ({', '.join(rates)})" if rates else "no rate"
            raise ValueError(
                f"{self.label}: {KEEP}={value} is short for the rate that a method's budget is kept by, and "
                f"{said['name']} has {several}; name its settings: {', '.join(settings_of(plain)) or 'it has none'}"
            )
        if rates[0] in said:
            raise ValueError(f"{self.label}: {KEEP} is short for {rates[0]}, which is given too; leave one of them out")
        return read_method(nested_method([(rates[0], value)], said), config)


def read_methods(text: str) -> list[SpelledMethod]:
    """Return the methods of a list in its order; ValueError for one that is not understood, or spelled twice."""
    found: list[tuple[str, list[tuple[str, str]]]] = []
    for part in _parts(text):
        before, equals, value = part.partition("=")
        if not equals:
            _check_name(part, found)
            found.append((part, []))
            continue
        name, colon, setting = before.rpartition(":")
        if not value.strip() or not setting.strip() or (colon and not name.strip()):
            raise ValueError(f"{part!r} is not understood; a setting is written NAME:SETTING=VALUE, or SETTING=VALUE")
        if colon:
            found.append((name.strip(), []))
        elif not found or not found[-1][1]:
            whose = f" and {found[-1][0]} before it has no ':'" if found else ", and no method stands before it"
            raise ValueError(f"{part!r} is a setting{whose}; write NAME:{part}")
        found[-1][1].append((setting.strip(), value.strip()))
    spelled = [_spelled(name, settings) for name, settings in found]
    labels = [one.label for one in spelled]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"methods {', '.join(twice)} are named twice; name each once")
    return spelled


def _spelled(name: str, settings: Sequence[tuple[str, str]]) -> SpelledMethod:
    paths = [path.replace("-", "_") for path, _ in settings]
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise ValueError(f"{name}: {', '.join(twice)} is given twice; give each setting once")
    label = name + (":" + ",".join(f"{path}={value}" for path, value in settings) if settings else "")
    return SpelledMethod(label, nested_method([("name", name), *settings]))


def _check_name(name: str, before: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> None:
    """Raise ValueError for a name without a class; a value that a comma has cut is the likeliest reason behind one."""
    if ":" in name or name in METHODS:
        return
    try:
        method_class(name)
    except ValueError as error:
        last = before[-1][1][-1] if before and before[-1][1] else None
        cut = f". If it belongs to {last[0]}, put the value into brackets: {last[0]}=({last[1]},{name})" if last else ""
        raise ValueError(f"{error}{cut}") from None


def _parts(text: str) -> list[str]:
    """Cut at the commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += BRACKETS.get(letter, 0)
        if depth not in (0, 1):
            raise ValueError(f"{text!r}: brackets do not match; a value in brackets is written (2,4)")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    parts = [part.strip() for part in parts]
    if depth or "" in parts:
        what = "a bracket is not closed" if depth else "something is missing beside a comma"
        raise ValueError(f"{text!r}: {what}; write NAME,NAME:SETTING=VALUE,SETTING=VALUE")
    return parts


def _knobs(method: Method) -> tuple[str, ...]:
    """Return the settings of the first budget that the method has any for."""
    return next((names for kind in get_args(BudgetKind) if (names := method.knobs(kind))), ())
