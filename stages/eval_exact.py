"""Score every reply against the gold step: action accuracy, escalation recall, over-escalation, valid output.

Reads   data/verify/{held_out,calibration}.parquet, data/predict/{base,student}.parquet, data/handoff_score/scores.parquet
Writes  data/eval_exact/{predictions,calibration}.parquet, metrics/eval_exact.json, metrics/eval_exact_counts.json

`valid_output` is measured free-running for both models. The other figures are the student's free-running ones and the
base model's under the JSON schema. A text that is not exactly one valid step is wrong and not a hand-off.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from schemas.action import ActionError, parse_action
from schemas.counts import ExactCounts
from schemas.errors import InputError
from schemas.metrics import ExactMetrics
from schemas.tables import SCORED, Calibration, Predictions, Replies, Scores, Verified
from stages._rates import Counts, clustered_rate, in_words, outcomes, shares, without_turns
from stages._stage import read_table, run, say, write_metrics, write_table

if TYPE_CHECKING:
    import polars as pl

HELD_OUT = Path("data/verify/held_out.parquet")
CALIBRATION = Path("data/verify/calibration.parquet")
BASE_REPLIES = Path("data/predict/base.parquet")
STUDENT_REPLIES = Path("data/predict/student.parquet")
HANDOFF_SCORES = Path("data/handoff_score/scores.parquet")
PREDICTIONS = Path("data/eval_exact/predictions.parquet")
SCORES = Path("data/eval_exact/calibration.parquet")
METRICS = Path("metrics/eval_exact.json")
COUNTS = Path("metrics/eval_exact_counts.json")


def gold_turns(table: pl.DataFrame) -> pl.DataFrame:
    """One row an agent turn: company, conversation_id, index, number, gold_action, gold_reason."""
    import polars as pl

    agent = table.filter(pl.col("role") == "agent").with_columns(
        pl.int_range(pl.len()).over("conversation_id").cast(pl.Int64).alias("number"))
    steps = [parse_action(text) for text in agent["content"]]
    return agent.select("company", "conversation_id", "index", "number").with_columns(
        pl.Series("gold_action", [step.action.value for step in steps], dtype=pl.String),
        pl.Series("gold_reason", [step.args.get("reason") for step in steps], dtype=pl.String))


def parse_replies(replies: pl.DataFrame) -> pl.DataFrame:
    """The replies with `action` and `reason`, or the `fault` that makes a text no valid step."""
    import polars as pl

    actions: list[str | None] = []
    reasons: list[str | None] = []
    faults: list[str | None] = []
    for text in replies["raw"]:
        try:
            step = parse_action(text)
        except ActionError as error:
            actions.append(None)
            reasons.append(None)
            faults.append(error.fault.value)
        else:
            actions.append(step.action.value)
            reasons.append(step.args.get("reason"))
            faults.append(None)
    return replies.with_columns(pl.Series("action", actions, dtype=pl.String), pl.Series("reason", reasons, dtype=pl.String),
                                pl.Series("fault", faults, dtype=pl.String)).with_columns(
        pl.when(pl.col("action") == "escalate").then("other").alias("other_action"))


def scored(rows: pl.DataFrame, model: str) -> dict[str, pl.DataFrame]:
    """The turns that each of one model's four rates is of, with `hit` for those that it counts."""
    import polars as pl

    mine = rows.filter(pl.col("model") == model)
    return {**outcomes(mine.filter(pl.col("decoding") == SCORED[model])),
            "valid_output": mine.filter(pl.col("decoding") == "free").with_columns(hit=pl.col("fault").is_null())}


def score(rows: pl.DataFrame, model: str) -> dict[str, tuple[int, int]]:
    """The four rates of one model as (k, n)."""
    return {name: (int(outcome["hit"].sum()), len(outcome)) for name, outcome in scored(rows, model).items()}


def main() -> None:
    import polars as pl

    gold, calibration = gold_turns(read_table(HELD_OUT, Verified)), gold_turns(read_table(CALIBRATION, Verified))
    if gold.is_empty():
        raise InputError(f"{HELD_OUT} holds no conversation, so there is nothing to measure", "metrics/verify.json says what was rejected, and why")
    handoff_scores = read_table(HANDOFF_SCORES, Scores)
    replies = parse_replies(pl.concat([read_table(BASE_REPLIES, Replies), read_table(STUDENT_REPLIES, Replies)]))
    for model, decoding in (("base", "free"), ("base", "schema"), ("student", "free")):
        mine = replies.filter((pl.col("model") == model) & (pl.col("decoding") == decoding))
        if missing := len(gold.join(mine, on=["conversation_id", "number"], how="anti")):
            raise InputError(f"{missing} of {len(gold)} agent turns have no {decoding} reply of {model}", f"dvc repro --force predict_{model}")
    if missing := len(pl.concat([gold, calibration]).join(handoff_scores, on=["conversation_id", "index"], how="anti")):
        raise InputError(f"{missing} of {len(gold) + len(calibration)} agent turns have no hand-off score", "dvc repro --force handoff_score")
    gold, calibration = (turns.join(handoff_scores, on=["conversation_id", "index"], how="inner") for turns in (gold, calibration))
    write_table(SCORES, calibration.sort("company", "conversation_id", "index"), Calibration)
    rows = gold.join(replies, on=["conversation_id", "number"], how="inner").sort("company", "conversation_id", "index", "model", "decoding")
    write_table(PREDICTIONS, rows, Predictions)
    counts: Counts = {company: {model: score(rows.filter(pl.col("company") == company), model) for model in SCORED}
                      for company in sorted(gold["company"].unique())}
    write_metrics(METRICS, shares(counts), ExactMetrics)
    write_metrics(COUNTS, {company: {model: {name: clustered_rate(outcome) for name, outcome in
                                             scored(rows.filter(pl.col("company") == company), model).items()} for model in SCORED}
                           for company in counts}, ExactCounts)
    say(f"eval_exact, base -> student: {in_words(counts)}")
    for warning in without_turns(counts):
        say(f"warning: {warning}")


if __name__ == "__main__":
    run(main)
