"""verify and oversample on tables of growing size: seconds and peak memory of each.

The tables are copies of the real traces, as they come from teacher_gen; a copy has ids and, in all that customer and agent
write, a word of its own, so that nothing in it is a duplicate of another (bench/_traces.py). Each stage runs as it always
does, in a process of its own, in a folder of its own.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from bench._measure import ProcessFailed, circumstances, watch
from schemas.bench import MILLION, TableSize, TablesPart
from schemas.errors import InputError

TRACES = Path("data/teacher_gen/traces.parquet")
COMPANIES = Path("data/companies")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--turns", type=int, nargs="+", default=[10_000, 100_000, MILLION], help="agent turns")
    parser.add_argument("--limit-s", type=float, default=3600, help="seconds after which a stage is given up, and the larger tables with it")


def measure(options: argparse.Namespace) -> TablesPart:
    """All sizes, from the smallest.

    Raises:
        InputError: there are no traces.
    """
    if not TRACES.is_file():
        raise InputError(f"{TRACES} does not exist", "dvc repro teacher_gen, or dvc pull")
    here = circumstances()
    sizes: list[TableSize] = []
    missing: dict[str, str] = {}
    for turns in tqdm(sorted(options.turns), desc="tables", unit="size", file=sys.stderr):
        with tempfile.TemporaryDirectory() as folder:
            try:
                sizes.append(one_size(Path(folder), turns, options.limit_s))
            except ProcessFailed as failed:
                missing[f"{turns} turns"] = str(failed)
                break
    return TablesPart(**here, sizes=sizes, missing=missing)


def one_size(folder: Path, turns: int, limit_s: float) -> TableSize:
    """Both stages on one table.

    Raises:
        ProcessFailed: a stage broke off or took too long.
    """
    (folder / TRACES).parent.mkdir(parents=True)
    (folder / COMPANIES).symlink_to(COMPANIES.resolve())
    shutil.copy("params.yaml", folder)
    _, counted = watch("bench._traces", str(TRACES.resolve()), str(folder / TRACES), str(turns), cwd=folder, limit_s=limit_s)
    agent_turns, messages, conversations = map(int, counted.split())
    verify, said = watch("stages.verify", cwd=folder, limit_s=limit_s)
    kept = int(said.partition(" in, ")[2].split(" kept")[0])
    oversample, _ = watch("stages.oversample", cwd=folder, limit_s=limit_s)
    return TableSize(turns=agent_turns, messages=messages, conversations=conversations, kept=kept, verify=verify, oversample=oversample,
                     seconds=verify.seconds + oversample.seconds)
