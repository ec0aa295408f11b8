"""How often a teacher agrees with itself, as `metrics/teacher_gen.json` holds it."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field, model_validator

from schemas.metrics import Count, Rate, TeacherGenMetrics
from schemas.recorded import RecordedCounts


class TurnKind(StrEnum):
    """Which turns, by the step that the teacher took in the conversation itself."""

    HANDOFF = "handoff_turns"
    OTHER = "other_turns"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Pairs(_Model):
    """Pairs of answers to the same turn: `k` of `n` agree. The 95 % interval draws whole conversations; null for no pairs."""

    k: Count
    n: Count
    low: Rate | None
    high: Rate | None

    @model_validator(mode="after")
    def _no_more_than_all(self) -> Pairs:
        if self.k > self.n:
            raise ValueError("more pairs agree than there are")
        return self


class Agreement(_Model):
    """Of one company's turns of one kind."""

    turns: Count
    unanswered: Count = Field(description="answers that the endpoint did not give; they are in no pair")
    action: Pairs = Field(description="both are a valid step, with the same action")
    handoff: Pairs = Field(description="both hand off, or neither does; what is no valid step does not")


class SelfAgreement(_Model):
    """The teacher of the file, asked `samples` times at each turn; what that cost is not in the file's other figures."""

    samples: int = Field(ge=2)
    prompt_tokens: Count
    cached_tokens: Count
    completion_tokens: Count
    cost_usd: float | None = Field(ge=0)
    companies: dict[str, dict[TurnKind, Agreement]]


class GenerationMetrics(TeacherGenMetrics):
    """`metrics/teacher_gen.json` with whatever the stage may add to it."""

    recorded: RecordedCounts | None = None
    self_agreement: SelfAgreement | None = None
