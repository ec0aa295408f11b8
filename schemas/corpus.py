"""What is measured on the companies as written."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from schemas.action import HandoffReason
from schemas.company import Cue, Kind
from schemas.metrics import Count, Rate

SurfaceAuc = dict[Literal["last_words", "customer_turns", "position", "after_tool", "last_words_same_kind", "position_same_kind"], Rate]
"""Surface feature -> AUC; without those for which there are only hand-offs or none."""
Words = dict[Literal["auc", "recall_at_5_percent"], Rate]
"""What a bag of words finds; empty where there are only hand-offs or none."""
Mean = Annotated[float, Field(ge=0)]


class _Corpus(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LastWords(_Corpus):
    """Median words in the customer's last message, before steps that hand off and before the others."""

    deciding: Mean
    other: Mean


class Described(_Corpus):
    """One company."""

    articles: Count
    policy_words: Count
    prompt_words: Count
    kinds: dict[Kind, Count]
    handoff_reasons: dict[HandoffReason, Count]
    near_miss_reasons: dict[HandoffReason, Count]
    cues: dict[Cue, Count]
    handoff_at_customer_turn: dict[int, Count]
    steps_by_kind: dict[Kind, Mean]
    steps_mean: Mean
    steps_p90: Mean
    escalate_share: Rate
    distinct_thought_trigrams: Rate
    median_last_words: LastWords
    surface_auc: SurfaceAuc


class Openings(_Corpus):
    """Cosines of word 1-2-gram TF-IDF between the customers' first messages."""

    highest_cosine: Rate
    held_out_nearest_training_p95: Rate


class BlindLabels(_Corpus):
    """A second reader's labels."""

    agree: Count
    labelled: Count


class CorpusMetrics(_Corpus):
    """`metrics/corpus.json`; keys beside `training` and `pooled` are slugs."""

    companies: dict[str, Described]
    scenarios: Count
    agent_steps: Count
    openings: Openings
    surface_auc: dict[str, SurfaceAuc]
    bag_of_words: dict[str, Words]
    blind_labels: dict[str, BlindLabels]
