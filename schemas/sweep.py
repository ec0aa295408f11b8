"""What the sweep over oversampling factors found."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from schemas.metrics import Count, Rate


class _Sweep(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Measured(_Sweep):
    """k of n, with the 95 % Wilson interval."""

    k: Count
    n: Count
    low: Rate
    high: Rate


class Rates(_Sweep):
    """One student on one split, as it decodes."""

    follows_from: str = Field(description="names the code, parameters and data; what has the same name need not be measured again")
    action_accuracy: Measured
    escalate_recall: Measured
    over_escalation: Measured
    valid_output: Measured


class Run(_Sweep):
    """One student. `held_out` is there for the smallest and the chosen factor where it was asked for, and chooses nothing."""

    factor: int = Field(ge=1)
    seed: int
    calibration: Rates
    held_out: Rates | None = None


class SweepMetrics(_Sweep):
    """`metrics/sweep.json`."""

    rule: str = Field(description="how the factor is chosen, in words")
    chosen_on_calibration: int = Field(ge=1)
    chosen_with_seed: int = Field(description="of the runs that the factor was chosen by; those with other seeds show the spread")
    runs: list[Run] = Field(min_length=1)
