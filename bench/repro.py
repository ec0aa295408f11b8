"""Minutes of `make repro` from a fresh clone, by what they went into.

`--run` clones this commit into a temporary folder and runs it there, which takes as long as it takes; the log is kept.
`--log FILE` reads such a log: each line begins with seconds, from any start, as those of `make repro 2>&1 | ts %.s` do.
Both see the working tree's last commit, with nothing in DVC's cache.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from bench._measure import circumstances
from schemas.bench import Minutes, ReproPart
from schemas.errors import InputError

LOG = Path(".cache/repro.log")
SECTIONS = {
    "corpus": "data", "teacher_gen": "data", "verify": "data", "oversample": "data", "qlora_train": "train", "handoff_score": "evaluate",
    "predict_base": "evaluate", "predict_student": "evaluate", "eval_exact": "evaluate", "yardsticks": "evaluate", "calibrate": "evaluate",
    "report": "evaluate", "eval_judge": "judge"}
"""Which of the minutes a stage's are."""
_LINE = re.compile(r"(?P<seconds>\d+(?:\.\d+)?)\s(?P<text>.*)")
_STAGE = re.compile(r"(?:Running s|S)tage '(?P<name>\w+)'(?::| didn't change)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the log comes from."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--log", type=Path, default=None, help="read this one; else one is made")
    source.add_argument("--run", action="store_true", help="make one, as without any argument")


def measure(options: argparse.Namespace) -> ReproPart:
    """The log's minutes.

    Raises:
        InputError: there is no log, it is not one of a whole run, or `make repro` failed.
    """
    here = circumstances()
    log = options.log or run_in_clone()
    if not log.is_file():
        raise InputError(f"{log} does not exist", "python -m bench repro --run makes one")
    # Progress bars write over their line, which ends where they do, not at every carriage return.
    with log.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        stages, total = read_log(lines, log)
    sections = dict.fromkeys(Minutes.model_fields, 0.0)
    for name, seconds in stages.items():
        sections[SECTIONS.get(name, "install")] += seconds / 60
    return ReproPart(**here, minutes=Minutes(**sections), total=total / 60, stages_s=stages)


def read_log(lines: Iterable[str], log: Path) -> tuple[dict[str, float], float]:
    """Seconds of every stage, of `install` before the first, and in all. What lies between two stages is the earlier one's.

    Raises:
        InputError: a line has no time, a stage is unknown, or not every stage ran, or is what git has.
    """
    stages: dict[str, float] = defaultdict(float)
    now, first, before = "install", None, 0.0
    for number, line in enumerate(lines, 1):
        if (found := _LINE.match(line)) is None:
            raise InputError(f"{log}, line {number}: does not begin with seconds", "make repro 2>&1 | ts %.s > FILE writes such a log")
        seconds = float(found["seconds"])
        first = seconds if first is None else first
        stages[now] += seconds - (before if number > 1 else first)
        before = seconds
        # dvc's progress bars leave carriage returns and colours in front of its words.
        if started := _STAGE.search(found["text"]):
            now = started["name"]
            if now not in SECTIONS:
                raise InputError(f"{log}, line {number}: '{now}' is no stage that bench/repro.py knows", "add it to SECTIONS there")
    if left_out := [name for name in SECTIONS if name not in stages]:
        raise InputError(f"{log} is not of a whole run: {left_out[0]} did not run", "python -m bench repro --run runs all of it")
    return dict(stages), before - (first or 0.0)


def run_in_clone() -> Path:
    """Run `make repro` in a clone of its own; the log.

    Raises:
        InputError: it failed.
    """
    log = LOG.resolve()
    log.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", ".", folder], check=True)
        # Those of a surrounding make would reach into the clone's.
        environment = {name: value for name, value in os.environ.items() if name not in ("HANDOFF_CACHE", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
        started = time.monotonic()
        with log.open("w", encoding="utf-8") as out, subprocess.Popen(["make", "repro"], cwd=folder, env=environment, stdout=subprocess.PIPE,
                                                                      stderr=subprocess.STDOUT, text=True, errors="replace") as process:
            assert process.stdout
            out.write("0.0 make repro\n")
            for line in process.stdout:
                out.write(f"{time.monotonic() - started:.1f} {line}")
                out.flush()
                sys.stderr.write(line)
            out.write(f"{time.monotonic() - started:.1f} end\n")
    if process.returncode:
        raise InputError(f"make repro ended with {process.returncode}", f"{log} shows why")
    return log
