"""How sure a figure is: intervals of a rate, of a ratio over conversations, of an AUC, and what a number of turns can show.

Turns of one conversation resemble each other, so besides the binomial intervals there is a bootstrap that draws whole
conversations (Field and Welsh 2007, Journal of the Royal Statistical Society B 69:369). It is a percentile bootstrap and
says nothing where a rate is 0 or 1: read the Wilson interval there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil, sqrt
from typing import Any

DRAWS = 2000
SEED = 1
WANTED = {"escalate_recall": (0.10, 0.20), "over_escalation": (0.02, 0.05)}
"""The change of a rate that one would want to see between two revisions, and the share of turns they are then taken to differ on."""
_Z95, _Z80 = 1.959963984540054, 0.8416212335729143


def wilson(k: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of k successes in n (Wilson 1927); (0, 1) for n = 0."""
    from scipy.stats import binomtest

    if n == 0:
        return 0.0, 1.0
    found = binomtest(k, n).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def clopper_pearson_upper(k: int, n: int) -> float:
    """The upper 95 % limit of a rate, one-sided and exact (Clopper and Pearson 1934); 1 for n = 0."""
    from scipy.stats import binomtest

    return float(binomtest(k, n, alternative="less").proportion_ci(0.95, method="exact").high) if n else 1.0


def by_conversation(conversations: Sequence[str], *values: Any) -> list[Any]:
    """Sums of each of `values` (n,) over the turns of each conversation: arrays (conversations,), in order of the sorted names."""
    import numpy as np

    _, where = np.unique(np.asarray(conversations, dtype=str), return_inverse=True)
    return [np.bincount(where, weights=np.asarray(value, dtype=float)) for value in values]


@lru_cache(maxsize=8)
def _weights(clusters: int) -> Any:
    """How often each conversation is drawn: array (DRAWS, clusters), the same for the same number of conversations."""
    import numpy as np

    drawn = np.random.default_rng(SEED).multinomial(clusters, np.full(clusters, 1 / clusters), size=DRAWS)
    drawn.flags.writeable = False
    return drawn


def _percentiles(draws: Any) -> tuple[float, float] | None:
    import numpy as np

    draws = draws[np.isfinite(draws)]  # a draw without a turn that counts has no rate
    if not len(draws):
        return None
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def cluster_ratio(conversations: Sequence[str], above: Any, below: Any) -> tuple[float, float] | None:
    """The 95 % percentile interval of sum(above) / sum(below), drawing whole conversations; None where nothing is below.

    A rate has `above` 1 for a hit and `below` 1 for a turn that counts. The difference of two paired rates has
    `above` -1, 0 or 1.
    """
    import numpy as np

    if not len(conversations):
        return None
    top, bottom = by_conversation(conversations, above, below)
    drawn = _weights(len(top))
    with np.errstate(invalid="ignore", divide="ignore"):
        return _percentiles((drawn @ top) / (drawn @ bottom))


def cluster_auc(conversations: Sequence[str], scores: Any, handoff: Any) -> tuple[float, float] | None:
    """The 95 % percentile interval of the AUC, drawing whole conversations; None where only one kind of turn occurs."""
    import numpy as np

    scores, handoff = np.asarray(scores, dtype=float), np.asarray(handoff, dtype=bool)
    if handoff.all() or not handoff.any():
        return None
    names, where = np.unique(np.asarray(conversations, dtype=str), return_inverse=True)
    won = np.zeros((len(names), len(names)))
    above = scores[handoff][:, None] - scores[~handoff]
    np.add.at(won, (where[handoff][:, None], where[~handoff][None, :]), (above > 0) + 0.5 * (above == 0))
    positives, negatives = (np.bincount(where, weights=part, minlength=len(names)) for part in (handoff, ~handoff))
    drawn = _weights(len(names))
    with np.errstate(invalid="ignore", divide="ignore"):
        return _percentiles(((drawn @ won) * drawn).sum(axis=1) / ((drawn @ positives) * (drawn @ negatives)))


def turns_needed(change: float, discordant: float) -> int:
    """How many turns a paired comparison needs to show a change of a rate at 5 % with a power of 80 %.

    Args:
        change: of the rate, as a share of the turns.
        discordant: the share of turns on which the two sides differ, at least `change`.

    Source: Connor 1987, Biometrics 43:207. Turns that resemble each other within a conversation need more.
    """
    discordant = max(discordant, change)
    return ceil((_Z95 * sqrt(discordant) + _Z80 * sqrt(discordant - change**2)) ** 2 / change**2)
