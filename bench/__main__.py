"""`python -m bench [part]`: measure how fast the loop is, beside what others or the machine would do.

Without a part, all of them but `trl_student`, which takes an hour, each in a process of its own. Every part puts its figures
into metrics/bench.json and leaves the others'. `python -m bench PART --help` shows what can be made smaller.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from bench._measure import RESULTS, add_result, read_results
from schemas.errors import InputError
from stages._stage import run, say

PARTS = ("start_up", "teacher_gen", "tables", "train", "eval", "repro")
"""In the order in which `make bench` runs them: the long ones last."""
BY_NAME = "trl_student"
"""The part that `make bench` leaves out: it says how good a student is, not how fast, and takes an hour."""


def arguments() -> argparse.Namespace:
    """The command line: a part and its sizes."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=f"Measure speed; results go to {RESULTS}.")
    parts = parser.add_subparsers(dest="part", metavar="|".join((*PARTS, BY_NAME)))
    for name in (*PARTS, BY_NAME):
        module = import_module(f"bench.{name}")
        described = str(module.__doc__)
        module.add_arguments(parts.add_parser(name, description=described, help=described.splitlines()[0],
                                              formatter_class=argparse.ArgumentDefaultsHelpFormatter))
    return parser.parse_args()


def run_all() -> None:
    """Every part of `PARTS` in a process of its own, so that one's memory is not another's.

    Raises:
        InputError: a part failed; those that did not are in the file.
    """
    failed = [name for name in PARTS if subprocess.run([sys.executable, "-m", "bench", name], check=False).returncode]
    if failed:
        raise InputError(f"could not be measured: {', '.join(failed)}", f"python -m bench {failed[0]} shows why; the others are in {RESULTS}")


def main() -> None:
    # Some parts work in a folder of their own, and share converted weights with the stages.
    os.environ["HANDOFF_CACHE"] = str(Path(os.environ.get("HANDOFF_CACHE", ".cache")).resolve())
    options = arguments()
    if options.part is None:
        run_all()
        return
    read_results()  # a file that cannot be added to is known before minutes are spent
    part = import_module(f"bench.{options.part}").measure(options)
    figures = add_result(options.part, part).model_dump(exclude={"machine", "details"})
    say(f"bench {options.part}: " + ", ".join(f"{name} {value:.3g}" for name, value in figures.items() if value is not None))


if __name__ == "__main__":
    run(main)
