"""What the files of counts hold: rates as k of n with an interval, company by company."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, RootModel

from schemas.metrics import Count, Model, Rate


class Counted(BaseModel):
    """k of n, with the 95 % interval; a file may say more about a rate."""

    model_config = ConfigDict(extra="allow", frozen=True)
    k: Count
    n: Count
    low: Rate
    high: Rate


class ExactCounted(BaseModel):
    """One model on one company."""

    model_config = ConfigDict(extra="allow", frozen=True)
    action_accuracy: Counted
    escalate_recall: Counted
    over_escalation: Counted
    valid_output: Counted


class JudgeCounted(BaseModel):
    """One model on one company."""

    model_config = ConfigDict(extra="allow", frozen=True)
    acceptable: Counted


class ExactCounts(RootModel[Annotated[dict[str, dict[Model, ExactCounted]], Field(min_length=1)]]):
    """`metrics/eval_exact_counts.json`: company -> model -> counts."""


class JudgeCounts(BaseModel):
    """`metrics/eval_judge_counts.json`: who judged, what that cost, and beside it company -> model -> counts."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, dict[Model, JudgeCounted]]
    judge: str
    cost: dict[str, Count | float | None]
