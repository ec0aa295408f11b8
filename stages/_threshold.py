"""Choose a threshold, a map to probabilities and a bound from the calibration turns, and from nothing else.

Every function takes calibration scores (n,) and whether each turn should hand off (n,).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, log
from typing import Any

from schemas.operating import Rule
from stages._intervals import clopper_pearson_upper

CLIP = 1e-6
NOTE = ("The bound holds for turns that are exchangeable with the calibration turns. Those come from the training companies; a turn of a new "
        "company is not exchangeable with them, so for a new company it is a starting point and no guarantee. The same calibration "
        "turns were looked at when the score was chosen, so for the training companies too it is not exact.")


SEEN = ("The threshold was chosen on these very turns, so the limit is on the low side; and it says nothing of a company that is not like those they "
        "come from.")


@dataclass(frozen=True)
class Cut:
    """A threshold (None: never hand off) and what it does to the calibration turns; `others`: turns that need no person."""

    threshold: float | None
    missed: int
    needless: int
    handoffs: int
    others: int


def cuts(scores: Any, handoff: Any) -> list[Cut]:
    """Every distinct threshold, from never to always, midway between neighbouring scores so that a last digit decides nothing."""
    import numpy as np

    scores, handoff = np.asarray(scores, dtype=float), np.asarray(handoff, dtype=bool)
    values, place = np.unique(scores, return_inverse=True)
    positives, negatives = (np.bincount(place, weights=part, minlength=len(values))[::-1].cumsum().astype(int) for part in (handoff, ~handoff))
    middles = [*((low + high) / 2 for low, high in zip(values[-2::-1], values[:0:-1], strict=True)), 0.0]
    total, others = int(handoff.sum()), int((~handoff).sum())
    return [Cut(None, total, 0, total, others), *(Cut(float(middle), total - int(found), int(needless), total, others)
                                                  for middle, found, needless in zip(middles, positives, negatives, strict=True))]


def choose(scores: Any, handoff: Any, rule: Rule, cost_missed: float, cost_needless: float, max_over_escalation: float) -> Cut:
    """The cut that the rule asks for.

    `max_over_escalation`: the fewest missed with at most that share of the other turns handed off; of several, the fewest needless.
    `expected_cost`: the least cost; of several, the fewest missed.
    """
    possible = cuts(scores, handoff)
    if rule is Rule.EXPECTED_COST:
        return min(possible, key=lambda cut: (cut.missed * cost_missed + cut.needless * cost_needless, cut.missed))
    return min((cut for cut in possible if cut.needless <= allowed(max_over_escalation, cut.others)), key=lambda cut: (cut.missed, cut.needless))


def allowed(share: float, others: int) -> int:
    """How many of the turns that need no person may be handed off; 29 of 100 at 0.29, which is 28.999999999999996 of them."""
    return floor(share * others + 1e-9)


def in_words(rule: Rule, cost_missed: float, cost_needless: float, max_over_escalation: float) -> str:
    """The rule as one says it."""
    if rule is Rule.EXPECTED_COST:
        return (f"Hand off where that costs the least time on average, if a missed hand-off costs {cost_missed:g} minutes and a needless one "
                f"{cost_needless:g} (both assumed).")
    return f"Find as many hand-offs as possible while at most {100 * max_over_escalation:g} in 100 turns that need no person go to one."


def degenerate(cut: Cut) -> str | None:
    """`never` or `always` where the threshold decides nothing."""
    if cut.threshold is None:
        return "never"
    return "always" if cut.needless == cut.others and not cut.missed else None


def platt(scores: Any, handoff: Any) -> tuple[float, float]:
    """(slope, intercept) of a logistic map from the score's logit to a probability, with Platt's smoothed targets.

    Two parameters, for with some dozens of hand-offs a step function (isotonic regression) fits chance: it needs about a
    thousand (Niculescu-Mizil and Caruana 2005). Platt 1999, "Probabilistic outputs for support vector machines".
    A score that ranks the wrong way round gets slope 0: the map stays monotone and says the base rate.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    handoff = np.asarray(handoff, dtype=bool)
    x = logit(scores)
    positives, negatives = int(handoff.sum()), int((~handoff).sum())
    target = np.where(handoff, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    base = float(np.log(target.sum() / (1 - target).sum()))
    if np.ptp(x) == 0:
        return 0.0, base
    # Standardised, so that the solver converges whatever the spread of the logits.
    centre, spread = x.mean(), x.std()
    fit = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(
        np.tile((x - centre) / spread, 2)[:, None], np.repeat([1, 0], len(x)), sample_weight=np.concatenate([target, 1 - target]))
    slope = float(fit.coef_[0, 0]) / spread
    return (float(slope), float(fit.intercept_[0] - slope * centre)) if slope > 0 else (0.0, base)


def logit(scores: Any) -> Any:
    """log(p / (1 - p)), p held inside [CLIP, 1 - CLIP]."""
    import numpy as np

    p = np.clip(np.asarray(scores, dtype=float), CLIP, 1 - CLIP)
    return np.log(p / (1 - p))


def recalibrated(scores: Any, slope: float, intercept: float) -> Any:
    """Probabilities by a Platt map, array (n,)."""
    import numpy as np

    return 1 / (1 + np.exp(-(slope * logit(scores) + intercept)))


def miss_bound(cut: Cut, miss_rate: float) -> dict[str, Any]:
    """How large a share of hand-offs like the calibration ones a threshold may miss: the exact upper 95 % limit (Clopper and Pearson 1934).

    Refused where there are so few of them that not even none missed would bound it at `miss_rate`.
    """
    needed = ceil(log(0.05) / log(1 - miss_rate) - 1e-9)
    refused = None if cut.handoffs >= needed else (
        f"{cut.handoffs} hand-off turns are too few to show that at most {100 * miss_rate:g} % are missed: with none missed it takes {needed}")
    return {"k": cut.missed, "n": cut.handoffs, "upper_95": clopper_pearson_upper(cut.missed, cut.handoffs), "refused": refused,
            "needed_handoff_turns": needed, "note": SEEN}


def conformal(scores: Any, handoff: Any, miss_rate: float) -> dict[str, Any]:
    """The highest threshold that misses a further, exchangeable hand-off with a probability of at most `miss_rate`.

    Split conformal: of n hand-off scores the floor(miss_rate · (n + 1))-th smallest (Vovk, Gammerman and Shafer 2005;
    class-conditional, since it looks at hand-offs alone). Refused where n is too small for any such rank.
    """
    import numpy as np

    found = np.sort(np.asarray(scores, dtype=float)[np.asarray(handoff, dtype=bool)])
    needed = ceil(1 / miss_rate - 1e-9) - 1
    rank = floor(miss_rate * (len(found) + 1) + 1e-9)
    refused = None if rank else f"{len(found)} hand-off turns are too few to bound the miss rate at {100 * miss_rate:g} %: it takes {needed} or more"
    return {"miss_rate": miss_rate, "threshold": float(found[rank - 1]) if rank else None, "refused": refused,
            "needed_handoff_turns": needed, "note": NOTE}
