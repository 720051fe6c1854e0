"""What every command shares: one style of --help, mistakes in one line, extras by their names, no noise of others.

Standard library only, so that a command answers at once, and says what to install where a package is missing.
"""

import argparse
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ParamSpec

from dynamic_llava.config import nested_method
from dynamic_llava.files import EXIT_WRITE_FAILED, NO_ROOM, WriteError

Arguments = ParamSpec("Arguments")

EXIT_MISTAKE = 2
"""Exit code of every command for what its user can mend."""
EXTRAS = {
    "accelerate": ("smol", "train", "lmms-eval"),
    "datasets": ("train", "eval", "lmms-eval"),
    "deepspeed": ("deepspeed",),
    "evaluate": ("lmms-eval",),
    "filelock": ("train", "eval", "lmms-eval"),
    "gguf": ("smol",),
    "google": ("convert",),
    "loguru": ("lmms-eval",),
    "matplotlib": ("train", "eval", "look"),
    "nltk": ("eval",),
    "omegaconf": ("train", "eval", "convert"),
    "openpyxl": ("eval", "lmms-eval"),
    "peft": ("train",),
    "pytablewriter": ("lmms-eval",),
    "sacrebleu": ("lmms-eval",),
    "sentencepiece": ("convert",),
    "tenacity": ("lmms-eval",),
    "tqdm": ("train", "eval", "lmms-eval"),
    "tyro": ("train", "eval", "convert"),
    "wandb": ("wandb",),
    "yaml": ("train", "eval", "convert"),
}
"""Packages that an installation without extras lacks, as they are imported, and the extras that bring them."""
_PIP_NAMES = {"google": "protobuf", "yaml": "pyyaml"}
_NOISE = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "DeepSpeed": "Setting (ds_)?accelerator to",
}
"""Beginnings of lines that packages log while they are imported, by their loggers: they ask for nothing that matters
here. 4-bit layers run without the package `kernels`, and which device a run has found, it says itself."""
_METAVARS = {None: "STR", str: "STR", int: "INT", float: "FLOAT", Path: "PATH"}


def entry_point(extra: str | None) -> Callable[[Callable[Arguments, int]], Callable[Arguments, int]]:
    """Make a function the `main` of a command whose packages the named extra brings; None: no extra is needed.

    A package that is missing is then a user's mistake, with what to install.
    """

    def decorate(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
        @functools.wraps(main)
        def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> int:
            silence_imports()
            try:
                return main(*args, **kwargs)
            except ImportError as error:
                advice = missing_package(error, extra)
                if advice is None:
                    raise
                return exit_on_mistake(advice)

        return run

    return decorate


def exit_on_mistake(error: Exception | str) -> int:
    """Print a mistake in one line; return its exit code: 2, 74 for an unwritten file, 1 for a killed worker process."""
    print(f"error: {error}", file=sys.stderr)
    if isinstance(error, WriteError) or getattr(error, "errno", None) in NO_ROOM:
        return EXIT_WRITE_FAILED
    return 1 if isinstance(error, ChildProcessError) else EXIT_MISTAKE


def missing_package(error: ImportError, extra: str | None) -> str | None:
    """Return what to install after a failed import; None where the package belongs to no extra.

    `extra`: the one of several that the command belongs to.
    """
    name = (error.name or "").split(".")[0]
    if name not in EXTRAS:  # transformers names what it lacks in its message alone
        said = str(error).lower()
        name = next((known for known in EXTRAS if re.search(rf"\b{known}\b", said)), "")
    if not name:
        return None
    choice = extra if extra in EXTRAS[name] else EXTRAS[name][0]
    return f'{_PIP_NAMES.get(name, name)} is not installed; it comes with: pip install "dynamic-llava[{choice}]"'


def silence_imports() -> None:
    """Keep out what other packages say while they are imported, line by line; and bars where nobody watches them."""
    for name, beginning in _NOISE.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(beginning))
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars too; before its import


class _Without(logging.Filter):
    """Lets every record pass but those that begin with a text."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = re.compile(beginning)

    def filter(self, record: logging.LogRecord) -> bool:
        return self.beginning.match(record.getMessage()) is None


CONSOLE = "dynamic-llava"
"""The console command; `python -m dynamic_llava` is the same. Its sub-commands are the modules with a __main__.py."""
_MODULE = re.compile(r"python -m dynamic_llava\.(\w+)(?!\w|\.\w)")


def as_typed(text: str) -> str:
    """Return a help text in the words of the console command where that is what runs, as the first word typed says."""
    program = Path(sys.argv[0] if sys.argv else "")
    by_module = program.name == "__main__.py" and program.parent.name == "dynamic_llava"
    return _MODULE.sub(rf"{CONSOLE} \1", text) if program.stem == CONSOLE or by_module else text


class Help(argparse.RawDescriptionHelpFormatter):
    """The help of every command: what an option takes, what it means, and its default."""

    def __init__(self, prog: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(prog, max_help_position=8)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return _METAVARS.get(action.type, "VALUE")  # type: ignore[arg-type]

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if not action.option_strings or action.default is argparse.SUPPRESS or "(default: " in text:
            return text
        if action.required:
            return f"{text} (required)"
        default = action.default
        if isinstance(default, (list, tuple)):
            default = " ".join(map(str, default)) or None
        return f"{text} (default: {default})".replace("%", "%%")


METHOD = "--method"
"""Option that names what decides; `--method.SETTING VALUE` sets its settings."""
METHOD_HELP = (
    "what decides, instead of Dynamic-LLaVA: a method's name, such as fastv, or package.module:Class for a class of "
    "your own; --method.SETTING VALUE, e.g. --method.layer 3, sets its settings (default: None)"
)


def method_words(method: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line that spell a method; its printed mapping (methods/registry.py) as options."""
    words: list[str] = []

    def add(flag: str, value: Any) -> None:
        if isinstance(value, Mapping):
            add(flag, value["name"])
            for name, inner in value.items():
                if name != "name":
                    add(f"{flag}.{name.replace('_', '-')}", inner)
        else:
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            words.append(f"{flag}={text}")

    add(METHOD, method)
    return words


def take_method(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return a command line without the words that spell a method, and the mapping that they make; empty without any.

    ValueError for an option without its value.
    """
    rest: list[str] = []
    settings: list[tuple[str, str]] = []
    joined = _joined(words)
    end = joined.index("--") if "--" in joined else len(joined)
    for word in joined[:end]:
        if word.startswith(f"{METHOD}="):
            settings.append(_setting(word.removeprefix(f"{METHOD}=")))
        else:
            rest.append(word)
    return rest + joined[end:], nested_method(settings)


def _joined(words: Sequence[str]) -> list[str]:
    """Return a command line in which each option that spells a method is one word: --method=PATH=VALUE."""
    joined, left = [], list(words)
    while left:
        word = left.pop(0)
        flag, equals, value = word.partition("=")
        if word == "--":
            return [*joined, word, *left]
        if flag != METHOD and not flag.startswith(f"{METHOD}."):
            joined.append(word)
            continue
        if not equals:
            if not left:
                raise ValueError(f"{flag} needs a value behind it")
            value = left.pop(0)
        path = flag.removeprefix(METHOD).removeprefix(".").replace("-", "_") or "name"
        joined.append(f"{METHOD}={path}={value}")
    return joined


def _setting(text: str) -> tuple[str, str]:
    path, _, value = text.partition("=")
    return path, value


class _TakeMethod(argparse.Action):
    """Collects `--method=PATH=VALUE` (see `_joined`) into the mapping that spells the method."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        before = getattr(namespace, self.dest) or {}
        setattr(namespace, self.dest, nested_method([_setting(values)], before))


def add_method(parser: argparse.ArgumentParser) -> None:
    """Add `--method` to a command; its value is the mapping that spells the method, None where none is named."""
    parser.add_argument(METHOD, action=_TakeMethod, metavar="NAME", help=METHOD_HELP)


class _TakeMethods(argparse.Action):
    """Collects `--method=PATH=VALUE` (see `_joined`) into a list; a name begins a method, settings are of the last."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        path, value = _setting(values)
        methods = [*(getattr(namespace, self.dest) or ())]
        if path == "name":
            methods.append({})
        elif not methods:
            parser.error(f"{METHOD}.{path} {value} stands before the method that it is a setting of; put it behind")
        methods[-1] = nested_method([(path, value)], methods[-1])
        setattr(namespace, self.dest, methods)


def add_methods(parser: argparse.ArgumentParser, otherwise: str) -> None:
    """Add `--method`, which may be given more than once; its value is a list of mappings, None where none is named.

    otherwise: what decides then, for the help.
    """
    parser.add_argument(
        METHOD,
        action=_TakeMethods,
        dest="methods",
        metavar="NAME",
        help="what decides; may be given more than once: a method's name, such as fastv, or package.module:Class for "
        "a class of your own; --method.SETTING VALUE behind it, e.g. --method.layer 3, sets its settings "
        f"(default: {otherwise})",
    )


def add_rates(parser: argparse.ArgumentParser) -> None:
    """Add what a call chooses thresholds and budgets by: two keep rates, and a budget of bytes."""
    parser.add_argument(
        "--image-keep-rate",
        type=float,
        metavar="RATE",
        help="share of each image's tokens that is kept; where image_selection is threshold the checkpoint has to be "
        "calibrated (default: the checkpoint's)",
    )
    parser.add_argument(
        "--output-keep-rate",
        type=float,
        metavar="RATE",
        help="share of output tokens that is kept on average; of Dynamic-LLaVA the checkpoint has to be calibrated, "
        "python -m dynamic_llava.calibrate (default: what the margin's sign keeps)",
    )
    parser.add_argument(
        "--kv-budget",
        metavar="BYTES",
        help="such as 512MiB: choose that share so that keys and values of the longest prompt and of a longest answer, "
        "--max-new-tokens, fill so much (default: None)",
    )


class _ImportProjector(argparse.Action):
    """Imports the class that is named; a checkpoint that names it can be opened from then on."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        from dynamic_llava.projectors import PROJECTORS, import_projector  # imports torch

        if values in PROJECTORS:
            parser.error(f"{option_string} {values}: it is found by its name; leave the option out")
        try:
            import_projector(values)
        except ValueError as error:
            parser.error(str(error))


def add_projector(parser: argparse.ArgumentParser) -> None:
    """Add `--projector` to a command that opens a checkpoint; nothing is stored: the class is imported at once."""
    parser.add_argument(
        "--projector",
        action=_ImportProjector,
        dest=argparse.SUPPRESS,
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="package.module:Class of your own projector, where the checkpoint has one: a checkpoint's word imports no "
        "code (default: None)",
    )


class Parser(argparse.ArgumentParser):
    """A command line without abbreviations, whose mistakes name the option that was meant."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": Help, "allow_abbrev": False, **settings})
        self.prog = as_typed(self.prog)

    def format_help(self) -> str:
        """Return the help in the words of the command that was typed."""
        return as_typed(super().format_help())

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; an option that no command here has ends the process, before its value is taken for a command."""
        given = list(sys.argv[1:] if args is None else args)
        known = self._flags()
        if METHOD in known:
            try:
                given = _joined(given)
            except ValueError as error:
                self.error(str(error))
        for word in given[: given.index("--") if "--" in given else None]:
            flag = word.split("=")[0]
            if flag.startswith("--") and flag not in known:
                close = get_close_matches(flag, known, n=1)
                self.error(f"unrecognized arguments: {flag}{f'; did you mean {close[0]}?' if close else ''}")
        return super().parse_args(given, namespace)

    def _flags(self) -> list[str]:
        flags = [flag for action in self._actions for flag in action.option_strings]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    flags += parser._flags()
        return flags
