"""What the metrics files hold; checked before they are written, since other tools build on them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, model_validator

from schemas.traces import RejectReason

Rate = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Model = Literal["base", "student"]


class _Metrics(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TeacherGenMetrics(_Metrics):
    """`metrics/teacher_gen.json`."""

    teacher: str
    customer: str
    scenarios_per_company: Count
    scenarios: Count
    conversations: Count
    agent_turns: Count
    infrastructure_failures: Count
    prompt_tokens: Count
    cached_tokens: Count
    completion_tokens: Count
    cost_usd: float | None = Field(ge=0, description="what the table's rows cost when they were paid for")


class Turns(_Metrics):
    """Conversations, agent turns, and how many of them hand off."""

    conversations: Count
    agent_turns: Count
    handoff_turns: Count
    escalate_share: Rate


class VerifyMetrics(_Metrics):
    """`metrics/verify.json`: conversations in = kept + rejected, and rejected = the sum of the reasons."""

    teacher: str
    in_: Count = Field(alias="in")
    kept: Count
    rejected: Count
    reasons: dict[RejectReason, Count]
    scenarios_without_a_kept_conversation: Count
    train: Turns
    calibration: Turns
    held_out: Turns

    @model_validator(mode="after")
    def _nothing_is_dropped_in_silence(self) -> VerifyMetrics:
        if self.in_ != self.kept + self.rejected or self.rejected != sum(self.reasons.values()):
            raise ValueError("in must equal kept + rejected, and rejected the sum of its reasons")
        return self


class OversampleMetrics(_Metrics):
    """`metrics/oversample.json`."""

    escalation_factor: int = Field(ge=1)
    before: Turns
    after: Turns


class QloraTrainMetrics(_Metrics):
    """`metrics/qlora_train.json`: what is learnt in an epoch; tokens are those of the distinct conversations."""

    student: str
    conversations: Count
    distinct_conversations: Count
    tokens: Count
    supervised_tokens: Count
    steps: Count
    train_loss: float


class ExactRates(_Metrics):
    """One model on one company."""

    action_accuracy: Rate
    escalate_recall: Rate
    over_escalation: Rate
    valid_output: Rate


class ExactMetrics(RootModel[dict[str, dict[Model, ExactRates]]]):
    """`metrics/eval_exact.json`: company -> model -> rates."""


class JudgeRates(_Metrics):
    """One model on one company."""

    acceptable: Rate
    over_escalation: Rate
    unscored: Rate


class JudgeMetrics(RootModel[dict[str, dict[Model, JudgeRates]]]):
    """`metrics/eval_judge.json`: company -> model -> rates."""
