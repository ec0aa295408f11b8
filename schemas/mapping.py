"""The mapping file: how a folder of recorded conversations is read as steps of our protocol.

People write it by hand, so every fault is reported with the file, the field and a hint.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from re import Pattern

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from schemas.action import ARGS, TOOLS, ActionName, HandoffReason
from schemas.company import read_yaml
from schemas.errors import InputError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LeaveOut(StrEnum):
    """What may be left out of a recorded conversation, if the mapping says so; otherwise it stays, or the conversation is rejected."""

    GREETING = "greeting"
    """What the agent says before the customer has said anything."""
    TEXT_BESIDE_CALL = "text_beside_call"
    """The agent's words beside a tool call ("One moment …")."""
    AFTER_HANDOFF = "after_handoff"
    """Everything after the hand-off: a person has taken over."""
    LAST_WORDS = "last_words"
    """The customer's messages that the agent did not answer, at the end."""


class ToolRule(_Strict):
    """One of the logs' tools: the action that it is, and where that action's arguments come from."""

    action: ActionName
    args: dict[str, str] = {}
    """our argument -> the tool's"""
    values: dict[str, str] = {}
    """our argument -> a fixed text"""
    message: str | None = None
    """the tool's argument that is said to the customer; only where the action speaks"""
    ignore: list[str] = []
    """the tool's arguments that are left out"""

    @model_validator(mode="after")
    def _fits_its_action(self) -> ToolRule:
        wanted, given = set(ARGS[self.action].model_fields), [*self.args, *self.values]
        # The reason may come from `handoff.default_reason`.
        needed = wanted - {"reason"}
        if extra := sorted(set(given) - wanted):
            raise ValueError(f"{self.action} has no argument '{extra[0]}'; it has: {', '.join(sorted(wanted)) or 'none'}")
        if missing := sorted(needed - set(given)):
            raise ValueError(f"{self.action} needs '{missing[0]}' under args or values")
        if len(given) != len(set(given)):
            raise ValueError("the same argument stands under args and under values")
        if self.message is not None and self.action in TOOLS:
            raise ValueError(f"{self.action} carries no message")
        if "reason" in self.values and self.values["reason"] not in list(HandoffReason):
            raise ValueError(f"'{self.values['reason']}' is no hand-off reason; they are: {', '.join(HandoffReason)}")
        return self


class Phrase(_Strict):
    """Words of the agent that are a hand-off: a regular expression, searched for anywhere in the message."""

    pattern: Pattern[str]
    reason: HandoffReason | None = None


class Handoff(_Strict):
    """How hand-offs show."""

    reasons: dict[str, HandoffReason] = {}
    """what the tool's reason argument says -> our reason; our own names need no entry"""
    phrases: list[Phrase] = []
    """the first that is found decides"""
    default_reason: HandoffReason | None = None
    """where nothing else gives one; without it such a conversation is rejected"""


class Mapping(_Strict):
    """The mapping file."""

    tools: dict[str, ToolRule] = {}
    clarify: Pattern[str]
    """an assistant's message in which this is found is clarify; every other one that is no hand-off is reply"""
    handoff: Handoff = Handoff()
    thought: str | None = None
    """the key of an assistant's message that holds its thought, such as reasoning_content; an absent thought is the empty text"""
    leave_out: list[LeaveOut] = []


def load_mapping(path: Path) -> Mapping:
    """Read and check a mapping file.

    Raises:
        InputError: it is missing or broken; says the field and what to do.
    """
    try:
        return Mapping.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "as a whole"
        found = first.get("input")
        shown = f" (found {found!r})" if isinstance(found, (str, int, float, bool)) and first["type"] != "extra_forbidden" else ""
        raise InputError(f"{path}: {field}: {first['msg'].removeprefix('Value error, ')}{shown}",
                         "data/examples/mapping.yaml is a whole one; README, 'Use your own logs'") from None
