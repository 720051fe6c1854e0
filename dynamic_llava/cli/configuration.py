"""Configuration files and command lines: YAML through OmegaConf, overrides and --help through tyro; nowhere else.

config = load_config(RunConfig, ["configs/tiny.yaml", "--train.learning-rate", "1e-5"])
"""

import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from dynamic_llava.cli.commands import METHOD, METHOD_HELP, as_typed, take_method
from dynamic_llava.files import brief, brief_text

Config = TypeVar("Config")

EXTENDS = "extends"
"""Key of a configuration file that names the file whose values it starts from."""
ELSEWHERE = {"tiny": "python -m dynamic_llava.tiny job"}
"""Section -> the command whose files have it; a file of another command may only say that it has none (null)."""


def load_config(config_class: type[Config], arguments: Sequence[str], program: str, description: str) -> Config:
    """Return the configuration of `arguments`: an optional YAML file first, then overrides such as --train.seed 1.

    The class's field `method`, if it has one, takes `--method NAME --method.SETTING VALUE`: another name replaces the
    file's method, the same or none changes its settings; `--method none` removes it.
    `--help` prints every field and ends the process, and so does a mistake on the command line (tyro's message, with
    suggestions). Raises FileNotFoundError for a missing file and ValueError for one with an unknown key (with a
    suggestion), a value of the wrong type, or a value that the configuration refuses. A class may offer short forms of
    often used flags, SHORT_FLAGS.
    """
    rest = list(arguments)
    default = None
    if rest and not rest[0].startswith("-"):
        default = read_yaml(config_class, rest.pop(0))
    short: Mapping[str, str] = getattr(config_class, "SHORT_FLAGS", {})
    rest = [short.get(argument, argument) for argument in rest]
    if "method" in {field.name for field in fields(config_class)}:
        rest, method = take_method(rest)
        default = _with_method(config_class() if default is None else default, method)
        description += f"\n\n{METHOD} NAME: {METHOD_HELP.removesuffix(' (default: None)')}; {METHOD} none: no method."
    if short:
        description += "\n\nShort forms: " + ", ".join(f"{name} = {flag}" for name, flag in short.items())
    import tyro  # not above: a command of another kind needs neither tyro nor OmegaConf

    with _plain_help():
        return tyro.cli(
            config_class,
            prog=as_typed(program),
            description=description,
            args=rest,
            default=config_class() if default is None else default,
            config=(tyro.conf.AvoidSubcommands,),
        )


def _with_method(config: Any, method: dict[str, Any]) -> Any:
    """Return the configuration with what the command line says of its method."""
    if not method:
        return config
    before = {"name": config.method} if isinstance(config.method, str) else dict(config.method or {})
    if method.get("name", before.get("name")) == before.get("name"):
        method = before | method
    removed = str(method.get("name")).lower() == "none"
    if removed and len(method) > 1:
        raise ValueError(f"--method none has no settings; leave --method.{next(n for n in method if n != 'name')} out")
    return replace(config, method=None if removed else _typed(method))


def _typed(value: Any) -> Any:
    """Return what a command line says of a method as a file would say it: numbers are numbers."""
    if isinstance(value, dict):
        return {name: _typed(inner) for name, inner in value.items()}
    for kind, form in ((int, r"[+-]?\d+"), (float, r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")):
        if isinstance(value, str) and re.fullmatch(form, value):
            return kind(value)
    return value


def read_yaml(config_class: type[Config], path: str | Path) -> Config:
    """Return the configuration that a YAML file describes; what it leaves out keeps its default.

    A file that says `extends: other.yaml` (relative to itself; that one may extend a third) starts from the values of
    that file, and its own keys override them one by one. Raises FileNotFoundError for a missing file, and ValueError
    for files that extend one another in a circle, for a section of another command, and for a mistake in any of the
    files, named with the file it is in.
    """
    from omegaconf import OmegaConf

    merged = OmegaConf.structured(config_class, flags={"readonly": False})
    foreign: dict[str, Any] = {}
    for file, values in _chain(config_class, Path(path)):
        foreign.update({section: values.pop(section) for section in _foreign(config_class) if section in values})
        with _naming(file):
            said = values.get("method")
            if isinstance(said, Mapping) and "name" in said:  # another method: the extended file's settings go with it
                merged = OmegaConf.merge(merged, {"method": None})
            merged = OmegaConf.merge(merged, values)
    for section in (name for name, value in foreign.items() if value is not None):
        raise ValueError(
            f"{path} has a `{section}` section, so it is a file of `{ELSEWHERE[section]} {path}`, which trains on data "
            f"that it generates itself. For a run on your own data leave the section out (`{section}: null` in a file "
            "that extends one with it); configs/your_data.yaml is the example to start from"
        )
    with _naming(path):
        return OmegaConf.to_object(merged)  # type: ignore[return-value]


def choose_command(commands: Mapping[str, type], arguments: Sequence[str], program: str, description: str) -> Any:
    """Return the instance of the dataclass in `commands` that the first argument names, filled in by the others.

    Fields without a default are positional. `--help` and mistakes end the process, as in `load_config`.
    """
    import tyro

    with _plain_help():
        return tyro.extras.subcommand_cli_from_dict(
            dict(commands),
            prog=as_typed(program),
            description=description,
            args=list(arguments),
            config=(tyro.conf.PositionalRequiredArgs, tyro.conf.FlagCreatePairsOff),
        )


@contextmanager
def _plain_help() -> Iterator[None]:
    """Take the frames out of the help that tyro prints: it then looks like that of every other command."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        text = re.sub(r" +$", "", printed.getvalue(), flags=re.MULTILINE)
        text = re.sub(r"--method \{[^}]*\}", "--method NAME", text)  # `load_config` takes it; tyro does not know how
        text = re.sub(r"^ (\S.*)\n -+$", r"\1:", text, flags=re.MULTILINE)  # a title, underlined
        print(as_typed(re.sub(r"^ +-+\n", "", text, flags=re.MULTILINE)), end="")


def _chain(config_class: type, path: Path, below: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """Return (file, values) of `path` and of the files it extends, the farthest first; `below` led to it."""
    named_by = f"; {below[-1]} extends it, relative to its own folder" if below else ""
    try:
        found = path.is_file()
    except OSError as error:  # a name that no file system takes, a folder that may not be looked into
        raise ValueError(f"{brief_text(path)} is no configuration file ({error.strerror}){named_by}") from None
    if not found:
        raise FileNotFoundError(f"there is no configuration file {brief_text(path)}{named_by}; see the folder configs")
    if path.resolve() in [file.resolve() for file in below]:
        circle = " extends ".join(str(file) for file in (*below, path))
        raise ValueError(f"{circle}: a circle; let the first of them stand on its own values")
    values = _read_values(path)
    if EXTENDS not in values:
        _check_keys(config_class, values, path)
        return [(path, values)]
    above = values.pop(EXTENDS)
    if not isinstance(above, str) or not above:
        raise ValueError(f"{path}: {EXTENDS}={brief(above)} must be the name of one file, relative to this one")
    _check_keys(config_class, values, path)
    return [*_chain(config_class, Path(os.path.normpath(path.parent / above)), (*below, path)), (path, values)]


@contextmanager
def _naming(file: str | Path) -> Iterator[None]:
    """Turn OmegaConf's exceptions, and those of a configuration that refuses a value, into a ValueError with the file.

    The key stands in either.
    """
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except OmegaConfBaseException as error:
        # What OmegaConf says of a file as a whole has neither key nor message; further lines are about its classes.
        said = [str(part) for part in (error.full_key, error.msg) if part] or [str(error) or type(error).__name__]
        raise ValueError(f"{file}: {brief_text(': '.join(said).splitlines()[0])}") from None
    except (TypeError, ValueError) as error:  # TypeError: OmegaConf's, for lists in the place of sections
        raise ValueError(f"{file}: {brief_text(str(error))}") from None


def _read_values(path: Path) -> dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf

    try:
        text = path.read_bytes().decode("utf-8-sig")
        with _naming(path):
            values = OmegaConf.to_container(OmegaConf.load(io.StringIO(text))) or {}
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not written in UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {brief_text(error)}") from None
    except AssertionError:  # OmegaConf's, for a quoted word that is a number or a yes without its marks
        raise ValueError(f"{path} holds a single word; a configuration file holds key: value lines") from None
    except OSError as error:  # OmegaConf's, for a file that holds a single word or number
        raise ValueError(f"{path}: {error}; a configuration file holds key: value lines") from None
    except RecursionError:
        raise ValueError(f"{path} is no valid YAML: it is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; a configuration file holds key: value lines")
    return values  # type: ignore[return-value]


def _check_keys(config_class: type, values: Mapping[str, Any], path: Path, prefix: str = "") -> None:
    types = get_type_hints(config_class)
    known = [field.name for field in fields(config_class)]
    for key, value in values.items():
        if not prefix and key in _foreign(config_class):
            continue
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            advice = f"did you mean {prefix}{close[0]}?" if close else f"the known ones are {', '.join(known)}"
            raise ValueError(f"{path}: unknown key {brief_text(prefix + str(key))}; {advice}")
        section, several = _section(types[key]), get_origin(types[key]) in (list, tuple)
        if section is not None and isinstance(value, Mapping):
            _check_keys(section, value, path, f"{prefix}{key}.")
        elif section is not None and several and isinstance(value, list):
            for number, item in enumerate(value, 1):
                place = f"{prefix}{key}, entry {number},"
                if not isinstance(item, Mapping):
                    raise ValueError(f"{path}: {place} is {brief(item)}; {_due(section)}")
                _check_keys(section, item, path, f"{place} ")
        elif section is not None and not several and not isinstance(value, _plain(types[key])):
            raise ValueError(f"{path}: {prefix}{key} is {brief(value)}; {_due(section)}")


def _due(section: type) -> str:
    return f"lines of settings are due there: {', '.join(field.name for field in fields(section)[:3])}, ..."


def _section(annotation: Any) -> type | None:
    """Return the dataclass behind a field's type, an optional one included; None for a plain value."""
    return next((kind for kind in (annotation, *get_args(annotation)) if is_dataclass(kind)), None)


def _plain(annotation: Any) -> tuple[type, ...]:
    """Return the types that a field takes beside a section: that of None for an optional one."""
    return tuple(kind for kind in get_args(annotation) if isinstance(kind, type) and not is_dataclass(kind))


def _foreign(config_class: type) -> set[str]:
    """Return the sections of ELSEWHERE that are none of a class's own."""
    return ELSEWHERE.keys() - {field.name for field in fields(config_class)}
