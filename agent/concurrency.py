"""How many calls are in flight at once, as the server can take them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

START = 10
"""TCP's (RFC 6928): what a server takes at once that has just answered the first call."""


class ConcurrencyLimit:
    """How many calls may be in flight, from 1 to `most`.

    Additive increase, multiplicative decrease (Chiu and Jain, 1989); up to the first overload the limit doubles with each
    round, from `START` (TCP's slow start, Jacobson, 1988).

    Args:
        most: calls in flight, at the most.
        pause: waits for so many seconds; False, at once, when no call will start any more.
    """

    def __init__(self, most: int, pause: Callable[[float], Awaitable[bool]]) -> None:
        self._most, self._limit = most, float(min(most, START))
        self._pause = pause
        self._in_flight = 0
        self._cut_at = self._not_before = -math.inf
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[float]:
        """Wait for a slot, and for the time that the server asked for; gives the time at which the call starts."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._in_flight < int(self._limit))
            self._in_flight += 1
        try:
            while (wait := self._not_before - time.monotonic()) > 0 and await self._pause(wait):
                pass  # another call may have been told to wait longer
            yield time.monotonic()
        finally:
            async with self._changed:
                self._in_flight -= 1
                self._changed.notify_all()

    def succeeded(self) -> None:
        """One more slot after each round of successes, or after each success as long as there was no overload."""
        self._limit = min(self._most, self._limit + (1 if self._cut_at == -math.inf else 1 / self._limit))

    def overloaded(self, started: float, wait_s: float | None) -> None:
        """Half the slots; once for all the calls that were in flight together."""
        if started > self._cut_at:
            self._limit, self._cut_at = max(1.0, self._limit / 2), time.monotonic()
        if wait_s is not None:
            self._not_before = max(self._not_before, time.monotonic() + wait_s)
