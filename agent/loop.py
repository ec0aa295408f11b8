"""The turn loop: customer and agent speak in turn, tools run in between."""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.endpoint import Endpoint
from agent.protocol import DONE, agent_chat, customer_chat
from agent.responses import Completion
from agent.spend import EndpointFailure, Usage
from agent.world import World
from schemas.action import (
    TOOLS,
    ActionError,
    ActionName,
    action_json_schema,
    parse_action,
)
from schemas.company import Company, Scenario
from schemas.traces import Message, Role

MAX_STEPS = 16
"""Agent steps after which a conversation is stopped: a loop guard, above what verify accepts."""
CUSTOMER_TRIES = 3
"""How many answers a customer has to say something in, where a model thinks until `max_tokens` cuts it."""
SAMPLES_APART = 1_000_000
"""Between the samples of those answers: more than anybody's `attempts`, so that no two attempts share an answer."""


@dataclass
class Transcript:
    """A conversation as held, what each message cost, the calls behind it, and whether the endpoint failed in it."""

    messages: list[Message] = field(default_factory=list)
    costs: list[Usage] = field(default_factory=list)
    failure: str | None = None
    calls: dict[Role, int] = field(default_factory=lambda: {Role.AGENT: 0, Role.CUSTOMER: 0})
    cut_short: int = 0
    unplaced: Usage = field(default_factory=Usage)

    def add(self, role: Role, content: str, completion: Completion | None = None) -> None:
        """Append a message, with what the endpoint counted for it."""
        self.messages.append(Message(role, content))
        self.costs.append((completion.usage if completion else Usage()) + self.unplaced)
        self.unplaced = Usage()

    def count(self, role: Role, completion: Completion) -> None:
        """Count a call by who answered it, and whether `max_tokens` cut the answer."""
        self.calls[role] += 1
        self.cut_short += completion.finish_reason == "length"

    def also_cost(self, completion: Completion) -> None:
        """Count a call that left no message towards the last one, or as `unplaced` towards the first one to come."""
        if self.costs:
            self.costs[-1] += completion.usage
        else:
            self.unplaced += completion.usage


async def converse(company: Company, scenario: Scenario, world: World, teacher: Endpoint, customer: Endpoint, sample: int) -> Transcript:
    """Hold one conversation.

    It ends with a hand-off, when the customer has nothing more to say, when the agent's output is not a valid step (the
    conversation would be rejected anyway, so no more is paid for it), or when an endpoint gives up.
    """
    transcript = Transcript()
    schema = action_json_schema(company.profile.ticket_categories)
    steps = 0
    try:
        while steps < MAX_STEPS:
            for again in range(CUSTOMER_TRIES):
                said = await customer.chat(customer_chat(company, scenario, transcript.messages), sample + again * SAMPLES_APART)
                transcript.count(Role.CUSTOMER, said)
                if said.text.strip():
                    break
                transcript.also_cost(said)
            else:
                raise EndpointFailure("the customer's answers were cut at max_tokens before they said anything")
            if DONE in said.text:
                transcript.also_cost(said)
                break
            transcript.add(Role.CUSTOMER, said.text.strip(), said)
            while steps < MAX_STEPS:
                steps += 1
                answer = await teacher.chat(agent_chat(company, transcript.messages), sample, schema)
                transcript.count(Role.AGENT, answer)
                transcript.add(Role.AGENT, answer.text, answer)
                try:
                    action = parse_action(answer.text)
                except ActionError:
                    return transcript
                if action.action is ActionName.ESCALATE:
                    return transcript
                if action.action not in TOOLS:
                    break
                transcript.add(Role.TOOL, world.run(action))
    except EndpointFailure as failure:
        transcript.failure = str(failure)
    return transcript
