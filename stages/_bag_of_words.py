"""What words alone say about a hand-off."""

from __future__ import annotations

from typing import Any


def bag_of_words_model() -> Any:
    """An unfitted scikit-learn pipeline: TF-IDF of word 1- and 2-grams, then logistic regression on the two classes weighed alike."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, class_weight="balanced", max_iter=2000))
