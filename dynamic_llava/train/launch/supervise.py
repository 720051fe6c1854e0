"""Runs a launcher as a child process: passes a wish to stop on to the training, and returns its exit code."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from dynamic_llava.files import Lock
from dynamic_llava.train.stopping import LAUNCH_FOLDER, LAUNCHER_LOCK, SIGNALS


def supervise(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run `command` to its end; return the exit code that the training left, else the command's own.

    The first signal asks the run to save and stop; the second ends it at once. The command gets a session of its own,
    so that a terminal's Ctrl-C reaches this process alone. When this process is killed its lock is free, and the
    training, which watches it, ends too.
    """
    with tempfile.TemporaryDirectory(prefix="dynamic-llava-launch-") as folder:
        stop, left = Path(folder) / "stop", Path(folder) / "exit-code"
        lock = Lock(Path(folder) / LAUNCHER_LOCK, "launching a training").take()
        started: list[subprocess.Popen[bytes]] = []

        def pass_on(number: int, frame: FrameType | None) -> None:
            if stop.exists() and started:
                os.killpg(started[0].pid, signal.SIGTERM)
                return
            stop.touch()
            print("asked the run to save and stop; a second signal ends it at once", file=sys.stderr, flush=True)

        former = {number: signal.signal(number, pass_on) for number in (*SIGNALS, signal.SIGHUP)}
        try:
            started.append(
                subprocess.Popen(command, env={**environment, LAUNCH_FOLDER: folder}, start_new_session=True)
            )
            code = started[0].wait()
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
            lock.release()
        if code and left.exists():
            return int(left.read_text(encoding="utf-8"))
        return code if code >= 0 else 128 - code
