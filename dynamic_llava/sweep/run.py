"""Does a sweep's steps one after another, each as a command of its own; a failed one is reported, the others go on."""

import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from dynamic_llava.files import EXIT_WRITE_FAILED, Lock, WriteError
from dynamic_llava.sweep.plan import PlannedRow, SweepPlan, SweepStep
from dynamic_llava.train.stopping import EXIT_STOPPED, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run_plan(plan: SweepPlan, say: Callable[[str], None], after_row: Callable[[], None]) -> list[str]:
    """Do what is not done yet, row by row; returns what failed, a line each. `after_row` is called after every row.

    A training that fails takes its row's evaluations with it. Raises WriteError where a file could not be written: no
    later step could write either. Raises Stopped when told to stop; a running step has then been told so too and has
    ended.
    """
    failures: dict[str, str] = {}
    for planned in plan.rows:
        say(f"{planned.row.title}:")
        _run_row(planned, failures, say)
        after_row()
    return list(failures.values())


def _run_row(planned: PlannedRow, failures: dict[str, str], say: Callable[[str], None]) -> None:
    if planned.training is not None and _failed(planned.training, failures, say):
        skipped = [str(evaluation) for evaluation in planned.evaluations]
        say(f"  not done for want of the model: {', '.join(skipped)}")
        return
    for evaluation in planned.evaluations:
        _failed(evaluation, failures, say)


def _failed(step: SweepStep, failures: dict[str, str], say: Callable[[str], None]) -> bool:
    """Do a step unless it is done; note and say why it failed, once for all rows that share it."""
    key = str(step.folder)
    if key in failures:
        say(f"  {step}: failed above")
        return True
    try:
        if step.is_done():
            say(f"  {step}: done before")
            return False
        say(f"  {step}: {shlex.join(step.command)}")
        _execute(step)
    except WriteError as error:
        say(f"  FAILED: {step} ({step.folder}): {error}")
        raise
    except (ValueError, OSError) as error:
        failures[key] = f"{step} ({step.folder}): {error}"
        say(f"  FAILED: {failures[key]}")
        return True
    return False


def _execute(step: SweepStep) -> None:
    """Run a step's command to its end. ValueError when it fails, or when another process is at it.

    The command holds the lock as well, so that a killed sweep's training is not started a second time.
    """
    with Lock(lock_of(step), f"{step} in a sweep") as lock:
        step.begin()
        with _Relay() as relay:
            # A session of its own: a terminal's Ctrl-C then reaches it once, from here.
            child = subprocess.Popen(step.command, start_new_session=True, pass_fds=(lock.fileno(),))
            code = relay.wait(child)
    if relay.told or code == EXIT_STOPPED:
        raise Stopped(f"{step} was told to stop and ended with exit code {code}")
    if code == EXIT_WRITE_FAILED:
        raise WriteError(f"a file could not be written (exit code {code}); what the command said stands above")
    if code:
        raise ValueError(f"its command ended with exit code {code}; what it said stands above")
    step.finish()
    if not step.is_done():
        raise ValueError("its command ended well but the result is not there")


def lock_of(step: SweepStep) -> Path:
    """Return the file that is locked while a step runs; it lies beside the step's folder."""
    return step.folder.with_name(f".{step.folder.name}.lock")


class _Relay:
    """Passes every wish to stop on to a step's process, which saves and ends, for as long as it is entered."""

    def __init__(self) -> None:
        self.told = False
        """Whether a wish to stop has come."""
        self._child: subprocess.Popen[bytes] | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "_Relay":
        self._former = {number: signal.signal(number, self._pass_on) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def wait(self, child: "subprocess.Popen[bytes]") -> int:
        """Return the process's exit code when it has ended."""
        self._child = child
        if self.told:  # between the process's start and now
            child.send_signal(signal.SIGTERM)
        return child.wait()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.told = True
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM)


def describe(plan: SweepPlan) -> list[str]:
    """Return the lines of a dry run: every command, whether it is done or missing, and how many are."""
    lines: list[str] = []
    states: dict[str, str] = {}
    for planned in plan.rows:
        lines.append(f"{planned.row.title}:")
        for step in planned.steps:
            if str(step.folder) in states:
                lines.append(f"  {step}: as above ({states[str(step.folder)]})")
                continue
            try:
                state = "done" if step.is_done() else "missing"
            except ValueError as error:
                state = f"conflict: {error}"
            states[str(step.folder)] = state
            lines.append(f"  {step}: {state}\n    {shlex.join(step.command)}")
    done = sum(state == "done" for state in states.values())
    lines.append(f"{done} of {len(states)} steps are done")
    return lines
