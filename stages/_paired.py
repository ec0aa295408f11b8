"""Two sides on the same turns: the difference of a rate, its interval, and whether chance explains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages._intervals import by_conversation, cluster_ratio

FEWEST_CHANGED = 10
"""Conversations that have to differ between two sides before the bootstrap's interval is believed.

Of g that changed the same way a draw holds none with a probability of about exp(-g). From g = 4 on that is less than 2.5 %, so the
interval leaves 0 out, while the exact test says p = .125 there and .0625 at 5. Ten leaves room for some that changed the other way.
"""


@dataclass(frozen=True)
class Paired:
    """A rate on both sides, over the n turns that it is of.

    `gained` turns are hits on side B alone, `lost` on side A alone; `changed` conversations have more of one than of the other. `low` and
    `high` bound the difference B - A at 95 % (None for no turns). `mcnemar_p` takes turns as independent; `cluster_p` takes
    conversations as independent.
    """

    k_a: int
    k_b: int
    n: int
    gained: int
    lost: int
    changed: int
    difference: float | None
    low: float | None
    high: float | None
    mcnemar_p: float
    cluster_p: float


def compare_pairs(conversations: Sequence[str], a: Any, b: Any) -> Paired:
    """Compare hits `a` and `b` (n,), turn by turn.

    Of the two tests read `cluster_p` where turns of one conversation resemble each other (Durkalski et al. 2003, Statistics in
    Medicine 22:2417, on clustered pairs and McNemar's test); where every conversation has one turn that changed, they are equal.
    """
    import numpy as np

    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    change = b.astype(int) - a.astype(int)
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    low, high = cluster_ratio(conversations, change, np.ones(len(change))) or (None, None)
    by_cluster = by_conversation(conversations, change)[0] if len(change) else np.zeros(0)
    return Paired(int(a.sum()), int(b.sum()), len(a), gained, lost, int((by_cluster != 0).sum()), float(change.mean()) if len(a) else None, low, high,
                  mcnemar_p(gained, lost), sign_flip_p(by_cluster.astype(int).tolist()))


def mcnemar_p(gained: int, lost: int) -> float:
    """The exact two-sided McNemar test (McNemar 1947): changes one way and the other, as throws of a fair coin.

    It takes every turn as independent. Turns of one conversation are not, so with several changed turns in a conversation its p is
    too small (or too large, where they cancel): `sign_flip_p` stands beside it.
    """
    from scipy.stats import binomtest

    return float(binomtest(min(gained, lost), gained + lost).pvalue) if gained + lost else 1.0


def sign_flip_p(differences: Sequence[int]) -> float:
    """The exact two-sided permutation test on whole conversations: without a true difference each one's net change may have either sign.

    Args:
        differences: of every conversation, hits of B less hits of A.

    Every one of the 2^m sign patterns counts, by adding up the distribution of the sum conversation by conversation.
    Fisher's randomisation test (Fisher 1935, The Design of Experiments, section 21), with conversations as the units.
    """
    import numpy as np

    sizes = [abs(difference) for difference in differences if difference]
    most = sum(sizes)
    ways = np.zeros(2 * most + 1)
    ways[most] = 1.0
    for size in sizes:
        ways = (np.roll(ways, size) + np.roll(ways, -size)) / 2
    distance = np.abs(np.arange(-most, most + 1))
    return float(min(1.0, ways[distance >= abs(sum(differences))].sum()))
