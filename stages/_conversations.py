"""Conversation tables as the student reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from agent.encode import Encoded, Encoder
from agent.protocol import system_prompt
from schemas.company import load_company
from schemas.traces import Message, Role

if TYPE_CHECKING:
    import polars as pl


def conversations(table: pl.DataFrame) -> Iterator[tuple[str, str, list[Message]]]:
    """(company, conversation_id, messages) for every conversation, in the table's order."""
    for part in table.partition_by("conversation_id", maintain_order=True):
        yield part["company"][0], part["conversation_id"][0], [
            Message(Role(role), content) for role, content in part.select("role", "content").iter_rows()]


def encode_table(table: pl.DataFrame, encoder: Encoder) -> list[tuple[str, str, Encoded]]:
    """(company, conversation_id, tokens) for every conversation, each with its company's system prompt."""
    prompts = {slug: system_prompt(load_company(slug)) for slug in table["company"].unique()}
    return [(company, name, encoder.conversation(prompts[company], messages)) for company, name, messages in conversations(table)]
