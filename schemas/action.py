"""The agent's step: one JSON object `{"thought", "action", "args", "message"}`, and how text becomes one."""

from __future__ import annotations

import json
import re
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class ActionName(StrEnum):
    """The six things an agent can do in a step."""

    SEARCH_KB = "search_kb"
    REPLY = "reply"
    CLARIFY = "clarify"
    ESCALATE = "escalate"
    CREATE_TICKET = "create_ticket"
    UPDATE_TICKET = "update_ticket"


class HandoffReason(StrEnum):
    """Why a conversation goes to a person."""

    SECURITY = "security"
    REFUND_OUTSIDE_POLICY = "refund_outside_policy"
    LEGAL = "legal"
    SAFETY = "safety"
    REPEATED_FAILURE = "repeated_failure"
    HUMAN_REQUESTED = "human_requested"
    COMPANY_RULE = "company_rule"


class ActionFault(StrEnum):
    """Why a text is not a valid step, in the order in which it is checked."""

    NOT_ONE_JSON_OBJECT = "not_one_json_object"
    UNKNOWN_ACTION = "unknown_action"
    BAD_ARGS = "bad_args"
    BAD_MESSAGE = "bad_message"


class ActionError(ValueError):
    """A text that is not a valid step; `fault` says which rule it breaks first."""

    def __init__(self, fault: ActionFault, detail: str) -> None:
        super().__init__(f"{fault}: {detail}")
        self.fault = fault
        self.detail = detail


class _Args(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SearchArgs(_Args):
    """`search_kb`."""

    query: str = Field(min_length=1)


class CreateTicketArgs(_Args):
    """`create_ticket`; the category is one of the company's."""

    category: str = Field(min_length=1)
    summary: str = Field(min_length=1)


class UpdateTicketArgs(_Args):
    """`update_ticket`."""

    ticket_id: str = Field(min_length=1)
    note: str = Field(min_length=1)


class EscalateArgs(BaseModel):
    """`escalate`."""

    model_config = ConfigDict(extra="forbid")
    reason: HandoffReason


class NoArgs(_Args):
    """`reply` and `clarify`."""


ARGS: dict[ActionName, type[BaseModel]] = {
    ActionName.SEARCH_KB: SearchArgs,
    ActionName.REPLY: NoArgs,
    ActionName.CLARIFY: NoArgs,
    ActionName.ESCALATE: EscalateArgs,
    ActionName.CREATE_TICKET: CreateTicketArgs,
    ActionName.UPDATE_TICKET: UpdateTicketArgs,
}
TOOLS = frozenset({ActionName.SEARCH_KB, ActionName.CREATE_TICKET, ActionName.UPDATE_TICKET})
"""Actions that run a tool and carry no message; the other three speak to the customer."""


class Action(BaseModel):
    """One valid step of the agent."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    thought: str
    action: ActionName
    args: dict[str, Any]
    message: str

    def to_json(self) -> str:
        """The canonical text: four keys in fixed order, no line breaks, non-ASCII kept."""
        return json.dumps(self.model_dump(mode="json"), ensure_ascii=False)


def make_action(thought: str, action: str, args: dict[str, Any], message: str) -> Action:
    """Build a step, checking what the protocol demands of it.

    Raises:
        ActionError: unknown action, arguments wrong for the action, or a message missing or out of place.
    """
    if action not in ActionName.__members__.values():
        raise ActionError(ActionFault.UNKNOWN_ACTION, repr(action))
    name = ActionName(action)
    try:
        args = ARGS[name].model_validate(args).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors()[0]
        raise ActionError(ActionFault.BAD_ARGS, f"{name} {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if name in TOOLS and message.strip():
        raise ActionError(ActionFault.BAD_MESSAGE, f"{name} carries no message")
    if name not in TOOLS and not message.strip():
        raise ActionError(ActionFault.BAD_MESSAGE, f"{name} needs a message to the customer")
    return Action(thought=thought, action=name, args=args, message=message)


_THINK = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_FENCE = re.compile(r"\A\s*```(?:json)?\s*\n(.*)\n\s*```\s*\Z", re.DOTALL)


def parse_action(text: str) -> Action:
    """Read a model's output as one step.

    The text must be exactly one JSON object with the four keys. Two wrappings are taken off first, since they are the
    habits of reasoning and chat models and leave no doubt about the object meant: one leading `<think>…</think>` block
    and one Markdown fence around everything else. Prose before or after, a second object, or a repeated key is a fault.

    Raises:
        ActionError: with the first rule the text breaks.
    """
    text = _THINK.sub("", text, count=1)
    if fenced := _FENCE.match(text):
        text = fenced[1]
    try:
        data = _DECODER.decode(text)
        # Half a surrogate pair, escaped or not, is JSON but no text that could be stored or sent.
        (json.dumps(data, ensure_ascii=False) if "\\u" in text else text).encode()
    except (ValueError, RecursionError) as error:
        raise ActionError(ActionFault.NOT_ONE_JSON_OBJECT, str(error)) from None
    if not isinstance(data, dict):
        raise ActionError(ActionFault.NOT_ONE_JSON_OBJECT, f"a JSON {type(data).__name__}")
    if extra := data.keys() - {"thought", "action", "args", "message"}:
        raise ActionError(ActionFault.NOT_ONE_JSON_OBJECT, f"unknown key {sorted(extra)[0]!r}")
    thought, action, args, message = (data.get(key) for key in ("thought", "action", "args", "message"))
    if not isinstance(thought, str):
        raise ActionError(ActionFault.NOT_ONE_JSON_OBJECT, "no text under 'thought'")
    if not isinstance(action, str) or action not in ActionName.__members__.values():
        raise ActionError(ActionFault.UNKNOWN_ACTION, repr(action))
    if not isinstance(args, dict):
        raise ActionError(ActionFault.BAD_ARGS, "no object under 'args'")
    if not isinstance(message, str):
        raise ActionError(ActionFault.BAD_MESSAGE, "no text under 'message'")
    return make_action(thought, action, args, message)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key occurs twice")
    return data


_DECODER = json.JSONDecoder(object_pairs_hook=_no_repeats)


def action_json_schema(ticket_categories: list[str] | None = None, bounded: bool = False) -> dict[str, Any]:
    """The JSON schema of a step, for endpoints and decoders that constrain their output.

    One variant an action, so that arguments and message fit the action; keys in canonical order.

    Args:
        ticket_categories: the company's; None leaves the category free.
        bounded: limit the length of every text, so that a small model that never closes a string still ends its step.
    """
    text = {"type": "string", "minLength": 1}
    thought = message = text
    if bounded:
        text, thought, message = ({**text, "maxLength": most} for most in (60, 120, 200))
    arg_schemas: dict[ActionName, dict[str, Any]] = {
        ActionName.SEARCH_KB: {"query": text},
        ActionName.REPLY: {},
        ActionName.CLARIFY: {},
        ActionName.ESCALATE: {"reason": {"enum": [reason.value for reason in HandoffReason]}},
        ActionName.CREATE_TICKET: {"category": {"enum": ticket_categories} if ticket_categories else text, "summary": text},
        ActionName.UPDATE_TICKET: {"ticket_id": text, "note": text},
    }
    return {"anyOf": [
        _object({
            "thought": thought,
            "action": {"const": name.value},
            "args": _object(args),
            "message": {"const": ""} if name in TOOLS else message,
        })
        for name, args in arg_schemas.items()
    ]}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
