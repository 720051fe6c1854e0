"""How a run is told to stop, in which ways it ends, and how it tells its launcher.

A signal reaches a training process directly, or its launcher, which passes it on through a folder that the environment
names: a launcher like torchrun would kill its processes half a minute after a signal, in the middle of a large save.
"""

import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from dynamic_llava.files import EXIT_WRITE_FAILED, WriteError, is_held

log = logging.getLogger(__name__)

LAUNCH_FOLDER = "DYNAMIC_LLAVA_LAUNCH_FOLDER"
"""Environment variable: the folder through which a launcher and its training processes speak."""
LAUNCHER_LOCK = "launcher"
"""In that folder: the file that the launcher holds as long as it lives (`files.Lock`)."""
LAUNCHED = (LAUNCH_FOLDER, "TORCHELASTIC_RUN_ID", "CROSS_RANK")
"""Environment variables of this launcher, torchrun and deepspeed; a process without any may outlive its parent."""
WATCH_SECONDS = 0.5
"""How often a launched process looks whether its launcher is still there."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_FAILED, EXIT_SAVE_FAILED, EXIT_STOPPED, EXIT_NOT_FINITE = 1, EXIT_WRITE_FAILED, 75, 76
"""Exit codes: an unexpected failure; a file could not be written; stopped as asked, and the same command goes on; NaN
or infinity.
"""
ECHO_SECONDS = 2.0
"""A signal this soon after the first one is its echo: a terminal and a launcher both deliver it."""


class Stopped(Exception):
    """The run was told to stop, has written a complete checkpoint and can be continued."""


class NotFinite(Exception):
    """A loss, gradient or weight is NaN or infinite: training further would only spoil what there is."""


class TrainingFailed(RuntimeError):
    """Training ended by an exception that nobody expected; the message says what the same command goes on from."""


class SaveError(WriteError):
    """A checkpoint or the model could not be written; complete checkpoints are untouched."""


class StopRequest:
    """Notes a wish to stop, from the first SIGTERM or SIGINT or from the launcher; a later signal ends at once.

    Used as a context: the signals have their former meaning again afterwards. Outside the main thread, where Python
    delivers no signals, only the launcher is listened to.
    """

    def __init__(self) -> None:
        folder = os.environ.get(LAUNCH_FOLDER)
        self.file = Path(folder) / "stop" if folder else None
        self.noted: float | None = None
        """When the first signal came."""
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether this process has been told to stop."""
        return self.noted is not None or (self.file is not None and self.file.exists())

    def _note(self, number: int, frame: FrameType | None) -> None:
        first = not self.asked()
        now = time.monotonic()
        if first or (self.noted is not None and now - self.noted < ECHO_SECONDS):
            self.noted = now if first else self.noted
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def end_with_launcher() -> None:
    """Ask this process to stop, by SIGTERM, as soon as what launched it is gone: nobody could stop it any more.

    Before training begins that ends it; in training it ends the step, writes a checkpoint and ends with EXIT_STOPPED.
    A process that no launcher has started (nohup, a batch system) is left alone.
    """
    if not any(name in os.environ for name in LAUNCHED):
        return
    folder, parent = os.environ.get(LAUNCH_FOLDER), os.getppid()
    lock = None if folder is None else Path(folder) / LAUNCHER_LOCK
    lock = lock if lock is not None and is_held(lock) else None  # started by hand with the variable left over

    def watch() -> None:
        while os.getppid() == parent and (lock is None or is_held(lock)):
            time.sleep(WATCH_SECONDS)
        log.warning("process %d: its launcher is gone, so it saves what it has and ends", os.getpid())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def tell_launcher(code: int) -> None:
    """Leave the exit code for the launcher, if there is one: torchrun itself returns 1 whatever its processes did."""
    folder = os.environ.get(LAUNCH_FOLDER)
    if folder:
        (Path(folder) / "exit-code").write_text(str(code), encoding="utf-8")
