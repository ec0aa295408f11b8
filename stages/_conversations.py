"""Conversation tables, conversation by conversation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from schemas.traces import Message, Role

if TYPE_CHECKING:
    import polars as pl


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
