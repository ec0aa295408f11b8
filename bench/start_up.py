"""What it costs to do nothing: `dvc repro` with nothing to do beside `dvc status`, and imports.

`dvc repro` runs only if `dvc status` says that everything is up to date.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from bench._measure import circumstances
from schemas.bench import Import, StartUpPart

MODULES = ("agent", "agent.loop", "agent.endpoint", "schemas", "schemas.tables", "schemas.metrics", "stages.oversample", "stages.verify",
           "stages.teacher_gen", "stages.qlora_train")
IMPORTING = "import sys, time; s = time.perf_counter(); import {}; print(time.perf_counter() - s, 'torch' in sys.modules)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured, in turn")


def measure(options: argparse.Namespace) -> StartUpPart:
    """Both comparisons."""
    here = circumstances()
    imports = {module: importing(module, options.rounds) for module in MODULES}
    status, repro, missing = nothing_to_do(options.rounds)
    extra = None if missing else statistics.median(repro) - statistics.median(status)
    return StartUpPart(**here, imports=imports, dvc_status_s=status, dvc_repro_s=repro, extra_s=extra, missing=missing)


def importing(module: str, rounds: int) -> Import:
    """Seconds of importing a module in a fresh interpreter, and whether torch comes along."""
    command = [sys.executable, "-c", IMPORTING.format(module)]
    found = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(rounds)]
    return Import(seconds=statistics.median(float(seconds) for seconds, _ in found), torch=found[0][1] == "True")


def nothing_to_do(rounds: int) -> tuple[list[float], list[float], dict[str, str]]:
    """Seconds of `dvc status` and of `dvc repro`, in turn, and why the second is missing."""
    status: list[float] = []
    repro: list[float] = []
    for _ in range(rounds):
        for command, seconds in ((["status", "--quiet"], status), (["repro"], repro)):
            started = time.monotonic()
            done = subprocess.run([sys.executable, "-m", "dvc", *command], capture_output=True, text=True, check=False)
            if done.returncode:
                what = f"dvc {command[0]} ended with {done.returncode}"
                return status, repro, {"extra_s": f"{what}: there is something to do, or no pipeline; dvc repro or dvc pull first"}
            seconds.append(time.monotonic() - started)
    return status, repro, {}
