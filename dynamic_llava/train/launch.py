"""`python -m dynamic_llava.train.launch CONFIG.yaml [overrides]`: says how it starts the run and why, and starts it.

`plan` chooses plain python, torchrun or deepspeed, and the number of processes, from the visible devices and the run;
`supervise` runs such a launcher as a child process, passes a wish to stop on to it, and returns its exit code.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TypeVar

from dynamic_llava.cli import load_config
from dynamic_llava.cli.commands import entry_point, exit_on_mistake
from dynamic_llava.config.run import RunConfig
from dynamic_llava.files import Lock
from dynamic_llava.train.__main__ import DESCRIPTION, PROGRAM, exit_code_of, hide_bars, log_to_stderr
from dynamic_llava.train.stopping import LAUNCH_FOLDER, LAUNCHER_LOCK, SIGNALS

MODULE = "dynamic_llava.train"
T = TypeVar("T")


@entry_point("train")
def main(arguments: Sequence[str] | None = None) -> int:
    """Start the run that the command line describes; --help and mistakes are answered here, once and at once."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        config = load_config(RunConfig, given, PROGRAM, DESCRIPTION)
        import torch  # not before --help and a mistyped key have been answered

        launch = plan(
            devices=torch.accelerator.device_count(),
            deepspeed=config.train.deepspeed is not None,
            environment=os.environ,
        )
    except (ValueError, FileNotFoundError) as error:
        return exit_on_mistake(error)
    print(launch.reason, file=sys.stderr, flush=True)
    command = launch.command(sys.executable, given)
    if not launch.launcher:
        os.execv(command[0], command)
    return supervise(command, {**launch.environment, **os.environ})


@dataclass(frozen=True)
class Launch:
    """A command to start, in words and in full."""

    reason: str
    """One line: what was found, and what follows from it."""
    launcher: tuple[str, ...]
    """Arguments of the Python interpreter before the training module and its own; empty for plain python."""
    processes: int = 1
    """Training processes on this machine."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that the processes get unless they are set already."""

    def command(self, python: str, arguments: Sequence[str]) -> list[str]:
        """Return the whole command line; `arguments` reach the training module as they are."""
        return [python, *(self.launcher or ("-m", MODULE)), *arguments]


def plan(*, devices: int, deepspeed: bool, environment: Mapping[str, str]) -> Launch:
    """Decide how to start a run on a machine with `devices` visible accelerators (0: the CPU).

    `deepspeed` says whether train.deepspeed is set. PROCESSES, and for several machines NNODES, NODE_RANK, MASTER_ADDR
    and MASTER_PORT, are read from `environment`. Raises ValueError for values that do not fit.
    """
    if place := _launched(environment):
        return Launch(place, ())
    asked, nodes = _number(environment, "PROCESSES"), _number(environment, "NNODES") or 1
    processes = asked or devices or 1
    if devices and processes > devices:
        raise ValueError(f"PROCESSES={processes} but {devices} GPUs are visible; a process needs a GPU of its own")
    found = _found(devices, asked)
    threads = {"OMP_NUM_THREADS": str(max(1, _cores() // processes))}
    if nodes > 1:
        where = _machines(environment, nodes)
        reason = f"{found} on each of {nodes} machines: torchrun with {processes} processes here"
        return Launch(reason, _torchrun(processes, where), processes, threads)
    if deepspeed:
        if devices and processes != devices:
            raise ValueError(
                f"PROCESSES={processes} but {devices} GPUs are visible; the deepspeed launcher starts one process per "
                f"visible GPU: make {processes} visible instead"
            )
        reason = f"{found} and train.deepspeed set: deepspeed launcher with {_count(processes, 'process')}"
        if not devices:
            threads["DS_ACCELERATOR"] = "cpu"
        return Launch(reason, _deepspeed(0 if devices else processes), processes, threads)
    if processes == 1 and devices <= 1:
        return Launch(f"{found}: plain python", ())
    reason = f"{found}: torchrun with {_count(processes, 'process')}"
    return Launch(reason, _torchrun(processes, ("--standalone",)), processes, threads)


def plan_alone(title: str, module: str, *, devices: int, environment: Mapping[str, str]) -> Launch:
    """Decide how to start a program that trains in one process: `title` in words, the `module` that python -m runs.

    Raises ValueError where `environment` asks for several processes or machines.
    """
    if place := _launched(environment):
        return Launch(place, ())
    if (_number(environment, "PROCESSES") or 1) > 1 or (_number(environment, "NNODES") or 1) > 1:
        raise ValueError(f"{title} runs in one process; unset PROCESSES and NNODES")
    if devices <= 1:
        return Launch(f"{title}: plain python", ())
    # One process would see all devices and split its batches over them; torchrun gives it the first.
    reason = f"{title} on the first of {devices} GPUs: torchrun with 1 process"
    return Launch(reason, _torchrun(1, ("--standalone",), module))


def run_alone(title: str, module: str, words: Sequence[str], read: Callable[[], T], work: Callable[[T], object]) -> int:
    """Do the `work` of what `read` returns: here, or, beside several GPUs, in one process that sees the first of them.

    `python -m module words` is the command that does it there. Returns the exit code, those of a training among them.
    """

    def run() -> int:
        config = read()
        import torch  # not before --help and a mistyped key have been answered

        launch = plan_alone(title, module, devices=torch.accelerator.device_count(), environment=os.environ)
        if launch.launcher:
            print(launch.reason, file=sys.stderr, flush=True)
            return supervise(launch.command(sys.executable, words), os.environ)
        hide_bars()
        work(config)
        return 0

    log_to_stderr()
    return exit_code_of(run)


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


def _launched(environment: Mapping[str, str]) -> str:
    """Say which process of another launcher this is; empty for one that was started by itself."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return ""
    place = f"{environment['RANK']} of {environment['WORLD_SIZE']}"
    return f"RANK and WORLD_SIZE are set: plain python, process {place} of another launcher"


def _found(devices: int, asked: int | None) -> str:
    seen = _count(devices, "GPU") + " visible" if devices else "no GPU visible"
    return seen if asked is None else f"{seen} and PROCESSES={asked}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}{'es' if what.endswith('s') else 's'}"


def _torchrun(processes: int, where: tuple[str, ...], module: str = MODULE) -> tuple[str, ...]:
    # Behind `--` nothing is taken for an option of torchrun, which accepts abbreviations.
    return ("-m", "torch.distributed.run", *where, f"--nproc-per-node={processes}", "-m", "--", module)


def _deepspeed(processes: int) -> tuple[str, ...]:
    # Given a number of GPUs it would start at the machine's first one, whichever are visible: only the CPU gets one.
    number = (f"--num_gpus={processes}",) if processes else ()
    options = (*number, f"--master_port={_free_port()}", "--log_level=warning", "--no_local_rank", "--module")
    return ("-m", "deepspeed.launcher.runner", *options, "--", MODULE)


def _machines(environment: Mapping[str, str], nodes: int) -> tuple[str, ...]:
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ValueError(
            f"NNODES={nodes} also needs {', '.join(missing)}: this machine's number from 0, and the address and a free "
            "port of machine 0"
        )
    rank, address, port = (environment[name] for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"))
    return (f"--nnodes={nodes}", f"--node-rank={rank}", f"--master-addr={address}", f"--master-port={port}")


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    if text == "":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{name}={text!r} is no number of processes; give 1 or more")
    return int(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
