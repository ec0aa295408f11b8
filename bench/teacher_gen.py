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

from bench._measure import call, circumstances, ratio
from schemas.bench import Generation, Held, Slots, TeacherGenPart
from schemas.errors import InputError

LIMIT_S = 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--latency-s", type=float, default=1.0, help="of the endpoint, seconds")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 32, 256], help="calls in flight at most")
    parser.add_argument("--calls-per-slot", type=int, default=10, help="how many calls follow each other on a slot")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--held", type=int, default=200, help="conversations held at an endpoint with a latency and so many slots")
    parser.add_argument("--held-slots", type=int, default=32, help="calls that it answers at a time")
    parser.add_argument("--held-latency-s", type=float, default=0.2, help="of each, seconds")
    parser.add_argument("--conversations", type=int, default=10_000, help="held at an endpoint that answers at once")
    parser.add_argument("--conversation-slots", type=int, default=32, help="calls in flight at most, for those")


def measure(options: argparse.Namespace) -> TeacherGenPart:
    """Calls at every number of slots, then conversations."""
    here = circumstances()
    levels = []
    with server(options.latency_s, 0, 0) as url:
        for slots in tqdm(options.slots, desc="teacher_gen: calls", unit="level", file=sys.stderr):
            levels.append(one_level(url, slots, options.calls_per_slot, options.latency_s, options.rounds))
    held = whole(options.held, options.held_slots, options.held_latency_s, options.rounds)
    with server(0.0, 0, options.conversations) as url:
        generation = hold(url, options.conversation_slots, options.conversations)
    return TeacherGenPart(**here, latency_s=options.latency_s, levels=levels, held=held, generation=generation)


def one_level(url: str, slots: int, calls_per_slot: int, latency_s: float, rounds: int) -> Slots:
    """Calls at one number of slots."""
    calls, ideal = slots * calls_per_slot, calls_per_slot * latency_s
    seconds = [float(work("calls", url, slots, calls)) for _ in range(rounds)]
    return Slots(slots=slots, calls=calls, ideal_s=ideal, seconds=seconds, vs_ideal=ratio([ideal / taken for taken in seconds]),
                 overhead_ms=statistics.median((taken - ideal) / calls_per_slot * 1000 for taken in seconds))


def whole(conversations: int, slots: int, latency_s: float, rounds: int) -> Held:
    """Whole conversations, against the time that their calls need at least."""
    found = []
    for _ in tqdm(range(rounds), desc="teacher_gen: conversations", unit="round", file=sys.stderr):
        with server(latency_s, slots, conversations) as url:
            found.append(hold(url, slots, conversations))
    ideal = latency_s * max(found[0].calls / slots, found[0].longest)
    seconds = [each.seconds for each in found]
    return Held(conversations=conversations, calls=found[0].calls, slots=slots, latency_s=latency_s, ideal_s=ideal, seconds=seconds,
                vs_ideal=ratio([ideal / taken for taken in seconds]))


def hold(url: str, slots: int, conversations: int) -> Generation:
    """Hold conversations once."""
    return Generation.model_validate(json.loads(work("conversations", url, slots, conversations)))


def work(what: str, url: str, slots: int, count: int) -> str:
    """The last line that bench._generation prints, with an empty store of responses."""
    with tempfile.TemporaryDirectory() as cache:
        return call("bench._generation", what, url, str(slots), str(count), cwd=Path(), limit_s=LIMIT_S, HANDOFF_CACHE=cache)[-1]


@contextmanager
def server(delay_s: float, slots: int, conversations: int) -> Iterator[str]:
    """The address of bench._server for the time of a `with` block.

    Raises:
        InputError: it does not start.
    """
    command = [sys.executable, "-m", "bench._server", str(delay_s), str(slots), str(conversations)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        try:
            if not (address := process.stdout.readline().strip()):
                raise InputError("the local server did not start", f"python -m bench._server {delay_s} {slots} {conversations} shows why")
            yield address
        finally:
            process.stdin.close()
            process.wait(timeout=30)
