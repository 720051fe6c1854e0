"""`python -m tests.soak [MINUTES]`: everything that can vary, be killed or be spoilt, in one table; 0 when all passed.

Parts run side by side as processes of their own, each with its share of the time; a part that is cut says how many of
its planned cases ran. The table is written again every few seconds, so an interrupted soak leaves a valid one.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

from tests.soak.ledger import Ledger
from tests.soak.table import Page, is_whole, merged, totals

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("kills", "faults", "fuzz", "long_runs", "determinism", "worlds")
"""Modules of this package in their order; what the others leave of their time goes to the last. Each has MINUTES (of
one core, in an hour of two), SHARDS,
`planned(shard)`: check -> cases, and `run(ledger, shard, seed, folder)`."""
ENDING = 40
"""Seconds at the end that no part gets: for the last cases and the table."""
LEAST = 15
"""A part that would get fewer seconds does not begin: its imports alone would take them."""
GRACE = 20
"""Seconds that a part may go on with its last case."""


def main(arguments=None):
    """Run the soak, or one part of it; return the exit code."""
    given = parser().parse_args(arguments)
    if given.part is not None:
        return run_part(given)
    seed = random.SystemRandom().randrange(2**20) if given.seed is None else given.seed
    command = " ".join(["bash scripts/test.sh --soak", *(sys.argv[1:] if arguments is None else arguments)])
    chosen = [name for name in PARTS if not given.only or name in given.only]
    means = import_module("tests.soak.faults").MEANS
    soak = Soak(chosen, seed, 60 * given.minutes, Page(given.output, command, seed, given.minutes, means))
    print(f"seed {seed}; {given.minutes:g} minutes; the table: {given.output}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return soak.run()


def parser():
    made = argparse.ArgumentParser(prog="bash scripts/test.sh --soak", description=__doc__, allow_abbrev=False)
    made.add_argument("minutes", nargs="?", type=float, default=60, help="how long it may take; plans stay (60)")
    made.add_argument("--only", nargs="+", choices=PARTS, help="these parts alone")
    made.add_argument("--seed", type=int, help="seed of everything; default: a new one, which is printed")
    made.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "reliability.md", help="the page")
    for option, kind in (("part", str), ("shard", int), ("seconds", float), ("ledger", Path)):
        made.add_argument(f"--{option}", type=kind, help=argparse.SUPPRESS)
    return made


def run_part(given):
    """Run one shard of a part in this process."""
    module = import_module(f"tests.soak.{given.part}")
    ledger = Ledger(given.ledger, module.planned(given.shard), given.seconds)
    folder = Path(tempfile.mkdtemp(prefix=f"soak-{given.part}-{given.shard}-"))
    try:
        module.run(ledger, given.shard, given.seed * 100 + given.shard, folder)
    finally:
        ledger.save()
        shutil.rmtree(folder, ignore_errors=True)
    return 0


class Shard:
    """A part's share of the cases, and the process that runs it."""

    def __init__(self, part, number, folder):
        self.part, self.number = part, number
        module = import_module(f"tests.soak.{part}")
        self.weight = module.MINUTES / module.SHARDS
        self.ledger = folder / f"{part}-{number}.json"
        self.log = folder / f"{part}-{number}.log"
        self.planned = module.planned(number)
        self.process, self.end = None, 0.0

    def start(self, seconds, seed, folder):
        """Start the process with so many seconds."""
        command = [sys.executable, "-m", "tests.soak", "--part", self.part, "--shard", self.number]
        command += ["--seconds", seconds, "--seed", seed, "--ledger", self.ledger]
        own = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        own |= {"TMPDIR": str(folder), "DYNAMIC_LLAVA_CACHE": str(folder / f"cache-{self.part}-{self.number}")}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), env={**os.environ, **own, "PYTHONPATH": path}, cwd=ROOT,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.end = time.monotonic() + seconds

    def is_running(self):
        """Whether the process works; one that overstays is ended, with what it has started."""
        if self.process is None or self.process.poll() is not None:
            return False
        if time.monotonic() > self.end + GRACE:
            self.stop()
            return False
        return True

    def stop(self):
        """End the process and what it has started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def state(self):
        """Return check -> numbers; of a part that has not begun, or broke, the plan."""
        if self.ledger.exists():
            return json.loads(self.ledger.read_text())
        nothing = {"ran": 0, "failures": 0, "found": [], "note": ""}
        return {name: {"planned": count, **nothing} for name, count in self.planned.items()}

    def crash(self):
        """Return the end of the log of a process that broke; None otherwise."""
        if self.process is None or self.process.poll() in (None, 0, -signal.SIGKILL):
            return None
        return self.log.read_text(errors="replace")[-3000:]


class Soak:
    """All shards, two or more at a time, within the time."""

    def __init__(self, parts, seed, seconds, page):
        self.folder = Path(tempfile.mkdtemp(prefix="soak-"))
        self.seed, self.seconds, self.page = seed, seconds, page
        self.slots = max(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
        shards = {name: import_module(f"tests.soak.{name}").SHARDS for name in parts}
        self.shards = [Shard(name, number, self.folder) for name in parts for number in range(shards[name])]

    def run(self):
        """Run everything; return 0 when all planned cases ran and passed."""
        begun = time.monotonic()
        end = begun + self.seconds - min(ENDING, self.seconds / 5)
        waiting, running = list(self.shards), []
        try:
            while (waiting and end - time.monotonic() > LEAST) or running:
                running = [shard for shard in running if shard.is_running()]
                while waiting and len(running) < self.slots and end - time.monotonic() > LEAST:
                    shard = waiting.pop(0)
                    shard.start(self._share(shard, waiting, running, end), self.seed, self.folder)
                    running.append(shard)
                self.page.write(self.results(), time.monotonic() - begun)
                time.sleep(min(5, self.seconds / 100))
        finally:
            for shard in self.shards:
                shard.stop()
            results = self.results()
            self.page.write(results, time.monotonic() - begun, ended=not waiting and not running)
            shutil.rmtree(self.folder, ignore_errors=True)
        planned, ran, failures = totals(results)
        print(self.page.output.read_text(encoding="utf-8"))
        print(f"{ran:,} of {planned:,} planned cases ran, {failures:,} failed; {self.page.output}", flush=True)
        return 0 if is_whole(results) else 1

    def _share(self, shard, waiting, running, end):
        """Return the seconds of a shard: its weight's share of what the slots have left."""
        now = time.monotonic()
        free = self.slots * (end - now) - sum(max(0, one.end - now) for one in running)
        weight = shard.weight + sum(one.weight for one in waiting)
        return max(1.0, min(end - now, free * shard.weight / weight))

    def results(self):
        """Return part -> check -> numbers."""
        found = {}
        for part in dict.fromkeys(shard.part for shard in self.shards):
            shards = [shard for shard in self.shards if shard.part == part]
            found[part.replace("_", " ")] = merged([shard.state() for shard in shards])
            for shard in shards:
                text = shard.crash()
                if text is not None:
                    again = f"python -m tests.soak --only {part} --seed {self.seed}"
                    one = {"planned": 1, "ran": 1, "failures": 1, "found": [{"what": text, "reproduction": again}]}
                    found[part.replace("_", " ")][f"shard {shard.number} broke"] = {**one, "note": ""}
        return found


if __name__ == "__main__":
    sys.exit(main())
