"""A part of a benchmark without torch, for tests of the runner: `stub_part.py NAME RESULTS FAULT`.

It adds three results, and after the first one it does what FAULT says: nothing, raise, hang, kill, exit, tear.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dynamic_llava.profile.results import RESULTS, Column, Report, Results
from dynamic_llava.profile.runner import attach_to_runner


def stub(folder: Path, faults: dict[str, str], pause: float = 0.0) -> Callable[[str], list[str]]:
    """The command of every part, with the fault of its name."""
    path = str(folder / RESULTS)
    return lambda name: [sys.executable, __file__, name, path, faults.get(name, "none"), str(pause)]


def misbehave(fault: str, results: Results) -> None:
    if fault == "raise":
        results.add(error="RuntimeError: told to")
        sys.exit(1)
    if fault == "exit":
        print("the last words of the log")
        sys.exit(3)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "tear":
        with results.path.open("ab") as file:
            file.write(b'{"part": "torn in the mid')
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        results.add(values={f"child_of_{results.part}": child.pid})
        time.sleep(600)


def main(name: str, path: str, fault: str, pause: str = "0") -> None:
    turn, times = attach_to_runner(), {f"started_{name}": time.time()}
    turn.wait()
    times[f"begun_{name}"] = time.time()
    results = Results(Path(path), name)
    results.add(about={"device": "stub"})
    head = Report("stub", f"Table of {name}", [Column("row", "row"), Column("pid", "pid")], [])
    results.table(head)
    for row in range(3):
        time.sleep(float(pause))
        results.rows(head.title, [{"row": row, "pid": os.getpid()}])
        print(f"finished {name} {row}", flush=True)  # after the result is on the disk: the log must not know more
        if row == 0:
            misbehave(fault, results)
    results.values(**times, **{f"ended_{name}": time.time()})


if __name__ == "__main__":
    main(*sys.argv[1:])
