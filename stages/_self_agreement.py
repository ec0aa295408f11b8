"""Ask a teacher several times at the same turns: how often two of its answers agree bounds what a match with one of them can mean.

The turns are agent turns of the held-out companies' conversations that pass every rule, with the history as the teacher
itself wrote it. Of each company at most `TURNS` turns that hand off and as many others are drawn, by a hash of their names,
so that another scenario changes little of what is asked. None of the answers had a part in the conversation.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from tqdm import tqdm

from agent.endpoint import EndpointParams, open_endpoints
from agent.loop import Transcript
from agent.protocol import agent_chat
from agent.responses import Completion
from agent.spend import EndpointFailure, Spend, Usage
from schemas.action import (
    ActionError,
    ActionName,
    action_json_schema,
    parse_action,
)
from schemas.company import Company, Scenario
from schemas.self_agreement import TurnKind
from schemas.traces import Message, Role
from stages._intervals import cluster_ratio
from stages._rules import examine

TURNS = 20
"""Of each kind, of each company."""
FIRST_SAMPLE = 1_000
"""Far above every attempt at a conversation: an answer that helped to choose the history is no independent one."""

_WORDS = {TurnKind.HANDOFF: "hand-off turns", TurnKind.OTHER: "other turns"}


@dataclass(frozen=True)
class Turn:
    """An agent turn: what was said before it, and the step that was taken then."""

    company: Company
    scenario: str
    history: list[Message]
    taken: str

    @property
    def kind(self) -> TurnKind:
        """By the step that was taken."""
        return TurnKind.HANDOFF if parse_action(self.taken).action is ActionName.ESCALATE else TurnKind.OTHER


def kept(company: Company, scenario: Scenario, transcripts: list[Transcript]) -> list[Message] | None:
    """The attempt at a scenario that passes the rules, None where there is none."""
    last = transcripts[-1]
    return last.messages if last.failure is None and examine(last.messages, company, scenario) is None else None


def draw_turns(conversations: Iterable[tuple[Company, Scenario, list[Message]]]) -> list[Turn]:
    """The turns to ask at: those of one company together, the ones that hand off first."""
    groups: dict[tuple[str, TurnKind], list[tuple[str, Turn]]] = defaultdict(list)
    for company, scenario, messages in conversations:
        for index, message in enumerate(messages):
            if message.role is Role.AGENT:
                turn = Turn(company, scenario.id, messages[:index], message.content)
                place = hashlib.sha256(f"{company.slug}/{scenario.id}/{index}".encode()).hexdigest()
                groups[company.slug, turn.kind].append((place, turn))
    return [turn for _, group in sorted(groups.items()) for _, turn in sorted(group, key=lambda found: found[0])[:TURNS]]


async def ask_again(turns: list[Turn], samples: int, params: EndpointParams, simulator_url: str | None, spend: Spend,
                    paid_usd: float = 0.0, *, offline: bool = False) -> list[list[Completion | None]]:
    """The teacher's answers, (turns, samples), None where the endpoint gave none; `offline` as far as the cache goes.

    `paid_usd` is what the conversations cost; the live line counts it in.
    """
    finished_usd, total = 0.0, len(turns) * samples
    async with open_endpoints(spend, simulator_url, params, offline=offline) as (teacher,):
        with tqdm(total=total, desc="teacher_gen, again", unit="turn", file=sys.stderr, disable=offline, miniters=0) as bar:

            async def ask(turn: Turn, sample: int) -> Completion | None:
                nonlocal finished_usd
                schema = action_json_schema(turn.company.profile.ticket_categories)
                answer: Completion | None = None
                with suppress(EndpointFailure):
                    answer = await teacher.chat(agent_chat(turn.company, turn.history), FIRST_SAMPLE + sample, schema)
                finished_usd += (answer and answer.cost_usd) or 0.0
                bar.update()
                bar.set_postfix_str(spend.progress(paid_usd + (finished_usd / bar.n * total if bar.n else 0.0)), refresh=False)
                return answer

            flat = await asyncio.gather(*(ask(turn, sample) for turn in turns for sample in range(samples)))
    return [flat[at: at + samples] for at in range(0, len(flat), samples)]


def self_agreement(turns: list[Turn], answers: list[list[Completion | None]], samples: int) -> dict[str, Any]:
    """`SelfAgreement` of schemas/self_agreement.py."""
    groups: dict[str, dict[str, list[tuple[Turn, list[Completion | None]]]]] = defaultdict(lambda: {kind.value: [] for kind in TurnKind})
    for turn, given in zip(turns, answers, strict=True):
        groups[turn.company.slug][turn.kind].append((turn, given))
    usage = sum((answer.usage for given in answers for answer in given if answer), Usage())
    return {"samples": samples, **asdict(usage), "companies": {
        slug: {kind: _agreement(asked) for kind, asked in kinds.items()} for slug, kinds in groups.items()}}


def _agreement(asked: list[tuple[Turn, list[Completion | None]]]) -> dict[str, Any]:
    read = [(turn.scenario, [_action(answer.text) for answer in given if answer]) for turn, given in asked]
    pairs = [(scenario, list(combinations(actions, 2))) for scenario, actions in read]
    return {
        "turns": len(asked), "unanswered": sum(answer is None for _, given in asked for answer in given),
        "action": _pairs([(scenario, [one is not None and one is other for one, other in found]) for scenario, found in pairs]),
        "handoff": _pairs([(scenario, [(one is ActionName.ESCALATE) is (other is ActionName.ESCALATE) for one, other in found])
                           for scenario, found in pairs])}


def _action(text: str) -> ActionName | None:
    try:
        return parse_action(text).action
    except ActionError:
        return None


def _pairs(agree: list[tuple[str, list[bool]]]) -> dict[str, Any]:
    """k of n pairs, over turns that name their conversation."""
    above, below = [sum(found) for _, found in agree], [len(found) for _, found in agree]
    low, high = cluster_ratio([scenario for scenario, _ in agree], above, below) or (None, None)
    return {"k": sum(above), "n": sum(below), "low": low, "high": high}


def in_words(agreement: dict[str, Any], teacher: str) -> str:
    """One line."""
    parts = [f"{slug}, {found['turns']} {_WORDS[TurnKind(kind)]}: action {found['action']['k']}/{found['action']['n']}, "
             f"hand-off {found['handoff']['k']}/{found['handoff']['n']}"
             for slug, kinds in agreement["companies"].items() for kind, found in kinds.items()]
    return f"teacher_gen: pairs of {agreement['samples']} answers to one turn in which the {teacher} agrees with itself: {'; '.join(parts)}"
