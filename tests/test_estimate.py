"""What the paid stages will cost, said before anything is sent; and what is kept of what was paid."""

import re
import sys

import pytest

from agent import endpoint
from schemas.errors import InputError
from simulator.actors import Player, Rates
from stages import cache, estimate, teacher_gen
from tests.helpers import FLAWLESS, PARAMS, SLUGS, inside, real, workspace
from tests.hostile import hostile
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
    assert not paid.log and (kept, cost) == (0, 0) and rest > 0 and "assumed from the written ones" in out


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
    assert kept == sent and "measured on" in out and cost == pytest.approx(whole, abs=0.01)
    teacher_gen.main()
    assert calls[0] + calls[1] == len(paid.log) - sent and rest == pytest.approx(worth(paid) - whole, rel=0.35)


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
