"""Logistic regression with the strength of its regularisation chosen on companies that a fit has not seen, and what a score is worth."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import Any

from tqdm import tqdm

from schemas.errors import InputError

STRENGTHS = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)
"""Inverse regularisation that may be chosen."""


def left_out_log_odds(model: Any, features: Any, handoff: Any, companies: Any) -> Any:
    """Log-odds of every turn, (n), by a fit of `model` on the other companies.

    Raises:
        InputError: fewer than two companies have hand-offs.
    """
    from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict

    if len(set(companies[handoff])) < 2:
        raise InputError("the training split is too small for a hand-off score: it takes hand-offs in two companies",
                         "data.scenarios_per_company in params.yaml makes it larger")
    return cross_val_predict(model, features, handoff, groups=companies, cv=LeaveOneGroupOut(), method="decision_function")


def mean_auc(scores: Any, handoff: Any, companies: Any) -> float:
    """Mean AUC over the companies that have both kinds of turn."""
    import numpy as np
    from sklearn.metrics import roc_auc_score

    of = [companies == company for company in np.unique(companies[handoff])]
    return float(np.mean([roc_auc_score(handoff[mine], scores[mine]) for mine in of if not handoff[mine].all()]))


def logistic(strength: float) -> Any:
    """An unfitted logistic regression, the two classes weighed alike.

    For features that are few beside the turns: Newton's method ends in a dozen steps where the usual L-BFGS takes hundreds.
    """
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, class_weight="balanced", solver="newton-cholesky")


def best_strength(model: Callable[[float], Any], features: Any, handoff: Any, companies: Any) -> tuple[float, Any]:
    """The inverse regularisation with the highest AUC on left-out companies, and the log-odds by fits without each turn's company, (n).

    From the strongest on, up to the first that is no better: what comes after it fits the training companies ever closer.

    Args:
        model: makes an unfitted one of a strength; whatever it learns of the features, it learns without the left-out company.
        features: array (n, d).
        handoff: which of the n turns hand off.
        companies: the company of each.
    """
    best, highest, log_odds = STRENGTHS[0], -1.0, None
    for strength in tqdm(STRENGTHS, desc="regularisation", unit="strength", file=sys.stderr):
        found = left_out_log_odds(model(strength), features, handoff, companies)
        if (auc := mean_auc(found, handoff, companies)) <= highest:
            break
        best, highest, log_odds = strength, auc, found
    return best, log_odds


def ranking(scores: Any, handoff: Collection[bool]) -> dict[str, float]:
    """How well `scores` (n,) separate hand-off turns from the others.

    Returns:
        AUC, and the recall at the threshold where at most 5 % of the others are over-escalated; nothing where only one
        of the two kinds of turn occurs.
    """
    import numpy as np
    from sklearn.metrics import roc_auc_score, roc_curve

    if len(set(handoff)) < 2:
        return {}
    false_rate, recall, _ = roc_curve(handoff, scores)
    return {"auc": float(roc_auc_score(handoff, scores)), "recall_at_5_percent": float(recall[np.searchsorted(false_rate, 0.05, side="right") - 1])}


def figures(strength: float, left_out: float, scores: dict[str, Any], handoff: dict[str, Any], companies: Any) -> dict[str, Any]:
    """What `ScoreFigures` holds of one fit.

    Args:
        strength, left_out: the inverse regularisation, and the AUC on left-out training companies.
        scores, handoff: `calibration` and `held_out` -> one value a turn.
        companies: the company of every held-out turn.
    """
    return {"inverse_regularisation": float(strength), "left_out_company_auc": left_out,
            "calibration": ranking(scores["calibration"], handoff["calibration"]) or None,
            "held_out": {slug: ranking(scores["held_out"][companies == slug], handoff["held_out"][companies == slug]) or None
                         for slug in sorted(set(companies))}}
