"""The rules a conversation must pass, each with the reason it is rejected for.

Rules look at one conversation. Those that need a company (facts, ticket categories) or a scenario (the outcome) are
skipped where there is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from agent.protocol import system_prompt
from schemas.action import TOOLS, Action, ActionError, ActionName, parse_action
from schemas.company import Company, Kind, Scenario
from schemas.traces import Message, RejectReason, Role
from stages._facts import unsupported

MAX_STEPS = 14
MAX_MESSAGE_WORDS = 90
_TICKET = re.compile(r"(?:created|updated) (?P<id>\S+) \(\w+\)")


@dataclass(frozen=True)
class Rejection:
    """Why a conversation is rejected, and where: the index of the message, or None for the conversation as a whole."""

    reason: RejectReason
    detail: str
    index: int | None = None


@dataclass(frozen=True)
class Case:
    """One conversation under examination: its messages, the agent's steps by message index, and what is known of its origin."""

    messages: list[Message]
    steps: dict[int, Action]
    company: Company | None
    scenario: Scenario | None


def examine(messages: list[Message], company: Company | None, scenario: Scenario | None) -> Rejection | None:
    """The first rule that the conversation breaks, or None."""
    steps = read_steps(messages)
    return steps if isinstance(steps, Rejection) else first_broken(Case(messages, steps, company, scenario))


def read_steps(messages: list[Message]) -> dict[int, Action] | Rejection:
    """The agent's steps by message index, or why one of its messages is none."""
    steps: dict[int, Action] = {}
    for index, message in enumerate(messages):
        if message.role is Role.AGENT:
            try:
                steps[index] = parse_action(message.content)
            except ActionError as error:
                return Rejection(RejectReason(error.fault.value), error.detail, index)
    return steps


def first_broken(case: Case) -> Rejection | None:
    """The first rule that a conversation whose steps can be read breaks, or None."""
    return next((rejection for rule in RULES for rejection in rule(case)), None)


def _known_category(case: Case) -> Iterator[Rejection]:
    if case.company:
        for index, step in case.steps.items():
            category = step.args.get("category")
            if category is not None and category not in case.company.profile.ticket_categories:
                yield Rejection(RejectReason.BAD_ARGS, f"no ticket category '{category}'", index)


def _order(case: Case) -> Iterator[Rejection]:
    """Every tool call is followed by its result, nothing follows an escalate, and the agent has the last word."""
    roles = [message.role for message in case.messages]
    for index, step in case.steps.items():
        following = roles[index + 1] if index + 1 < len(roles) else None
        if step.action in TOOLS and following is not Role.TOOL:
            yield Rejection(RejectReason.TOOL_RESULT_MISSING, f"{step.action} has no result", index)
        if step.action is ActionName.ESCALATE and following is not None:
            yield Rejection(RejectReason.AFTER_ESCALATE, f"a {following} message follows the hand-off", index + 1)
        if step.action in (ActionName.REPLY, ActionName.CLARIFY) and following in (Role.AGENT, Role.TOOL):
            yield Rejection(RejectReason.UNFINISHED, f"{following} speaks where the customer should", index + 1)
    for index, role in enumerate(roles):
        if role is Role.TOOL and (index - 1 not in case.steps or case.steps[index - 1].action not in TOOLS):
            yield Rejection(RejectReason.UNFINISHED, "a tool result that no call asked for", index)
    if not roles or roles[0] is not Role.CUSTOMER:
        yield Rejection(RejectReason.UNFINISHED, "the customer does not open the conversation", 0)
    elif roles[-1] is not Role.AGENT:
        yield Rejection(RejectReason.UNFINISHED, f"ends on a {roles[-1]} message", len(roles) - 1)


def _tickets(case: Case) -> Iterator[Rejection]:
    """An update names a ticket that exists. The store answers `error: no ticket …` where it does not."""
    for index, step in case.steps.items():
        if step.action is ActionName.UPDATE_TICKET and case.messages[index + 1].content.startswith("error: no ticket"):
            yield Rejection(RejectReason.UNKNOWN_TICKET, step.args["ticket_id"], index)


def _facts(case: Case) -> Iterator[Rejection]:
    """What a message to the customer states comes from the policy, the tools or the customer."""
    if not case.company:
        return
    sources = [system_prompt(case.company)]
    own_tickets: set[str] = set()
    for index, message in enumerate(case.messages):
        if step := case.steps.get(index):
            if step.message and (missing := unsupported(step.message, sources)):
                yield Rejection(RejectReason.UNSUPPORTED_FACT, missing, index)
        elif created := _TICKET.match(message.content) if message.role is Role.TOOL else None:
            # A ticket's summary is the agent's own words, and no source for its next message.
            ticket = created["id"]
            if message.content.startswith("created "):
                own_tickets.add(ticket)
            sources.append(created[0] if ticket in own_tickets else message.content)
        else:
            sources.append(message.content)


def _searches(case: Case) -> Iterator[Rejection]:
    seen: set[str] = set()
    for index, step in case.steps.items():
        if step.action is ActionName.SEARCH_KB:
            query = " ".join(sorted(step.args["query"].lower().split()))
            if query in seen:
                yield Rejection(RejectReason.REPEATED_SEARCH, step.args["query"], index)
            seen.add(query)


def _length(case: Case) -> Iterator[Rejection]:
    if len(case.steps) > MAX_STEPS:
        yield Rejection(RejectReason.TOO_LONG, f"{len(case.steps)} steps, at most {MAX_STEPS}")
    for index, step in case.steps.items():
        if (words := len(step.message.split())) > MAX_MESSAGE_WORDS:
            yield Rejection(RejectReason.TOO_LONG, f"a message of {words} words, at most {MAX_MESSAGE_WORDS}", index)


def _outcome(case: Case) -> Iterator[Rejection]:
    """The hand-off against the scenario: when (in customer messages), whether, and for which reason."""
    if not case.scenario:
        return
    handoff = next(((i, step) for i, step in case.steps.items() if step.action is ActionName.ESCALATE), None)
    wanted = case.scenario.kind is Kind.HANDOFF
    if handoff is None:
        if wanted:
            yield Rejection(RejectReason.HANDOFF_MISSED, f"should be handed off for {case.scenario.reason}")
        return
    index, step = handoff
    heard = [message.content for message in case.messages[:index] if message.role is Role.CUSTOMER]
    script = [turn.customer for turn in case.scenario.turns]
    if not wanted:
        yield Rejection(RejectReason.HANDOFF_NEEDLESS, "nothing here goes to a person", index)
    elif len(heard) > len(script):
        yield Rejection(RejectReason.HANDOFF_LATE, "the deciding fact was known before", index)
    elif len(heard) < len(script) and heard == script[: len(heard)]:
        yield Rejection(RejectReason.HANDOFF_NEEDLESS, "handed off before the deciding fact was known", index)
    elif step.args["reason"] != case.scenario.reason:
        yield Rejection(RejectReason.HANDOFF_WRONG_REASON, f"{step.args['reason']}, should be {case.scenario.reason}", index)


RULES: list[Callable[[Case], Iterator[Rejection]]] = [
    _known_category, _order, _tickets, _facts, _searches, _length, _outcome]
