"""The tables between stages: Parquet, one row a message (or a turn), checked by pandera on write and on read."""

from __future__ import annotations

import pandera.polars as pa
import polars as pl

from schemas.action import ActionFault, ActionName, HandoffReason
from schemas.company import Kind
from schemas.traces import RejectReason, Role

_ROLES, _KINDS = list(Role), list(Kind)
_ACTIONS, _REASONS = list(ActionName), list(HandoffReason)


class Conversations(pa.DataFrameModel):
    """What every conversation table holds: one row a message, in order within its conversation."""

    conversation_id: str = pa.Field(str_length={"min_value": 1})
    company: str = pa.Field(str_length={"min_value": 1})
    index: int = pa.Field(ge=0, description="position of the message in its conversation")
    role: str = pa.Field(isin=_ROLES)
    content: str

    class Config:
        strict = True

    @pa.dataframe_check
    @classmethod
    def conversations_stand_together(cls, data: pa.PolarsData) -> pl.LazyFrame:
        """No conversation begins twice."""
        return data.lazyframe.select(((pl.col("index") == 0).sum() == pl.col("conversation_id").n_unique()) | (pl.len() == 0))

    @pa.dataframe_check
    @classmethod
    def messages_are_in_order(cls, data: pa.PolarsData) -> pl.LazyFrame:
        """A conversation's rows stand together, numbered 0, 1, 2, …"""
        previous = pl.col("index").shift(1)
        same = pl.col("conversation_id") == pl.col("conversation_id").shift(1)
        return data.lazyframe.select(
            pl.when(pl.col("index") == 0).then(~same.fill_null(False)).otherwise((same & (previous + 1 == pl.col("index"))).fill_null(False)))


class Traces(Conversations):
    """teacher_gen's table: every conversation held, with what it cost and how it ended."""

    scenario: str = pa.Field(nullable=True, description="the scenario played, null for recorded logs")
    attempt: int = pa.Field(ge=0)
    teacher: str
    prompt_tokens: int = pa.Field(ge=0)
    cached_tokens: int = pa.Field(ge=0, description="of the prompt's, those that the provider read from its prefix cache")
    completion_tokens: int = pa.Field(ge=0)
    cost_usd: float = pa.Field(ge=0, nullable=True, description="dollars when it was paid for, null where no price is known")
    failure: str = pa.Field(nullable=True, description="why the endpoint gave up on this conversation")


class Verified(Conversations):
    """verify's kept conversations; the agent's content is canonical JSON."""

    system: str = pa.Field(description="the company's system prompt: later stages know the company from here alone")
    scenario: str = pa.Field(nullable=True)
    kind: str = pa.Field(nullable=True, isin=_KINDS)


class Rejected(Traces):
    """verify's rejected conversations, with the first rule each breaks."""

    reject_reason: str = pa.Field(isin=list(RejectReason))
    reject_detail: str
    reject_index: int = pa.Field(nullable=True, description="the message at fault, null for the conversation as a whole")


class Oversampled(Verified):
    """oversample's table: conversations with a hand-off stand in it several times."""

    copy: int = pa.Field(ge=0)


class Replies(pa.DataFrameModel):
    """predict's table: one row an agent turn and way of decoding, as the model wrote it."""

    conversation_id: str
    number: int = pa.Field(ge=0, description="which agent turn of the conversation")
    model: str = pa.Field(isin=["base", "student"])
    decoding: str = pa.Field(isin=["free", "schema"])
    raw: str
    other: str = pa.Field(nullable=True, isin=_ACTIONS, description="the most likely action but escalate, null where no action was begun")

    class Config:
        strict = True


class PromptStates(pa.DataFrameModel):
    """What the base model holds in its middle when it has read an agent turn's prompt: one row a turn."""

    conversation_id: str
    number: int = pa.Field(ge=0, description="which agent turn of the conversation")
    state: pl.List = pa.Field(dtype_kwargs={"inner": pl.Float32}, description="what enters layer `handoff_score.layer` at the prompt's last token")

    class Config:
        strict = True


class Scores(pa.DataFrameModel):
    """handoff_score's table: one row an agent turn of the calibration and held-out conversations."""

    conversation_id: str
    index: int = pa.Field(ge=0, description="position of the gold agent message in its conversation")
    p_escalate: float = pa.Field(ge=0, le=1, description="how likely the turn is to be handed off, before a word is written")

    class Config:
        strict = True


class Predictions(pa.DataFrameModel):
    """eval_exact's table: one row an agent turn and model."""

    company: str
    conversation_id: str
    index: int = pa.Field(ge=0, description="position of the gold agent message in its conversation")
    model: str = pa.Field(isin=["base", "student"])
    decoding: str = pa.Field(isin=["free", "schema"])
    gold_action: str = pa.Field(isin=_ACTIONS)
    gold_reason: str = pa.Field(nullable=True, isin=_REASONS)
    raw: str
    action: str = pa.Field(nullable=True, isin=_ACTIONS, description="null where the text is not a valid step")
    reason: str = pa.Field(nullable=True, isin=_REASONS)
    fault: str = pa.Field(nullable=True, isin=list(ActionFault))
    p_escalate: float = pa.Field(nullable=True, ge=0, le=1, description="how likely the turn is to be handed off; alike for both models")
    other_action: str = pa.Field(nullable=True, isin=_ACTIONS, description="its best action other than escalate, where its own is escalate")

    class Config:
        strict = True


SCORED = {"base": "schema", "student": "free"}
"""Which decoding the figures other than `valid_output` are taken from."""


class Calibration(pa.DataFrameModel):
    """eval_exact's second table: one row an agent turn of the calibration split."""

    company: str
    conversation_id: str
    index: int = pa.Field(ge=0)
    gold_action: str = pa.Field(isin=_ACTIONS)
    p_escalate: float = pa.Field(ge=0, le=1)

    class Config:
        strict = True


class Judgements(pa.DataFrameModel):
    """eval_judge's table: one row a judged turn and model."""

    company: str
    conversation_id: str
    index: int = pa.Field(ge=0)
    model: str = pa.Field(isin=["base", "student"])
    gold_action: str = pa.Field(isin=_ACTIONS)
    action: str = pa.Field(nullable=True, isin=_ACTIONS)
    verdict: str = pa.Field(isin=["acceptable", "not_acceptable", "unscored"])
    answer: str = pa.Field(description="the judge's raw text")

    class Config:
        strict = True
