"""Say whether the student may go to customers: every rule of params.yaml's `gate` with its value, interval and verdict.

    python -m stages.gate [--base REV [--worse]] [--format plain|markdown|json]

Exit code 0 if every rule passes that was asked, else 1; without a base revision the cost is not asked. With `--worse` a rule that the
base's student does not pass either is let go, so that code 1 says what a change has made worse. What is judged is what ships,
the student under its threshold; what it does without stands beside. A rule passes only if the whole 95 % interval is on the right
side, fails only if all of it is on the wrong one, and otherwise cannot tell, which fails unless `cannot_tell_passes`. Of a rate, the
wider of the Wilson interval and the one that draws whole conversations counts; the cost has the latter, and where few conversations changed
an exact bound. No rule is about `acceptable`: a judge lets a needless hand-off pass.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from pydantic import Field

from schemas.counts import CalibrateDetail, ExactCounts, JudgeCounts
from schemas.errors import InputError
from schemas.operating import Policy
from stages._intervals import by_conversation, clopper_pearson_upper, cluster_ratio
from stages._paired import FEWEST_CHANGED
from stages._policy import minutes
from stages._rates import outcomes
from stages._revisions import OPERATING_POINT, PREDICTIONS, WORKSPACE, Side, has_file, predictions, read_json, same_grader, same_turns
from stages._show import markdown, plain
from stages._stage import PARAMS, Params, load_params, run

if TYPE_CHECKING:
    from collections.abc import Iterable

    import polars as pl

DETAIL = Path("metrics/calibrate_detail.json")
EXACT = Path("metrics/eval_exact_counts.json")
JUDGE = Path("metrics/eval_judge_counts.json")
INPUTS = (PARAMS, DETAIL, EXACT, JUDGE, OPERATING_POINT, PREDICTIONS)
"""What it judges by, in the workspace."""
PASS, FAIL, CANNOT_TELL, SKIPPED = "pass", "fail", "cannot tell", "skipped"
WORST_FIRST = (FAIL, CANNOT_TELL, PASS)
POOLED = "pooled"
MOST_TURNS = 1_000_000
Z95 = NormalDist().inv_cdf(0.975)


class GateParams(Params):
    """`gate`."""

    min_recall: float = Field(ge=0, le=1, description="of the lower limit of escalation recall, in the worst company")
    max_over_escalation: float = Field(ge=0, le=1, description="of the upper limit, in the worst company")
    max_cost_increase: float = Field(ge=0, description="minutes a turn, of the upper limit of the increase over the base revision")
    min_valid_output: float = Field(ge=0, le=1, description="of the lower limit, in the worst company")
    max_unscored: float = Field(ge=0, le=1, description="of the upper limit, in the worst company")
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


def more_turns(rate: dict[str, Any], limit: float) -> int | None:
    """About how many more turns, hit at the same rate, put the whole interval on one side of `limit`; None if no number within reason does.

    The Wilson interval of n turns with the share p ends at the limit where n = z² limit (1 - limit) / (p - limit)². Where drawing
    whole conversations makes the interval wider, a turn tells less: n is multiplied by the design effect (Kish 1965, "Survey
    Sampling"), the squared ratio of the two half-widths, each from p to the interval's end on the side of the limit.
    """
    if not rate["n"] or (share := rate["k"] / rate["n"]) == limit:
        return None
    end = int(limit > share)
    wilson, wider = (rate["low"], rate["high"])[end], limits(rate)[end]
    effect = ((wider - share) / (wilson - share)) ** 2
    return _within_reason(effect * Z95**2 * limit * (1 - limit) / (share - limit) ** 2, rate["n"])


def more_turns_of_mean(value: float, low: float, high: float, n: int, limit: float) -> int | None:
    """The same for the interval (low, high) of a mean over n turns: it shrinks towards `value` with the square root of n."""
    if value == limit:
        return None
    return _within_reason(n * (((low, high)[int(limit > value)] - value) / (limit - value)) ** 2, n)


def _within_reason(needed: float, n: int) -> int | None:
    return max(1, ceil(needed) - n) if needed <= MOST_TURNS else None


def why_not(more: int | None, turns: str) -> str:
    """What it takes to tell."""
    return f"needs about {more} more {turns}" if more else f"no number of {turns} would tell: there are none, or the value is too close to the limit"


def limit_rule(name: str, by_company: dict[str, tuple[dict[str, Any], dict[str, Any]]], limit: float, at_least: bool, turns: str) -> Verdict:
    """A rule on the interval of a rate, in the company where it stands worst.

    Args:
        name: of the rate.
        by_company: the rate as it ships, and as the model decodes.
        limit: what the lower limit must reach, or the upper one keep to.
        at_least: which of the two.
        turns: what the rate is a share of.
    """
    rule, wanted = f"{name}, {'lower' if at_least else 'upper'} limit, worst company", f"{'≥' if at_least else '≤'} {100 * limit:.1f} %"
    found = []
    for company, (at, plain_rate) in by_company.items():
        low, high = limits(at)
        why = ""
        if (low >= limit) if at_least else (high <= limit):
            verdict = PASS
        elif (high < limit) if at_least else (low > limit):
            verdict = FAIL
        else:
            verdict, why = CANNOT_TELL, why_not(more_turns(at, limit), turns)
        found.append((WORST_FIRST.index(verdict), low if at_least else -high, Verdict(
            rule, wanted, f"{_share(at)} {company}", _interval(low, high), _share(plain_rate), verdict, why)))
    return min(found, key=lambda entry: entry[:2])[2]


def student(side: Side) -> pl.DataFrame:
    """The student's rows on one side, in order of the turns."""
    rows = predictions(side)
    return rows.filter(rows["model"] == "student").sort("company", "conversation_id", "index")


def what_ships(rev: str) -> Side:
    """A revision under its threshold, or plain where it was made before there was one.

    Raises:
        InputError: there is no such revision.
    """
    return Side(rev, Policy.TUNED if has_file(OPERATING_POINT, rev) else Policy.PLAIN)


def cost_rule(base: str | None, limit: float, costs: dict[str, float]) -> Verdict:
    """The cost a turn must not be shown to be, nor left open to be, more than `limit` above the base revision's, on the same turns.

    Raises:
        InputError: the base revision has no data, or was measured on other turns or by another grader.
    """
    rule, wanted = "expected cost, upper limit of the increase", f"≤ {limit:+.2f} min"
    if base is None:
        return Verdict(rule, wanted, "–", "–", "–", SKIPPED, "no base revision: --base REV")
    old, new = what_ships(base), Side(WORKSPACE, Policy.TUNED)
    rows_old, rows_new = student(old), student(new)
    same_turns(old, new, rows_old, rows_new)
    same_grader(base, WORKSPACE)
    before, after, without = (minutes(rows, costs["missed_minutes"], costs["needless_minutes"])
                              for rows in (rows_old, rows_new, student(Side(WORKSPACE, Policy.PLAIN))))
    conversations = rows_new["conversation_id"].to_list()
    interval = cluster_ratio(conversations, after - before, [1.0] * len(after))
    if interval is None:
        return Verdict(rule, wanted, "–", "–", "–", CANNOT_TELL, "there are no turns")
    (low, high), increase = interval, float((after - before).mean())
    verdict = PASS if high <= limit else FAIL if low > limit else CANNOT_TELL
    why = why_not(more_turns_of_mean(increase, low, high, len(after), limit), "turns") if verdict == CANNOT_TELL else ""
    changes = by_conversation(conversations, after - before)[0]
    dearer = changes[changes > 0]
    if verdict == PASS and len(dearer) and (changes != 0).sum() < FEWEST_CHANGED:
        # Too few for the bootstrap. At most so many of all conversations are dearer, each by no more than the dearest one here.
        most = clopper_pearson_upper(len(dearer), len(changes)) * len(changes) * dearer.max() / len(after)
        if most > limit:
            verdict = CANNOT_TELL
            why = f"only {len(dearer)} of {len(changes)} conversations cost more: too few for the interval, and up to {most:+.2f} min is possible"
    return Verdict(rule, wanted, f"{increase:+.2f} min against {old}", f"{low:+.2f} to {high:+.2f}", f"{(without - before).mean():+.2f} min",
                   verdict, why)


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


def counted(path: Path, content: dict[str, Any], companies: Iterable[str], name: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """company -> the student's rate from a file of counts, twice: no threshold touches it.

    Raises:
        InputError: the file is of other companies, or of the base model alone.
    """
    found = {}
    for company in companies:
        if company not in content:
            raise InputError(f"{path} has no {company}, which {DETAIL} has: it is of an earlier choice of held-out companies",
                             f"dvc repro {path.stem.removesuffix('_counts')}")
        if "student" not in content[company]:
            raise InputError(f"{path} has no student in {company}", f"dvc repro {path.stem.removesuffix('_counts')}")
        rate = content[company]["student"][name]
        found[company] = rate, rate
    return found


def judge_rules(params: GateParams, detail: dict[str, Any], exact: dict[str, Any], judge: dict[str, Any], base: str | None) -> list[Verdict]:
    """Every rule's verdict, in the order of params.yaml.

    Raises:
        InputError: the files are of different companies, or the base revision cannot be compared with.
    """
    student_of = {company: models["student"] for company, models in detail["held_out"].items() if company != POOLED}

    def acting(name: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
        return {company: (of["at_threshold"][name], of["plain"][name]) for company, of in student_of.items()}

    return [
        limit_rule("escalate_recall", acting("escalate_recall"), params.min_recall, True, "hand-off turns"),
        limit_rule("over_escalation", acting("over_escalation"), params.max_over_escalation, False, "other turns"),
        cost_rule(base, params.max_cost_increase, detail["costs"]),
        limit_rule("valid_output", counted(EXACT, exact, student_of, "valid_output"), params.min_valid_output, True, "turns"),
        limit_rule("unscored", counted(JUDGE, judge, student_of, "unscored"), params.max_unscored, False, "turns")]


def read_counts(rev: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What a revision's rules are judged by: the detail of `calibrate`, the counts of `eval_exact` and `eval_judge`.

    Raises:
        InputError: it has no such files.
    """
    return read_json(DETAIL, rev, CalibrateDetail), read_json(EXACT, rev, ExactCounts), read_json(JUDGE, rev, JudgeCounts)


def not_passed(verdicts: list[Verdict], params: GateParams) -> set[str]:
    """The rules that do not let the student through."""
    enough = {PASS, SKIPPED, *([CANNOT_TELL] if params.cannot_tell_passes else [])}
    return {verdict.rule for verdict in verdicts if verdict.verdict not in enough}


def _share(rate: dict[str, Any]) -> str:
    return f"{100 * rate['k'] / rate['n']:.1f} % ({rate['k']}/{rate['n']})" if rate["n"] else "– (0/0)"


def _interval(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description="Say whether the student may go to customers.")
    parser.add_argument("--base", metavar="REV", help="the revision whose cost must not be exceeded")
    parser.add_argument("--worse", action="store_true", help="let go what that revision's student does not pass either")
    parser.add_argument("--format", choices=["plain", "markdown", "json"], default="plain")
    options = parser.parse_args()
    if options.worse and not options.base:
        parser.error("--worse takes --base REV: worse than what?")
    params = load_params("gate", GateParams)
    detail, exact, judge = read_counts(WORKSPACE)
    check_detail(detail)
    verdicts = judge_rules(params, detail, exact, judge, options.base)
    failed = not_passed(verdicts, params)
    known = failed & not_passed(judge_rules(params, *read_counts(options.base), None), params) if options.worse else set()
    if options.format == "json":
        print(json.dumps({"passed": not failed, "rules": [asdict(verdict) for verdict in verdicts]}, indent=2, ensure_ascii=False))
    else:
        table = [["rule", "wanted", "at the threshold", "95 % interval", "without", "verdict"],
                 *([v.rule, v.wanted, v.value, v.interval, v.plain, v.verdict + (f": {v.why}" if v.why else "")] for v in verdicts)]
        print((markdown if options.format == "markdown" else plain)(table) + "\n")
        unasked = "" if options.base else "; whether the cost rose was not asked"
        let_go = f" {options.base} does not pass either: {'; '.join(sorted(known))}." if known else ""
        print(f"Judge: {judge['judge']}. The gate {'does not pass' if failed else 'passes'}{unasked}.{let_go}")
    sys.exit(1 if failed - known else 0)


if __name__ == "__main__":
    run(main)
