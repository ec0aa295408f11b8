"""The operating point: the threshold that whoever runs the student obeys, and what is measured at it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Scorer = Literal["base", "student", "bag_of_words", "embedding"]


class Rule(StrEnum):
    """How the threshold is chosen."""

    MAX_OVER_ESCALATION = "max_over_escalation"
    EXPECTED_COST = "expected_cost"


class Policy(StrEnum):
    """What acts: the model as it decodes, or the model under the threshold."""

    PLAIN = "plain"
    TUNED = "tuned"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RuleText(_Strict):
    """The rule by its name, and in words."""

    name: Rule
    in_words: str


class CalibrationCounts(_Strict):
    """The calibration turns, and what the threshold does to them."""

    conversations: Count
    turns: Count
    handoff_turns: Count
    missed: Count
    needless: Count


class Platt(_Strict):
    """Probability = 1 / (1 + exp(-(slope · logit(score) + intercept))), the score first held inside [1e-6, 1 - 1e-6]."""

    method: Literal["platt"] = "platt"
    slope: float = Field(ge=0)
    intercept: float


class MissBound(_Strict):
    """Of the calibration hand-offs how many the threshold misses, and what share of further ones like them it may; or why they are too few."""

    k: Count
    n: Count
    upper_95: Share
    refused: str | None
    needed_handoff_turns: Count
    note: str


class Conformal(_Strict):
    """The score below which a turn is left to the agent so that a hand-off is missed at most at `miss_rate`, or why there is none."""

    miss_rate: Share
    threshold: Share | None
    refused: str | None
    needed_handoff_turns: Count
    note: str


class OperatingPoint(_Strict):
    """`models/operating_point.json`: hand off where the score is `threshold` or more; null never hands off."""

    model: Literal["student"]
    score: str
    threshold: Share | None
    rule: RuleText
    calibration: CalibrationCounts
    miss_rate: MissBound | None = None  # older revisions have none, and are compared too
    recalibration: Platt
    conformal: Conformal


class AtPolicy(_Strict):
    """The figures of one policy; cost in minutes a turn."""

    escalate_recall: Share
    over_escalation: Share
    expected_cost: float = Field(ge=0)


class Calibrated(_Strict):
    """One model on one company; a yardstick has no policy of its own, so its `plain` is missing."""

    plain: AtPolicy | None = None
    at_threshold: AtPolicy
    auc: Share | None
    brier: Share
    brier_recalibrated: Share


class CalibrateMetrics(BaseModel):
    """`metrics/calibrate.json`: the student's threshold, the rule, and beside them company -> model -> figures."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, dict[Scorer, Calibrated]]
    threshold: Share | None
    rule: Rule
