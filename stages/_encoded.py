"""Conversation tables as the student reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.encode import Encoded, Encoder
from stages._conversations import conversations

if TYPE_CHECKING:
    import polars as pl

Item = tuple[str, str, Encoded]
"""What may be read together, conversation id, tokens."""


def encode_table(table: pl.DataFrame, encoder: Encoder) -> list[Item]:
    """(system prompt, conversation_id, tokens) for every conversation: what is computed once for several is their system prompt's.

    A company has one of its own; recorded conversations of one company may have begun with different ones.
    """
    return [(c.system, c.name, encoder.conversation(c.system, c.messages)) for c in conversations(table)]
