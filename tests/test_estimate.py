"""What the paid stages will cost, said before anything is sent; and what is kept of what was paid."""

import json
import re
import sys

import pytest
import yaml

from agent import endpoint
from schemas.errors import InputError
from simulator.actors import Player, Rates
from stages import cache, estimate, teacher_gen
from stages._recorded import RecordedParams, read_logs
from stages._self_agreement import FIRST_SAMPLE
from stages._stage import DataParams
from tests.helpers import (
    FLAWLESS,
    PARAMS,
    SLUGS,
    documented,
    inside,
    real,
    workspace,
)
from tests.hostile import completion, hostile
from tests.layout import ROOT
from tests.test_endpoint import elsewhere, worth

PLAYER = Player({slug: real(slug) for slug in SLUGS}, Rates(**FLAWLESS)).answer


@pytest.fixture
def paid(tmp_path, monkeypatch):
    """A workspace in which everybody is played by a server that counts; the server, and what the estimate says."""
    monkeypatch.setenv("TEACHER_KEY", "a-long-and-secret-key")
    for module in (endpoint, estimate, cache):
        monkeypatch.setattr(module, "RESPONSES", tmp_path / "responses")
    with hostile(PLAYER) as server, inside(tmp_path):
        once = elsewhere(server.url)
        workspace(tmp_path, data={**PARAMS["data"], "scenarios_per_company": 1}, teacher_gen={"attempts": 1, "teacher": once, "customer": once},
                  eval_judge={"judge": {**once, "model": "judge"}})
        yield server


def said(capsys):
    """teacher_gen's figures: calls of teacher and customer, answers in the cache and what they cost, and what is to pay."""
    estimate.main()
    out = capsys.readouterr().out
    calls = [int(number) for number in re.findall(r"(\d+) calls", out)]
    kept, cost, rest = re.search(r"in the cache already: (\d+) answers, which cost \$([\d.]+) .*\n  to pay: \$([\d.]+)", out).groups()
    return calls, int(kept), float(cost), float(rest), out


def test_the_estimate_sends_nothing_and_needs_no_key(paid, capsys, monkeypatch):
    monkeypatch.delenv("TEACHER_KEY")
    _, kept, cost, rest, out = said(capsys)
    assert not paid.log and (kept, cost) == (0, 0) and rest > 0
    assert out.count("assumed: 4 characters a token") == 3 == out.count("an answer is as long as the written one"), "nobody has answered anything"


def test_what_is_estimated_is_what_is_paid_and_then_nothing_is_left(paid, capsys):
    calls, _, _, rest, _ = said(capsys)
    teacher_gen.main()
    capsys.readouterr()
    assert calls[0] + calls[1] == len(paid.log), "a flawless teacher takes the written steps"
    assert 0.5 * worth(paid) < rest < 1.5 * worth(paid), "but for what the provider really caches"
    calls, kept, cost, rest, _ = said(capsys)
    assert calls[:2] == [0, 0] and kept == len(paid.log) and cost == pytest.approx(worth(paid), abs=0.01) and rest == 0
    assert calls[2] > 0, "the judge is still to be paid"


def test_after_a_part_the_rest_is_estimated_from_what_was_measured(paid, capsys, tmp_path):
    teacher_gen.main()
    whole, sent = worth(paid), len(paid.log)
    workspace(tmp_path, data={**PARAMS["data"], "scenarios_per_company": 2}, teacher_gen={
        "attempts": 1, "teacher": elsewhere(paid.url), "customer": elsewhere(paid.url)})
    capsys.readouterr()
    calls, kept, cost, rest, out = said(capsys)
    assert kept == sent and out.count("measured on") == 2 and cost == pytest.approx(whole, abs=0.01)
    teacher_gen.main()
    assert calls[0] + calls[1] == len(paid.log) - sent and rest == pytest.approx(worth(paid) - whole, rel=0.35)


def thinking(request, _):
    """What a server answers whose teacher thinks before it speaks, and that counts two characters a token."""
    text, spoken = PLAYER(request["messages"], request["seed"]), request["messages"][0]["content"].startswith("You are a customer")
    prompt = sum(len(message["content"]) for message in request["messages"]) // 2
    usage = {"prompt_tokens": prompt, "completion_tokens": 7 if spoken else 900, "prompt_tokens_details": {"cached_tokens": prompt // 4}}
    return 200, {}, json.dumps(completion(text) | ({} if request["model"] == "uncounted" else {"usage": usage}))


def bases(folder, paid, capsys, model="paid"):
    """What the lines of teacher, customer and judge rest on, where one scenario a company was paid for and another is left."""
    paid.fault, once = thinking, elsewhere(paid.url, model=model)
    for scenarios in (1, 2):
        workspace(folder, data={**PARAMS["data"], "scenarios_per_company": scenarios},
                  teacher_gen={"attempts": 1, "teacher": once, "customer": once}, eval_judge={"judge": once})
        if scenarios == 1:
            teacher_gen.main()
    capsys.readouterr()
    return re.findall(r"^ {11}(.*)", said(capsys)[-1], re.MULTILINE)


def test_tokens_are_measured_role_by_role_and_what_is_assumed_is_called_so(paid, capsys, tmp_path):
    teacher, customer, judge = bases(tmp_path, paid, capsys)
    assert re.fullmatch(r"measured on \d+ of its answers: 2\.0\d characters a token of prompt, 25% of it cached, 900 tokens an answer", teacher)
    assert re.fullmatch(r"measured on \d+ of its answers: 2\.0\d characters a token of prompt, 25% of it cached, 7 tokens an answer", customer)
    mean = int(re.search(r"assumed: 4 characters .* cached answers in any role, (\d+) tokens", judge)[1])
    assert 7 < mean < 900, "the judge has answered nothing, so it is the mean of the others"


def test_tokens_that_the_server_did_not_count_are_not_called_measured(paid, capsys, tmp_path):
    assert all(basis.startswith("assumed: 4 characters a token") for basis in bases(tmp_path, paid, capsys, "uncounted"))


def test_with_recorded_conversations_only_the_judge_is_estimated(paid, capsys, tmp_path):
    logs = yaml.safe_load(re.search(r"```yaml\n(data:.*?)```", documented("Use your own logs"), re.DOTALL)[1])
    (tmp_path / "data/examples").symlink_to(ROOT / "data/examples")
    workspace(tmp_path, data=logs["data"], teacher_gen=logs["teacher_gen"], eval_judge={"judge": elsewhere(paid.url)})
    estimate.main()
    out = capsys.readouterr().out
    assert out.startswith("teacher_gen\n  takes the conversations recorded under data/examples/logs: nobody is asked, nothing to pay\neval_judge\n")
    turns = sum(row["role"] == "agent" and row["company"] in logs["data"]["held_out"] for row in read_logs(
        RecordedParams(**PARAMS["teacher_gen"]["recorded"]), DataParams(**{**PARAMS["data"], **logs["data"]})).traces)
    assert re.findall(r"(\d+) calls", out) == [str(2 * turns)] and turns > 0 and not paid.log


def test_asking_again_is_estimated_paid_once_and_kept_under_the_cap(paid, capsys, tmp_path):
    once = elsewhere(paid.url)

    def asked(samples, budget_usd=None):
        workspace(tmp_path, data={**PARAMS["data"], "scenarios_per_company": 1}, eval_judge={"judge": {**once, "model": "judge"}},
                  teacher_gen={"attempts": 1, "samples": samples, "budget_usd": budget_usd, "teacher": once, "customer": once})

    asked(0)
    teacher_gen.main()
    sent, before = len(paid.log), worth(paid)
    asked(8)
    capsys.readouterr()
    (teacher, customer, again, _), _, _, rest, _ = said(capsys)
    assert (teacher, customer) == (0, 0) and again > 0 and again % 8 == 0
    asked(8, budget_usd=before + 0.7 * rest)
    with pytest.raises(InputError, match=r"teacher_gen\.budget_usd of"):
        teacher_gen.main()
    assert before < worth(paid) <= before + 0.7 * rest and "self_agreement" not in teacher_gen.METRICS.read_text()
    asked(8, budget_usd=2 * (before + rest))
    teacher_gen.main()
    assert len(paid.log) == sent + again == sum(paid.arrived.values()) and set(paid.arrived.values()) == {1}
    assert sum(request["seed"] >= FIRST_SAMPLE for _, _, request, _ in paid.log) == again
    metrics = json.loads(teacher_gen.METRICS.read_text())
    assert [metrics["cost_usd"], metrics["self_agreement"]["cost_usd"]] == pytest.approx([before, worth(paid) - before], abs=0.001)
    capsys.readouterr()
    calls, kept, _, rest, _ = said(capsys)
    assert calls[:3] == [0, 0, 0] and kept == len(paid.log) and rest == 0


def test_without_a_price_the_estimate_says_so(paid, capsys, tmp_path):
    once = elsewhere(paid.url, price=None)
    workspace(tmp_path, data={**PARAMS["data"], "scenarios_per_company": 1}, teacher_gen={"teacher": once, "customer": once})
    estimate.main()
    assert "to pay: $?" in capsys.readouterr().out


def run_cache(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["cache", *arguments])
    cache.main()
    return capsys.readouterr().out.strip()


def test_the_cache_is_listed_sized_and_pruned(paid, capsys, monkeypatch):
    assert "holds no response" in run_cache(monkeypatch, capsys, "list")
    teacher_gen.main()
    capsys.readouterr()
    listed = run_cache(monkeypatch, capsys, "list")
    assert listed.startswith(f"{paid.url} paid: {len(paid.log)} responses") and f"${worth(paid):.2f}" in listed
    assert re.fullmatch(r"[\d.]+ MB in .*responses", run_cache(monkeypatch, capsys, "size"))
    assert run_cache(monkeypatch, capsys, "prune", "--older-than", "1h").startswith("deleted 0 responses")
    assert run_cache(monkeypatch, capsys, "prune", "--model", "other").startswith("deleted 0 responses")
    assert run_cache(monkeypatch, capsys, "prune", "--model", "paid", "--older-than", "0h").startswith(f"deleted {len(paid.log)} responses")
    assert "holds no response" in run_cache(monkeypatch, capsys, "list")
    sent = len(paid.log)
    teacher_gen.main()
    assert len(paid.log) == 2 * sent


@pytest.mark.parametrize("arguments, message", [([], "wants to know what"), (["--older-than", "a while"], "'a while' is no age")])
def test_a_prune_that_says_too_little_deletes_nothing(paid, capsys, monkeypatch, arguments, message):
    with pytest.raises(InputError, match=message):
        run_cache(monkeypatch, capsys, "prune", *arguments)
