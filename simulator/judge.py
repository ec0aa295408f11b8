"""The simulated judge, with the known weakness of real ones.

It compares actions, not words: several actions can be acceptable, at stated rates, and a needless hand-off, looked at
alone, mostly passes. Its figures say nothing about a real judge.
"""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, Field

from schemas.action import ActionError, ActionName, parse_action
from schemas.company import Company, Scenario
from simulator._draw import Draw


class Rates(BaseModel):
    """`simulator.judge`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    unusable: float = Field(ge=0, le=1, description="of verdicts")


ACCEPTABLE: dict[tuple[ActionName, ActionName], float] = {
    (ActionName.SEARCH_KB, ActionName.CLARIFY): 0.6,
    (ActionName.SEARCH_KB, ActionName.REPLY): 0.4,
    (ActionName.REPLY, ActionName.SEARCH_KB): 0.7,
    (ActionName.REPLY, ActionName.CLARIFY): 0.6,
    (ActionName.REPLY, ActionName.CREATE_TICKET): 0.5,
    (ActionName.REPLY, ActionName.UPDATE_TICKET): 0.3,
    (ActionName.CLARIFY, ActionName.REPLY): 0.5,
    (ActionName.CLARIFY, ActionName.SEARCH_KB): 0.7,
    (ActionName.CREATE_TICKET, ActionName.REPLY): 0.5,
    (ActionName.CREATE_TICKET, ActionName.CLARIFY): 0.5,
    (ActionName.CREATE_TICKET, ActionName.UPDATE_TICKET): 0.3,
    (ActionName.UPDATE_TICKET, ActionName.REPLY): 0.5,
    (ActionName.UPDATE_TICKET, ActionName.CREATE_TICKET): 0.4,
    (ActionName.ESCALATE, ActionName.SEARCH_KB): 0.3,
    (ActionName.ESCALATE, ActionName.CLARIFY): 0.3,
    (ActionName.ESCALATE, ActionName.REPLY): 0.15,
}
"""(gold, candidate) -> how often the simulated judge calls it acceptable; pairs that are not listed: never."""
SAME_ACTION = 0.97
NEEDLESS_HANDOFF = 0.85
"""The known weakness of real judges: a needless hand-off, looked at alone, mostly passes."""


class Player:
    """Answers as judge."""

    def __init__(self, companies: dict[str, Company], rates: Rates) -> None:
        self._rates = rates
        self._by_opening: dict[str, Scenario] = {
            scenario.turns[0].customer: scenario for company in companies.values() for scenario in company.scenarios}

    def answer(self, messages: list[dict[str, str]], seed: int) -> str:
        """The verdict on one candidate.

        Raises:
            LookupError: the conversation is from no scenario.
        """
        document = json.loads(messages[1]["content"])
        said = document["conversation"]
        scenario = self._by_opening[said[0]["text"]]
        position = sum(message["from"] == "agent" for message in said)
        gold = scenario.steps[position].action
        draw = Draw(scenario.id, position, seed, document["candidate"])
        if draw.happens("unusable", self._rates.unusable):
            return "I would need to see more of the conversation to say."
        try:
            candidate = parse_action(document["candidate"]).action
        except ActionError:
            return '{"verdict": "not_acceptable"}'
        if candidate is gold:
            chance = SAME_ACTION
        elif candidate is ActionName.ESCALATE:
            chance = NEEDLESS_HANDOFF
        else:
            chance = ACCEPTABLE.get((gold, candidate), 0.0)
        verdict = "acceptable" if draw.happens("verdict", chance) else "not_acceptable"
        return json.dumps({"verdict": verdict})
