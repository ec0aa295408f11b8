"""Conversations held over real HTTP: with the bundled simulator as a process, and with small servers that misbehave."""

import asyncio
import gc
import json
import weakref
from collections import Counter
from itertools import groupby, pairwise

import pytest

from agent import endpoint
from agent.world import World
from schemas.action import TOOLS, ActionError, parse_action
from schemas.company import Kind
from schemas.errors import InputError
from schemas.tables import Traces
from schemas.traces import Message, RejectReason, Role
from stages import _chunks, teacher_gen
from stages._rules import examine
from stages._simulated import simulator_for
from stages._stage import DataParams, read_table, used_companies
from stages.teacher_gen import TeacherGenParams, hold_conversations
from tests.helpers import FLAWLESS, PARAMS, SLUGS, help_centre, inside, played, tool, workspace

SLICE = DataParams(**{**PARAMS["data"], "scenarios_per_company": 3})
NOISY = {**FLAWLESS, "broken_json": 0.06, "missed_handoff": 0.3, "invented_fact": 0.06, "needless_handoff": 0.03}


def section(attempts=4, teacher=None, customer=None):
    """`teacher_gen` of params.yaml, with changes to its two endpoints."""
    actors = {"teacher": teacher, "customer": customer}
    changed = {name: PARAMS["teacher_gen"][name] | (changes or {}) for name, changes in actors.items()}
    return PARAMS["teacher_gen"] | {"attempts": attempts, "budget_usd": None} | changed


def params(*args, **changes):
    return TeacherGenParams(**section(*args, **changes))


def hold(folder, rates, **changes):
    """The rows of one run on the slice, and what they hold: (company, scenario, attempts) in the order of the corpus."""
    workspace(folder, simulator={"actors": rates})
    with inside(folder):
        companies, asked = used_companies(SLICE), params(**changes)
        with simulator_for("actors", asked.teacher, asked.customer) as url:
            table, _ = asyncio.run(hold_conversations(companies, asked, url))
    rows = table.to_dicts()
    return rows, held(rows, companies)


def held(rows, companies):
    """(company, scenario, the messages of each attempt), in order, for every scenario; checks that each row is in its place."""
    found = {(slug, scenario.id): (company, scenario, []) for slug, company in companies.items() for scenario in company.scenarios}
    for _, group in groupby(rows, lambda row: row["conversation_id"]):
        group = list(group)
        attempts = found[group[0]["company"], group[0]["scenario"]][2]
        assert [(row["index"], row["attempt"]) for row in group] == [(index, len(attempts)) for index in range(len(group))]
        attempts.append([Message(Role(row["role"]), row["content"]) for row in group])
    assert list(dict.fromkeys((row["company"], row["scenario"]) for row in rows)) == list(found), "every scenario, in the order of the corpus"
    return list(found.values())


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    return hold(tmp_path_factory.mktemp("noisy"), NOISY)


def test_every_scenario_of_the_slice_is_held(noisy):
    rows, conversations = noisy
    assert len(conversations) == 3 * len(SLUGS) and Counter(scenario.kind for _, scenario, _ in conversations) == dict.fromkeys(Kind, len(SLUGS))
    assert all(attempts for _, _, attempts in conversations)
    assert {row["teacher"] for row in rows} == {"simulator"} and {row["failure"] for row in rows} == {None}


def test_tools_really_ran(noisy):
    ran = 0
    for company, scenario, attempts in noisy[1]:
        for messages in attempts:
            store = World(company, help_centre(company.slug), scenario.tickets, scenario.ticket_start)
            for message, result in pairwise(messages):
                if message.role is Role.AGENT and parse_action(message.content).action in TOOLS:
                    assert result == tool(store.run(parse_action(message.content)))
                    ran += 1
    assert ran == sum(row["role"] == "tool" for row in noisy[0]) > 30


def test_attempts_stop_at_the_first_good_conversation(noisy):
    for company, scenario, attempts in noisy[1]:
        verdicts = [examine(messages, company, scenario) for messages in attempts]
        assert all(verdicts[:-1]) and (verdicts[-1] is None or len(attempts) == 4), scenario.id
    assert {1, 2} <= {len(attempts) for _, _, attempts in noisy[1]}


def test_a_broken_step_is_the_last_thing_that_is_paid_for(noisy):
    steps = [(message is messages[-1], message.content) for _, _, attempts in noisy[1] for messages in attempts for message in messages
             if message.role is Role.AGENT]
    assert all(parse_action(text) for last, text in steps if not last)
    with pytest.raises(ActionError):
        [parse_action(text) for last, text in steps if last]


def test_tokens_are_counted_where_they_were_paid(noisy):
    for row in noisy[0]:
        assert (row["prompt_tokens"] > 0) is (row["completion_tokens"] > 0) is (row["role"] != "tool")


def test_a_second_run_gives_the_same_rows(noisy, tmp_path):
    assert hold(tmp_path, NOISY)[0] == noisy[0]


def test_rows_put_away_bit_by_bit_are_the_same_rows(noisy, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_gen, "ROWS_AT_ONCE", 1)
    monkeypatch.setattr(_chunks, "ROWS", 5)
    assert hold(tmp_path, NOISY)[0] == noisy[0]


def test_conversations_that_have_ended_are_not_held_in_memory(tmp_path, monkeypatch):
    """With room for two calls, four conversations are on the way, each beside the one that ended before it."""
    alive, ended = [], []
    add = teacher_gen.Held.add

    def counted(self, place, company, scenario, transcripts):
        add(self, place, company, scenario, transcripts)
        ended.extend(map(weakref.ref, transcripts))
        gc.collect()
        alive.append(sum(each() is not None for each in ended))

    monkeypatch.setattr(teacher_gen.Held, "add", counted)
    conversations = hold(tmp_path, FLAWLESS, teacher={"max_concurrency": 2}, customer={"max_concurrency": 2})[1]
    assert len(alive) == len(conversations) == 30 and max(alive) <= 4 < len(ended)


def test_without_flaws_the_conversations_are_the_reference(tmp_path):
    for company, scenario, attempts in hold(tmp_path, FLAWLESS)[1]:
        assert attempts == [played(company, scenario)]


@pytest.mark.parametrize("flaw, kinds, reason", [
    ("broken_json", set(Kind), "not_one_json_object"), ("unknown_action", set(Kind), "unknown_action"),
    ("invented_fact", {Kind.NEAR_MISS, Kind.ORDINARY}, "unsupported_fact"), ("needless_handoff", {Kind.NEAR_MISS, Kind.ORDINARY}, "handoff_needless"),
    ("missed_handoff", {Kind.HANDOFF}, "handoff_missed"), ("wrong_reason", {Kind.HANDOFF}, "handoff_wrong_reason")])
def test_each_flaw_breaks_the_rule_that_it_is_named_for(tmp_path, flaw, kinds, reason):
    for company, scenario, attempts in hold(tmp_path, {**FLAWLESS, flaw: 1.0}, attempts=2)[1]:
        verdicts = [examine(messages, company, scenario) for messages in attempts]
        if scenario.kind in kinds:
            assert [rejection.reason for rejection in verdicts] == [RejectReason(reason)] * 2
        elif flaw in ("missed_handoff", "wrong_reason"):
            assert verdicts == [None], "a hand-off's flaw leaves the others alone"


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_steps_are_broken_at_the_stated_rate(tmp_path, rate):
    """Each step of an attempt is drawn apart, and a broken one is its last; within three standard errors."""
    steps = [message.content for _, _, attempts in hold(tmp_path, {**FLAWLESS, "broken_json": rate}, attempts=20)[1] for messages in attempts
             for message in messages if message.role is Role.AGENT]
    broken = 0
    for text in steps:
        try:
            parse_action(text)
        except ActionError:
            broken += 1
    assert abs(broken / len(steps) - rate) <= 3 * (rate * (1 - rate) / len(steps)) ** 0.5 and len(steps) > 100


def run_stage(folder, teacher, customer=None):
    """The stage itself, as `dvc repro` would run it: the table and the metrics."""
    workspace(folder, data=SLICE.model_dump(), teacher_gen=section(4, teacher, customer))
    with inside(folder):
        teacher_gen.main()
        return read_table(teacher_gen.TRACES, Traces), json.loads(teacher_gen.METRICS.read_text())


def test_the_stage_counts_what_its_table_holds(tmp_path, capsys):
    table, metrics = run_stage(tmp_path, {})
    assert metrics == {
        "teacher": "simulator", "customer": "simulator", "scenarios_per_company": 3, "scenarios": 30, "infrastructure_failures": 0,
        "conversations": table["conversation_id"].n_unique(), "agent_turns": (table["role"] == "agent").sum(),
        "prompt_tokens": table["prompt_tokens"].sum(), "completion_tokens": table["completion_tokens"].sum(), "cached_tokens": 0, "cost_usd": 0.0}
    assert capsys.readouterr().out.startswith(f"teacher_gen: {metrics['conversations']} conversations of 30 scenarios, ")


def test_the_simulator_is_never_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "RESPONSES", tmp_path / "responses")
    hold(tmp_path, FLAWLESS, attempts=1)
    assert not (tmp_path / "responses").exists()


def test_a_simulator_that_cannot_start_is_said_to_be_so(tmp_path):
    with inside(tmp_path), pytest.raises(InputError, match="the simulator did not start"), simulator_for("actors", params().teacher):
        pass
