"""Compare two revisions, or two policies, turn by turn.

    python -m stages.compare REV_A REV_B [--format plain|markdown|json] [--no-judge]

A side is `REV`, `REV:plain` (the model as it decodes; the same as REV) or `REV:tuned` (the student under that revision's own
models/operating_point.json). REV is a commit, branch, tag, experiment or `workspace`. Differences are B - A.

`acceptable` compares the judge's verdicts where both sides have them; a turn that either left unscored is out. A judge saw what
the model decoded, so tuned sides have no verdicts.
"""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.counts import JudgeCounts
from schemas.errors import InputError
from schemas.operating import Policy
from schemas.tables import Judgements
from stages._intervals import WANTED, turns_needed
from stages._paired import FEWEST_CHANGED, Paired, compare_pairs
from stages._rates import outcomes
from stages._revisions import Side, predictions, read_json, read_revision, same_grader, same_turns
from stages._show import markdown, plain
from stages._stage import run

if TYPE_CHECKING:
    import polars as pl

JUDGEMENTS = Path("data/eval_judge/judgements.parquet")
JUDGE = Path("metrics/eval_judge_counts.json")
TURN = ["company", "conversation_id", "index"]
POOLED = "pooled"


def by_company(rows: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """The rows of every company, and of all together."""
    return {**{company: rows.filter(rows["company"] == company) for company in sorted(rows["company"].unique())}, POOLED: rows}


def exact(left: pl.DataFrame, right: pl.DataFrame) -> dict[str, dict[str, Paired]]:
    """company -> rate -> comparison, for one model's rows on both sides, which are of the same turns."""
    first, second = by_company(left.sort(TURN)), by_company(right.sort(TURN))
    result = {}
    for company in first:
        a, b = outcomes(first[company]), outcomes(second[company])
        result[company] = {name: compare_pairs(a[name]["conversation_id"].to_list(), a[name]["hit"], b[name]["hit"]) for name in a}
    return result


def verdicts(rev: str) -> pl.DataFrame:
    """The judge's table of a revision.

    Raises:
        InputError: it has none on this machine.
    """
    import pandera.errors
    import polars as pl

    try:
        return Judgements.validate(pl.read_parquet(io.BytesIO(read_revision(JUDGEMENTS, rev))))
    except (pandera.errors.SchemaError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        why = " ".join(str(error).split())[:120]
        raise InputError(f"{JUDGEMENTS} of '{rev}' is no Judgements table: {why}", "dvc repro --force eval_judge") from None


def same_judge(a: Side, b: Side, names: list[str]) -> None:
    """Refuse to set one judge's verdicts against another's.

    Raises:
        InputError: two judges, for instance the simulator and a model.
    """
    if names[0] != names[1]:
        raise InputError(f"{a.rev} was judged by '{names[0]}' and {b.rev} by '{names[1]}': their verdicts cannot be compared",
                         "--no-judge leaves 'acceptable' out; or run eval_judge with one judge in both")


def judged(a: Side, b: Side, model: str) -> dict[str, Paired]:
    """company -> comparison of `acceptable`, over the turns that both sides' judge scored.

    Raises:
        InputError: a side has no judgements on this machine.
    """
    import polars as pl

    left, right = (verdicts(side.rev).filter((pl.col("model") == model) & (pl.col("verdict") != "unscored")) for side in (a, b))
    both = left.join(right, on=TURN, how="inner", suffix="_b").sort(TURN)
    return {company: compare_pairs(rows["conversation_id"].to_list(), rows["verdict"] == "acceptable", rows["verdict_b"] == "acceptable")
            for company, rows in by_company(both).items()}


def compare(a: Side, b: Side, with_judge: bool = True) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows (company, model, rate and a `Paired`'s fields) and notes.

    Raises:
        InputError: the sides cannot be compared, or one of them has no data.
    """
    import polars as pl

    left, right = predictions(a), predictions(b)
    models = sorted(set(left["model"]) & set(right["model"]), reverse=True)
    left, right = (rows.filter(pl.col("model").is_in(models)) for rows in (left, right))
    same_turns(a, b, left, right)
    same_grader(a.rev, b.rev)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    judge_counts = with_judge and a.policy is b.policy is Policy.PLAIN
    if judge_counts:
        try:
            names = [read_json(JUDGE, side.rev, JudgeCounts)["judge"] for side in (a, b)]
        except InputError as error:
            judge_counts = False
            notes.append(f"acceptable is not compared, for who judged is not known: {error} (hint: {error.hint})")
        else:
            same_judge(a, b, names)
    elif with_judge:
        notes.append("acceptable is not compared: the judge saw what the models decoded, not what the threshold makes of it")
    for model in models:
        mine, other = (side.filter(pl.col("model") == model) for side in (left, right))
        if model == "base" and mine.sort(TURN)["action"].equals(other.sort(TURN)["action"]):
            notes.append("base: the same steps on both sides, not shown")
            continue
        found = exact(mine, other)
        if judge_counts:
            try:
                for company, pair in judged(a, b, model).items():
                    found[company]["acceptable"] = pair
            except InputError as error:
                notes.append(f"{model}: acceptable is not compared: {error} (hint: {error.hint})")
        rows += [{"company": company, "model": model, "rate": name, **asdict(pair)}
                 for company, rates in found.items() for name, pair in rates.items()]
        notes += too_narrow(found, model) + too_few(found[POOLED], model)
    return rows, notes


def too_narrow(found: dict[str, dict[str, Paired]], model: str) -> list[str]:
    """A note that names the intervals which rest on too few conversations to be believed."""
    named = [f"{company} {name} ({pair.changed})" for company, rates in found.items() for name, pair in rates.items()
             if 0 < pair.changed < FEWEST_CHANGED]
    return [f"{model}: fewer than {FEWEST_CHANGED} conversations changed, so go by p and not by the interval: {', '.join(named)}"] if named else []


def too_few(pooled: dict[str, Paired], model: str) -> list[str]:
    """A note for each rate whose turns, differing as often as they do here, could not show the change that one would want to see."""
    notes = []
    for name, (change, _) in WANTED.items():
        n = pooled[name].n
        if n and n < (needed := turns_needed(change, (pooled[name].gained + pooled[name].lost) / n)):
            notes.append(f"{model}: {n} turns are too few to show a change of {100 * change:g} points in {name}: "
                         f"it takes about {needed} (80 % power)")
    return notes


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Header and one row a comparison, as text."""
    shown = [["company", "model", "rate", "A", "B", "B - A", "95 % interval", "A only", "B only", "n", "McNemar p", "p by conversation"]]
    for row in rows:
        if row["n"]:
            shares = [f"{100 * row[k] / row['n']:.1f} %" for k in ("k_a", "k_b")]
            shares += [f"{100 * row['difference']:+.1f}", f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}"]
        else:
            shares = ["–"] * 4
        shown.append([row["company"], row["model"], row["rate"], *shares, *(str(row[name]) for name in ("lost", "gained", "n")),
                      _p(row["mcnemar_p"]), _p(row["cluster_p"])])
    return shown


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else "<0.001"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare two revisions, or two policies, turn by turn.")
    parser.add_argument("a", metavar="REV_A[:plain|:tuned]")
    parser.add_argument("b", metavar="REV_B[:plain|:tuned]")
    parser.add_argument("--format", choices=["plain", "markdown", "json"], default="plain")
    parser.add_argument("--no-judge", action="store_true", help="leave the judge's verdicts out")
    options = parser.parse_args()
    a, b = Side.parse(options.a), Side.parse(options.b)
    rows, notes = compare(a, b, not options.no_judge)
    if options.format == "json":
        print(json.dumps({"a": str(a), "b": str(b), "rows": rows, "notes": notes}, indent=2, ensure_ascii=False))
        return
    print(f"A: {a}. B: {b}. Differences in points; the interval and the last p draw whole conversations.\n")
    print((markdown if options.format == "markdown" else plain)(table(rows)) + "\n")
    for note in notes:
        print(f"note: {note}")


if __name__ == "__main__":
    run(main)
