"""kill -9 at any moment: the next run goes on, and nothing that was answered is asked for again."""

import multiprocessing
import os
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


@pytest.mark.parametrize("kills, slices", [(25, 2), pytest.param(100, 6, marks=pytest.mark.long)])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path, forks, kills, slices):
    player = Player({slug: real(slug) for slug in SLUGS}, RATES).answer
    moment = random.Random(kills)
    with hostile(player, delay_s=0.003) as server:
        for name in ("whole", "killed"):
            (tmp_path / name).mkdir()
            once = elsewhere(server.url, max_concurrency=8)
            workspace(tmp_path / name, data={**PARAMS["data"], "scenarios_per_company": slices},
                      teacher_gen={"attempts": 3, "teacher": once, "customer": once})
        life = forks.Process(target=generate, args=(tmp_path / "whole",))
        life.start()
        life.join(120)
        assert life.exitcode == 0
        calls = len(server.log)
        assert set(server.arrived.values()) == {1} and calls > 4 * kills
        server.log.clear()

        killed, in_flight, answered = 0, 0, set()
        while True:
            life = forks.Process(target=generate, args=(tmp_path / "killed",))
            fatal = threading.Event()
            before = len(server.log)
            # About as many requests a life as leaves something to do for the last; from none to all of them in flight.
            last = before + moment.randrange(2 * calls // (3 * kills) + 2)

            def watch(*_, last=last, fatal=fatal):
                if len(server.log) >= last:
                    fatal.set()
                return OK

            server.fault = watch
            life.start()
            if killed < kills:
                while not fatal.wait(0.01) and life.is_alive():
                    pass
                time.sleep(moment.uniform(0, 0.03))
                os.kill(life.pid, signal.SIGKILL)
            life.join(120)
            sent = [request_key(server.url, request, request["seed"]) for _, _, request, _ in server.log[before:]]
            assert not answered & set(sent), "what was stored when the process died is asked for again"
            responses = Responses(tmp_path / "killed/responses")
            answered = {key for key, _ in responses.entries()}
            responses.close()
            if life.exitcode == 0:
                break
            assert life.exitcode == -signal.SIGKILL
            killed += 1
            in_flight += len(set(sent) - answered)
    assert killed >= kills
    assert len(server.log) == calls + in_flight and in_flight <= 8 * 2 * killed, "each request once, but for those in flight when it died"
    whole, resumed = ((tmp_path / name / teacher_gen.TRACES).read_bytes() for name in ("whole", "killed"))
    assert whole == resumed
    assert (tmp_path / "whole" / teacher_gen.METRICS).read_bytes() == (tmp_path / "killed" / teacher_gen.METRICS).read_bytes()
