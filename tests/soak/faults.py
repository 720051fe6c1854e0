"""Faults of the machine put to every job: one line says what happened, nothing computed is lost, the job goes on later.

Everything is real: the fault meets the command that a user starts, at a random moment or size.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tests.soak.jobs import JOBS, PATIENCE, Bench
from tests.soak.kills import difference

MINUTES, SHARDS = 34, 2
MEANS = (
    "a full disk is a library before libc's whose writes say ENOSPC after a random number of bytes, and RLIMIT_FSIZE; "
    "read-only is `chattr +i`; no permission is another user; a jumping clock is that library's clock_gettime; few "
    "file handles are RLIMIT_NOFILE; memory runs out under RLIMIT_AS; the rest are signals and removed folders."
)
NOBODY = 65534
FAULTED = JOBS | {
    "training with workers": replace(JOBS["training"], arguments=(*JOBS["training"].arguments, "--data.workers", "2")),
}
"""Jobs that are put to faults."""
ALL_JOBS = tuple(JOBS)
WRITERS = [name for name in JOBS if name != "training on two processes"]
"""The launcher's own files lie elsewhere; its training is the same one."""
NOT_WRITTEN, MISTAKE, FAILED, STOPPED = 74, 2, 1, 75
"""Exit codes that the library promises."""
LEAST_HANDLES, MOST_HANDLES = 16, 64


class NotHere(Exception):
    """This machine has no means for a fault; the message says which is missing."""


@dataclass(frozen=True)
class Fault:
    """What is done to a job."""

    strike: Callable
    """(bench, numbers, undisturbed) -> (process, what was done); the process runs."""
    codes: tuple[int, ...]
    """Exit codes that are right; with 0 the result must be right at once."""
    jobs: tuple[str, ...] | list[str] = tuple(WRITERS)
    mend: Callable = lambda bench: None
    """Takes the fault away, so that the same command can go on."""
    says: str = ""
    """Words that must be among what the job says."""


def shim():
    """Return the library that is loaded before libc, compiled when it is first asked for."""
    library = Path(os.environ.get("TMPDIR", "/tmp")) / f"soak-faults-{os.getpid()}.so"
    if not library.exists():
        if shutil.which("cc") is None:
            raise NotHere("no C compiler")
        source = Path(__file__).with_name("faults.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return str(library)


def written(bench):
    """Return how many bytes lie in the folder of a job that has ended."""
    return sum(path.stat().st_size for path in bench.work.rglob("*") if path.is_file() and not path.is_symlink())


def full_disk(bench, numbers, undisturbed):
    size = numbers.randrange(max(1, written(bench)))
    bench.clear()
    extra = {"LD_PRELOAD": shim(), "SOAK_DISK": str(bench.work), "SOAK_DISK_BYTES": str(size)}
    return bench.start(**extra), f"the disk was full after {size} bytes"


def file_limit(bench, numbers, undisturbed):
    largest = max((path.stat().st_size for path in bench.work.rglob("*") if path.is_file()), default=1)
    size = numbers.randrange(largest)
    bench.clear()
    return bench.start(before=("prlimit", f"--fsize={size}")), f"no file might be larger than {size} bytes"


def lock_folders(bench):
    """Make every folder of a job, and what is in it, immutable."""
    done = subprocess.run(["chattr", "-R", "+i", str(bench.work)], capture_output=True)
    if done.returncode:
        raise NotHere("chattr +i is not allowed")


def unlock_folders(bench):
    """Undo it."""
    subprocess.run(["chattr", "-R", "-i", str(bench.work)], capture_output=True, check=True)


def read_only(bench, numbers, undisturbed):
    bench.clear()
    lock_folders(bench)
    return bench.start(), "the folder was read-only"


def becomes_read_only(bench, numbers, undisturbed):
    bench.clear()
    process = bench.start()
    after = moment(bench, process, numbers, undisturbed)
    lock_folders(bench)
    return process, f"after {after:.2f} s the folder became read-only"


def no_permission(bench, numbers, undisturbed):
    bench.clear()
    for folder in (bench.folder, *bench.folder.parents):
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            folder.chmod(folder.stat().st_mode | 0o055)
    if os.getuid():
        bench.work.chmod(0o555)
        return bench.start(), "the folder might not be written"
    bench.work.chmod(0o755)
    bench.cache.mkdir(exist_ok=True)
    if not bench.job.own_cache:
        subprocess.run(["chmod", "-R", "a+rwX", str(bench.cache)], check=True)
    subprocess.run(["chmod", "-R", "a+rX", str(bench.folder / "inputs")], check=True)
    before = ("setpriv", f"--reuid={NOBODY}", "--clear-groups")
    if subprocess.run([*before, sys.executable, "-c", "import torch"], capture_output=True).returncode:
        raise NotHere("another user may not read this Python")
    return bench.start(before=before, HOME=str(bench.folder)), f"user {NOBODY} might not write the folder"


def moment(bench, process, numbers, undisturbed):
    """Wait for a random moment after the job has begun to write; return how many seconds that took."""
    _, first, seconds = undisturbed
    begun, after = time.monotonic(), numbers.uniform(first, seconds)
    while time.monotonic() - begun < after and process.poll() is None:
        time.sleep(0.005)
    return time.monotonic() - begun


def output_deleted(bench, numbers, undisturbed):
    bench.clear()
    process = bench.start()
    after = moment(bench, process, numbers, undisturbed)
    if process.poll() is not None:
        return process, "nothing: it had ended"
    for path in list(bench.work.iterdir()):
        bench.remove(path)
    return process, f"after {after:.2f} s everything in the folder was deleted"


def inputs_deleted(bench, numbers, undisturbed):
    bench.clear()
    process = bench.start()
    after = moment(bench, process, numbers, (None, undisturbed[1] / 2, undisturbed[2]))
    (bench.folder / "inputs").rename(bench.folder / "away")
    return process, f"after {after:.2f} s the inputs were gone"


def inputs_back(bench):
    (bench.folder / "away").rename(bench.folder / "inputs")


def few_handles(bench, numbers, undisturbed):
    count = numbers.randrange(LEAST_HANDLES, MOST_HANDLES)
    bench.clear()
    return bench.start(before=("prlimit", f"--nofile={count}")), f"{count} file handles"


def children(pid):
    """Return the processes that a process has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        found += map(int, (task / "children").read_text().split())
    return found


def dead_worker(bench, numbers, undisturbed):
    """Kill a worker process within half a second after the first one is seen."""
    bench.clear()
    process, wait = bench.start(), numbers.uniform(0, 0.5)
    while process.poll() is None:
        if workers(process.pid):
            time.sleep(wait)
            alive = workers(process.pid)
            if alive:
                os.kill(numbers.choice(alive), signal.SIGKILL)
                return process, f"a worker was killed {wait:.2f} s after the first one was seen"
        time.sleep(0.005)
    return process, "no worker was seen"


def workers(pid):
    """Return the children of a process that run Python: not a compiler, nor a helper of torch's."""
    return [child for child in children(pid) if b"python" in command_of(child)]


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def clock_jumps(bench, numbers, undisturbed):
    bench.clear()
    after, back = int(1000 * numbers.uniform(0, undisturbed[2])), numbers.choice([2, 3600, 86400 * 400])
    extra = {"LD_PRELOAD": shim(), "SOAK_CLOCK_MS": str(after), "SOAK_CLOCK_BACK": str(back)}
    return bench.start(**extra), f"after {after} ms the clock jumped back by {back} s"


LITTLE_MEMORY = """
import resource, runpy, sys
import torch
from dynamic_llava import DynamicLlavaForConditionalGeneration as Model
generate, per_row = Model.generate, 2**28
def within(self, *arguments, **settings):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + int({rows} * per_row + per_row // 2), before[1]))
    try:
        activations = torch.empty(len(settings["input_ids"]) * per_row, dtype=torch.uint8)
        return generate(self, *arguments, **settings)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
Model.generate = within
sys.argv = ["eval", *{arguments!r}]
runpy.run_module("dynamic_llava.eval", run_name="__main__", alter_sys=True)
"""
"""Each question of a batch takes a quarter of a GB more, and there is room for some: the allocator itself refuses."""


def memory_of_a_batch(bench, numbers, undisturbed):
    bench.clear()
    rows, arguments = numbers.randrange(1, 4), [*bench.job.arguments[2:], "--batch-size", "4"]
    code = LITTLE_MEMORY.format(rows=rows, arguments=arguments)
    return bench.start(arguments=("-c", code)), f"memory was enough for {rows} questions at once"


FAULTS = {
    "disk full": Fault(full_disk, (NOT_WRITTEN, 0)),
    "file size limited": Fault(file_limit, (NOT_WRITTEN, 0)),
    "read-only from the start": Fault(read_only, (NOT_WRITTEN,), mend=unlock_folders),
    "becomes read-only": Fault(becomes_read_only, (NOT_WRITTEN, 0), mend=unlock_folders),
    "no permission": Fault(no_permission, (NOT_WRITTEN,), mend=lambda bench: bench.work.chmod(0o755)),
    "output folder deleted": Fault(output_deleted, (NOT_WRITTEN, MISTAKE, FAILED, 0)),
    "input folder deleted": Fault(inputs_deleted, (MISTAKE, FAILED, 0), mend=inputs_back),
    "too few file handles": Fault(few_handles, (NOT_WRITTEN, MISTAKE, FAILED, 0)),
    "dead data worker": Fault(dead_worker, (FAILED, 0), jobs=("training with workers",)),
    "out of memory in one batch": Fault(
        memory_of_a_batch, (0,), jobs=("evaluation",), says="questions at once; going on with"
    ),
    "clock jumps back": Fault(clock_jumps, (0,), jobs=ALL_JOBS),
}
"""Name -> fault."""
NEEDS_OUTPUT = (full_disk, file_limit)
"""These look at what the last run has left, to know how much it writes."""


def planned(shard):
    """Return fault -> cases: one of each job that it is put to, in this shard."""
    mine = jobs_of(shard)
    counts = {name: sum(job in mine for job in fault.jobs) for name, fault in FAULTS.items()}
    return {name: count for name, count in counts.items() if count}


def jobs_of(shard):
    return list(FAULTED)[shard::SHARDS]


def run(ledger, shard, seed, folder):
    """Put every fault to every job of this shard."""
    numbers = random.Random(seed)
    for parent in (folder, folder.parent):
        parent.chmod(0o755)
    for job in jobs_of(shard):
        bench = Bench(FAULTED[job], folder / job.replace(" ", "-"))
        undisturbed = bench.undisturbed()
        for name, fault in FAULTS.items():
            if job in fault.jobs and ledger.left() > 0:
                _put(ledger, name, fault, bench, undisturbed, numbers)
        bench.remove(bench.folder)


def _put(ledger, name, fault, bench, undisturbed, numbers):
    done = "nothing yet"
    try:
        if fault.strike in NEEDS_OUTPUT:
            bench.undisturbed()
        process, done = fault.strike(bench, numbers, undisturbed)
        problem = meet(bench, process, fault, undisturbed)
    except NotHere as error:
        ledger.checks[name].note = f"not run, {error}"
        return
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    command = " ".join(["python", *bench.job.arguments])
    if problem is None:
        ledger.passed(name)
    else:
        ledger.failed(name, problem, f"{command}\n{done}")


def meet(bench, process, fault, undisturbed):
    """Wait for the end of a job with a fault, look at what it says, and let the same command go on without."""
    try:
        code = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        fault.mend(bench)
        return f"no end within {PATIENCE} s:\n{bench.said()[-1500:]}"
    said = bench.said()
    fault.mend(bench)
    problem = wrong_words(code, said, fault.codes, bench)
    if problem is not None:
        return problem
    if fault.says not in said:
        return f"nothing of {fault.says!r}:\n{said[-1500:]}"
    if code == 0 and fault.strike is not output_deleted:
        return difference(bench, undisturbed[0])
    again = bench.start()
    try:
        again.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(again.pid, signal.SIGKILL)
        return f"started again, no end within {PATIENCE} s:\n{bench.said()[-1500:]}"
    if again.returncode and not (again.returncode == 2 and bench.job.done in bench.said()):
        return f"started again, exit code {again.returncode} after\n{said[-800:]}\nthen\n{bench.said()[-1500:]}"
    return difference(bench, undisturbed[0])


def wrong_words(code, said, codes, bench):
    """Return what is wrong with how a job ended; None when its code is right and one line names the place."""
    end = said[-2500:]
    if code not in codes:
        return f"exit code {code}, expected {' or '.join(map(str, codes))}:\n{end}"
    if "Traceback (most recent call last)" in said:
        return f"a traceback:\n{end}"
    if code == 0:
        return None
    lines = [line for line in said.splitlines() if re.match(r"error: |failed: |[^:]*: failed: ", line)]
    if not lines:
        return f"exit code {code} and no line that says why:\n{end}"
    names = {path.name for path in (*bench.work.rglob("*"), *bench.folder.rglob("inputs/*"))} | {"world", "tiny.md"}
    named = any("/" in line or any(name in line for name in names) for line in lines)
    return None if named else f"no line names a place:\n{end}"
