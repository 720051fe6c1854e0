"""Configuration files and command lines: YAML through OmegaConf, overrides and --help through tyro; nowhere else.

config = load_config(RunConfig, ["configs/tiny.yaml", "--train.learning-rate", "1e-5"])
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import tyro
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Config = TypeVar("Config")

SHORT_FLAGS = {"--seed": "--train.seed", "--seeds": "--tiny.seeds", "--full": "--tiny.untrained-base"}
"""Short forms of often used flags."""


def load_config(config_class: type[Config], arguments: Sequence[str], program: str, description: str) -> Config:
    """Return the configuration of `arguments`: an optional YAML file first, then overrides such as --train.seed 1.

    `--help` prints every field and ends the process, and so does a mistake on the command line (tyro's message, with
    suggestions). Raises FileNotFoundError for a missing file and ValueError for one with an unknown key (with a
    suggestion), a value of the wrong type, or a value that the configuration refuses.
    """
    rest = list(arguments)
    default = None
    if rest and not rest[0].startswith("-"):
        default = read_yaml(config_class, rest.pop(0))
    short = {name: flag for name, flag in SHORT_FLAGS.items() if _has_field(config_class, flag)}
    rest = [short.get(argument, argument) for argument in rest]
    if short:
        description += "\n\nShort forms: " + ", ".join(f"{name} = {flag}" for name, flag in short.items())
    return tyro.cli(
        config_class,
        prog=program,
        description=description,
        args=rest,
        default=config_class() if default is None else default,
        config=(tyro.conf.AvoidSubcommands,),
    )


def read_yaml(config_class: type[Config], path: str | Path) -> Config:
    """Return the configuration that a YAML file describes; what it leaves out keeps its default."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration file {path}; see the folder configs")
    try:
        loaded = OmegaConf.load(path)
        values = OmegaConf.to_container(loaded) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}; a configuration file holds key: value lines")
        _check_keys(config_class, values, path)
        schema = OmegaConf.structured(config_class, flags={"readonly": False})
        return OmegaConf.to_object(OmegaConf.merge(schema, loaded))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {error.full_key}: {error.msg}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from None


def exit_on_mistake(error: ValueError | FileNotFoundError) -> int:
    """Print a user's mistake in one line on stderr and return the exit code for it."""
    print(f"error: {error}", file=sys.stderr)
    return 2


def _check_keys(config_class: type, values: Mapping[str, Any], path: Path, prefix: str = "") -> None:
    types = get_type_hints(config_class)
    known = [field.name for field in fields(config_class)]
    for key, value in values.items():
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            advice = f"did you mean {prefix}{close[0]}?" if close else f"the known ones are {', '.join(known)}"
            raise ValueError(f"{path}: unknown key {prefix}{key}; {advice}")
        section = _section(types[key])
        if section is not None and isinstance(value, Mapping):
            _check_keys(section, value, path, f"{prefix}{key}.")


def _section(annotation: Any) -> type | None:
    """Return the dataclass behind a field's type, an optional one included; None for a plain value."""
    return next((kind for kind in (annotation, *get_args(annotation)) if is_dataclass(kind)), None)


def _has_field(config_class: type, flag: str) -> bool:
    section: type | None = config_class
    for name in flag.removeprefix("--").replace("-", "_").split("."):
        if section is None or name not in get_type_hints(section):
            return False
        section = _section(get_type_hints(section)[name])
    return True
