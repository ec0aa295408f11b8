"""What the files of counts hold, as far as the report reads them: rates as k of n with an interval, company by company."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, RootModel

from schemas.metrics import Count, Model, Rate


class _Known(BaseModel):
    """What is read of a file that says more."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Counted(_Known):
    """k of n, with the 95 % interval; a file may say more about a rate."""

    k: Count
    n: Count
    low: Rate
    high: Rate


class ExactCounted(_Known):
    """One model on one company."""

    action_accuracy: Counted
    escalate_recall: Counted
    over_escalation: Counted
    valid_output: Counted


class JudgeCounted(_Known):
    """One model on one company."""

    acceptable: Counted
    unscored: Counted


class ExactCounts(RootModel[Annotated[dict[str, dict[Model, ExactCounted]], Field(min_length=1)]]):
    """`metrics/eval_exact_counts.json`: company -> model -> counts."""


class JudgeCounts(_Known):
    """`metrics/eval_judge_counts.json`: who judged, what that cost, and beside it company -> model -> counts."""

    __pydantic_extra__: dict[str, dict[Model, JudgeCounted]]
    judge: str
    cost: dict[str, Count | float | None] = Field({}, description="empty in a revision from before it was counted")


class Bin(Counted):
    """Turns of like score: its mean, and the share of hand-offs among them."""

    predicted: Rate
    observed: Rate


class Cost(_Known):
    """Minutes a turn, with the 95 % interval that draws whole conversations."""

    value: float = Field(ge=0)
    cluster_low: float | None
    cluster_high: float | None


class Decided(_Known):
    """What comes of one policy: the model as it decodes, or under the threshold."""

    action_accuracy: Counted
    escalate_recall: Counted
    over_escalation: Counted
    expected_cost: Cost


class Area(_Known):
    """A score's curve in figures; null where the turns are all of one kind."""

    value: Rate | None
    cluster_low: Rate | None
    cluster_high: Rate | None
    recall_at_5_percent: Rate | None


class Brier(_Known):
    """Brier score of the score as it is, and of saying the turns' own share of hand-offs every time."""

    raw: Rate
    constant: Rate


class Measured(_Known):
    """One score on one company."""

    at_threshold: Decided
    auc: Area
    brier: Brier


class MeasuredModel(Measured):
    """A model, which decides without the threshold too."""

    plain: Decided


class Reliability(_Known):
    """Bins of the score as it is, and after the map to probabilities."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    raw: list[Bin]
    recalibrated: list[Bin]


class Binned(MeasuredModel):
    """The student on all held-out companies."""

    reliability: Reliability


class CompanyFigures(_Known):
    """All scores on one company; base and student share theirs."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    base: MeasuredModel
    student: MeasuredModel
    bag_of_words: Measured
    embedding: Measured


class Pooled(CompanyFigures):
    """All scores on all held-out companies together."""

    student: Binned


class HeldOut(_Known):
    """All held-out companies together, and beside it every company by name."""

    __pydantic_extra__: dict[str, CompanyFigures]
    pooled: Pooled


class WorstRate(Counted):
    """A rate at the threshold in the company where that is worst, and there as the model decodes."""

    company: str
    plain: Counted


class WorstCost(Cost):
    """The same for the cost."""

    company: str
    plain: Cost


class Worst(_Known):
    """Where each figure is worst; that may be three companies."""

    escalate_recall: WorstRate
    over_escalation: WorstRate
    expected_cost: WorstCost


class WorstCompany(_Known):
    """The student's worst company; the file has the other scores' too."""

    student: Worst


class Costs(_Known):
    """Minutes of people's time for one mistake; assumed."""

    missed_minutes: float = Field(ge=0)
    needless_minutes: float = Field(ge=0)


class Compared(_Known):
    """Two sides on the same turns: B - A with the interval that draws whole conversations, and how many of them changed."""

    k_a: Count
    k_b: Count
    n: Count
    changed: Count
    difference: float | None
    low: float | None
    high: float | None


class Compareds(_Known):
    """What decides about hand-offs, compared."""

    escalate_recall: Compared
    over_escalation: Compared


class CalibrateDetail(_Known):
    """`metrics/calibrate_detail.json`."""

    rule: str
    costs: Costs
    held_out: HeldOut
    against_yardsticks: dict[str, Compareds] = Field({}, description="empty in a revision from before they were compared")
    worst_company: WorstCompany
    warnings: list[str]
