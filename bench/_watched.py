"""`python -m bench._watched MODULE ARGUMENT…`: run a module as `python -m` does; then print the peak of resident memory, megabytes.

Linux's own count for children is of no use: it begins with what their parent held when it started them.
"""

from __future__ import annotations

import platform
import resource
import runpy
import sys
from pathlib import Path


def peak_mb() -> float:
    """The most memory that this process has held."""
    if (status := Path("/proc/self/status")).is_file():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10)


def main() -> None:
    module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    print(f"\n{peak_mb()}", flush=True)


if __name__ == "__main__":
    main()
