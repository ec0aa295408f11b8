"""Guessing a text's next tokens from what stood behind the same few tokens before, so that a model can check several at once.

Speculative decoding without a second model (Leviathan et al. 2023; prompt lookup, Saxena 2023): what a model would not have
picked is thrown away, so that drafts change no text, only how many steps it takes. An agent's steps are one JSON object after
the other and repeat what the conversation says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

CONTEXT = 4
"""A guess is what came last behind the same so many tokens."""
MOST = 3
"""Tokens guessed at once. More are seldom right, and a token that is thrown away takes nearly as long as one that stands."""


@dataclass(frozen=True, slots=True)
class Drafts:
    """What stood behind every few tokens, in all texts that were learned."""

    _following: dict[tuple[int, ...], int] = field(default_factory=dict)

    def learn(self, ids: Sequence[int]) -> None:
        """Keep what follows what in a text."""
        for start in range(len(ids) - CONTEXT):
            self._following[tuple(ids[start:start + CONTEXT])] = ids[start + CONTEXT]

    def guess(self, ids: Sequence[int], most: int) -> tuple[int, ...]:
        """What may follow a text: up to `most` tokens, fewer where nothing is known."""
        text = list(ids[-CONTEXT:])
        while len(text) < CONTEXT + most and (token := self._following.get(tuple(text[-CONTEXT:]))) is not None:
            text.append(token)
        return tuple(text[CONTEXT:])
