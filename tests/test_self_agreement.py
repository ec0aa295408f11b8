"""How often a teacher agrees with itself: which turns it is asked at, what counts as agreement, and what is said of a simulator."""

import json
from collections import Counter

import pytest

from agent.responses import Completion
from schemas.action import ActionName, parse_action
from schemas.self_agreement import GenerationMetrics, TurnKind
from schemas.tables import Traces
from schemas.traces import Message, Role
from stages import teacher_gen
from stages._self_agreement import TURNS, Turn, draw_turns, self_agreement
from stages._stage import read_table
from tests.helpers import FLAWLESS, HELD_OUT, PARAMS, agent, customer, inside, played, real, workspace

REPLY, CLARIFY, NO_STEP = agent("reply", "Yes.").content, agent("clarify", "Which?").content, "Yes."
LEGAL, SAFETY = (agent("escalate", "A colleague takes over.", reason=reason).content for reason in ("legal", "safety"))
WRITTEN = [(company, scenario, played(company, scenario)) for company in map(real, HELD_OUT) for scenario in company.scenarios]


def answer(text, cost_usd=0.25):
    return text if text is None else Completion(
        base_url="u", model="m", stored=0.0, content=text, reasoning="", finish_reason="stop", prompt_tokens=8, cached_tokens=2, completion_tokens=1,
        cost_usd=cost_usd)


def agreed(*asked):
    """The figures over turns of (scenario, step taken, answers)."""
    turns = [Turn(real("gym"), scenario, [customer("hi")], taken) for scenario, taken, _ in asked]
    found = self_agreement(turns, [list(map(answer, given)) for _, _, given in asked], 3)
    return found, found["companies"]["gym"]


@pytest.mark.parametrize("given, unanswered, action, handoff", [
    ([REPLY, REPLY, REPLY], 0, (3, 3), (3, 3)), ([REPLY, CLARIFY, REPLY], 0, (1, 3), (3, 3)), ([LEGAL, SAFETY, REPLY], 0, (1, 3), (1, 3)),
    ([NO_STEP, NO_STEP, REPLY], 0, (0, 3), (3, 3)), ([NO_STEP, LEGAL, LEGAL], 0, (1, 3), (1, 3)),
    ([None, REPLY, REPLY], 1, (1, 1), (1, 1)), ([None, None, REPLY], 2, (0, 0), (0, 0))])
def test_what_agrees(given, unanswered, action, handoff):
    kinds = agreed(("a", REPLY, given))[1]
    found = kinds[TurnKind.OTHER]
    assert (found["unanswered"], *((found[what]["k"], found[what]["n"]) for what in ("action", "handoff"))) == (unanswered, action, handoff)
    none = {"k": 0, "n": 0, "low": None, "high": None}
    assert kinds[TurnKind.HANDOFF] == {"turns": 0, "unanswered": 0, "action": none, "handoff": none}


def test_turns_that_hand_off_are_counted_apart_and_conversations_are_what_is_drawn():
    found, kinds = agreed(("a", REPLY, [REPLY] * 3), ("a", LEGAL, [LEGAL] * 3), ("b", LEGAL, [LEGAL, REPLY, CLARIFY]))
    assert [kinds[kind]["turns"] for kind in TurnKind] == [2, 1]
    assert kinds[TurnKind.HANDOFF]["handoff"] == {"k": 4, "n": 6, "low": pytest.approx(1 / 3), "high": 1.0}
    assert (found["prompt_tokens"], found["cached_tokens"], found["completion_tokens"], found["cost_usd"]) == (72, 18, 9, 2.25)


def test_at_most_so_many_turns_of_a_kind_are_drawn_from_each_company_each_with_its_own_history():
    turns = draw_turns(WRITTEN)
    assert Counter((turn.company.slug, turn.kind) for turn in turns) == {(slug, kind): TURNS for slug in HELD_OUT for kind in TurnKind}
    messages = {scenario.id: messages for _, scenario, messages in WRITTEN}
    for turn in turns:
        whole = messages[turn.scenario]
        assert whole[: len(turn.history) + 1] == [*turn.history, Message(Role.AGENT, turn.taken)]
        assert (turn.kind is TurnKind.HANDOFF) == (parse_action(turn.taken).action is ActionName.ESCALATE)


def test_another_conversation_changes_only_what_it_takes_the_place_of():
    def places(conversations):
        return {(turn.scenario, len(turn.history)) for turn in draw_turns(conversations)}
    assert {place for place in places(WRITTEN) if place[0] != WRITTEN[0][1].id} <= places(WRITTEN[1:])
    assert places(reversed(WRITTEN)) == places(WRITTEN)


def generated(folder, rates, samples):
    workspace(folder, data={"scenarios_per_company": 4}, teacher_gen={"samples": samples}, simulator={"actors": rates})
    with inside(folder):
        teacher_gen.main()
        return json.loads(teacher_gen.METRICS.read_text()), read_table(teacher_gen.TRACES, Traces)


@pytest.mark.parametrize("rates, agrees", [(FLAWLESS, True), ({**FLAWLESS, "missed_handoff": 0.5}, False)])
def test_the_stage_asks_the_simulator_and_calls_it_so(tmp_path, capsys, rates, agrees):
    metrics, _ = generated(tmp_path, rates, samples=4)
    found = GenerationMetrics.model_validate(metrics).self_agreement
    assert found.samples == 4 and set(found.companies) == set(HELD_OUT), "no company that is trained on"
    for kinds in found.companies.values():
        for agreement in kinds.values():
            assert agreement.action.n == agreement.handoff.n == 6 * agreement.turns > 0 == agreement.unanswered
        other, handoff = kinds[TurnKind.OTHER], kinds[TurnKind.HANDOFF]
        assert other.action.k == other.handoff.k == other.action.n and handoff.action.k == handoff.handoff.k
    assert all(kinds[TurnKind.HANDOFF].action.k == kinds[TurnKind.HANDOFF].action.n for kinds in found.companies.values()) is agrees
    assert "pairs of 4 answers to one turn in which the simulator agrees with itself: " in capsys.readouterr().out


@pytest.mark.parametrize("samples", [0, 1])
def test_a_teacher_that_is_not_asked_again_leaves_the_outputs_as_they_are(tmp_path, samples):
    metrics, table = generated(tmp_path / "off", FLAWLESS, samples)
    asked, same = generated(tmp_path / "on", FLAWLESS, 2)
    assert asked.pop("self_agreement") and asked == metrics and same.equals(table)
    assert PARAMS["teacher_gen"]["samples"] == 0
