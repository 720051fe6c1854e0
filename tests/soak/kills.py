"""Jobs killed at random moments: started again with the same command, they end with an undisturbed run's files."""

import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass

from tests.soak.jobs import JOBS, PATIENCE, Bench

MINUTES, SHARDS = 56, 2
KILLS = 20
"""Of every job."""
CHAIN = 5
"""Most kills of one job before it is left to end."""
ENDING = 60
"""Seconds within which a job that is told to stop has done so."""
HOW = ("SIGKILL", "SIGTERM", "SIGINT", "SIGKILL alone")
"""SIGTERM goes to the process that was started, SIGINT to its group as a terminal sends it; SIGKILL to the group, as
when memory runs out, or to the process alone, which leaves its workers without a parent."""


@dataclass(frozen=True)
class Kill:
    """A signal, and when it came, in seconds after the start."""

    how: str
    after: float

    def __str__(self):
        return f"{self.how} after {self.after:.2f} s"


def planned(shard):
    """Return job -> kills."""
    return {name: KILLS for name in list(JOBS)[shard::SHARDS]}


def run(ledger, shard, seed, folder):
    """Kill the jobs of this shard in turns, so that a cut part has some of each."""
    numbers, benches, results = random.Random(seed), {}, {}
    while any(ledger.wants(name) for name in ledger.checks):
        for name in ledger.checks:
            if not ledger.wants(name):
                continue
            if name not in benches:
                benches[name] = Bench(JOBS[name], folder / name.replace(" ", "-"))
                results[name] = benches[name].undisturbed()
            _chain(ledger, name, benches[name], results[name], numbers)


def _chain(ledger, name, bench, undisturbed, numbers):
    """Kill one run some times and let it end; every kill of it is a case."""
    _, first, seconds = undisturbed
    wanted = min(CHAIN, ledger.checks[name].planned - ledger.checks[name].ran)
    kills = []
    for number in range(wanted):
        # One in five at any time; the others while it works, not while Python imports.
        begin = 0.1 if numbers.random() < 0.2 else 0.9 * first
        kills.append(Kill(HOW[(ledger.checks[name].ran + number) % len(HOW)], numbers.uniform(begin, seconds)))
    done, problem = disturbed(bench, kills, undisturbed[0])
    if problem is None:
        ledger.passed(name, done)
        ledger.save()
        return
    ledger.passed(name, max(0, done - 1))
    smallest = kills
    for kill in kills if ledger.left() > 0 else ():
        _, alone = disturbed(bench, [kill], undisturbed[0])
        if alone is not None:
            smallest, problem = [kill], alone
            break
    command = " ".join(["python", *bench.job.arguments])
    ledger.failed(
        name, problem, f"{command}\n" + "\n".join(f"killed by {kill}, then started again" for kill in smallest)
    )


def disturbed(bench, kills, wanted):
    """Run a job from the start through some kills to its end; return (kills that met it alive, what went wrong)."""
    bench.clear()
    done = 0
    for kill in kills:
        process = bench.start()
        end = time.monotonic() + kill.after
        while time.monotonic() < end and process.poll() is None:
            time.sleep(0.005)
        if process.poll() is not None:
            break
        done += 1
        problem = stop(bench, process, kill)
        if problem is not None:
            return done, f"{kill}: {problem}"
    else:
        process = bench.start()
    try:
        process.wait(PATIENCE)
    except Exception:
        os.killpg(process.pid, signal.SIGKILL)
        return done, f"started again, it did not end within {PATIENCE} s:\n{bench.said()[-1500:]}"
    if process.returncode and not _was_done(bench, process.returncode):
        return done, f"started again, it ended with exit code {process.returncode}:\n{bench.said()[-1500:]}"
    return done, difference(bench, wanted)


def stop(bench, process, kill):
    """Send a signal and see how the process ends; return what was wrong with that."""
    number = getattr(signal, kill.how.split()[0])
    with suppress(ProcessLookupError):
        if kill.how in ("SIGINT", "SIGKILL"):
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)
    try:
        code = process.wait(ENDING)
    except Exception:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"not ended within {ENDING} s:\n{bench.said()[-1500:]}"
    # 0: it had ended by itself, and the system was still taking it down.
    allowed = (-signal.SIGKILL, 0) if number == signal.SIGKILL else (*bench.job.stops, 0)
    if code not in allowed and not _was_done(bench, code):
        return f"exit code {code}:\n{bench.said()[-1500:]}"
    return None


def _was_done(bench, code):
    """Whether a job has refused to do again what an earlier kill had found done."""
    return code == 2 and bench.job.done in bench.said()


def difference(bench, wanted):
    """Return how the job's result, or what it has left running, is not as it should be."""
    found = bench.job.result(bench.work)
    names = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if names:
        return f"other files than an undisturbed run's: {', '.join(names)}"
    end = time.monotonic() + 10
    while bench.left_over() and time.monotonic() < end:
        time.sleep(0.1)
    return f"still running: {bench.left_over()}" if bench.left_over() else None
