"""Repeat the training conversations that contain a hand-off.

Reads   data/verify/train.parquet
Writes  data/oversample/train.parquet, metrics/oversample.json

Escalate is a rare action: without repetition the student learns to say it hardly ever (v2), with it the hand-offs come
back (v2.1). Whole conversations are repeated, and the order is shuffled once, by `seed`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from schemas.metrics import OversampleMetrics
from schemas.tables import Oversampled, Verified
from stages._stage import (
    Params,
    load_params,
    read_table,
    run,
    say,
    write_metrics,
    write_table,
)
from stages._turns import escalations, turn_counts

if TYPE_CHECKING:
    import polars as pl

TRAIN = Path("data/verify/train.parquet")
OVERSAMPLED = Path("data/oversample/train.parquet")
METRICS = Path("metrics/oversample.json")


class OversampleParams(Params):
    """`oversample`."""

    escalation_factor: int = Field(ge=1)
    seed: int


def repeat(table: pl.DataFrame, counts: pl.DataFrame, factor: int, seed: int) -> pl.DataFrame:
    """The table with every conversation that escalates standing `factor` times, in seeded order.

    A copy's `conversation_id` ends in `#copy`, so that rows of one conversation stay together under one name.
    """
    import polars as pl

    copies = pl.when(pl.col("escalates") > 0).then(pl.int_ranges(0, factor)).otherwise(pl.int_ranges(0, 1)).alias("copy")
    order = counts.with_columns(copies).explode("copy").sample(fraction=1.0, shuffle=True, seed=seed).with_row_index("place")
    return (order.select("conversation_id", "copy", "place").join(table, on="conversation_id", how="inner")
            .sort("place", "index")
            .with_columns(conversation_id=pl.when(pl.col("copy") > 0).then(pl.format("{}#{}", "conversation_id", "copy"))
                          .otherwise("conversation_id"))
            .drop("place"))


def main() -> None:
    params = load_params("oversample", OversampleParams)
    train = read_table(TRAIN, Verified)
    counts = escalations(train)
    table = repeat(train, counts, params.escalation_factor, params.seed)
    write_table(OVERSAMPLED, table, Oversampled)
    before, after = turn_counts(counts), turn_counts(escalations(table))
    write_metrics(METRICS, {"escalation_factor": params.escalation_factor, "before": before, "after": after}, OversampleMetrics)
    say(f"oversample: {before['conversations']} conversations become {after['conversations']}; "
        f"escalate is {before['escalate_share']:.1%} of agent turns before, {after['escalate_share']:.1%} after")


if __name__ == "__main__":
    run(main)
