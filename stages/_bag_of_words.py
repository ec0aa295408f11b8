"""What words alone say about a hand-off: the model, and how well any score ranks the turns that need one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def bag_of_words_model() -> Any:
    """An unfitted scikit-learn pipeline: TF-IDF of word 1- and 2-grams, then logistic regression on the two classes weighed alike."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, class_weight="balanced", max_iter=2000))


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
