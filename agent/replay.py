"""Play a written scenario against the real tools, without any model."""

from __future__ import annotations

from agent.kb import KnowledgeBase
from agent.world import World
from schemas.action import TOOLS
from schemas.company import Company, Scenario
from schemas.traces import Message, Role


def reference_messages(company: Company, scenario: Scenario, kb: KnowledgeBase) -> list[Message]:
    """The conversation as written, with what the tools answer filled in."""
    world = World(company, kb, scenario.tickets, scenario.ticket_start)
    messages = []
    for turn in scenario.turns:
        messages.append(Message(Role.CUSTOMER, turn.customer))
        for step in turn.agent:
            action = step.as_action()
            messages.append(Message(Role.AGENT, action.to_json()))
            if action.action in TOOLS:
                messages.append(Message(Role.TOOL, world.run(action)))
    return messages
