"""What calls cost, what a stage may spend, and why it must stop."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from schemas.errors import InputError

MILLION = 1_000_000


class Price(BaseModel):
    """Dollars per million tokens."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    input: float = Field(ge=0)
    cached_input: float = Field(ge=0, description="prompt tokens that the provider read from its own prefix cache")
    output: float = Field(ge=0)

    def of(self, prompt_tokens: float, cached_tokens: float, completion_tokens: float) -> float:
        """Dollars for one call; the cached tokens are part of the prompt's."""
        fresh = prompt_tokens - cached_tokens
        return (fresh * self.input + cached_tokens * self.cached_input + completion_tokens * self.output) / MILLION


FREE = Price(input=0.0, cached_input=0.0, output=0.0)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one or more calls and their dollars; None where a price is not known."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float | None = 0.0

    def __add__(self, other: Usage) -> Usage:
        cost = None if self.cost_usd is None or other.cost_usd is None else self.cost_usd + other.cost_usd
        return Usage(self.prompt_tokens + other.prompt_tokens, self.cached_tokens + other.cached_tokens,
                     self.completion_tokens + other.completion_tokens, cost)


class EndpointFailure(Exception):
    """The endpoint gave no usable answer. Never the model's fault."""


class Stopped(EndpointFailure):
    """Nothing was sent, for the stage is ending early; `Spend.reason` says why."""


class Room:
    """One call's place in the budget: say what became of it before it is given back."""

    def __init__(self, spend: Spend, worst_usd: float) -> None:
        self._spend, self._worst_usd = spend, worst_usd

    def paid(self, key: str | None, usage: Usage) -> None:
        """The call was answered. `key` names the answer, None for one that cannot be used."""
        self._spend.sent += 1
        self._spend.paid_now += usage
        if key is not None:
            self._spend.count(key, usage)
        else:
            self._spend.wasted_usd += usage.cost_usd or 0.0

    def lost(self) -> None:
        """The request went out and no answer came: the provider may charge for it, so the budget counts it at its worst."""
        self._spend.lost += 1
        self._spend.wasted_usd += self._worst_usd


class Spend:
    """What the endpoints of one stage have spent together.

    The budget covers what the stage's data cost, whenever it was paid, and what this run paid for nothing. A call starts
    only if its worst case, and that of the calls in flight, still fits: the cap is not passed, as long as the server
    counts no more than a token a byte of prompt and keeps to `max_tokens`.

    Args:
        budget_usd: the cap in dollars, None for no cap.
        section: the section of params.yaml that holds `budget_usd`.
    """

    def __init__(self, budget_usd: float | None, section: str) -> None:
        self.budget_usd, self.section = budget_usd, section
        self.reason: InputError | None = None
        self.sent = self.reused = self.lost = 0
        self.paid_now = self.data = Usage()
        self.wasted_usd = 0.0
        self.answers = 0
        """How many different answers the data rests on."""
        # Their names, on disk but for half a megabyte: those of a million would take 150 MB. 64 bits of each; two are alike once in 40 million runs.
        self._counted = sqlite3.connect("", isolation_level=None)
        self._counted.executescript("PRAGMA journal_mode = OFF; PRAGMA cache_size = -512; CREATE TABLE counted (name INTEGER PRIMARY KEY)")
        self._reserved_usd, self._in_flight = 0.0, 0
        self._changed = asyncio.Condition()
        self._stopped = asyncio.Event()

    def count(self, key: str, usage: Usage) -> None:
        """An answer that the data rests on, new or from the cache; each is counted once."""
        if self._counted.execute("INSERT OR IGNORE INTO counted VALUES (?)", (hash(key),)).rowcount:
            self.answers += 1
            self.data += usage

    def stop(self, reason: InputError) -> None:
        """Start no more calls. Those in flight go on to their end, so that what is paid is kept."""
        self.reason = self.reason or reason
        self._stopped.set()

    async def pause(self, seconds: float) -> bool:
        """Wait for some seconds; False, at once, when the stage is ending early."""
        try:
            await asyncio.wait_for(self._stopped.wait(), seconds)
        except TimeoutError:
            return True
        return False

    @property
    def _total_usd(self) -> float:
        return (self.data.cost_usd or 0.0) + self.wasted_usd

    @asynccontextmanager
    async def room_for(self, worst_usd: float) -> AsyncIterator[Room]:
        """Reserve a call's worst case, once it fits into the budget.

        Raises:
            Stopped: the stage is ending early, or this call does not fit and nothing in flight could make room.
        """
        async with self._changed:
            while self.reason is None and self.budget_usd is not None and self._total_usd + self._reserved_usd + worst_usd > self.budget_usd:
                if not self._in_flight:
                    lost = f", of which ${self.wasted_usd:.4f} for answers that cannot be used or never came" if self.wasted_usd else ""
                    self.stop(InputError(
                        f"{self.section}.budget_usd of ${self.budget_usd:g} is used up: ${self._total_usd:.4f} spent{lost}, "
                        f"and the next call may cost ${worst_usd:.4f}",
                        f"every answer is kept: raise {self.section}.budget_usd in params.yaml and run again to go on"))
                else:
                    await self._changed.wait()
            if self.reason is not None:
                raise Stopped("the stage was stopped before this call")
            self._reserved_usd += worst_usd
            self._in_flight += 1
        try:
            yield Room(self, worst_usd)
        finally:
            async with self._changed:
                self._in_flight -= 1
                self._reserved_usd = self._reserved_usd - worst_usd if self._in_flight else 0.0
                self._changed.notify_all()

    def progress(self, projected_usd: float) -> str:
        """Calls, tokens and dollars so far, for a progress bar."""
        tokens = self.data.prompt_tokens + self.data.completion_tokens
        calls = f"calls={self.sent + self.reused} ({self.reused} cached)"
        projected = "" if self.data.cost_usd is None else f" of ~{dollars(projected_usd)}"
        return f"{calls}, tokens={tokens / MILLION:.2f}M, {dollars(self.data.cost_usd)}{projected}"

    def summary(self) -> str:
        """One sentence for the end of a stage."""
        lost = f"; {self.lost} tries got no answer, and the provider may charge for them" if self.lost else ""
        return (f"{dollars(self.data.cost_usd)} for the data, of that {dollars(self.paid_now.cost_usd)} in this run "
                f"({self.sent} answers, {self.reused} from the cache){lost}")


def dollars(amount: float | None) -> str:
    """`$1.23`, to four places below ten cents; `$?` where no price is known."""
    if amount is None:
        return "$?"
    return f"${amount:.2f}" if amount >= 0.1 or amount == 0 else f"${amount:.4f}"
