"""Write what was measured, and every conversation it was measured on, as one HTML file that needs no network.

Reads   data/verify/{held_out,rejected}.parquet, data/eval_exact/predictions.parquet, data/eval_judge/judgements.parquet,
        models/operating_point.json, metrics/{teacher_gen,verify,qlora_train,eval_exact_counts,eval_judge_counts,calibrate_detail}.json,
        metrics/{qlora_train,calibrate}/
Writes  data/report/report.html

The page is stages/_report/page.html with its style sheet and its script. It states what the metrics files state; what it counts itself, it
counts from the predictions (which action was taken where). The same inputs give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel

from schemas.action import ActionName, HandoffReason
from schemas.counts import CalibrateDetail, ExactCounts, JudgeCounts
from schemas.errors import InputError
from schemas.metrics import QloraTrainMetrics
from schemas.operating import OperatingPoint, Policy
from schemas.recorded import OriginVerifyMetrics
from schemas.self_agreement import GenerationMetrics
from schemas.tables import SCORED, Judgements, Predictions, Rejected, Verified
from stages._policy import tuned
from stages._rates import rate
from stages._report import charts, figures, viewer, words
from stages._report.figures import pooled
from stages._revisions import WORKSPACE, Side, same_grader, same_turns
from stages._revisions import predictions as predictions_of
from stages._stage import Params, load_params, read_table, run, say

if TYPE_CHECKING:
    import polars as pl

HELD_OUT = Path("data/verify/held_out.parquet")
REJECTED = Path("data/verify/rejected.parquet")
PREDICTIONS = Path("data/eval_exact/predictions.parquet")
JUDGEMENTS = Path("data/eval_judge/judgements.parquet")
GENERATED = Path("metrics/teacher_gen.json")
VERIFIED = Path("metrics/verify.json")
TRAINED = Path("metrics/qlora_train.json")
TRAINING = Path("metrics/qlora_train")
EXACT = Path("metrics/eval_exact_counts.json")
JUDGED = Path("metrics/eval_judge_counts.json")
CALIBRATED = Path("metrics/calibrate_detail.json")
CURVES = Path("metrics/calibrate")
POINT = Path("models/operating_point.json")
REPORT = Path("data/report/report.html")
LOSS = "plots/metrics/loss.tsv"

TEMPLATES = Path(__file__).with_name("_report")
PAGE, STYLE, SCRIPT = "page.html", "page.css", "page.js"
GATE = "stages.gate"
POOLED = "pooled"


class ReportParams(Params):
    """`report`."""

    compare_with: str | None


def read_metrics(path: Path, model: type[BaseModel] | None = None, text: bytes | None = None) -> dict[str, Any]:
    """A metrics file, or `text` as one of another revision.

    Raises:
        InputError: it is not there, or is not such a file.
    """
    try:
        content = json.loads(path.read_bytes() if text is None else text)
        if model:
            model.model_validate(content)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}",
                         f"git checkout {path}, or dvc repro, brings it back") from None
    return content


def read_revision(revision: str, judge: str) -> tuple[dict[str, Any], pl.DataFrame]:
    """The counts of both evaluations, and the predictions, as a revision of the repository holds them.

    Without `acceptable` if another one than `judge` said so: two judges' verdicts cannot be compared.

    Raises:
        InputError: there is no such revision, it lacks one of them, or it was measured on other turns or by another grader.
    """
    import dvc.api
    import polars as pl
    from dvc.exceptions import DvcException

    try:
        exact, judged, table = (dvc.api.read(path.as_posix(), rev=revision, mode="rb") for path in (EXACT, JUDGED, PREDICTIONS))
        predictions = pl.read_parquet(io.BytesIO(table)).select("conversation_id", "index", "model", "raw")
    except (DvcException, OSError, ValueError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise InputError(f"report.compare_with: revision '{revision}' cannot be read: {' '.join(str(error).split())[:200]}",
                         "git log, or dvc exp list, shows the revisions; null compares with none") from None
    now, before = (Side(rev, Policy.PLAIN) for rev in (WORKSPACE, revision))
    same_turns(now, before, predictions_of(now), predictions_of(before))
    same_grader(now.rev, before.rev)
    counts, verdicts = read_metrics(EXACT, ExactCounts, exact), read_metrics(JUDGED, JudgeCounts, judged)
    return with_judge(counts, verdicts) if verdicts["judge"] == judge else counts, predictions


def read_curve(scorer: str) -> figures.Curve:
    """A score's curve over the held-out turns; empty where they are all of one kind.

    Raises:
        InputError: it is not there, or is no curve.
    """
    path = CURVES / f"curve_{scorer}.csv"
    try:
        return figures.read_columns(path, "over_escalation", "recall")
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}", f"git checkout {path}, or dvc repro calibrate, brings it back") from None


def with_judge(exact: dict[str, Any], judged: dict[str, Any]) -> dict[str, Any]:
    """company -> model -> all five rates."""
    return {company: {model: rates | {"acceptable": judged[company][model]["acceptable"]} for model, rates in models.items()}
            for company, models in exact.items()}


def results(counts: dict[str, Any], before: dict[str, Any] | None) -> list[dict[str, Any]]:
    """One table for all companies together and one for each: a row a rate, a column a model; None where a model has no such rate."""
    if before:
        counts = {company: models | ({"compared": before[company]["student"]} if company in before else {}) for company, models in counts.items()}
    tables = []
    for title, chosen in [("all held-out companies", counts), *((company, {company: models}) for company, models in counts.items())]:
        models = [name for name in words.MODELS if all(name in company for company in chosen.values())]
        tables.append({"title": title, "models": models, "rows": [
            {"name": name, "rates": [pooled(chosen, model, name) if all(name in company[model] for company in chosen.values()) else None
                                     for model in models]} for name in words.RATES]})
    return tables


def scored(predictions: pl.DataFrame, model: str) -> pl.DataFrame:
    """The rows that a model's figures other than `valid_output` are taken from."""
    return predictions.filter(model=model, decoding=SCORED[model])


def confusion(predictions: pl.DataFrame, model: str) -> list[dict[str, Any]]:
    """Gold action by the model's action, `invalid` for text that is no step: one row a gold action that occurs, with counts and shares."""
    counted = Counter((gold, action or "invalid") for gold, action in scored(predictions, model).select("gold_action", "action").iter_rows())
    rows = []
    for gold in ActionName:
        counts = {action: counted[gold.value, action] for action in [*map(str, ActionName), "invalid"]}
        if total := sum(counts.values()):
            rows.append({"gold": gold.value, "n": total, "cells": [
                {"action": action, "k": k, "shade": -(-5 * k // total)} for action, k in counts.items()]})
    return rows


def reasons(predictions: pl.DataFrame, threshold: float | None) -> list[dict[str, Any]]:
    """For every hand-off reason that occurs: how many of its turns each model handed off as it decodes, and the student at the threshold (`chosen`).

    `same` counts those handed off for this reason. At the threshold it is left out: the predictions hold no reason where the threshold, and not
    the student, hands off.
    """
    decoded = {model: scored(predictions, model) for model in SCORED}
    found = []
    for reason in HandoffReason:
        rates: dict[str, Any] = {}
        for name, rows in (decoded | {"chosen": tuned(decoded["student"], threshold)}).items():
            rows = rows.filter(gold_reason=reason.value)
            handed = rows.filter(action="escalate")
            rates[name] = rate(len(handed), len(rows)) | ({} if name == "chosen" else {"same": len(handed.filter(reason=reason.value))})
        if rates["student"]["n"]:
            found.append({"reason": reason.value, "rates": rates})
    return found


def render(context: dict[str, Any]) -> str:
    """The page. Style and script are named by their hashes in its content security policy: nothing else may run."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in (STYLE, SCRIPT))
    environment.filters |= {"percent": lambda share: f"{100 * share:.1f} %", "thousands": lambda number: f"{number:,}".replace(",", " ")}
    return environment.get_template(PAGE).render(
        context, style=Markup(style), script=Markup(script), style_hash=_hash(style), script_hash=_hash(script), words=words, charts=charts) + "\n"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def gate(base: str | None) -> dict[str, Any]:
    """What the gate says: {passed, rules}, or {error} where it cannot judge.

    A command of its own and not an import: what it refuses is a sentence on this page, and nothing that stops the page.
    """
    done = subprocess.run([sys.executable, "-m", GATE, "--format", "json", *(["--base", base] if base else [])],
                          capture_output=True, encoding="utf-8", check=False)
    if done.stdout:
        return json.loads(done.stdout)
    return {"error": done.stderr.strip().partition("\n")[0].removeprefix("error: ")}


def score_figures(counts: dict[str, Any], calibrated: dict[str, Any], judged: dict[str, Any], slice_of: int) -> dict[str, Any]:
    """What there is about hand-offs and their score: the answer on the first screen, and the charts.

    Args:
        counts: company -> model -> rates, as the models decode.
        calibrated: what CALIBRATED holds.
        judged: what the gate says.
        slice_of: scenarios a company of a run on a slice, else 0.
    """
    found, against = calibrated["held_out"], calibrated.get("against_yardsticks", {}).get("bag_of_words")
    chosen = {name: models["student"]["at_threshold"] for name, models in found.items()}
    curves = {name: read_curve(name) for name in words.SCORERS}
    everything = {model: {name: pooled(counts, model, name) for name in words.RATES} for model in SCORED}
    at = chosen[POOLED]
    return {
        "verdict": figures.verdict(at["escalate_recall"], at["over_escalation"], curves["bag_of_words"], against, judged.get("passed"), slice_of),
        "operating": [figures.operating("all held-out companies", everything, at, curves), *(
            figures.operating(company, models, chosen[company], {name: figures.at_5_percent(found[company][name]["auc"]) for name in words.SCORERS})
            for company, models in counts.items())],
        "legend": {"base": words.MODELS["base"], **words.SCORERS, "chosen": words.CHOSEN},
        "reliability": [figures.reliability(title, found[POOLED]["student"]["reliability"][version]) for version, title in
                        (("raw", "the score as it is"), ("recalibrated", "after the map to probabilities"))]}


def main() -> None:
    params = load_params("report", ReportParams)
    held_out, rejected = read_table(HELD_OUT, Verified), read_table(REJECTED, Rejected)
    predictions, judgements = read_table(PREDICTIONS, Predictions), read_table(JUDGEMENTS, Judgements)
    generated, verified = read_metrics(GENERATED, GenerationMetrics), read_metrics(VERIFIED, OriginVerifyMetrics)
    trained, point = read_metrics(TRAINED, QloraTrainMetrics), read_metrics(POINT, OperatingPoint)
    calibrated = read_metrics(CALIBRATED, CalibrateDetail)
    exact, judged = read_metrics(EXACT, ExactCounts), read_metrics(JUDGED, JudgeCounts)
    before, compared = read_revision(params.compare_with, judged["judge"]) if params.compare_with else (None, None)
    counts = with_judge(exact, judged)
    judgement = gate(params.compare_with)
    scores = score_figures(counts, calibrated, judgement, generated["scenarios_per_company"])
    conversations = viewer.conversations(held_out, rejected, viewer.predicted(predictions, judgements, compared))
    played = {"teacher": generated["teacher"], "customer": generated["customer"], "judge": judged["judge"]}
    write_page(render(scores | {
        "gate": judgement, "point": point, "calibrated": calibrated,
        "results": results(counts, before), "compare_with": params.compare_with,
        "confusion": {model: confusion(predictions, model) for model in SCORED},
        "reasons": reasons(predictions, point["threshold"]),
        "verified": verified, "most_rejected": max(verified["reasons"].values()), "trained": trained,
        "training": figures.training(TRAINING / LOSS, trained["steps"]), "generated": generated,
        "judge_cost": judged.get("cost"), "played": played, "companies": list(exact),
        "simulated": [role for role, name in played.items() if name == "simulator"],
        "data": Markup(viewer.embed({"threshold": point["threshold"], "compared": params.compare_with,
                                     "conversations": conversations}))}))
    say(f"report: {len(conversations)} conversations, {REPORT.stat().st_size / 1e6:.1f} MB; open {REPORT} in a browser")


def write_page(page: str) -> None:
    """Write the page; it appears whole or not at all."""
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    partial = REPORT.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, REPORT)


if __name__ == "__main__":
    run(main)
