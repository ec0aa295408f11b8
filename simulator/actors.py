"""The simulated teacher and customer: both play a written scenario.

They keep no state. They find the scenario by the text of the conversation (no customer line occurs twice in the
corpus) and the place in it by counting messages. The teacher errs at stated rates, so that verification has real work.
"""

from __future__ import annotations

import json
import re

from pydantic import BaseModel, ConfigDict, Field

from schemas.action import TOOLS, Action, ActionName, HandoffReason
from schemas.company import Company, Scenario, Step
from simulator._draw import Draw

DONE = "###DONE###"


class Rates(BaseModel):
    """`simulator.actors`: how often the simulated teacher errs, per step."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    broken_json: float = Field(ge=0, le=1)
    unknown_action: float = Field(ge=0, le=1)
    invented_fact: float = Field(ge=0, le=1, description="of messages to the customer")
    needless_handoff: float = Field(ge=0, le=1, description="of steps that should not hand off")
    missed_handoff: float = Field(ge=0, le=1, description="of steps that should hand off")
    wrong_reason: float = Field(ge=0, le=1, description="of steps that hand off")


class Player:
    """Answers as teacher or customer, by what the system prompt asks for."""

    def __init__(self, companies: dict[str, Company], rates: Rates) -> None:
        self._rates = rates
        self._by_opening: dict[str, tuple[Company, Scenario]] = {}
        self._by_told: dict[str, Scenario] = {}
        for company in companies.values():
            for scenario in company.scenarios:
                self._by_opening[scenario.turns[0].customer] = (company, scenario)
                self._by_told[f"{scenario.customer.aim}\n{scenario.customer.facts}"] = scenario

    def answer(self, messages: list[dict[str, str]], seed: int) -> str:
        """The reply to one request.

        Raises:
            LookupError: the conversation is from no scenario.
        """
        told = re.search(r"^What you want: (.*?)\nWhat you know: (.*?)\nHow you are: ", messages[0]["content"], re.DOTALL | re.MULTILINE)
        return self._customer(f"{told[1]}\n{told[2]}", messages) if told else self._teacher(messages, seed)

    def _customer(self, told: str, messages: list[dict[str, str]]) -> str:
        scenario = self._by_told[told]
        spoken = sum(message["role"] == "assistant" for message in messages)
        return scenario.turns[spoken].customer if spoken < len(scenario.turns) else DONE

    def _teacher(self, messages: list[dict[str, str]], seed: int) -> str:
        opening = messages[1]["content"].removeprefix("Customer: ")
        company, scenario = self._by_opening[opening]
        position = sum(message["role"] == "assistant" for message in messages)
        step = scenario.steps[position]
        draw = Draw(scenario.id, position, seed)
        return self._flawed(step, company, draw) or step.as_action().to_json()

    def _flawed(self, step: Step, company: Company, draw: Draw) -> str | None:
        action, rates = step.as_action(), self._rates
        if draw.happens("broken_json", rates.broken_json):
            return action.to_json()[:-1]
        if draw.happens("unknown_action", rates.unknown_action):
            return json.dumps({**action.model_dump(mode="json"), "action": "transfer_call"}, ensure_ascii=False)
        if action.action is ActionName.ESCALATE:
            if draw.happens("missed_handoff", rates.missed_handoff):
                return Action(thought="This looks routine, a reply will do.", action=ActionName.REPLY, args={},
                              message="Thank you for telling us, we have noted it.").to_json()
            if draw.happens("wrong_reason", rates.wrong_reason):
                others = [reason.value for reason in HandoffReason if reason != action.args["reason"]]
                return action.model_copy(update={"args": {"reason": draw.choice("reason", others)}}).to_json()
            return None
        if draw.happens("needless_handoff", rates.needless_handoff):
            reason = draw.choice("reason", [reason.value for reason in HandoffReason])
            return Action(thought="Not sure about this one, a person had better look.", action=ActionName.ESCALATE,
                          args={"reason": reason}, message="A colleague will take this over.").to_json()
        if action.action not in TOOLS and draw.happens("invented_fact", rates.invented_fact):
            invented = f"{action.message} Reference {10_000 + draw.integer('fact', 90_000)} applies."
            return action.model_copy(update={"message": invented}).to_json()
        return None
