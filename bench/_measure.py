"""What the parts share: ratios, processes under a watch, the machine, and the results file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from schemas.bench import BenchMetrics, Details, Machine, Part, Process, Ratio
from schemas.errors import InputError
from stages._stage import write_metrics

RESULTS = Path("metrics/bench.json")
ROOT = Path(__file__).resolve().parent.parent


class ProcessFailed(Exception):
    """A process under measurement ended badly or ran out of time; the message says how."""


def ratio(values: Sequence[float]) -> Ratio:
    """A ratio with its spread, from one value a round."""
    return Ratio(median=statistics.median(values), low=min(values), high=max(values), rounds=list(values))


def watch(module: str, *arguments: str, cwd: Path, limit_s: float, **environment: str) -> tuple[Process, str]:
    """Run a module in a process of its own: wall seconds from start to end, peak resident memory, and what it printed.

    Args:
        module: as for `python -m`.
        arguments: its own.
        cwd: the folder it works in.
        limit_s: seconds after which it is killed.
        environment: variables that it has besides ours.

    Raises:
        ProcessFailed: it returned an error, or was killed.
    """
    started = time.monotonic()
    *said, last = call("bench._watched", module, *arguments, cwd=cwd, limit_s=limit_s, **environment)
    return Process(seconds=time.monotonic() - started, peak_mb=float(last)), "\n".join(said).strip()


def call(module: str, *arguments: str, cwd: Path, limit_s: float, **environment: str) -> list[str]:
    """As `watch`, with nothing beside the module in its process: the lines that it printed."""
    try:
        done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        raise ProcessFailed(f"{module}: stopped after {limit_s:g} s") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        raise ProcessFailed(f"{module}: exit code {done.returncode}: {lines[-1] if lines else 'nothing was printed'}")
    return lines


def this_machine() -> Machine:
    """The machine we are on."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        cpu = next((line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(cpu=cpu, cores=cores, memory_gb=round(memory / 2**30, 1), system=platform.system(), python=platform.python_version())


def circumstances() -> dict[str, Any]:
    """The fields that every part begins with; to be taken before it starts."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    # The results file changes from part to part; that is no change of what is measured.
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", ".", f":!{RESULTS}"], capture_output=True, check=False).returncode
    return {"commit": f"{commit}-dirty" if commit and changed else commit or "unknown", "load": os.getloadavg()[0]}


def read_results(path: Path = RESULTS) -> Details:
    """The parts measured so far on this machine; none where there is no file.

    Raises:
        InputError: the file is broken, or from another machine.
    """
    if not path.is_file():
        return Details()
    try:
        found = BenchMetrics.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, ValidationError) as error:
        raise InputError(f"{path} holds no results of this benchmark: {str(error).splitlines()[0]}", f"rm {path}") from None
    if found.machine != (here := this_machine()):
        raise InputError(f"{path} is from another machine ({found.machine.cpu}, {found.machine.cores} cores; here {here.cpu}, {here.cores})",
                         f"rm {path}, and run all parts here")
    return found.details


def add_result(name: str, part: Part, path: Path = RESULTS) -> BenchMetrics:
    """Put one part into the results file; the others stay.

    Raises:
        InputError: the file is broken, or from another machine.
    """
    results = BenchMetrics.of(read_results(path).model_copy(update={name: part}), this_machine())
    write_metrics(path, results.model_dump(mode="json"), BenchMetrics)
    return results
