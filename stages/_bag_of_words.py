"""What the customer's words alone say about a hand-off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agent.handoff_score import tf_idf
from schemas.action import parse_action
from schemas.errors import InputError
from schemas.traces import Role

if TYPE_CHECKING:
    import polars as pl


def heard(table: pl.DataFrame, split: str) -> pl.DataFrame:
    """One row an agent turn: company, conversation_id, index, gold_action, and `said`, the list of the customer's messages so far.

    Raises:
        InputError: the split is empty.
    """
    import polars as pl

    if table.is_empty():
        raise InputError(f"the {split} split is empty: a hand-off score takes conversations of all three splits",
                         "data.scenarios_per_company or verify.calibration_one_in in params.yaml makes it larger")
    rows = []
    said: list[str] = []
    for row in table.select("company", "conversation_id", "index", "role", "content").iter_rows(named=True):
        if row["index"] == 0:
            said = []
        if row["role"] == Role.CUSTOMER:
            said = [*said, row["content"]]
        elif row["role"] == Role.AGENT:
            rows.append((row["company"], row["conversation_id"], row["index"], parse_action(row["content"]).action.value, said))
    return pl.DataFrame(rows, orient="row", schema={"company": pl.String, "conversation_id": pl.String, "index": pl.Int64,
                                                    "gold_action": pl.String, "said": pl.List(pl.String)})


def bag_of_words_model() -> Any:
    """An unfitted scikit-learn pipeline: TF-IDF, then logistic regression on the two classes weighed alike."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return make_pipeline(tf_idf(), LogisticRegression(C=10, class_weight="balanced", max_iter=2000))
