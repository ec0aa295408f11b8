"""The charts of the page, each with what it shows in words, and the answer on its first screen."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages._paired import FEWEST_CHANGED
from stages._rates import rate
from stages._report import charts, words

Curve = Sequence[tuple[float, float]]
"""(over-escalation, recall) at every threshold, from (0, 0) on."""
ASIDE = 13
"""Pixels between marks that stand side by side: a mark's width and a little air."""


def pooled(counts: dict[str, Any], model: str, name: str) -> dict[str, Any]:
    """A rate over all companies together, with its interval."""
    mine = [company[model][name] for company in counts.values()]
    return rate(sum(one["k"] for one in mine), sum(one["n"] for one in mine))


def share(counted: dict[str, Any]) -> float:
    """k / n, and 0 for n = 0."""
    return counted["k"] / counted["n"] if counted["n"] else 0.0


def read_columns(path: Path, first: str, second: str) -> list[tuple[float, float]]:
    """Two columns of a table with a header line, tab- or comma-separated by its name.

    Raises:
        OSError, KeyError, ValueError: there is no such table, no such column in it, or a value that is no number.
    """
    with path.open(encoding="utf-8", newline="") as lines:
        return [(float(row[first]), float(row[second])) for row in csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")]


def at_5_percent(area: dict[str, Any]) -> Curve:
    """What metrics/calibrate_detail.json states of a curve, as the one known point of it; empty where it states none."""
    return [(0.05, area["recall_at_5_percent"])] if area["recall_at_5_percent"] is not None else []


def recall_at(curve: Curve, over_escalation: float) -> float:
    """The recall that a score reaches at no more than this over-escalation.

    Between two thresholds, handing off at the higher one and at the lower one by lot reaches the straight line between them.
    """
    below = max(point for point in curve if point[0] <= over_escalation)
    above = min((point for point in curve if point[0] > over_escalation), default=below)
    if above == below:
        return below[1]
    return below[1] + (above[1] - below[1]) * (over_escalation - below[0]) / (above[0] - below[0])


def verdict(found: dict[str, Any], needless: dict[str, Any], yardstick: Curve, against: dict[str, Any] | None, passed: bool | None,
            slice_of: int) -> dict[str, Any]:
    """The first screen's answer: may the student ship?

    The student is called worse than the bag of words where the whole interval of what it finds more, turn by turn, lies below 0 and that
    of its needless hand-offs does not; `better` is the reverse. Neither is said on a handful of changed conversations. Only the gate
    calls it good enough: that takes limits, which the gate holds.

    Args:
        found: the student's recall.
        needless: its over-escalation.
        yardstick: the curve of the bag of words, empty where the turns are all of one kind.
        against: rate -> how the student at its threshold differs from the bag of words at its own, None where that is not known.
        passed: whether the gate lets it through, None where it could not judge.
        slice_of: scenarios a company of a run on a slice, else 0.
    """
    fair = recall_at(yardstick, share(needless)) if yardstick else None
    if against and None in (against["escalate_recall"]["low"], against["over_escalation"]["low"]):
        against = None
    told = {"found": found, "needless": needless, "fair": fair, "against": against, "worse": False, "better": False}
    if against:
        more, over = against["escalate_recall"], against["over_escalation"]
        enough = more["changed"] >= FEWEST_CHANGED
        told |= {"worse": enough and more["high"] < 0 <= over["high"], "better": enough and over["low"] <= 0 < more["low"]}
    if slice_of:
        answer, title = "Not decided", f"a slice of {slice_of} scenarios a company, its figures mean nothing"
    elif passed:
        answer, title = "Yes", "the gate lets this student through" + (", though it hands off worse than a bag of words" if told["worse"] else "")
    elif not found["k"]:
        answer, title = "No", "the student never hands off where it should"
    elif told["worse"]:
        answer, title = "No", "the student hands off worse than a bag of words"
    elif passed is None:
        answer, title = "Not decided", "the gate could not judge this student"
    else:
        answer, title = "No", "the gate does not let this student through"
    return told | {"answer": answer, "title": title}


def _stand(rates: dict[str, Any]) -> charts.Point:
    found, needless = rates["escalate_recall"], rates["over_escalation"]
    return charts.Point(share(needless), share(found), (needless["low"], needless["high"]), (found["low"], found["high"]))


def _told(who: str, rates: dict[str, Any]) -> str:
    found, needless = rates["escalate_recall"], rates["over_escalation"]
    return f"{who} finds {found['k']} of {found['n']} hand-offs at {needless['k']} needless ones in {needless['n']}"


def operating(title: str, rates: dict[str, Any], chosen: dict[str, Any], curves: dict[str, Curve]) -> dict[str, Any]:
    """Recall against over-escalation: where each model stands as it decodes, the student under the threshold, and the curves.

    Args:
        title: the companies it is of.
        rates: model -> its counts as it decodes.
        chosen: the student's counts under the threshold.
        curves: scorer -> its curve; those of a single point are drawn as marks side by side about that point's line.
    """
    told = [_told(words.MODELS[model], of) for model, of in rates.items()]
    highest = max([0.1, *(of["over_escalation"]["high"] for of in [*rates.values(), chosen])])
    series = []
    for name, curve in curves.items():
        if len(curve) > 1:
            highest = max(highest, 0.4)
            series.append(charts.Series(name, words.SCORERS[name], line=curve))
            told.append(f"at 5% needless hand-offs the score of {words.SCORERS[name]} finds {recall_at(curve, 0.05):.1%}")
        elif curve:
            aside = ASIDE * (len(series) - (len(curves) - 1) / 2)
            series.append(charts.Series(name, f"score of {words.SCORERS[name]}", points=[charts.Point(*curve[-1])], aside=aside))
            told.append(f"at {curve[-1][0]:.0%} needless hand-offs the score of {words.SCORERS[name]} finds {curve[-1][1]:.1%}")
    series += [charts.Series(model, words.MODELS[model], points=[_stand(of)]) for model, of in rates.items()]
    series.append(charts.Series("chosen", words.CHOSEN, points=[_stand(chosen)]))
    told.append(_told("at the threshold the student", chosen))
    svg = charts.chart(f"Hand-offs found against needless ones, {title}", "; ".join(told),
                       charts.shares(highest, "needless hand-offs (over-escalation)"), charts.shares(1, "hand-offs found (recall)"), series,
                       upright=next((curve[-1][0] for curve in curves.values() if len(curve) == 1), None))
    return {"title": title, "told": told, "svg": svg}


def reliability(title: str, bins: list[dict[str, Any]]) -> dict[str, Any]:
    """The share of hand-offs against the mean score, a point a bin of turns."""
    points = [charts.Point(one["predicted"], one["observed"], y_interval=(one["low"], one["high"])) for one in bins]
    told = [f"{one['predicted']:.1%} said, {one['k']} of {one['n']} were ({one['observed']:.1%})" for one in bins]
    highest = max([0.1, *(max(one["predicted"], one["high"]) for one in bins)])
    svg = charts.chart(f"Reliability, {title}", "; ".join(told), charts.shares(highest, "score, mean of the bin"),
                       charts.shares(highest, "turns to hand off"), [charts.Series("student", title, points=points)], diagonal=True)
    return {"title": title, "told": told, "svg": svg}


def training(path: Path, steps: int) -> dict[str, Any] | None:
    """The training loss by optimiser step; None where fewer than two values were kept.

    Args:
        path: the loss, one row a logged value, each the mean since the one before.
        steps: optimiser steps taken in all, logged at equal distances.
    """
    losses = [loss for _, loss in read_columns(path, "step", "loss")] if path.is_file() else []
    if len(losses) < 2:
        return None
    every = max(1, steps // len(losses))
    points = [(float(every * number), loss) for number, loss in enumerate(losses, 1)]
    told = f"{losses[0]:.2f} over the first {every} steps, {losses[-1]:.2f} over the last"
    svg = charts.chart("Training loss", told, charts.Axis("optimiser step", charts.nice_ticks(0, points[-1][0]), "{:g}".format),
                       charts.Axis("loss, nats a supervised token", charts.nice_ticks(min(losses), max(losses)), "{:g}".format),
                       [charts.Series("student", "loss", line=points)])
    return {"svg": svg, "told": told, "every": every, "rows": points[::max(1, len(points) // 10)]}
