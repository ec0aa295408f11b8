"""Choose the operating point on the calibration split, and measure it on the held-out companies.

Reads   data/eval_exact/{predictions,calibration}.parquet, data/yardsticks/scores.parquet
Writes  models/operating_point.json, metrics/calibrate.json, metrics/calibrate_detail.json, metrics/calibrate/

The threshold, the map to probabilities and the bound come from the calibration split alone. On the held-out companies a turn
is handed off where its score is at the threshold or above; below it the model's own action stands, or its best other one. A
yardstick hands off in the student's place, on top of the student's other actions. Base model and student share the score, so at
the threshold they hand off the same turns: only the actions below it, and so the action accuracy, are each model's own.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from schemas.errors import InputError
from schemas.operating import CalibrateMetrics, OperatingPoint, Rule
from schemas.tables import SCORED, Calibration
from schemas.yardsticks import Yardstick, YardstickScores
from stages._curve_svg import Mark, draw
from stages._intervals import WANTED, clopper_pearson_upper, cluster_auc, cluster_ratio, turns_needed
from stages._logistic import ranking
from stages._paired import compare_pairs
from stages._policy import SCORE, hands_off, minutes, parse_predictions, scored_rows, tuned
from stages._rates import clustered_rate, outcomes
from stages._stage import Params, load_params, read_table, run, say, write_metrics
from stages._threshold import Cut, choose, conformal, degenerate, in_words, miss_bound, platt, recalibrated

if TYPE_CHECKING:
    import polars as pl

PREDICTIONS = Path("data/eval_exact/predictions.parquet")
CALIBRATION = Path("data/eval_exact/calibration.parquet")
YARDSTICKS = Path("data/yardsticks/scores.parquet")
OPERATING_POINT = Path("models/operating_point.json")
METRICS = Path("metrics/calibrate.json")
DETAIL = Path("metrics/calibrate_detail.json")
PLOTS = Path("metrics/calibrate")
BINS = 10
POOLED = "pooled"


class CalibrateParams(Params):
    """`calibrate`."""

    rule: Annotated[Rule, BeforeValidator(lambda text: Rule(text))]
    max_over_escalation: float = Field(ge=0, le=1, description="share of the turns that need no person")
    cost_missed: float = Field(ge=0, allow_inf_nan=False, description="minutes that a missed hand-off costs; an assumption")
    cost_needless: float = Field(ge=0, allow_inf_nan=False, description="minutes that a needless hand-off costs; an assumption")
    conformal_miss_rate: float = Field(gt=0, lt=1)


@dataclass(frozen=True)
class Point:
    """What the calibration turns of one model give."""

    cut: Cut
    rates: dict[str, Any]
    missed: dict[str, Any]
    slope: float
    intercept: float
    bound: dict[str, Any]


def at_cut(calibration: pl.DataFrame, cut: Cut) -> dict[str, Any]:
    """Recall and over-escalation of a threshold on the calibration turns, with their intervals."""
    import polars as pl

    found = outcomes(calibration.with_columns(action=pl.when(hands_off(cut.threshold)).then(pl.lit("escalate"))))
    return {name: clustered_rate(found[name]) for name in WANTED}


def fit(calibration: pl.DataFrame, model: str, params: CalibrateParams) -> Point:
    """The operating point of one model, from its calibration turns and nothing else.

    Raises:
        InputError: only one kind of turn among them.
    """
    scores, handoff = calibration[SCORE].to_numpy(), (calibration["gold_action"] == "escalate").to_numpy()
    if handoff.all() or not handoff.any():
        raise InputError(f"{model} has {int(handoff.sum())} hand-off turns among {len(handoff)} calibration turns: a threshold needs both kinds",
                         f"dvc repro eval_exact writes {CALIBRATION}; data.scenarios_per_company in params.yaml makes it larger")
    cut = choose(scores, handoff, params.rule, params.cost_missed, params.cost_needless, params.max_over_escalation)
    return Point(cut, at_cut(calibration, cut), miss_bound(cut, params.conformal_miss_rate), *platt(scores, handoff),
                 conformal(scores, handoff, params.conformal_miss_rate))


def at_policy(rows: pl.DataFrame, params: CalibrateParams) -> dict[str, Any]:
    """The rates of what `action` says, and its cost in minutes a turn, each with its intervals."""
    import numpy as np

    rates = {name: clustered_rate(outcome) for name, outcome in outcomes(rows).items()}
    cost = minutes(rows, params.cost_missed, params.cost_needless)
    low, high = cluster_ratio(rows["conversation_id"].to_list(), cost, np.ones(len(cost))) or (None, None)
    return {**rates, "expected_cost": {"value": float(cost.mean()), "cluster_low": low, "cluster_high": high}}


def curve(rows: pl.DataFrame) -> list[tuple[float, float]]:
    """(over-escalation, recall) at every threshold, from never to always; empty where one kind of turn is missing."""
    from sklearn.metrics import roc_curve

    handoff = (rows["gold_action"] == "escalate").to_numpy()
    if handoff.all() or not handoff.any():
        return []
    false_rate, recall, _ = roc_curve(handoff, rows[SCORE].to_numpy())
    return [(float(x), float(y)) for x, y in zip(false_rate, recall, strict=True)]


def areas(rows: pl.DataFrame) -> dict[str, Any]:
    """Area under the curve with its interval, the part of it up to 5 % over-escalation, and the recall there; null without a curve.

    The partial area is scaled so that .5 is chance and 1 perfect (McClish 1989, Medical Decision Making 9:190).
    """
    from sklearn.metrics import roc_auc_score

    handoff, scores = (rows["gold_action"] == "escalate").to_numpy(), rows[SCORE].to_numpy()
    of = ranking(scores, handoff)
    if not of:
        return dict.fromkeys(("value", "cluster_low", "cluster_high", "partial_at_5_percent", "recall_at_5_percent"))
    low, high = cluster_auc(rows["conversation_id"].to_list(), scores, handoff) or (None, None)
    return {"value": of["auc"], "cluster_low": low, "cluster_high": high,
            "partial_at_5_percent": float(roc_auc_score(handoff, scores, max_fpr=0.05)),
            "recall_at_5_percent": of["recall_at_5_percent"]}


def reliability(rows: pl.DataFrame, scores: Any) -> list[dict[str, Any]]:
    """Turns by their score, in bins of equal number: the mean score `predicted`, the share of hand-offs `observed`, its k, n and intervals."""
    import numpy as np
    import polars as pl

    turns = rows.select("conversation_id", hit=pl.col("gold_action") == "escalate")
    parts = np.array_split(np.argsort(scores, kind="stable"), BINS)
    bins = [(scores[chosen].mean(), clustered_rate(turns[chosen])) for chosen in parts if len(chosen)]
    return [{"predicted": float(mean), "observed": of["k"] / of["n"], **of} for mean, of in bins]


def probabilities(rows: pl.DataFrame, point: Point, with_bins: bool) -> dict[str, Any]:
    """Brier score, and where asked for reliability, of the score as it is and after the map.

    `constant` is the Brier score of saying the turns' own share of hand-offs every time.
    """
    handoff = (rows["gold_action"] == "escalate").to_numpy()
    raw = rows[SCORE].to_numpy()
    versions = {"raw": raw, "recalibrated": recalibrated(raw, point.slope, point.intercept)}
    return {"brier": {**{name: float(((scores - handoff) ** 2).mean()) for name, scores in versions.items()},
                      "constant": float(handoff.mean() * (1 - handoff.mean()))},
            **({"reliability": {name: reliability(rows, scores) for name, scores in versions.items()}} if with_bins else {})}


def measured(rows: pl.DataFrame, point: Point, params: CalibrateParams, with_plain: bool, with_bins: bool) -> dict[str, Any]:
    """Everything about one model on some held-out turns."""
    at = at_policy(tuned(rows, point.cut.threshold), params)
    found = at["escalate_recall"]
    bounded = {"at_conformal": at_policy(tuned(rows, point.bound["threshold"]), params)} if point.bound["threshold"] is not None else {}
    return {
        **({"plain": at_policy(rows, params)} if with_plain else {}), "at_threshold": at, **bounded,
        "miss_rate": {"k": found["n"] - found["k"], "n": found["n"], "upper_95": clopper_pearson_upper(found["n"] - found["k"], found["n"])},
        "auc": areas(rows), **probabilities(rows, point, with_bins)}


def against(yardstick: pl.DataFrame, student: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """rate -> a `Paired`: the student under its threshold (B) and a yardstick under its own (A), on the same turns in the same order."""
    a, b = outcomes(yardstick), outcomes(student)
    return {name: asdict(compare_pairs(a[name]["conversation_id"].to_list(), a[name]["hit"], b[name]["hit"])) for name in WANTED}


def worst(by_company: dict[str, dict[str, Any]], model: str) -> dict[str, Any]:
    """For recall, over-escalation and cost the company where it is worst at the threshold: the figure there, and as the model decodes (`plain`)."""
    def share(company: str, name: str, without_turns: float) -> float:
        found = by_company[company][model]["at_threshold"][name]
        return found["k"] / found["n"] if found["n"] else without_turns

    chosen = {
        "escalate_recall": min(by_company, key=lambda company: share(company, "escalate_recall", 2.0)),
        "over_escalation": max(by_company, key=lambda company: share(company, "over_escalation", -1.0)),
        "expected_cost": max(by_company, key=lambda company: by_company[company][model]["at_threshold"]["expected_cost"]["value"])}
    found = {}
    for name, company in chosen.items():
        of = by_company[company][model]
        found[name] = {"company": company, **of["at_threshold"][name], **({"plain": of["plain"][name]} if "plain" in of else {})}
    return found


def warnings_of(points: dict[str, Point], by_company: dict[str, dict[str, Any]], params: CalibrateParams) -> list[str]:
    """What a reader of the figures has to know and might not see."""
    found = []
    for model in ("student", *Yardstick):
        point = points[model]
        if extreme := degenerate(point.cut):
            found.append(f"{model}: on the calibration turns the rule comes down to '{extreme} hand off': the score is too weak for it")
        if point.slope == 0:
            found.append(f"{model}: the score does not rise with the share of hand-offs, so the map says the base rate everywhere")
        found += [f"{model}: {bound['refused']}" for bound in (point.missed, point.bound) if bound["refused"]]
    for company, models in by_company.items():
        bounded = models["student"].get("at_conformal", {}).get("escalate_recall")
        if bounded and bounded["high"] < 1 - params.conformal_miss_rate:
            found.append(f"{company}: the conformal threshold misses {bounded['n'] - bounded['k']}/{bounded['n']} hand-offs; that they are at most "
                         f"{100 * params.conformal_miss_rate:g} % holds for turns like the calibration ones and does not carry over to this company")
        over = models["student"]["at_threshold"]["over_escalation"]
        if params.rule is Rule.MAX_OVER_ESCALATION and over["low"] > params.max_over_escalation:
            found.append(f"{company}: over-escalation {over['k']}/{over['n']} is above the {100 * params.max_over_escalation:g} % that the threshold "
                         "was chosen for: it does not carry over to this company")
        for name, (change, discordant) in WANTED.items():
            if (n := models["student"]["at_threshold"][name]["n"]) < (needed := turns_needed(change, discordant)):
                found.append(f"{company}: {n} turns are too few to show a change of {100 * change:g} points in {name} between two revisions: "
                             f"it takes about {needed} (80 % power, the two differing on {100 * discordant:g} % of turns)")
    return found


def short(of: dict[str, Any]) -> dict[str, Any]:
    """One model's entry of metrics/calibrate.json."""
    def figures(policy: dict[str, Any]) -> dict[str, float]:
        shares = {name: policy[name]["k"] / policy[name]["n"] if policy[name]["n"] else 0.0 for name in WANTED}
        return {**shares, "expected_cost": policy["expected_cost"]["value"]}

    return {**{name: figures(of[name]) for name in ("plain", "at_threshold") if name in of}, "auc": of["auc"]["value"],
            "brier": of["brier"]["raw"], "brier_recalibrated": of["brier"]["recalibrated"]}


def write_operating_point(calibration: pl.DataFrame, point: Point, params: CalibrateParams) -> None:
    """What whoever runs the student obeys; all digits, for a rounded threshold is another one."""
    content = {
        "model": "student", "score": SCORE, "threshold": point.cut.threshold,
        "rule": {"name": params.rule.value, "in_words": in_words(params.rule, params.cost_missed, params.cost_needless, params.max_over_escalation)},
        "calibration": {"conversations": calibration["conversation_id"].n_unique(), "turns": len(calibration), "handoff_turns": point.cut.handoffs,
                        "missed": point.cut.missed, "needless": point.cut.needless},
        "miss_rate": point.missed,
        "recalibration": {"method": "platt", "slope": point.slope, "intercept": point.intercept}, "conformal": point.bound}
    OperatingPoint.model_validate(content)
    OPERATING_POINT.parent.mkdir(parents=True, exist_ok=True)
    partial = OPERATING_POINT.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, OPERATING_POINT)


def write_plots(held_out: dict[str, pl.DataFrame], pooled: dict[str, Any]) -> None:
    """Curves of all scores and the student's reliability as CSV, and the picture; the base model's score is the student's."""
    import polars as pl

    PLOTS.mkdir(parents=True, exist_ok=True)
    curves = {model: curve(rows) for model, rows in held_out.items() if model != "base"}
    for model, points in curves.items():
        frame = pl.DataFrame(points, orient="row", schema={"over_escalation": pl.Float64, "recall": pl.Float64})
        frame.write_csv(PLOTS / f"curve_{model}.csv", float_precision=4)
    for version, bins in pooled["student"]["reliability"].items():
        pl.DataFrame(bins).write_csv(PLOTS / f"reliability_{version}.csv", float_precision=4)
    marks = []
    for name, label in (("plain", "as it decodes"), ("at_threshold", "at the threshold")):
        over, recall = (pooled["student"][name][rate_name] for rate_name in ("over_escalation", "escalate_recall"))
        if over["n"] and recall["n"]:
            marks.append(Mark(label, over["k"] / over["n"], recall["k"] / recall["n"], recall["low"], recall["high"], name == "at_threshold"))
    (PLOTS / "curve.svg").write_text(draw(curves, marks, "What the threshold does, on companies never trained on"), encoding="utf-8")


def main() -> None:
    import polars as pl

    params = load_params("calibrate", CalibrateParams)
    if not PREDICTIONS.is_file():
        raise InputError(f"{PREDICTIONS} does not exist", "run the stage that writes it: dvc repro eval_exact")
    predictions = scored_rows(parse_predictions(PREDICTIONS.read_bytes(), str(PREDICTIONS), with_score=True))
    own, yardsticks = read_table(CALIBRATION, Calibration), read_table(YARDSTICKS, YardstickScores)
    scored = fit(own, "the score", params)
    points = {**dict.fromkeys(SCORED, scored), **{
        name.value: fit(yardsticks.filter((pl.col("split") == "calibration") & (pl.col("model") == name)), name, params) for name in Yardstick}}

    held_out = {model: predictions.filter(pl.col("model") == model) for model in SCORED}
    for name in Yardstick:
        mine = yardsticks.filter((pl.col("split") == "held_out") & (pl.col("model") == name)).select("conversation_id", "index", SCORE)
        held_out[name.value] = held_out["student"].drop(SCORE).join(mine, on=["conversation_id", "index"], how="inner", maintain_order="left")
        if len(held_out[name.value]) != len(held_out["student"]):
            raise InputError(f"{YARDSTICKS} and {PREDICTIONS} are of different held-out turns", "dvc repro yardsticks eval_exact")
    companies = sorted(predictions["company"].unique())
    parts = {**{company: {model: rows.filter(pl.col("company") == company) for model, rows in held_out.items()} for company in companies},
             POOLED: held_out}
    found = {name: {model: measured(rows, points[model], params, model in SCORED, name == POOLED) for model, rows in models.items()}
             for name, models in parts.items()}
    by_company = {company: found[company] for company in companies}
    warnings = warnings_of(points, by_company, params)

    write_operating_point(own, scored, params)
    write_metrics(METRICS, {
        "threshold": points["student"].cut.threshold, "rule": params.rule.value,
        **{company: {model: short(of) for model, of in models.items()} for company, models in by_company.items()}}, CalibrateMetrics)
    write_metrics(DETAIL, {
        "rule": in_words(params.rule, params.cost_missed, params.cost_needless, params.max_over_escalation),
        "costs": {"missed_minutes": params.cost_missed, "needless_minutes": params.cost_needless, "origin": "assumed, not measured"},
        "warnings": warnings,
        "thresholds": {model: {
            "threshold": point.cut.threshold, **point.rates, "miss_rate": point.missed,
            "recalibration": {"method": "platt", "slope": point.slope, "intercept": point.intercept}, "conformal": point.bound}
            for model, point in points.items()},
        "held_out": found,
        "against_yardsticks": {name.value: against(*(tuned(held_out[model], points[model].cut.threshold) for model in (name.value, "student")))
                               for name in Yardstick},
        "worst_company": {model: worst(by_company, model) for model in points}})
    write_plots(held_out, found[POOLED])
    changes = "; ".join(f"{company} {_change(models['student'])}" for company, models in by_company.items())
    say(f"calibrate, student as it decodes -> at the threshold: {changes}")
    for warning in warnings:
        say(f"warning: {warning}")


def _change(of: dict[str, Any]) -> str:
    plain, at = of["plain"], of["at_threshold"]
    rates = [f"{name} {plain[name]['k']}/{plain[name]['n']} -> {at[name]['k']}/{at[name]['n']}" for name in ("escalate_recall", "over_escalation")]
    return f"{', '.join(rates)}, {plain['expected_cost']['value']:.2f} -> {at['expected_cost']['value']:.2f} minutes a turn"


if __name__ == "__main__":
    run(main)
