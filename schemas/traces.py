"""Conversations as rows, and the closed lists that describe them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from schemas.action import ActionFault


class Role(StrEnum):
    """Who speaks."""

    CUSTOMER = "customer"
    AGENT = "agent"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class Message:
    """One message: the customer's words, the agent's raw output, or a tool's result."""

    role: Role
    content: str


class RejectReason(StrEnum):
    """Why verify rejects a conversation: the faults of a single step first, then those of a whole conversation."""

    NOT_ONE_JSON_OBJECT = ActionFault.NOT_ONE_JSON_OBJECT.value
    UNKNOWN_ACTION = ActionFault.UNKNOWN_ACTION.value
    BAD_ARGS = ActionFault.BAD_ARGS.value
    BAD_MESSAGE = ActionFault.BAD_MESSAGE.value
    TOOL_RESULT_MISSING = "tool_result_missing"
    UNFINISHED = "unfinished"
    AFTER_ESCALATE = "after_escalate"
    UNKNOWN_TICKET = "unknown_ticket"
    UNSUPPORTED_FACT = "unsupported_fact"
    REPEATED_SEARCH = "repeated_search"
    TOO_LONG = "too_long"
    HANDOFF_NEEDLESS = "handoff_needless"
    HANDOFF_MISSED = "handoff_missed"
    HANDOFF_LATE = "handoff_late"
    HANDOFF_WRONG_REASON = "handoff_wrong_reason"
    DUPLICATE = "duplicate"
    HELD_OUT_TEXT = "held_out_text"
    INFRASTRUCTURE = "infrastructure"
