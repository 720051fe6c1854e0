"""What a part of the soak has found so far: law or fault -> cases planned, cases run, failures; kept on the disk."""

import json
import time
import traceback
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

SHOWN = 5
"""Failures of one law or fault that are kept with their text; all are counted."""


@dataclass
class Check:
    """A law or a fault: how many cases are planned, have run, have failed."""

    planned: int
    ran: int = 0
    failures: int = 0
    found: list = field(default_factory=list)
    """Of the first failures: what happened, and the code or command that shows it again."""
    note: str = ""


class Ledger:
    """The checks of one part, written at most once a second, at every failure and at the end."""

    def __init__(self, path, planned, seconds):
        self.path, self.end = path, time.monotonic() + seconds
        self.checks = {name: Check(count) for name, count in planned.items()}
        self._saved = 0.0
        self.save()

    def left(self):
        """Return how many seconds of this part's share are left."""
        return self.end - time.monotonic()

    def wants(self, name):
        """Whether a check has planned cases that have not run, and there is time."""
        check = self.checks[name]
        return check.ran < check.planned and self.left() > 0

    def passed(self, name, cases=1):
        """Count cases that ended as they should."""
        self.checks[name].ran += cases
        if time.monotonic() - self._saved > 1:
            self.save()

    def failed(self, name, what, reproduction):
        """Count a case that failed; return its entry, which a smaller reproduction may replace (then `save`)."""
        check = self.checks[name]
        check.ran, check.failures = check.ran + 1, check.failures + 1
        printable = str(what)[-3000:].encode(errors="backslashreplace").decode()
        entry = {"what": printable, "reproduction": reproduction}
        if len(check.found) < SHOWN:
            check.found.append(entry)
        self.save()
        return entry

    @contextmanager
    def case(self, name, reproduction):
        """Count the block as one case; any exception in it is a failure."""
        try:
            yield
        except Exception as error:
            said = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
            self.failed(name, said or traceback.format_exc(), reproduction)
        else:
            self.passed(name)

    def save(self):
        """Write the state as a whole."""
        self._saved = time.monotonic()
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({name: asdict(check) for name, check in self.checks.items()}))
        partial.replace(self.path)
