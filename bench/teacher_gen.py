"""What teacher_gen adds to the time that the endpoint takes: per call at a fixed latency, and over whole conversations.

The endpoint is a server on loopback, in a process of its own, on the same cores. Calls go through everything that the
stage's calls go through: the limit on calls in flight, the ledger, the store of responses on disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from bench._measure import circumstances, ratio, watch
from schemas.bench import Generation, Slots, TeacherGenPart
from schemas.errors import InputError

LIMIT_S = 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--latency-s", type=float, default=1.0, help="of the endpoint, seconds")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 32, 256], help="calls in flight at most")
    parser.add_argument("--calls-per-slot", type=int, default=10, help="how many calls follow each other on a slot")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--conversations", type=int, default=10_000, help="held at an endpoint that answers at once")
    parser.add_argument("--conversation-slots", type=int, default=32, help="calls in flight at most, for those")


def measure(options: argparse.Namespace) -> TeacherGenPart:
    """Calls at every number of slots, then conversations."""
    here = circumstances()
    levels = []
    with server(options.latency_s, 0) as url:
        for slots in tqdm(options.slots, desc="teacher_gen: calls", unit="level", file=sys.stderr):
            levels.append(one_level(url, slots, options.calls_per_slot, options.latency_s, options.rounds))
    with server(0.0, options.conversations) as url:
        generation = Generation.model_validate(json.loads(work("conversations", url, options.conversation_slots, options.conversations)))
    return TeacherGenPart(**here, latency_s=options.latency_s, levels=levels, generation=generation)


def one_level(url: str, slots: int, calls_per_slot: int, latency_s: float, rounds: int) -> Slots:
    """Calls at one number of slots."""
    calls, ideal = slots * calls_per_slot, calls_per_slot * latency_s
    seconds = [float(work("calls", url, slots, calls)) for _ in range(rounds)]
    return Slots(slots=slots, calls=calls, ideal_s=ideal, seconds=seconds, vs_ideal=ratio([ideal / taken for taken in seconds]),
                 overhead_ms=statistics.median((taken - ideal) / calls_per_slot * 1000 for taken in seconds))


def work(what: str, url: str, slots: int, count: int) -> str:
    """The last line that bench._generation prints, with an empty store of responses."""
    with tempfile.TemporaryDirectory() as cache:
        _, said = watch("bench._generation", what, url, str(slots), str(count), cwd=Path(), limit_s=LIMIT_S, HANDOFF_CACHE=cache)
    return said.splitlines()[-1]


@contextmanager
def server(delay_s: float, conversations: int) -> Iterator[str]:
    """The address of bench._server for the time of a `with` block.

    Raises:
        InputError: it does not start.
    """
    command = [sys.executable, "-m", "bench._server", str(delay_s), str(conversations)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        try:
            if not (address := process.stdout.readline().strip()):
                raise InputError("the local server did not start", f"python -m bench._server {delay_s} {conversations} shows why")
            yield address
        finally:
            process.stdin.close()
            process.wait(timeout=30)
