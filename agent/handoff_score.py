"""How likely a turn is to be handed off, from what the student's middle layer holds and from what the customer has said."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from schemas.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np


class Linear(BaseModel):
    """`x @ weight + bias`, for x of shape (N, len(weight))."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    weight: list[float]
    bias: float

    def __call__(self, x: Any) -> Any:
        """Shape (N,)."""
        import numpy as np

        return x @ np.array(self.weight) + self.bias


class HandoffScore(BaseModel):
    """Two classifiers and what weighs them against each other, as one file of numbers.

    `layer`: whose input the probe reads, counted from 0. `probe`: log-odds from that state. `terms`, `idf`, `words`: log-odds
    from TF-IDF of the customer's words. `stack`: log-odds from those two.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    layer: int
    probe: Linear
    terms: list[str]
    idf: list[float]
    words: Linear
    stack: Linear

    def __call__(self, states: np.ndarray, said: Sequence[str]) -> np.ndarray:
        """p_escalate, shape (N,).

        Args:
            states: what enters the layer at the last token of each turn's prompt, shape (N, H).
            said: everything that the customer has said so far, a line a message, N texts.
        """
        import numpy as np
        from scipy.special import expit

        return expit(self.stack(np.column_stack([self.probe(states), self.words(self._vectorizer.transform(said))])))

    @cached_property
    def _vectorizer(self) -> Any:
        import numpy as np

        vectorizer = tf_idf(vocabulary=self.terms)
        vectorizer.idf_ = np.array(self.idf)
        return vectorizer

    def save(self, path: Path) -> None:
        """Write the file, with all digits."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> HandoffScore:
        """Read the file.

        Raises:
            InputError: it is not there, or is no such file.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, ValidationError) as error:
            raise InputError(f"{path} is no hand-off score: {str(error).splitlines()[0]}", "dvc repro handoff_score, or dvc pull") from None


def tf_idf(**options: Any) -> Any:
    """An unfitted scikit-learn vectoriser of word 1- and 2-grams."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, **options)
