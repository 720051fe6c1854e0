"""Every parser on spoilt files: read, or refused in a message that names the file and the place; never a hang or a bug.

python -m tests.soak.fuzz "DeepSpeed files" 7 123      one case again: parser, seed, number
"""

import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

import yaml

from tests.soak.parsers import PARSERS
from tests.spoiling import HOSTILE, SPOILS, spoil

MINUTES, SHARDS = 10, 2
LONGEST = 10
"""Seconds that one reading may take."""
MEMORY = 6 * 2**30
"""Bytes of address space that the readings may take beyond the libraries."""


class TooLong(BaseException):
    """A reading took longer than LONGEST."""


def planned(shard):
    """Return the table's row -> cases."""
    counts = {}
    for name in mine(shard):
        counts[row_of(name)] = counts.get(row_of(name), 0) + PARSERS[name].cases
    return counts


def mine(shard):
    """Return the names of a shard's parsers."""
    return list(PARSERS)[shard::SHARDS]


def row_of(name):
    """Return the row of the table that counts a parser's cases."""
    return PARSERS[name].group or name


def run(ledger, shard, seed, folder):
    """Put every parser of this shard to its cases, each by its share of the time left."""
    names, next_case = mine(shard), dict.fromkeys(PARSERS, 0)
    for _ in range(2):  # what was cut in the first turn goes on in the second, with what the others have left
        waiting = [name for name in names if next_case[name] < PARSERS[name].cases]
        for number, name in enumerate(waiting):
            share = ledger.left() / (len(waiting) - number)
            next_case[name] = cases(ledger, name, seed, folder / "corpus", share, next_case[name])


def cases(ledger, name, seed, folder, seconds, next_case=0):
    """Run the cases of one parser in a child process; if it hangs or dies that is a failure.

    Return the number of the next case.
    """
    end = time.monotonic() + seconds
    while next_case < PARSERS[name].cases and time.monotonic() < end:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _child(name, seed, next_case, folder, end, writing)
        os.close(writing)
        next_case = _listen(ledger, name, seed, next_case, reading, child)
    shutil.rmtree(folder, ignore_errors=True)
    return next_case


def _child(name, seed, first, folder, end, pipe):
    """Run cases until the time is up, a JSON line each; never returns."""
    with os.fdopen(pipe, "w") as out:

        def say(**what):
            print(json.dumps(what), file=out, flush=True)

        try:
            silence()
            corpus = Corpus(name, folder)
            say()
            for case in range(first, PARSERS[name].cases):
                if time.monotonic() > end:
                    break
                say(case=case, problem=corpus.problem(seed, case))
            say(end=True)
        except BaseException:
            say(broken=traceback.format_exc()[-2500:])
    os._exit(0)


def _listen(ledger, name, seed, case, pipe, child):
    """Count what a child says; return the number of the next case."""
    patience, ended, broken = 300.0, False, None  # the corpus is made first
    with os.fdopen(pipe, "rb", buffering=0) as lines:
        while select.select([lines], [], [], patience)[0]:
            line = lines.readline()
            if not line:
                break
            said = json.loads(line)
            patience = 2 * LONGEST + 5
            ended, broken = ended or "end" in said, said.get("broken")
            if "case" in said:
                case = said["case"] + 1
                if said["problem"] is None:
                    ledger.passed(row_of(name))
                else:
                    ledger.failed(row_of(name), said["problem"][0], said["problem"][1])
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if broken is not None:  # the valid files are refused, or the soak itself is wrong: no case can run
        ledger.failed(row_of(name), broken, again(name, seed, case))
        return PARSERS[name].cases
    if not ended:
        ledger.failed(row_of(name), f"the process hung or died (status {status})", again(name, seed, case))
        case += 1
    return case


def again(name, seed, case):
    return f'python -m tests.soak.fuzz "{name}" {seed} {case}'


def silence():
    """Let nothing of the readings through, and give memory a limit: a file that asks for 500 GB must not get them."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))


class Corpus:
    """A parser's valid files, and their spoilt copies."""

    def __init__(self, name, folder):
        self.name, self.parser, self.folder = name, PARSERS[name], folder / "files"
        os.environ["DYNAMIC_LLAVA_CACHE"] = str(folder / "cache")
        shutil.rmtree(folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.files = self.parser.files(self.folder)
        assert self.files, name
        self.parser.read(self.folder)
        self.kept = folder / "kept"
        shutil.copytree(self.folder, self.kept, symlinks=True)
        self.names = [*{path.name for path in self.files}, *self.parser.names]

    def mutations(self, seed, case):
        """Return (file, new bytes) of a case, and what was done to it in words."""
        numbers = random.Random(f"{self.name}-{seed}-{case}")
        path = numbers.choice(self.files)
        data, done = path.read_bytes(), []
        for _ in range(numbers.choice([1, 1, 1, 2, 3])):
            how, place, value = numbers.choice(SPOILS), numbers.randrange(10**4), numbers.randrange(len(HOSTILE))
            try:
                data = spoil(data, path.suffix, how, place, HOSTILE[value])
            except (ValueError, AttributeError, TypeError, yaml.YAMLError):
                break  # spoilt so far that it has no structure any more
            done.append(f"{how} {place} {HOSTILE[value]!r:.40}")
        return path, data, "; ".join(done)

    def problem(self, seed, case):
        """Return (what is wrong with a case, how to see it again), or None."""
        self.restore()
        path, data, done = self.mutations(seed, case)
        path.write_bytes(data)
        wrong = self.look()
        if wrong is None:
            return None
        return f"{path.relative_to(self.folder)}: {done}\n{wrong}", again(self.name, seed, case)

    def restore(self):
        """Put every file back as it was."""
        for kept in self.kept.rglob("*"):
            path = self.folder / kept.relative_to(self.kept)
            if kept.is_dir():
                path.mkdir(exist_ok=True)
            elif not path.exists() or path.stat().st_mtime_ns != kept.stat().st_mtime_ns:
                shutil.copy2(kept, path)
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if not (self.kept / path.relative_to(self.folder)).exists():
                path.unlink() if not path.is_dir() else shutil.rmtree(path)

    def look(self):
        """Read the files; return what is wrong with how that went."""
        signal.signal(signal.SIGALRM, _too_long)
        signal.setitimer(signal.ITIMER_REAL, LONGEST)
        try:
            self.parser.read(self.folder)
        except (ValueError, FileNotFoundError) as error:
            return self.wrong_message(error)
        except TooLong:
            return f"no end within {LONGEST} s:\n{traceback.format_exc()[-2000:]}"
        except BaseException:
            return traceback.format_exc()[-2500:]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return None

    def wrong_message(self, error):
        """Return what is wrong with a refusal."""
        text = str(error)
        if isinstance(error, UnicodeError | json.JSONDecodeError):
            return f"a bare {type(error).__name__}: {text[:500]}"
        found = [name for name in self.names if name in text]
        if not found:
            return f"names no file:\n{text[:1000]}"
        rest = text
        for name in (str(self.folder), *found):
            rest = rest.replace(name, "")
        if len(re.findall(r"\w+", rest)) < 3:
            return f"says nothing but a name:\n{text[:1000]}"
        if text.encode(errors="replace").decode() != text:
            return f"a message that cannot be printed: {text[:500]!r}"
        return f"a message of {len(text)} characters:\n{text[:500]}" if len(text) > 4000 else None


def _too_long(*_):
    raise TooLong


def main(name, seed, case):
    """Run one case in the open; return 1 when it fails."""
    folder = Path(tempfile.mkdtemp())
    try:
        corpus = Corpus(name, folder)
        problem = corpus.problem(int(seed), int(case))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(problem[0] if problem else "read, or refused by name")
    return int(problem is not None)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
