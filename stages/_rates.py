"""A rate is never a bare number: k of n, with its intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages._intervals import cluster_ratio, wilson

if TYPE_CHECKING:
    import polars as pl


def outcomes(rows: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """The turns that each rate is of, with `hit` for those that it counts.

    Args:
        rows: `gold_action` and `action`, one row a turn; null is no valid step: wrong, and no hand-off.
    """
    import polars as pl

    handoff, escalated = pl.col("gold_action") == "escalate", pl.col("action").eq("escalate").fill_null(False)
    return {
        "action_accuracy": rows.with_columns(hit=pl.col("action").eq(pl.col("gold_action")).fill_null(False)),
        "escalate_recall": rows.filter(handoff).with_columns(hit=escalated),
        "over_escalation": rows.filter(~handoff).with_columns(hit=escalated)}


def rate(k: int, n: int) -> dict[str, Any]:
    """`{k, n, low, high}`: the count and its 95 % Wilson interval."""
    low, high = wilson(k, n)
    return {"k": k, "n": n, "low": low, "high": high}


def clustered_rate(outcome: pl.DataFrame) -> dict[str, Any]:
    """`rate` of `hit` with `cluster_low` and `cluster_high`, the interval that draws whole conversations; null for no turns."""
    import numpy as np

    hits = outcome["hit"].to_numpy()
    low, high = cluster_ratio(outcome["conversation_id"].to_list(), hits, np.ones(len(hits))) or (None, None)
    return {**rate(int(hits.sum()), len(hits)), "cluster_low": low, "cluster_high": high}


Counts = dict[str, dict[str, dict[str, tuple[int, int]]]]
"""company -> model -> rate -> (k, n)."""


def shares(counts: Counts) -> dict[str, dict[str, dict[str, float]]]:
    """company -> model -> rate -> k / n, and 0 for no turns: a metrics file of rates has no null."""
    return {company: {model: {name: k / n if n else 0.0 for name, (k, n) in rates.items()} for model, rates in models.items()}
            for company, models in counts.items()}


def in_words(counts: Counts) -> str:
    """Every rate of every company as `base -> student`, on one line."""
    return "; ".join(f"{company} " + ", ".join(
        f"{name} " + " -> ".join("{}/{}".format(*rates[name]) for rates in models.values()) for name in next(iter(models.values())))
        for company, models in counts.items())


def without_turns(counts: Counts) -> list[str]:
    """A sentence for every rate that `shares` calls 0 because no turn counts for it."""
    found = []
    for company, models in counts.items():
        for name in next(iter(models.values())):
            if empty := [model for model, rates in models.items() if not rates[name][1]]:
                found.append(f"{company}: no turn counts for {name} of {' and '.join(empty)}: the 0.0 in the metrics is 0 of 0")
    return found
