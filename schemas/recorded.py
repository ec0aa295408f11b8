"""What becomes of recorded conversations: the closed lists, the table that keeps every line of the logs, and the counts."""

from __future__ import annotations

from enum import StrEnum

import pandera.polars as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from schemas.metrics import Count, TeacherGenMetrics, VerifyMetrics


class Source(StrEnum):
    """Where teacher_gen has its conversations from."""

    ENDPOINT = "endpoint"
    RECORDED = "recorded"


class UnmappedReason(StrEnum):
    """Why a recorded conversation cannot be turned into a trace; the first that is met, from the line to its messages."""

    BROKEN_LINE = "broken_line"
    """The line is not one JSON object in UTF-8."""
    BROKEN_CONVERSATION = "broken_conversation"
    """A key is missing or has the wrong type."""
    NO_COMPANY = "no_company"
    """`company` is missing or no slug."""
    DUPLICATE_ID = "duplicate_id"
    """An earlier line has the same company and conversation_id."""
    UNKNOWN_ROLE = "unknown_role"
    SYSTEM_MIDWAY = "system_midway"
    """A system message after the opening: our prompt stands at the beginning only."""
    NOT_TEXT = "not_text"
    """An image, a sound or a file."""
    EMPTY_MESSAGE = "empty_message"
    UNKNOWN_TOOL = "unknown_tool"
    """The mapping does not name it."""
    BAD_ARGUMENTS = "bad_arguments"
    """The arguments are no JSON object, or not what the mapping says."""
    CALL_IN_TEXT = "call_in_text"
    """JSON, a tool call or an open thought stands inside the words, and is not the whole of them."""
    TEXT_BESIDE_CALL = "text_beside_call"
    """Words beside a tool call: our tool calls carry none."""
    RESULT_WITHOUT_CALL = "result_without_call"
    UNCLEAR_IDS = "unclear_ids"
    """Empty or repeated ids leave open which result belongs to which call."""
    HANDOFF_WITHOUT_REASON = "handoff_without_reason"
    HANDOFF_WITHOUT_MESSAGE = "handoff_without_message"
    NO_AGENT_STEP = "no_agent_step"


class OriginRule(StrEnum):
    """verify's rules that need the company's folder or the scenario, and do not apply where there is none."""

    TICKET_CATEGORY = "ticket_category"
    FACTS = "facts"
    OUTCOME = "outcome"


class Recorded(pa.DataFrameModel):
    """teacher_gen's table of the logs: one row a line that is not blank; no rows where the teacher is an endpoint."""

    file: str = pa.Field(description="relative to the folder of logs")
    line: int = pa.Field(ge=1)
    conversation_id: str = pa.Field(nullable=True, description="as in the traces; null where unmapped")
    company: str = pa.Field(nullable=True)
    system: str = pa.Field(nullable=True, description="the log's system message")
    left_out: int = pa.Field(ge=0, description="messages that the mapping's `leave_out` took off")
    metadata: str = pa.Field(description="the conversation's other keys, as a JSON object")
    reason: str = pa.Field(nullable=True, isin=list(UnmappedReason), description="null where mapped")
    detail: str = pa.Field(nullable=True)
    index: int = pa.Field(nullable=True, description="the message at fault, from 0, as the log counts")
    raw: str = pa.Field(nullable=True, description="the line as it came, where unmapped")

    class Config:
        strict = True


class RecordedCounts(BaseModel):
    """Conversations in = mapped + unmapped, and unmapped = the sum of the reasons; `left_out` counts messages."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    in_: Count = Field(alias="in")
    mapped: Count
    unmapped: Count
    reasons: dict[UnmappedReason, Count]
    left_out: Count

    @model_validator(mode="after")
    def _nothing_is_lost_in_silence(self) -> RecordedCounts:
        if self.in_ != self.mapped + self.unmapped or self.unmapped != sum(self.reasons.values()):
            raise ValueError("in must equal mapped + unmapped, and unmapped the sum of its reasons")
        return self


class RecordedGenMetrics(TeacherGenMetrics):
    """`metrics/teacher_gen.json` where the conversations are recorded."""

    recorded: RecordedCounts


class OriginVerifyMetrics(VerifyMetrics):
    """`metrics/verify.json`, with the number of conversations that a rule could not be applied to."""

    not_applicable: dict[OriginRule, Count]
