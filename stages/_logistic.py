"""Logistic regression with the strength of its regularisation chosen on companies that a fit has not seen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from schemas.errors import InputError

STRENGTHS = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)
"""Inverse regularisation that may be chosen."""


def left_out_auc(make: Callable[[], Any], features: Any, handoff: Any, companies: Any) -> float:
    """Mean AUC over the companies, each scored by a fit on the others; companies with one kind of turn say nothing.

    Raises:
        InputError: no company says anything.
    """
    import numpy as np
    from sklearn.metrics import roc_auc_score

    found = []
    for company in np.unique(companies):
        out = companies == company
        if len(set(handoff[out])) == 2 == len(set(handoff[~out])):
            found.append(roc_auc_score(handoff[out], make().fit(features[~out], handoff[~out]).predict_proba(features[out])[:, 1]))
    if not found:
        raise InputError("the training split is too small for yardsticks: they need hand-offs in two companies",
                         "data.scenarios_per_company in params.yaml makes it larger")
    return float(np.mean(found))


def logistic(strength: float) -> Any:
    """An unfitted logistic regression, the two classes weighed alike."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)


def best_strength(features: Any, handoff: Any, companies: Any) -> tuple[float, float]:
    """The inverse regularisation with the highest AUC on left-out companies, and that AUC; the stronger one of equals.

    Args:
        features: array (n, d).
        handoff: which of the n turns hand off.
        companies: the company of each.
    """
    auc = {strength: left_out_auc(partial(logistic, strength), features, handoff, companies) for strength in STRENGTHS}
    best = max(auc, key=lambda strength: (auc[strength], -strength))
    return best, auc[best]
