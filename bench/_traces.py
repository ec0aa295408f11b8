"""`python -m bench._traces FROM TO TURNS`: a table of traces with at least so many agent turns, from copies of a real one.

A copy's conversations have ids of their own, and a word of the copy's own stands in everything that customer and agent write: in every
customer's message, in the agent's thought, search and message, and in a ticket's result. So no text of theirs comes back in another copy, and a
stage that remembers what it has examined gains nothing. The articles of a help centre do come back, as they do in real tables.

Prints agent turns, messages and conversations.
"""

from __future__ import annotations

import sys

import polars as pl

SPOKEN = '("(?:thought|query|message)": ")([^"])'
"""The beginning of what an agent writes in a step's JSON, where it writes anything."""
TICKET = "^(?:created|updated) "
"""The beginning of a ticket's result, which ends in the agent's own words."""


def grow(traces: pl.DataFrame, turns: int) -> pl.DataFrame:
    """Whole conversations until there are `turns` agent turns; the first copy is the table itself."""
    agent = pl.col("role") == "agent"
    copies = pl.int_range(-(-turns // int((traces["role"] == "agent").sum())), eager=True).alias("again").to_frame()
    again = pl.col("again")
    # The most attempts there are keep the ids of copies apart.
    attempt = pl.col("attempt") + again * (traces["attempt"].max() + 1)  # type: ignore[operator]
    # No vowel and no digit, so that it is neither a word that anybody writes nor a number that has to come from somewhere.
    word = pl.concat_str(pl.lit("q"), again.cast(pl.String).str.replace_many(list("0123456789"), list("bcdfghjklm")))
    text = pl.col("content")
    content = (pl.when(again == 0).then(text)
               .when(agent).then(text.str.replace_all(SPOKEN, pl.concat_str(pl.lit("${1}"), word, pl.lit(" ${2}"))))
               .when(pl.col("role") == "customer").then(pl.format("{} {}", word, text))
               .when(text.str.contains(TICKET)).then(pl.format("{} {}", text, word)).otherwise(text))
    return (
        copies.lazy().join(traces.lazy(), how="cross", maintain_order="left_right")
        .with_columns(before=agent.cum_sum() - agent)
        .filter(pl.col("before").first().over("again", "conversation_id") < turns)
        .with_columns(attempt=attempt, conversation_id=pl.concat_str("company", pl.lit("/"), "scenario", pl.lit("/"), attempt), content=content)
        .drop("again", "before").collect())


def main() -> None:
    traces = pl.read_parquet(sys.argv[1])
    grown = grow(traces.filter(pl.col("scenario").is_not_null()), int(sys.argv[3]))
    grown.write_parquet(sys.argv[2])
    print((grown["role"] == "agent").sum(), len(grown), grown["conversation_id"].n_unique())


if __name__ == "__main__":
    main()
