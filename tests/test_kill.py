"""kill -9 at any moment: the next run goes on, and nothing that was answered is asked for again."""

import multiprocessing
import random
import signal
import threading
import time

import pytest

from agent.responses import Responses, request_key
from simulator.actors import Player, Rates
from stages import teacher_gen
from tests.helpers import FLAWLESS, PARAMS, SLUGS, real, workspace
from tests.hostile import OK, hostile
from tests.killed import generate
from tests.test_endpoint import elsewhere

RATES = Rates(**{**FLAWLESS, "missed_handoff": 0.5, "broken_json": 0.02})


@pytest.fixture(scope="module")
def forks():
    """Processes that have everything imported, so that a life costs no start-up and kills fall into the work."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["openai.resources.chat", "diskcache", "pandera.polars", "polars", "bm25s", "stages.teacher_gen", "tests.killed"])
    return context


def lived(forks, folder, moment=None, fatal=None):
    """One life of the generator, killed at a moment after `fatal` is set if there is one: its exit code."""
    life = forks.Process(target=generate, args=(folder,))
    life.start()
    if fatal:
        while not fatal.wait(0.005) and life.is_alive():
            pass
        time.sleep(moment)
        life.kill()
    life.join(200)
    return life.exitcode


def in_store(folder):
    responses = Responses(folder / "responses")
    keys = {key for key, _ in responses.entries()}
    responses.close()
    return keys


@pytest.mark.parametrize("kills, slices", [(25, 4), pytest.param(100, 14, marks=pytest.mark.long)])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path, forks, kills, slices):
    player, moment = Player({slug: real(slug) for slug in SLUGS}, RATES).answer, random.Random(kills)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with hostile(player, delay_s=0.002) as server:
        for folder in (whole, killed):
            once = elsewhere(server.url, max_concurrency=8, timeout_s=60.0)
            workspace(folder, data={**PARAMS["data"], "scenarios_per_company": slices},
                      teacher_gen={"attempts": 3, "teacher": once, "customer": once})
        assert lived(forks, whole) == 0
        calls = len(server.log)
        assert set(server.arrived.values()) == {1} and calls > 12 * kills
        server.log.clear()

        in_flight, stored = 0, set()
        for number in range(kills + 1):
            before, fatal = len(server.log), threading.Event()
            # Somewhere in so many requests; a few more are answered while it dies, so that there is something left for every life.
            last = before + moment.randrange(calls // (2 * kills))

            def fault(*_, last=last, fatal=fatal):
                if len(server.log) >= last:
                    fatal.set()
                return OK if len(server.log) < last + 6 else "hang"

            server.fault = fault if number < kills else lambda *_: OK
            code = lived(forks, killed, moment.choice((0, moment.uniform(0, 0.02))), fatal) if number < kills else lived(forks, killed)
            assert code == (-signal.SIGKILL if number < kills else 0)
            sent = {request_key(server.url, request, request["seed"]) for _, _, request, _ in server.log[before:]}
            assert len(sent) == len(server.log) - before and not sent & stored, "what was stored when the process died is asked for again"
            stored = in_store(killed)
            in_flight += len(sent - stored)
        assert len(server.log) == calls + in_flight and 0 < in_flight <= 8 * 2 * kills, "each request once, but for those in flight when it died"

        for _ in range(5):  # and while it reads from the cache and writes its files
            started = threading.Event()
            started.set()
            lived(forks, killed, moment.uniform(0, 1.5), started)
        assert lived(forks, killed) == 0 and len(server.log) == calls + in_flight
    for name in (teacher_gen.TRACES, teacher_gen.METRICS):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
