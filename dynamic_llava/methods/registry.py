"""The methods that have a name, and the one place where a method is read from what a user writes, and printed back.

In a call, on a command line, in a YAML file, a method is spelled as

    fastv                          a registered name
    package.module:Class           a method of one's own: a class that Python can import, found without registering it
    {name: fastv, layer: 3}        either of them with settings

Settings that are not said are the checkpoint's, where it has them (`Method.settings_from`), else the class's defaults.
A value may be text, or what YAML and JSON make of it; it is read by the type of its field (values.py).
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from importlib import import_module
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from dynamic_llava.config import SparsityConfig
from dynamic_llava.files import brief
from dynamic_llava.methods.average_pool import AveragePool
from dynamic_llava.methods.base import Method
from dynamic_llava.methods.cdpruner import CDPruner
from dynamic_llava.methods.dart import DART
from dynamic_llava.methods.dense import Dense
from dynamic_llava.methods.divprune import DivPrune
from dynamic_llava.methods.downsample import Downsample
from dynamic_llava.methods.dynamic import Dynamic
from dynamic_llava.methods.fastv import FastV
from dynamic_llava.methods.h2o import H2O
from dynamic_llava.methods.hiprune import HiPrune
from dynamic_llava.methods.hired import HiRED
from dynamic_llava.methods.holov import HoloV
from dynamic_llava.methods.idpruner import IDPruner
from dynamic_llava.methods.knorm import KNorm
from dynamic_llava.methods.mixed import Mixed
from dynamic_llava.methods.prumerge import PruMergePlus
from dynamic_llava.methods.pyramiddrop import PyramidDrop
from dynamic_llava.methods.random import Random
from dynamic_llava.methods.random_window import RandomWindow
from dynamic_llava.methods.scope import SCOPE
from dynamic_llava.methods.snapkv import SnapKV
from dynamic_llava.methods.sparsevlm import SparseVLM, SparseVLMPlus
from dynamic_llava.methods.streaming_llm import StreamingLLM
from dynamic_llava.methods.structure import Structure
from dynamic_llava.methods.tome import ToMe
from dynamic_llava.methods.tova import TOVA
from dynamic_llava.methods.trim import TRIM
from dynamic_llava.methods.values import UnreadableValue, read_value
from dynamic_llava.methods.visionselector import VisionSelector
from dynamic_llava.methods.visionzip import VisionZip
from dynamic_llava.methods.vispruner import VisPruner
from dynamic_llava.methods.voco_llama import VoCoLlama
from dynamic_llava.methods.vscan import VScan

_ROWS: tuple[type[Method], ...] = (
    *(Dense, Dynamic, FastV, PyramidDrop, DivPrune, ToMe),
    *(DART, VScan, IDPruner, SparseVLM, SparseVLMPlus),
    *(TRIM, CDPruner),
    *(VisionSelector, VoCoLlama, VisPruner, VisionZip, HiRED, PruMergePlus, HoloV, SCOPE, HiPrune),
    *(H2O, TOVA, KNorm, SnapKV, StreamingLLM),
    *(AveragePool, Downsample),
    *(Random, Structure, RandomWindow, Mixed),
)
METHODS: dict[str, type[Method]] = {method.name: method for method in sorted(_ROWS, key=lambda method: method.name)}
"""Registered name -> class."""
Spelling = Method | str | Mapping[str, Any]
"""A method, or what names one: a name, or a mapping of `name` and settings."""
NAME = "name"
"""Key of the name in a mapping."""
DEFAULT = Dynamic.name
"""The method of a checkpoint that does not say whose weights it holds."""


def get_method(name: str, **settings: Any) -> Method:
    """Build the method of this name, registered or package.module:Class; ValueError for an unknown name or setting."""
    return read_method({NAME: name, **settings})


def read_method(spelling: Spelling, config: SparsityConfig | None = None, *, trusted: bool = True) -> Method:
    """Return the method that a spelling names; a Method is returned as it is.

    Values may be text, as on a command line: each is read by the type of its field, `none` as None where that is
    allowed. `config`: the checkpoint's settings, for those that are not said. trusted=False is for spellings that come
    with a checkpoint: no name but a registered one is taken, so that no file chooses which code is imported.
    Raises ValueError for an unknown name or setting, with the likeliest one, and for a value that a setting refuses.
    """
    if isinstance(spelling, Method):
        return spelling
    said = said_settings(spelling)
    method = method_class(said.pop(NAME), trusted=trusted)
    said = {**_trained_settings(method, config), **said}
    known = settings_of(method)
    what = f"method {printed_name(method)!r}"
    values = {} if config is None else method.settings_from(config)
    hints = _hints(method)
    for name, value in said.items():
        if name not in known:
            raise ValueError(f"{what} has no setting {brief(name)}; {_advice(name, list(known), 'settings')}")
        try:
            values[name] = read_value(value, hints[name], lambda inner: read_method(inner, config, trusted=trusted))
        except UnreadableValue as error:
            raise ValueError(f"{what}: {name}={brief(value)} {error}") from None
        except ValueError as error:
            raise ValueError(f"{what}: {name}: {error}") from None
    lacking = [one for one in known.values() if one.default is MISSING and one.default_factory is MISSING]
    if missing := [one.name for one in lacking if one.name not in values]:
        raise ValueError(f"{what} needs a value for its settings {', '.join(missing)}")
    return method(**values)


def import_named(spelling: Spelling | None) -> None:
    """Import the classes of one's own that a user's spelling names, inner ones too, before a checkpoint is opened.

    A user's word is trust; a checkpoint that names such a class can be read from then on (`checkpoint_method`).
    """
    if spelling is None or isinstance(spelling, Method):
        return
    said = said_settings(spelling)
    hints = _hints(method_class(said.pop(NAME)))
    for name, inner in said.items():
        named = isinstance(inner, Mapping) and NAME in inner
        if named or (isinstance(inner, str) and ":" in inner and _takes_method(hints.get(name))):
            import_named(inner)


def _trained_settings(method: type[Method], config: SparsityConfig | None) -> dict[str, Any]:
    """Return the settings that a checkpoint says of its own method, if it is this one."""
    if config is None or config.method is None:
        return {}
    said = said_settings(config.method)
    return said if said.pop(NAME) == printed_name(method) else {}


def checkpoint_method(config: SparsityConfig) -> Method:
    """Return the method whose weights a checkpoint holds, as its settings describe it.

    A class of one's own must have been imported by the caller: a checkpoint's word imports no code. ValueError that
    says so where it has not.
    """
    said = said_settings(config.method or DEFAULT)
    module, _, name = said[NAME].partition(":")
    if name and module not in sys.modules:
        raise ValueError(
            f"the checkpoint holds weights of the method {brief(said[NAME])}, and a checkpoint's word imports no code: "
            f"if you trust that class, import {module} yourself before you load the checkpoint, or name it on the "
            f"command line (--method {said[NAME]})"
        )
    return read_method(said, config)


def print_method(method: Method) -> dict[str, Any]:
    """Return the mapping that `read_method` reads as this very method: its name and every setting, JSON-able."""
    return {NAME: printed_name(type(method))} | {name: _plain(getattr(method, name)) for name in settings_of(method)}


def describe_method(method: Method) -> str:
    """Return a method in one line for tables and logs: "fastv (layer 2, image_keep_rate 0.5)"."""
    name, *settings = _described(print_method(method))
    return f"{name} ({', '.join(settings)})" if settings else name


def said_settings(spelling: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return a name or mapping as a mapping with `name`; ValueError for one without, or of another kind."""
    if isinstance(spelling, str):
        return {NAME: spelling}
    if not isinstance(spelling, Mapping):
        raise ValueError(
            f"method={brief(spelling)} is neither a registered name nor a Method object; give a name "
            f"({', '.join(METHODS)}), package.module:Class, a mapping of name and settings, or a Method object"
        )
    if not isinstance(spelling.get(NAME), str):
        raise ValueError(f"method={brief(dict(spelling))} does not say its name; add name: one of {', '.join(METHODS)}")
    if odd := [key for key in spelling if not isinstance(key, str)]:
        raise ValueError(f"method={brief(dict(spelling))}: {brief(odd[0])} is no setting; settings are named by text")
    return dict(spelling)


def method_class(name: str, *, trusted: bool = True) -> type[Method]:
    """Return the class of a registered name, or that of package.module:Class (see `read_method` for `trusted`)."""
    if name in METHODS:
        return METHODS[name]
    if ":" not in name:
        own = "" if not trusted else ", or name a class of your own as package.module:Class"
        raise ValueError(f"method {brief(name)} is not known; {_advice(name, list(METHODS), 'methods')}{own}")
    if not trusted:
        raise ValueError(
            f"the checkpoint names the method {brief(name)}, which is not one of {', '.join(METHODS)}: a checkpoint's "
            "word imports no code. If you trust that class, name it yourself with `method` in the call (--method)"
        )
    return _own_class(name)


def settings_of(method: Method | type[Method]) -> dict[str, "Field[Any]"]:
    """Return name -> field of the settings that a method is built from."""
    return {one.name: one for one in fields(method) if one.init}


def printed_name(method: type[Method]) -> str:
    """Return the name that finds a class: the registered one, or module:Class."""
    registered = METHODS.get(getattr(method, NAME, ""))
    return method.name if registered is method else f"{method.__module__}:{method.__qualname__}"


def _own_class(name: str) -> type[Method]:
    """Import package.module:Class. ValueError where it is not there or no method that can be built."""
    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name or module_name.startswith("."):
        raise ValueError(f"method {brief(name)} is not understood; a class of your own is named package.module:Class")
    try:
        module = import_module(module_name)
    except Exception as error:  # whatever a module of one's own does while it is imported
        advice = f"importing {module_name} failed: {type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            advice = f"there is no module {error.name}; its folder must be the current one, or stand in PYTHONPATH"
        raise ValueError(f"method {brief(name)}: {advice}") from error
    found: Any = module
    for part in class_name.split("."):
        found = getattr(found, part, None)
    if found is None:
        here = [key for key, value in vars(module).items() if _is_method(value) and value.__module__ == module_name]
        raise ValueError(
            f"method {brief(name)}: {module_name} has no {class_name}; {_advice(class_name, here, 'methods')}"
        )
    if problem := _problem(found):
        raise ValueError(f"method {brief(name)} {problem} (docs/adding-a-method.md)")
    return found


def _problem(found: Any) -> str:
    """Say why something is no method that can be built; empty where it is one."""
    if not _is_method(found):
        return "is no class that extends dynamic_llava.Method"
    if not isinstance(getattr(found, NAME, None), str):
        return f'has no name; write name: ClassVar[str] = "{found.__name__.lower()}" into the class'
    settings = {key for key, kind in _hints(found).items() if get_origin(kind) is not ClassVar}
    if forgotten := sorted(settings - set(found.__dataclass_fields__)):
        return f"has annotated {forgotten[0]!r}, but is no dataclass; write @dataclass(frozen=True) above the class"
    return ""


def _hints(method: type[Method]) -> dict[str, Any]:
    try:
        return get_type_hints(method)
    except NameError as error:
        raise ValueError(
            f"method {printed_name(method)!r} has a setting whose type cannot be read ({error}); write types that its "
            "module knows when it runs"
        ) from error


def _takes_method(kind: Any) -> bool:
    """Whether a setting of the type `kind` may be a method."""
    return any(_is_method(one) for one in (kind, *get_args(kind)))


def _is_method(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Method)


def _advice(given: str, known: Sequence[str], what: str) -> str:
    near = get_close_matches(given, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}the {what} are {', '.join(map(repr, known))}" if known else f"there are no {what}"


def _plain(value: Any) -> Any:
    if isinstance(value, Method):
        return print_method(value)
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def _described(printed: Mapping[str, Any]) -> list[str]:
    """Return the name of a printed method and "setting value" for each of its settings."""
    words = [str(printed[NAME])]
    for name, value in printed.items():
        if isinstance(value, Mapping):
            inner, *settings = _described(value)
            words.append(f"{name} {inner}" + (f" ({', '.join(settings)})" if settings else ""))
        elif name != NAME:
            words.append(f"{name} {value}")
    return words
