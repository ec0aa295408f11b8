"""Say whether the student may go to customers: every rule of params.yaml's `gate` with its value, interval and verdict.

    python -m stages.gate [--base REV] [--format plain|markdown|json]

Exit code 0 if every rule passes, else 1. What is judged is what ships, the student under its threshold; what it does without
stands beside. A rule on a limit passes only if the whole 95 % interval is on the right side, fails only if all of it is on the
wrong one, and otherwise cannot tell, which fails unless `cannot_tell_passes`. The wider of the Wilson interval and the one
that draws whole conversations counts. No rule is about `acceptable`: a judge lets a needless hand-off pass.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from schemas.errors import InputError
from schemas.operating import Policy
from stages._intervals import cluster_ratio, wilson
from stages._rates import outcomes
from stages._revisions import OPERATING_POINT, WORKSPACE, Side, predictions, read_json, read_revision, same_turns
from stages._show import markdown, plain
from stages._stage import Params, load_params, run

if TYPE_CHECKING:
    import polars as pl

DETAIL = Path("metrics/calibrate_detail.json")
EXACT = Path("metrics/eval_exact_counts.json")
JUDGE = Path("metrics/eval_judge_counts.json")
PASS, FAIL, CANNOT_TELL, SKIPPED = "pass", "fail", "cannot tell", "skipped"
WORST_FIRST = (FAIL, CANNOT_TELL, PASS)
POOLED = "pooled"
MOST_TURNS = 1_000_000


class GateParams(Params):
    """`gate`."""

    min_recall: float = Field(ge=0, le=1, description="of the lower limit of escalation recall, in the worst company")
    max_over_escalation: float = Field(ge=0, le=1, description="of the upper limit, in the worst company")
    max_cost_increase: float = Field(ge=0, description="minutes a turn, of the upper limit of the increase over the base revision")
    min_valid_output: float = Field(ge=0, le=1, description="in the worst company")
    max_unscored: float = Field(ge=0, le=1, description="in the worst company")
    cannot_tell_passes: bool


@dataclass(frozen=True)
class Verdict:
    """One rule: what is wanted, what was found at the threshold and without it, and what follows."""

    rule: str
    wanted: str
    value: str
    interval: str
    plain: str
    verdict: str
    why: str = ""


def limits(rate: dict[str, Any]) -> tuple[float, float]:
    """The wider of a rate's two intervals at either end."""
    lows, highs = ([rate[name] for name in names if rate.get(name) is not None] for names in (("low", "cluster_low"), ("high", "cluster_high")))
    return min(lows), max(highs)


def more_turns(k: int, n: int, limit: float) -> int | None:
    """How many more turns, hit at the same rate, put the whole Wilson interval on one side of `limit`; None if no number within reason does."""
    if not n or k / n == limit:
        return None

    def decided(total: int) -> bool:
        low, high = wilson(round(k / n * total), total)
        return not low < limit < high

    enough = n
    while not decided(enough):
        enough *= 2
        if enough > MOST_TURNS:
            return None
    short = enough // 2
    while enough - short > 1:
        middle = (short + enough) // 2
        short, enough = (short, middle) if decided(middle) else (middle, enough)
    return max(1, enough - n)


def limit_rule(name: str, by_company: dict[str, Any], limit: float, at_least: bool, turns: str) -> Verdict:
    """A rule on the interval of a rate at the threshold, in the company where it stands worst."""
    rule, wanted = f"{name}, {'lower' if at_least else 'upper'} limit, worst company", f"{'≥' if at_least else '≤'} {100 * limit:.1f} %"
    found = []
    for company, of in by_company.items():
        at = of["at_threshold"][name]
        low, high = limits(at)
        why = ""
        if (low >= limit) if at_least else (high <= limit):
            verdict = PASS
        elif (high < limit) if at_least else (low > limit):
            verdict = FAIL
        else:
            verdict = CANNOT_TELL
            more = more_turns(at["k"], at["n"], limit)
            why = f"needs about {more} more {turns} turns" if more else f"{turns} turns: none, or the value is too close to the limit for any number"
        found.append((WORST_FIRST.index(verdict), low if at_least else -high, Verdict(
            rule, wanted, f"{_share(at)} {company}", _interval(low, high), _share(of["plain"][name]), verdict, why)))
    return min(found, key=lambda entry: entry[:2])[2]


def value_rule(name: str, rates: dict[str, dict[str, Any]], limit: float, at_least: bool) -> Verdict:
    """A rule on a share as it is, in the worst company; no threshold touches it."""
    shares = {company: rate["k"] / rate["n"] for company, rate in rates.items() if rate["n"]}
    if not shares:
        return Verdict(f"{name}, worst company", "", "–", "–", "–", CANNOT_TELL, "there are no turns")
    company = (min if at_least else max)(shares, key=lambda slug: shares[slug])
    passes = shares[company] >= limit if at_least else shares[company] <= limit
    found = _share(rates[company])
    return Verdict(f"{name}, worst company", f"{'≥' if at_least else '≤'} {100 * limit:.1f} %", f"{found} {company}",
                   _interval(*limits(rates[company])), found, PASS if passes else FAIL)


def minutes(rows: pl.DataFrame, costs: dict[str, float]) -> Any:
    """What the action at each turn costs, in minutes: array (n,), in order of the turns."""
    rows = rows.sort("company", "conversation_id", "index")
    gold, escalated = (rows["gold_action"] == "escalate").to_numpy(), (rows["action"] == "escalate").fill_null(False).to_numpy()
    return costs["missed_minutes"] * (gold & ~escalated) + costs["needless_minutes"] * (~gold & escalated)


def student(side: Side) -> pl.DataFrame:
    """The student's rows on one side."""
    rows = predictions(side)
    return rows.filter(rows["model"] == "student")


def what_ships(rev: str) -> Side:
    """A revision under its threshold, or plain where it was made before there was one."""
    try:
        read_revision(OPERATING_POINT, rev)
    except InputError:
        return Side(rev, Policy.PLAIN)
    return Side(rev, Policy.TUNED)


def cost_rule(base: str | None, limit: float, costs: dict[str, float]) -> Verdict:
    """The cost a turn must not be shown to be, nor left open to be, more than `limit` above the base revision's, on the same turns.

    Raises:
        InputError: the base revision has no data, or was measured on other turns.
    """
    rule, wanted = "expected cost, upper limit of the increase", f"≤ {limit:+.2f} min"
    if base is None:
        return Verdict(rule, wanted, "–", "–", "–", SKIPPED, "no base revision: --base REV")
    old, new = what_ships(base), Side(WORKSPACE, Policy.TUNED)
    rows_old, rows_new = student(old), student(new)
    same_turns(old, new, rows_old, rows_new)
    before, after, without = (minutes(rows, costs) for rows in (rows_old, rows_new, student(Side(WORKSPACE, Policy.PLAIN))))
    low, high = cluster_ratio(rows_new.sort("company", "conversation_id", "index")["conversation_id"].to_list(), after - before,
                              [1.0] * len(after)) or (0.0, 0.0)
    verdict = PASS if high <= limit else FAIL if low > limit else CANNOT_TELL
    return Verdict(rule, wanted, f"{(after - before).mean():+.2f} min against {old}", f"{low:+.2f} to {high:+.2f}",
                   f"{(without - before).mean():+.2f} min", verdict, "needs more turns" if verdict == CANNOT_TELL else "")


def check_detail(detail: dict[str, Any]) -> None:
    """Refuse figures that are not those of the predictions and the threshold beside them.

    Raises:
        InputError: the metrics are older than what they are of.
    """
    rows = student(Side(WORKSPACE, Policy.TUNED))
    for company, models in detail["held_out"].items():
        mine = rows if company == POOLED else rows.filter(rows["company"] == company)
        for name, outcome in outcomes(mine).items():
            shown = models["student"]["at_threshold"][name]
            if (shown["k"], shown["n"]) != (int(outcome["hit"].sum()), len(outcome)):
                raise InputError(f"{DETAIL} says {name} {shown['k']}/{shown['n']} in {company}, and predictions and threshold say "
                                 f"{int(outcome['hit'].sum())}/{len(outcome)}", "dvc repro calibrate")


def judge_rules(params: GateParams, detail: dict[str, Any], exact: dict[str, Any], judge: dict[str, Any], base: str | None) -> list[Verdict]:
    """Every rule's verdict, in the order of params.yaml."""
    by_company = {company: models["student"] for company, models in detail["held_out"].items() if company != POOLED}
    return [
        limit_rule("escalate_recall", by_company, params.min_recall, True, "hand-off"),
        limit_rule("over_escalation", by_company, params.max_over_escalation, False, "other"),
        cost_rule(base, params.max_cost_increase, detail["costs"]),
        value_rule("valid_output", {company: exact[company]["student"]["valid_output"] for company in by_company}, params.min_valid_output, True),
        value_rule("unscored", {company: judge[company]["student"]["unscored"] for company in by_company}, params.max_unscored, False)]


def passes(verdicts: list[Verdict], params: GateParams) -> bool:
    """Whether all rules together let the student through."""
    enough = {PASS, SKIPPED, *([CANNOT_TELL] if params.cannot_tell_passes else [])}
    return all(verdict.verdict in enough for verdict in verdicts)


def _share(rate: dict[str, Any]) -> str:
    return f"{100 * rate['k'] / rate['n']:.1f} % ({rate['k']}/{rate['n']})" if rate["n"] else "– (0/0)"


def _interval(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description="Say whether the student may go to customers.")
    parser.add_argument("--base", metavar="REV", help="the revision whose cost must not be exceeded")
    parser.add_argument("--format", choices=["plain", "markdown", "json"], default="plain")
    options = parser.parse_args()
    params = load_params("gate", GateParams)
    detail, exact, judge = (read_json(path, WORKSPACE) for path in (DETAIL, EXACT, JUDGE))
    check_detail(detail)
    verdicts = judge_rules(params, detail, exact, judge, options.base)
    passed = passes(verdicts, params)
    if options.format == "json":
        print(json.dumps({"passed": passed, "rules": [asdict(verdict) for verdict in verdicts]}, indent=2, ensure_ascii=False))
    else:
        table = [["rule", "wanted", "at the threshold", "95 % interval", "without", "verdict"],
                 *([v.rule, v.wanted, v.value, v.interval, v.plain, v.verdict + (f": {v.why}" if v.why else "")] for v in verdicts)]
        print((markdown if options.format == "markdown" else plain)(table) + "\n")
        print(f"Judge: {judge['judge']}. The gate {'passes' if passed else 'does not pass'}.")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    run(main)
