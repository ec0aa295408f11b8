"""Small tables with hand-off scores, for the tests of thresholds, comparisons and the gate."""

import contextlib
import importlib
import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import yaml

from stages._rates import rate
from stages._stage import run
from tests.helpers import PARAMS, inside

COMPANIES = ("north", "south")


def turns(companies=COMPANIES, conversations=40, length=3, handoff_every=2):
    """Rows (company, conversation_id, index, gold_action): every so-manieth conversation ends in a hand-off."""
    return pl.DataFrame([
        {"company": company, "conversation_id": f"{company}/{number}", "index": 2 * turn + 1,
         "gold_action": "escalate" if turn == length - 1 and number % handoff_every == 0 else "reply"}
        for company in companies for number in range(conversations) for turn in range(length)])


def scores(table, strength=2.0, seed=0):
    """A hand-off score for every row: logistic, `strength` apart for hand-offs."""
    drawn = np.random.default_rng(seed).normal(size=len(table)) + strength * (table["gold_action"] == "escalate").to_numpy() - 2
    return pl.Series("p_escalate", 1 / (1 + np.exp(-drawn)))


def predictions(table=None, action="reply", seed=0, strength=2.0, models=("base", "student")):
    """A Predictions table in which the models, which share the score, take one action everywhere; base is decoded both ways."""
    table = turns() if table is None else table
    parts = []
    for model in models:
        scored = table.with_columns(scores(table, strength, seed + len("student")), model=pl.lit(model))
        parts += [scored.with_columns(decoding=pl.lit(way)) for way in (("free", "schema") if model == "base" else ("free",))]
    return with_action(pl.concat(parts), pl.lit(action))


def with_action(rows, action):
    """The rows with `action` as their step, and a raw text that goes with it."""
    rows = rows.with_columns(action=action.cast(pl.String))
    none = pl.lit(None, pl.String)
    escalates = pl.col("action") == "escalate"
    return rows.with_columns(
        gold_reason=pl.when(pl.col("gold_action") == "escalate").then(pl.lit("legal")), raw=pl.col("action").fill_null("nonsense"),
        reason=pl.when(escalates).then(pl.lit("legal")), fault=pl.when(pl.col("action").is_null()).then(pl.lit("unknown_action")).otherwise(none),
        other_action=pl.when(escalates).then(pl.lit("reply")))


def calibration(strength=2.0, seed=7, table=None):
    """A Calibration table of two training companies."""
    table = turns(("east", "west")) if table is None else table
    return table.with_columns(scores(table, strength, seed))


def yardsticks(held_out=None):
    """A YardstickScores table over the calibration and held-out turns."""
    parts = [table.with_columns(scores(table, 1.0, seed), split=pl.lit(split), model=pl.lit(model))
             for split, table in (("calibration", turns(("east", "west"))), ("held_out", turns() if held_out is None else held_out))
             for seed, model in enumerate(("bag_of_words", "embedding"))]
    return pl.concat(parts)


def lay_out(folder, rows=None, calibrated=None, **sections):
    """Put the inputs of `calibrate`, and what the gate reads besides, into a folder; `sections` are laid over params.yaml's."""
    rows = predictions() if rows is None else rows
    for path in ("data/eval_exact", "data/yardsticks", "metrics"):
        (folder / path).mkdir(parents=True, exist_ok=True)
    params = {name: {**section, **sections.get(name, {})} for name, section in PARAMS.items()}
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    rows.write_parquet(folder / "data/eval_exact/predictions.parquet")
    (calibration() if calibrated is None else calibrated).write_parquet(folder / "data/eval_exact/calibration.parquet")
    yardsticks(rows.filter(pl.col("model") == "student").select("company", "conversation_id", "index", "gold_action")).write_parquet(
        folder / "data/yardsticks/scores.parquet")
    put_counts(folder, rows)


def put_counts(folder, rows, judge="simulator", unscored=0, acceptable=1.0, valid=1.0):
    """metrics/eval_exact_counts.json and eval_judge_counts.json, as far as the gate and compare read them."""
    n = {company: len(rows.filter((pl.col("company") == company) & (pl.col("model") == "student"))) for company in rows["company"].unique()}
    others = ("action_accuracy", "escalate_recall", "over_escalation")
    exact = {company: {"student": {"valid_output": rate(round(valid * count), count), **dict.fromkeys(others, rate(0, count))}}
             for company, count in n.items()}
    judged = {company: {"student": {"unscored": rate(unscored, count), "acceptable": rate(round(acceptable * count), count)}}
              for company, count in n.items()}
    (folder / "metrics/eval_exact_counts.json").write_text(json.dumps(exact))
    (folder / "metrics/eval_judge_counts.json").write_text(json.dumps({"judge": judge, **judged}))


def command(folder, module, *arguments):
    """What `python -m stages.MODULE ARGUMENTS` in a folder leaves: returncode, stdout, stderr; in this process, since starting one takes seconds."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with inside(folder), pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [module, *arguments])
        try:
            run(importlib.import_module(f"stages.{module}").main)
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())
