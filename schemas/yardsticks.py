"""Hand-off scores that were fitted: the one that the threshold is put on, and the yardsticks that it has to beat."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import pandera.polars as pa
from pydantic import BaseModel, ConfigDict, Field, RootModel

from schemas.action import ActionName

Share = Annotated[float, Field(ge=0, le=1)]


class Yardstick(StrEnum):
    """Which classifier."""

    BAG_OF_WORDS = "bag_of_words"
    EMBEDDING = "embedding"


class YardstickScores(pa.DataFrameModel):
    """yardsticks' table: one row an agent turn and yardstick, of turns that the yardstick was not fitted on."""

    split: str = pa.Field(isin=["calibration", "held_out"])
    company: str
    conversation_id: str
    index: int = pa.Field(ge=0, description="position of the gold agent message in its conversation")
    model: str = pa.Field(isin=list(Yardstick))
    gold_action: str = pa.Field(isin=list(ActionName))
    p_escalate: float = pa.Field(ge=0, le=1)

    class Config:
        strict = True


class Ranking(BaseModel):
    """How well a score ranks hand-off turns above the others."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    auc: Share
    recall_at_5_percent: Share


class ScoreFigures(BaseModel):
    """A score that was fitted: its strength of fit, and its ranking of turns that it was not fitted on; null where one kind of turn is missing."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    inverse_regularisation: float = Field(gt=0)
    left_out_company_auc: Share = Field(description="mean over the training companies, each scored by fits on the others; a stack weighs those")
    calibration: Ranking | None
    held_out: dict[str, Ranking | None]


class YardsticksMetrics(RootModel[dict[Yardstick, ScoreFigures]]):
    """`metrics/yardsticks.json`."""


class HandoffScoreMetrics(ScoreFigures):
    """`metrics/handoff_score.json`; the strength is the probe's."""

    student: str
    layer: int = Field(ge=1, description="the probe reads what enters it")
