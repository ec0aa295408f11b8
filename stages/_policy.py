"""What acts at a turn: the model as it decodes, or the model under a threshold on its hand-off score."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from schemas.errors import InputError
from schemas.tables import SCORED, Predictions

if TYPE_CHECKING:
    import polars as pl

SCORE = "p_escalate"
"""The column that the threshold is put on."""


def scored_rows(predictions: pl.DataFrame) -> pl.DataFrame:
    """One row a turn and model: the decoding that figures are taken from."""
    import polars as pl

    return predictions.filter(pl.col("decoding") == pl.col("model").replace_strict(SCORED))


def parse_predictions(content: bytes, name: str, with_score: bool) -> pl.DataFrame:
    """A Parquet file as Predictions; one from before hand-off scores gets them as null, or is refused where they are needed.

    Raises:
        InputError: scores are needed and it has none, or it is no such table.
    """
    import pandera.errors
    import polars as pl

    try:
        frame = pl.read_parquet(io.BytesIO(content))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise InputError(f"{name} is not a Predictions table: {str(error).splitlines()[0]}", "dvc repro --force eval_exact") from None
    missing = {SCORE, "other_action"} - set(frame.columns)
    if missing and with_score:
        raise InputError(f"{name} has no {' and no '.join(sorted(missing, reverse=True))}: it was written before there were hand-off scores",
                         "dvc repro eval_exact writes it anew; an old revision can be compared plain")
    frame = frame.with_columns(pl.lit(None, pl.String if column == "other_action" else pl.Float64).alias(column) for column in sorted(missing))
    try:
        frame = Predictions.validate(frame)
    except (pandera.errors.SchemaError, pandera.errors.SchemaErrors) as error:
        raise InputError(f"{name} is not a Predictions table: {' '.join(str(error).split())[:200]}", "dvc repro --force eval_exact") from None
    if with_score:
        for (model,), part in frame.group_by("model", maintain_order=True):
            if nulls := part[SCORE].null_count():
                raise InputError(f"{name} has no {SCORE} in {nulls} of {len(part)} rows of {model}", "dvc repro handoff_score eval_exact")
    return frame


def hands_off(threshold: float | None) -> pl.Expr:
    """Whether a score is at or above the threshold; without one, never."""
    import polars as pl

    return pl.lit(False) if threshold is None else (pl.col(SCORE) >= threshold).fill_null(False)


def tuned(rows: pl.DataFrame, threshold: float | None) -> pl.DataFrame:
    """The rows with `action` as it is under the threshold.

    At or above it the turn is handed off. Below it the model's own action stands, and `other_action` where its own was to hand
    off (null, no valid step, where it has no other).
    """
    import polars as pl

    own = pl.when(pl.col("action") == "escalate").then("other_action").otherwise("action")
    return rows.with_columns(action=pl.when(hands_off(threshold)).then(pl.lit("escalate")).otherwise(own))


def minutes(rows: pl.DataFrame, cost_missed: float, cost_needless: float) -> Any:
    """What `action` costs at each turn, in minutes of people's time: array (n,), in order of the rows; no valid step is no hand-off."""
    gold, escalated = (rows["gold_action"] == "escalate").to_numpy(), (rows["action"] == "escalate").fill_null(False).to_numpy()
    return cost_missed * (gold & ~escalated) + cost_needless * (~gold & escalated)
