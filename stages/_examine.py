"""What can be said of conversations one by one, in any process: the rules each breaks, its steps in canonical JSON, what was said in it."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from schemas.action import Action, ActionName
from schemas.company import Company
from schemas.traces import Message, RejectReason, Role
from stages._chunks import digest
from stages._rules import Case, Rejection, first_broken, read_steps
from stages._sentences import sentences

if TYPE_CHECKING:
    import polars as pl

EXAMINED = ["conversation_id", "company", "scenario", "failure", "index", "role", "content"]
"""The columns that conversations are examined by."""
_ROLES = {role.value: role for role in Role}
_quoted = json.JSONEncoder(ensure_ascii=False).encode


class Examined(NamedTuple):
    """One conversation, as far as it can be judged by itself.

    Texts are held as digests, so that many conversations take little memory; all of them are empty where the conversation is rejected.
    A tuple, since pickle takes two to three times as long for a frozen dataclass with slots.
    """

    name: str
    company: str
    scenario: str | None
    first: int
    """The row of the chunk that it begins in."""
    rejection: Rejection | None
    canonical: tuple[tuple[int, str], ...] = ()
    """The agent's messages that are no canonical JSON: their index, and the text as such."""
    sentences: tuple[tuple[bytes, ...], ...] = ()
    """Of every message to or by the customer, the digests of its `sentences`."""
    spoken: bytes = b""
    """The digest of all that customer and agent said to each other."""
    turns: int = 0
    handoffs: int = 0


class Examiner:
    """Knows what conversations are examined by; goes to other processes."""

    def __init__(self, companies: dict[str, Company]) -> None:
        self._companies = companies
        self._scenarios = {(slug, s.id): s for slug, company in companies.items() for s in company.scenarios}

    def chunk(self, chunk: pl.DataFrame) -> list[Examined]:
        """All conversations of a table that has the columns EXAMINED, in order."""
        firsts = (chunk["index"] == 0).arg_true()
        begins = chunk[firsts].select("conversation_id", "company", "scenario", "failure").iter_rows()
        messages = [Message(_ROLES[role], content) for role, content in chunk.select("role", "content").iter_rows()]
        bounds = pairwise([*firsts, len(chunk)])
        return [self.conversation(name, company, scenario, failure, messages[first:end], first)
                for (name, company, scenario, failure), (first, end) in zip(begins, bounds, strict=True)]

    def conversation(self, name: str, company: str, scenario: str | None, failure: str | None, messages: list[Message], first: int = 0) -> Examined:
        """One conversation; `failure` is why the endpoint gave up on it."""
        if failure:
            return Examined(name, company, scenario, first, Rejection(RejectReason.INFRASTRUCTURE, failure))
        steps = read_steps(messages)
        rejection = steps if isinstance(steps, Rejection) else first_broken(
            Case(messages, steps, self._companies.get(company), self._scenarios.get((company, scenario or ""))))
        if rejection or isinstance(steps, Rejection):
            return Examined(name, company, scenario, first, rejection)
        texts = [spoken(message, steps.get(index)) for index, message in enumerate(messages)]
        return Examined(
            name, company, scenario, first, None,
            tuple((index, step.to_json()) for index, step in steps.items() if not _is_canonical(messages[index].content, step)),
            tuple(tuple(map(digest, sentences(text))) if text else () for text in texts), digest("\n".join(map(words, texts))),
            len(steps), sum(step.action is ActionName.ESCALATE for step in steps.values()))


def _is_canonical(text: str, step: Action) -> bool:
    """Whether `text` is what `step.to_json()` gives, in an eighth of its time; it may say no where it is."""
    args = ", ".join(f"{_quoted(key)}: {_quoted(value)}" for key, value in step.args.items())
    return text == f'{{"thought": {_quoted(step.thought)}, "action": "{step.action}", "args": {{{args}}}, "message": {_quoted(step.message)}}}'


def spoken(message: Message, step: Action | None) -> str:
    """What was said to or by the customer; nothing for tool calls and results, which conversations may share."""
    return step.message if step else message.content if message.role is Role.CUSTOMER else ""


def words(text: str) -> str:
    """A text as it is compared: in small letters, one space between words."""
    return " ".join(text.lower().split())
