"""A benchmark: parts in order, each a process of its own with its own time, and files that survive whatever happens.

Standard library only, so that neither a broken torch nor a device that hangs takes more than one part with it. The
parts themselves are in parts.py. A part has to end when its planned seconds and those of all parts before it are over,
and whatever was given beyond the plan: what an earlier part did not need, a later one may use, and no part takes from
those behind it. Beside an accelerator the next part's process is started early: it imports, seconds that are nobody's,
and waits for its turn. On two CPU cores that would disturb what is being measured.
"""

import contextlib
import faulthandler
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamic_llava.files import writing
from dynamic_llava.profile import results
from dynamic_llava.profile.summary import write_summary

LOG = "log.txt"
ENDING = 2.5
"""Seconds of a part's time that are kept for ending it: its stack goes into the log, then its processes are killed,
which takes a while where they hold much memory."""


@dataclass(frozen=True)
class Part:
    """One part of a benchmark."""

    name: str
    seconds: float
    """Planned time, start of the process included; after it the part is ended."""
    about: str


GPU_PARTS = (
    Part("device", 20, "device, versions, copy bandwidth and matrix-product rate"),
    Part("methods", 20, "every method and a training step on the device beside the CPU"),
    Part("compiling", 150, "compiling the steps of the next two parts, side by side"),
    Part("steps-batch-8", 60, "cached steps of all layers, batch 8, beside both dense baselines"),
    Part("steps-batch-1", 40, "cached steps of all layers, batch 1"),
    Part("prefill", 20, "prefill, batch 1 and 8"),
    Part("training", 25, "a training step: time and memory"),
    Part("ragged", 20, "attention of one new token over ragged rows"),
    Part("predictors", 15, "what the predictors cost at full size"),
    Part("attention", 20, "MaskedSoftmax beside plain attention, both passes"),
    Part("compiled", 55, "laws of the compiled decoding step on the device"),
    Part("kernels", 80, "laws of MaskedSoftmax and ragged attention on the device"),
    Part("generate", 45, "generate(), time of a token"),
)
"""The parts for one GPU, 570 seconds in all."""
CPU_PARTS = (
    Part("device", 15, "device, versions, copy bandwidth and matrix-product rate"),
    Part("cache", 30, "bytes of the cache after long generations"),
    Part("steps", 100, "cached steps, eager and compiled, beside both dense baselines"),
    Part("prefill", 30, "prefill"),
    Part("attention", 20, "MaskedSoftmax beside plain attention, both passes"),
    Part("small-steps", 55, "small compiled steps: one graph, the same tokens, time beside eager and dense"),
    Part("predictors", 30, "what the predictors cost at full size"),
    Part("uncached", 25, "steps without cache, and whole generations"),
    Part("memory", 20, "measured memory of a generation beside the calculation"),
    Part("training", 20, "a training step: time and memory"),
    Part("calculated", 10, "the paper's tables and curves, calculated"),
)
"""The reduced set for two CPU cores: ratios that hold on a small machine."""
SETS = {
    "gpu": GPU_PARTS,
    "cpu": CPU_PARTS,
    "rehearsal": tuple(Part(part.name, 120, part.about) for part in GPU_PARTS),
}
"""The rehearsal runs the GPU's parts at tiny sizes, anywhere; times of a busy CPU need wide limits."""


@dataclass(frozen=True)
class BenchmarkPlan:
    """The parts of a benchmark that run, and those left out from the start."""

    set: str
    parts: tuple[Part, ...]
    left_out: tuple[Part, ...]
    seconds: float
    """The whole time."""

    def lines(self) -> list[str]:
        """Return what is said before anything runs."""
        planned = sum(part.seconds for part in self.parts)
        said = [f"{self.set}: {len(self.parts)} parts, {planned:g} of {self.seconds:g} seconds planned"]
        if self.seconds > planned:
            said.append(f"{self.seconds - planned:g} seconds to spare, for parts that take longer than planned")
        return said + [f"left out, {part.seconds:g} s: {part.name} ({part.about})" for part in self.left_out]


def set_found(device: str | None) -> str:
    """Return the set for a device, asked for in another process: here nothing may depend on torch.

    ValueError where torch does not say whether there is an accelerator.
    """
    if device is not None:
        return "cpu" if device == "cpu" else "gpu"
    code = "import torch; print(torch.accelerator.current_accelerator(check_available=True) is not None)"
    try:
        asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise ValueError("torch did not say within 60 s whether there is an accelerator; give --set") from None
    if asked.returncode:
        reason = (asked.stderr.strip() or "no message").split("\n")[-1]
        raise ValueError(f"torch cannot say whether there is an accelerator ({reason}); mend it, or give --set")
    return "gpu" if asked.stdout.strip() == "True" else "cpu"


def plan(name: str, parts: Sequence[Part], seconds: float | None = None, only: Sequence[str] = ()) -> BenchmarkPlan:
    """Choose the parts that fit into so many seconds, in order; None is enough for all. ValueError for a mistake."""
    known = [part.name for part in parts]
    unknown = [part for part in only if part not in known]
    if unknown:
        raise ValueError(f"--parts {' '.join(unknown)}: the {name} set has no such part; choose of {', '.join(known)}")
    wanted = [part for part in parts if not only or part.name in only]
    if seconds is None:
        seconds = sum(part.seconds for part in wanted)
    chosen, left = [], seconds
    for part in wanted:
        if part.seconds <= left:
            chosen.append(part)
            left -= part.seconds
    if not chosen:
        least = min(part.seconds for part in wanted)
        raise ValueError(f"--seconds {seconds:g} is too little: the shortest part needs {least:g}; give at least that")
    return BenchmarkPlan(name, tuple(chosen), tuple(part for part in parts if part not in chosen), seconds)


def part_command(name: str, chosen: str, path: Path, device: str | None) -> list[str]:
    """Return the command that runs one part of a set and adds to the file of results."""
    command = [sys.executable, "-m", "dynamic_llava.profile", "part", name, "--set", chosen, "--results", str(path)]
    return [*command, "--attached", *(["--device", device] if device is not None else [])]


def new_folder(folder: Path) -> Path:
    """Make the folder of a benchmark's files. ValueError where it holds results, which are never touched.

    WriteError where it cannot be made.
    """
    if (folder / results.RESULTS).exists():
        raise ValueError(
            f"{folder} holds the results of an earlier benchmark; give another --output-folder, or move them"
        )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


class Ended(BaseException):
    """Somebody asked the whole benchmark to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run(chosen: BenchmarkPlan, command: Callable[[str], list[str]], folder: Path, begun: float | None = None) -> bool:
    """Run the plan's parts, each with the command of its name; True where all are done.

    `begun`: time.monotonic() that the plan's seconds count from. Files in the folder: results, log and two of a
    summary that is written anew after every part. On SIGTERM, SIGINT and SIGHUP the running part is ended and Ended is
    raised, after the summary. A part whose runner was killed outright ends itself.
    """
    begun = time.monotonic() if begun is None else begun
    path = folder / results.RESULTS
    head = {
        "set": chosen.set,
        "seconds": chosen.seconds,
        "parts": [[part.name, part.seconds, part.about] for part in chosen.parts],
        "left_out": [[part.name, part.seconds, part.about] for part in chosen.left_out],
        "begun": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    results.append(path, {"run": head})
    for line in chosen.lines():
        _say(folder, line)
    _write_summary(folder)
    deadline = begun + chosen.seconds - sum(part.seconds for part in chosen.parts)
    all_done = True
    before = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    started: dict[str, subprocess.Popen[bytes] | OSError] = {}
    try:
        for part, following in itertools.zip_longest(chosen.parts, chosen.parts[1:]):
            begun = time.monotonic()
            deadline += part.seconds
            early = [following] if following is not None and chosen.set != "cpu" else []
            for each in (part, *early):
                if each.name not in started:
                    started[each.name] = _start(command(each.name), folder)
            state = _run_part(part, started[part.name], folder, begun, deadline - ENDING)
            del started[part.name]
            all_done &= state["state"] == "done"
            _write_summary(folder)
    finally:
        for process in started.values():
            if not isinstance(process, OSError):
                _kill(process)
        for number, handler in before.items():
            signal.signal(number, handler)
    return all_done


def _end(number: int, frame: Any) -> None:
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)  # ending goes on undisturbed
    raise Ended(number)


def _start(command: Sequence[str], folder: Path) -> subprocess.Popen[bytes] | OSError:
    """Start a part's process, which imports and then waits for its turn; what cannot be started gives its reason."""
    try:
        with (folder / LOG).open("ab") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # its other end closes when this process ends, however it does
                bufsize=0,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
    except OSError as error:
        return error


def _run_part(
    part: Part, process: subprocess.Popen[bytes] | OSError, folder: Path, begun: float, deadline: float
) -> dict[str, Any]:
    """Run one part until the deadline; returns how it ended, which is in the results by then."""
    path, log = folder / results.RESULTS, folder / LOG
    limit = deadline - begun
    _say(folder, f"=== {part.name}, at most {limit:.0f} s ===")
    results.append(path, {"part": part.name, "state": "running", "limit": limit})
    offset, state = log.stat().st_size, {"state": "cut off", "reason": "the whole benchmark was ended"}
    try:
        state = _wait(process, limit, begun, lambda code: _outcome(code, part.name, path, log, offset))
    finally:
        if not isinstance(process, OSError) and not _kill(process):
            state["reason"] = f"{state.get('reason', '')}; its process could not be ended"
        results.append(path, {"part": part.name, "seconds": round(time.monotonic() - begun, 1), **state})
        _say(folder, f"=== {part.name}: {state['state']}{', ' + state['reason'] if state.get('reason') else ''} ===")
        if state["state"] == "cut off":
            _write_summary(folder)
    return state


def _wait(
    process: subprocess.Popen[bytes] | OSError, limit: float, begun: float, outcome: Callable[[int], dict[str, Any]]
) -> dict[str, Any]:
    if isinstance(process, OSError):
        return {"state": "failed", "reason": f"the process could not be started: {process}"}
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended by itself, and its code says how
        process.stdin.write(b"your turn\n")
        process.stdin.flush()
    try:
        return outcome(process.wait(max(0.0, limit)))
    except subprocess.TimeoutExpired:
        _dump_stack(process)
        return {"state": "timed out", "reason": f"ended after {time.monotonic() - begun:.0f} s"}


def _outcome(code: int, name: str, path: Path, log: Path, offset: int) -> dict[str, Any]:
    if code == 0:
        return {"state": "done"}
    if code < 0:
        return {"state": "failed", "reason": f"killed by {signal.Signals(-code).name}"}
    said = [entry["error"] for entry in results.read(path) if entry.get("part") == name and "error" in entry]
    with log.open("rb") as file:
        file.seek(offset)
        lines = file.read().decode(errors="replace").strip().split("\n")
    return {"state": "failed", "reason": said[-1] if said else f"exit code {code}: {lines[-1]}"}


def _dump_stack(process: subprocess.Popen[bytes]) -> None:
    """Let a part write into the log where it stands; one that has not come far enough just ends."""
    process.send_signal(signal.SIGUSR1)
    try:
        process.wait(ENDING / 5)
    except subprocess.TimeoutExpired:
        return


def _kill(process: subprocess.Popen[bytes]) -> bool:
    """End the part and everything it has started; False where the system does not let go of it."""
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(ENDING * 3 / 5)
    except subprocess.TimeoutExpired:
        return False
    return True


def attach_to_runner() -> threading.Event:
    """Make this process a part: its stack goes into the log when asked for, and it ends when its runner has ended.

    Returns an event that is set when it is the part's turn. The runner holds the other end of standard input. With the
    process ends all that it has started.
    """
    faulthandler.register(signal.SIGUSR1)
    turn = threading.Event()

    def watch() -> None:
        while os.read(0, 4096):
            turn.set()
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    return turn


def _say(folder: Path, line: str) -> None:
    print(line, flush=True)
    with (folder / LOG).open("a", encoding="utf-8") as log:
        log.write(f"{time.strftime('%H:%M:%S')} {line}\n")


def _write_summary(folder: Path) -> None:
    try:
        write_summary(folder)
    except Exception:  # whatever is wrong with a table, measuring goes on; the summary can be rebuilt
        _say(folder, f"no summary could be written:\n{traceback.format_exc()}")
