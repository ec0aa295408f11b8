"""How many agent turns there are, and how many hand off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from schemas.action import ActionError, ActionName, parse_action
from schemas.errors import InputError

if TYPE_CHECKING:
    import polars as pl


def escalations(table: pl.DataFrame) -> pl.DataFrame:
    """conversation_id, agent turns, and how many of them escalate; one row a conversation, in the table's order."""
    import polars as pl

    agent = table.filter(pl.col("role") == "agent")
    try:
        escalates = [parse_action(text).action is ActionName.ESCALATE for text in agent["content"]]
    except ActionError as error:
        raise InputError(f"the table holds an agent message that is no step: {error}", "dvc repro --force verify") from None
    return (agent.with_columns(pl.Series("escalates", escalates, dtype=pl.Int64))
            .group_by("conversation_id", maintain_order=True).agg(pl.len().cast(pl.Int64).alias("turns"), pl.col("escalates").sum()))


def turn_counts(counts: pl.DataFrame) -> dict[str, Any]:
    """The sums of `escalations`: conversations, agent turns, hand-off turns and their share."""
    return with_share(len(counts), int(counts["turns"].sum()), int(counts["escalates"].sum()))


def with_share(conversations: int, turns: int, handoffs: int) -> dict[str, Any]:
    """Counts as they stand in the metrics, with the share of hand-offs."""
    return {"conversations": conversations, "agent_turns": turns, "handoff_turns": handoffs, "escalate_share": handoffs / max(1, turns)}
