"""Conversation tables as the student reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.encode import Encoded, Encoder
from schemas.action import ActionName, parse_action
from schemas.traces import Message, Role

if TYPE_CHECKING:
    import polars as pl

Item = tuple[str, str, Encoded]
"""What may be read together, conversation id, tokens."""


@dataclass(frozen=True)
class Conversation:
    """One conversation of a table."""

    company: str
    name: str
    system: str
    messages: list[Message]


def conversations(table: pl.DataFrame) -> Iterator[Conversation]:
    """Every conversation, in the table's order."""
    for part in table.partition_by("conversation_id", maintain_order=True):
        first = part.row(0, named=True)
        yield Conversation(first["company"], first["conversation_id"], first["system"], [
            Message(Role(role), content) for role, content in part.select("role", "content").iter_rows()])


def encode_table(table: pl.DataFrame, encoder: Encoder) -> list[Item]:
    """(system prompt, conversation_id, tokens) for every conversation: what is computed once for several is their system prompt's.

    A company has one of its own; recorded conversations of one company may have begun with different ones.
    """
    return [(c.system, c.name, encoder.conversation(c.system, c.messages)) for c in conversations(table)]


def handoffs(table: pl.DataFrame) -> dict[str, list[bool]]:
    """conversation_id -> which of its agent turns hand off, in order."""
    return {c.name: [parse_action(message.content).action is ActionName.ESCALATE for message in c.messages if message.role is Role.AGENT]
            for c in conversations(table)}
