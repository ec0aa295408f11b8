"""Repeat the training conversations that contain a hand-off.

Reads   data/verify/train.parquet
Writes  data/oversample/train.parquet, metrics/oversample.json

Escalate is a rare action: without repetition the student learns to say it hardly ever (v2), with it the hand-offs come
back (v2.1). Whole conversations are repeated, and the order is shuffled once, by `seed`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pydantic import Field

from schemas.metrics import OversampleMetrics
from stages._chunks import Parts, checked_chunks, on_all_cores, publish
from stages._stage import (
    Params,
    load_params,
    run,
    say,
    write_metrics,
)
from stages._turns import escalations, turn_counts

if TYPE_CHECKING:
    import polars as pl

TRAIN = Path("data/verify/train.parquet")
OVERSAMPLED = Path("data/oversample/train.parquet")
METRICS = Path("metrics/oversample.json")
CONVERSATIONS = 4096
"""How many are put in order at once: about 40,000 messages. In memory are these, and of all others the name and the counts, 150 bytes each."""


class OversampleParams(Params):
    """`oversample`."""

    escalation_factor: int = Field(ge=1)
    seed: int


def shuffled(counts: pl.DataFrame, factor: int, seed: int) -> pl.DataFrame:
    """The order in which conversations stand: every one of `counts` with its copies, `factor` of them if it escalates, in seeded places."""
    import polars as pl

    copies = pl.when(pl.col("escalates") > 0).then(pl.int_ranges(0, factor)).otherwise(pl.int_ranges(0, 1)).alias("copy")
    return counts.with_columns(copies).explode("copy").sample(fraction=1.0, shuffle=True, seed=seed).with_row_index("place")


def repeat(table: pl.LazyFrame, order: pl.DataFrame, folder: Path, at_once: int = CONVERSATIONS) -> Iterator[pl.DataFrame]:
    """The table in that order, so many conversations at a time.

    A copy's `conversation_id` ends in `#copy`, so that rows of one conversation stay together under one name. In `folder`, which is
    made here, rows are first brought near their places: one pass over the table, however large it is.
    """
    import polars as pl

    places = order.lazy().select("conversation_id", "copy", "place", near=pl.col("place") // at_once)
    (table.join(places, on="conversation_id", how="inner")
     .sink_parquet(pl.PartitionBy(folder, key="near", include_key=False), compression="lz4", mkdir=True))
    for near in range(-(-len(order) // at_once)):
        yield (pl.read_parquet(folder / f"near={near}" / "*.parquet").sort("place", "index")
               .with_columns(conversation_id=pl.when(pl.col("copy") > 0).then(pl.format("{}#{}", "conversation_id", "copy"))
                             .otherwise("conversation_id"))
               .drop("place"))


def main() -> None:
    import polars as pl

    # Not above, since a process of `on_all_cores` imports this module and would take twice as long to begin.
    from schemas.tables import Oversampled, Verified

    params = load_params("oversample", OversampleParams)
    said = (chunk.select("conversation_id", "role", "content") for chunk in checked_chunks(TRAIN, Verified))
    counts = pl.concat(count for _, count in on_all_cores(escalations, said))
    order = shuffled(counts, params.escalation_factor, params.seed)
    with TemporaryDirectory() as folder:
        parts = Parts(Path(folder) / "parts", Oversampled)
        parts.add(Oversampled.empty())
        for part in repeat(pl.scan_parquet(TRAIN), order, Path(folder) / "near"):
            parts.add(part)
        publish(OVERSAMPLED, parts.scan())
    before, after = turn_counts(counts), turn_counts(order)
    write_metrics(METRICS, {"escalation_factor": params.escalation_factor, "before": before, "after": after}, OversampleMetrics)
    say(f"oversample: {before['conversations']} conversations become {after['conversations']}; "
        f"escalate is {before['escalate_share']:.1%} of agent turns before, {after['escalate_share']:.1%} after")


if __name__ == "__main__":
    run(main)
