"""The compare command on the toy benchmark, and what it wrote."""

import json
from dataclasses import dataclass
from typing import ClassVar

from dynamic_llava.eval.__main__ import main
from dynamic_llava.methods import OneCut
from tests.eval.run_builders import TOKENS


@dataclass(frozen=True)
class Refusing(OneCut):
    """A method that fails."""

    name: ClassVar[str] = "refusing"
    training_free: ClassVar[bool] = True

    def keep_image(self, cut, images, learned):
        """Fail."""
        raise ValueError("this method takes no images")


def compare(checkpoint, methods, out, *more, tasks="toy", root=None):
    """Run the command; return its exit code."""
    places = ("--model", checkpoint, "--data-root", root or checkpoint, "--output-folder", out, "--methods", methods)
    asked = ("--tasks", tasks, "--max-new-tokens", TOKENS, "--repeats", 2)
    return main(["compare", *map(str, (*places, *asked, *more))])


def results(out):
    """Return compare.json."""
    return json.loads((out / "compare.json").read_text())


def rows_of(out, task="toy", model=None):
    """Return method -> row of a task, without what differs between two runs: times, and where answers lie."""
    rows = [row for row in results(out)["tasks"][task]["rows"] if model in (None, row["model"])]
    return {row["method"]: {name: row[name] for name in row if name not in ("times", "answers")} for row in rows}


def answers_of(out):
    """Return folder -> bytes of each file of answers."""
    return {path.parent.parent.name: path.read_bytes() for path in sorted(out.glob("answers/*/answers/*.jsonl"))}
