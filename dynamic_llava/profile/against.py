"""Two checkouts side by side: how much longer a call takes in this one than in another, measured by turns.

Both run at once in processes of their own and take turns call by call, who begins changing every time, so that both see
the same load of the machine; a ratio is that of two calls beside each other. What differs between processes on one
source (where memory lies) is seen by starting several pairs of them.
"""

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dynamic_llava
from dynamic_llava.profile.presets import PRESETS, Preset
from dynamic_llava.profile.results import Column, Report

HERE = Path(dynamic_llava.__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("one_side.py")
QUESTIONS = 100
"""Questions of each category of POPE that are scored."""


@dataclass(frozen=True)
class Compared:
    """A call that both checkouts make by turns."""

    name: str
    preset: Preset
    call: str
    """generate (a turn is a token), prefill, training; or score, a command of its own."""
    turns: int
    """Turns that count, in each pair of processes."""
    warmup: int = 2
    """Turns before these."""
    compile: bool = False


_TRAINED = replace(PRESETS["cpu-small"].with_layers(4), batch=2)
COMPARED = (
    Compared("eager-step", PRESETS["cpu"], "generate", 24),
    Compared("small-eager-step", PRESETS["cpu-small"], "generate", 96),
    Compared("compiled-step", PRESETS["cpu"], "generate", 24, 4, True),
    Compared("small-compiled-step", PRESETS["cpu-small"], "generate", 192, 4, True),
    Compared("prefill", PRESETS["cpu-prefill"], "prefill", 6, 1),
    Compared("small-prefill", PRESETS["cpu-small"], "prefill", 24),
    Compared("training", _TRAINED, "training", 12, 1),
    Compared("score", PRESETS["cpu-small"], "score", 10, 1),
)
"""The calls that are compared, at the sizes of the CPU set; `score` is a whole `eval score`, mostly its start."""


@dataclass(frozen=True)
class TimedTurn:
    """One call in each of the two checkouts."""

    here: float
    """Seconds of this checkout."""
    there: float
    """Seconds of the other one."""
    processor: float
    """Ratio of the processor's seconds, here to there."""
    same: bool
    """Whether both checkouts gave the same result."""

    @property
    def ratio(self) -> float:
        """Seconds here to there."""
        return self.here / self.there


def compare(compared: Compared, other: Path, pairs: int) -> dict[str, Any]:
    """Return the row of one call: medians, their ratio and its interval. RuntimeError where a checkout fails.

    The interval holds the median of all turns at 95 %, and the median of every pair of processes.
    """
    found = [list(_turns(compared, other)) for _ in range(pairs)]
    turns = [turn for pair in found for turn in pair]
    ratios = [turn.ratio for turn in turns]
    each = [statistics.median(turn.ratio for turn in pair) for pair in found]
    low, high = median_interval(ratios)
    return {
        "call": compared.name,
        "preset": compared.preset.name,
        "turns": len(turns),
        "here": statistics.median(turn.here for turn in turns),
        "there": statistics.median(turn.there for turn in turns),
        "ratio": statistics.median(ratios),
        "low": min(low, *each),
        "high": max(high, *each),
        "pairs": " ".join(f"{ratio:.3f}" for ratio in each),
        "processor": statistics.median(turn.processor for turn in turns),
        "same": sum(turn.same for turn in turns) / len(turns),
    }


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return an interval that holds the median of what the values are drawn from, whatever its shape.

    Its ends are values: as many are left out on either side as a fair coin allows at that level. With fewer than six
    values, which do not reach 95 %, it is all of them.
    """
    ordered, left_out, tail = sorted(values), 0, 0.5 ** len(values)
    while tail <= (1 - level) / 2 and left_out < len(ordered) // 2:
        left_out += 1
        tail += math.comb(len(ordered), left_out) * 0.5 ** len(ordered)
    left_out = max(0, left_out - 1)
    return ordered[left_out], ordered[-1 - left_out]


def against_report(rows: Sequence[Mapping[str, Any]], other: Path) -> Report:
    """Return the comparison as a table."""
    columns = (
        Column("call", "call"),
        Column("preset", "preset"),
        Column("turns", "turns"),
        Column("there", f"{other.name}, ms", ".2f", 1e3),
        Column("here", "this, ms", ".2f", 1e3),
        Column("ratio", "this / that", ".3f"),
        Column("low", "from", ".3f"),
        Column("high", "to", ".3f"),
        Column("pairs", "each pair of processes"),
        Column("processor", "processor's", ".3f"),
        Column("same", "same result", ".0%"),
    )
    notes = (
        f"this: {HERE}, {_commit(HERE)}; {other.name}: {other}, {_commit(other)}.",
        "Medians; from, to: a 95 % interval of the median ratio over all turns, widened to the medians of the pairs. "
        "processor's: the ratio of processor time.",
    )
    return Report("against", "This checkout beside another one, call by call by turns", columns, rows, notes)


def _commit(folder: Path) -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    return f"commit {done.stdout.strip()}" if done.returncode == 0 else "no commit known"


def check_folder(folder: Path) -> Path:
    """Return a checkout's folder, resolved. FileNotFoundError where it holds no package."""
    if not (folder / "dynamic_llava" / "__init__.py").is_file():
        raise FileNotFoundError(
            f"{folder} holds no dynamic_llava/; give a checkout's folder, as `git worktree add FOLDER COMMIT` makes it"
        )
    return folder.resolve()


def _turns(compared: Compared, other: Path) -> Iterator[TimedTurn]:
    folders = {"here": HERE, "there": other}
    with contextlib.ExitStack() as stack:
        sides: dict[str, Any] = {}
        if compared.call == "score":
            data = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            command = write_pope(data)
            sides = {name: _Command(folder, command) for name, folder in folders.items()}
        else:
            sides = {name: stack.enter_context(_Worker(folder, _sizes(compared))) for name, folder in folders.items()}
        for number in range(compared.warmup + compared.turns):
            order = ("here", "there") if number % 2 else ("there", "here")
            taken = {name: sides[name].turn() for name in order}
            (here, cpu_here, said), (there, cpu_there, other_said) = taken["here"], taken["there"]
            if number >= compared.warmup:
                yield TimedTurn(here, there, cpu_here / cpu_there, said == other_said)


def _sizes(compared: Compared) -> dict[str, Any]:
    preset, decoder, vision = compared.preset, compared.preset.shape.decoder, compared.preset.shape.vision
    return {
        "call": compared.call,
        "compile": compared.compile,
        "turns": compared.warmup + compared.turns + 1,
        "batch": preset.batch,
        "prompt": preset.prompt,
        "image_tokens": preset.shape.tokens_per_image,
        "sparsity": {"sparse_layer": preset.sparse_layer, "image_keep_rate": preset.image_keep_rate},
        "decoder": {
            "hidden_size": decoder.hidden,
            "intermediate_size": decoder.intermediate,
            "num_hidden_layers": decoder.layers,
            "num_attention_heads": decoder.heads,
            "num_key_value_heads": decoder.kv_heads,
            "head_dim": decoder.head_width,
            "vocab_size": decoder.vocab,
        },
        "vision": {
            "hidden_size": vision.hidden,
            "intermediate_size": vision.intermediate,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": max(1, vision.hidden // 64),
            "patch_size": vision.patch,
        },
    }


def _environment(folder: Path) -> dict[str, str]:
    passive = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}  # who waits for a turn takes nothing from the other
    return {**os.environ, **passive, "PYTHONPATH": str(folder)}


class _Worker:
    """A process that runs one_side.py in a checkout."""

    def __init__(self, folder: Path, sizes: Mapping[str, Any]) -> None:
        self.folder, self.sizes = folder, sizes

    def __enter__(self) -> "_Worker":
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{WORKER.read_text(encoding='utf-8')}\nmain()\n"],
            cwd=self.folder,
            env=_environment(self.folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self._write(json.dumps(self.sizes))
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]

    def _write(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended; what it said is read below
            self.process.stdin.write(line + "\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]

    def turn(self) -> list[Any]:
        """Return seconds, processor seconds and what came out of one call. RuntimeError where the process ended."""
        self._write("")
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            self.errors.seek(0)
            last = (self.errors.read().strip() or "no message").splitlines()[-1]
            raise RuntimeError(f"{self.sizes['call']} failed in {self.folder}: {last}")
        return json.loads(line)


class _Command:
    """A command that runs in a checkout, from its start to its end."""

    def __init__(self, folder: Path, command: Sequence[str]) -> None:
        self.folder, self.command = folder, [sys.executable, "-m", *command]

    def turn(self) -> list[Any]:
        """Return seconds, processor seconds and output of one run. RuntimeError where it fails."""
        before, begun = os.times(), time.perf_counter()
        environment = _environment(self.folder)
        done = subprocess.run(self.command, cwd=self.folder, env=environment, capture_output=True, text=True)
        seconds, after = time.perf_counter() - begun, os.times()
        if done.returncode:
            raise RuntimeError(f"{' '.join(self.command[2:4])} failed in {self.folder}: {done.stderr.strip()}")
        processor = after.children_user + after.children_system - before.children_user - before.children_system
        return [seconds, processor, done.stdout]


def write_pope(folder: Path) -> list[str]:
    """Write questions, labels and answers of POPE; return the command that scores them."""
    questions, answers = [], []
    (folder / "pope" / "coco").mkdir(parents=True)
    for start, category in enumerate(("adversarial", "popular", "random")):
        labels = []
        for number in range(QUESTIONS):
            text, image = f"Is there a {category} thing {number} in the image?", f"{number}.jpg"
            name = start * 10_000_000 + number
            questions.append({"question_id": name, "image": image, "text": text, "category": category})
            labels.append({"question_id": number, "image": image, "text": text, "label": ("yes", "no")[number % 2]})
            answers.append({"question_id": name, "prompt": text, "text": ("Yes", "No")[number // 2 % 2]})
        _write_lines(folder / "pope" / "coco" / f"coco_pope_{category}.json", labels)
    _write_lines(folder / "pope" / "llava_pope_test.jsonl", questions)
    _write_lines(folder / "answers.jsonl", answers)
    given = ["--task", "pope", "--answers", str(folder / "answers.jsonl"), "--data-root", str(folder)]
    return ["dynamic_llava.eval", "score", *given]


def _write_lines(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
