"""`dynamic-llava COMMAND ...`, or `python -m dynamic_llava COMMAND ...`: the commands of the package under one name.

Each is a module of its own, which `python -m` runs too; only the one that is asked for is imported.
"""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import NamedTuple

import dynamic_llava
from dynamic_llava.cli.commands import CONSOLE, exit_on_mistake


class ConsoleCommand(NamedTuple):
    """Where a command is, and what it does."""

    module: str
    """Module below dynamic_llava whose `main` it is."""
    about: str
    """One line."""
    before: tuple[str, ...] = ()
    """Words that stand before those of the user."""


COMMANDS = {
    "look": ConsoleCommand("look.__main__", "ask about an image, and see what was kept: pictures and a page"),
    "chat": ConsoleCommand("chat.__main__", "several turns in the terminal; dropped words turn grey"),
    "train": ConsoleCommand("train.launch", "train on LLaVA-format data, on every visible GPU"),
    "eval": ConsoleCommand("eval.__main__", "benchmarks; `eval compare` for several methods, `eval score` for answers"),
    "data": ConsoleCommand("data.__main__", "check data before a training"),
    "convert": ConsoleCommand(
        "checkpoints.__main__", "make a checkpoint of another layout ours, or back", ("convert",)
    ),
    "checkpoints": ConsoleCommand("checkpoints.__main__", "convert, check; assemble a LLaVA from its parts"),
    "calibrate": ConsoleCommand("calibrate.__main__", "let keep rates choose the thresholds of a trained model"),
    "profile": ConsoleCommand("profile.__main__", "what it costs: FLOPs, memory, times; calculated and measured"),
    "sweep": ConsoleCommand("sweep.__main__", "a table of trainings and their evaluations"),
    "report": ConsoleCommand("report", "a page about a run, made of its files: curves, tables, pictures, settings"),
    "tiny": ConsoleCommand("tiny.__main__", "the embedded tiny world: train, evaluate and draw without a download"),
    "smol": ConsoleCommand("smol.__main__", "rules on output tokens compared on a real language model"),
}
"""Name -> command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, with the others; return its exit code, 2 for an unknown command."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    if words[0] == "--version":
        print(f"{CONSOLE} {dynamic_llava.__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, n=1)
        advice = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}"
        return exit_on_mistake(f"there is no command {name!r}; {advice}")
    command = COMMANDS[name]
    code: int = import_module(f"dynamic_llava.{command.module}").main([*command.before, *rest])
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            f"usage: {CONSOLE} COMMAND ...",
            "",
            "Dynamic-LLaVA: what LLaVA drops of images and of its own answers, in training, prefill and decoding.",
            "",
            *(f"  {name:<{width}}  {command.about}" for name, command in COMMANDS.items()),
            "",
            f"`{CONSOLE} look` alone shows a first sparse answer of the model that ships with the package.",
            f"`{CONSOLE} COMMAND --help` shows what a command takes; `{CONSOLE} --version` the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
