"""A rate is never a bare number: k of n, with its interval."""

from __future__ import annotations

from math import sqrt
from typing import Any

Z95 = 1.959963984540054


def wilson(k: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of k successes in n (Wilson 1927); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = k / n, Z95 * Z95
    centre, spread = p + z2 / (2 * n), Z95 * sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z2 / n)), min(1.0, (centre + spread) / (1 + z2 / n))


def rate(k: int, n: int) -> dict[str, Any]:
    """`{k, n, low, high}`: the count and its 95 % Wilson interval."""
    low, high = wilson(k, n)
    return {"k": k, "n": n, "low": low, "high": high}
