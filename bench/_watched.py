"""`python -m bench._watched MODULE ARGUMENT…`: run a module as `python -m` does; then print the peak of resident memory, megabytes.

With it count the processes that it starts, each with its own peak, as if they all had it at once: what is printed is never too little.
Linux's own count for children is of no use: it begins with what their parent held when it started them.
"""

from __future__ import annotations

import platform
import resource
import runpy
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path


def peak_mb() -> float:
    """The most memory that this process has held."""
    if (status := Path("/proc/self/status")).is_file():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10)


def children_mb() -> float:
    """The peaks of the processes that this one has started and that still run, together."""
    peaks = 0
    for listed in Path("/proc/self/task").glob("*/children"):
        for process in listed.read_text().split():
            with suppress(OSError, StopIteration):  # it has ended meanwhile
                peaks += next(int(line.split()[1]) for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return peaks / 2**10


class Children(threading.Thread):
    """Looks at them several times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mb = 0.0

    def run(self) -> None:
        """As long as this process lives."""
        while True:
            with suppress(OSError):  # a thread of ours has ended meanwhile
                self.peak_mb = max(self.peak_mb, children_mb())
            time.sleep(0.1)


def main() -> None:
    children = Children()
    children.start()
    module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    print(f"\n{peak_mb() + children.peak_mb}", flush=True)


if __name__ == "__main__":
    main()
