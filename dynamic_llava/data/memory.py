"""How much memory this process has needed."""

import resource
import sys
from pathlib import Path


def peak_resident_bytes() -> int:
    """Return the largest resident memory of this process so far, memory-mapped pages that it has read included.

    Where Linux tells it, without what its parent held before the process began, which getrusage would count.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
