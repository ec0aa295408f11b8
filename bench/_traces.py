"""`python -m bench._traces FROM TO TURNS`: a table of traces with at least so many agent turns, from copies of a real one.

Prints agent turns, messages and conversations.
"""

from __future__ import annotations

import sys

import polars as pl


def grow(traces: pl.DataFrame, turns: int) -> pl.DataFrame:
    """Whole conversations until there are `turns` agent turns; each copy has an id and an opening line of its own."""
    agent = pl.col("role") == "agent"
    copies = pl.int_range(-(-turns // int((traces["role"] == "agent").sum())), eager=True).alias("again").to_frame()
    again = pl.col("again")
    # The most attempts there are keep the ids of copies apart.
    attempt = pl.col("attempt") + again * (traces["attempt"].max() + 1)  # type: ignore[operator]
    return (
        copies.lazy().join(traces.lazy(), how="cross", maintain_order="left_right")
        .with_columns(before=agent.cum_sum() - agent)
        .filter(pl.col("before").first().over("again", "conversation_id") < turns)
        .with_columns(attempt=attempt, conversation_id=pl.concat_str("company", pl.lit("/"), "scenario", pl.lit("/"), attempt),
                      content=pl.when((pl.col("index") == 0) & (again > 0)).then(pl.format("{} ({})", "content", again)).otherwise("content"))
        .drop("again", "before").collect())


def main() -> None:
    traces = pl.read_parquet(sys.argv[1])
    grown = grow(traces.filter(pl.col("scenario").is_not_null()), int(sys.argv[3]))
    grown.write_parquet(sys.argv[2])
    print((grown["role"] == "agent").sum(), len(grown), grown["conversation_id"].n_unique())


if __name__ == "__main__":
    main()
