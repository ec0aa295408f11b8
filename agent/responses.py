"""Paid responses: a content-addressed store outside every DVC output, so that nothing is paid for twice.

A response is one row of an SQLite database in WAL mode (diskcache), written in one transaction as soon as it arrives:
after a kill it is there whole or not at all. An entry that is damaged all the same is dropped, and asked anew; one of a
shape that we do not know stays until it is.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import sqlite3
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent.paths import CACHE
from agent.spend import Usage
from agent.wire import unwrapped
from schemas.errors import InputError

RESPONSES = CACHE / "responses"
"""Outside every DVC output: DVC deletes a stage's outputs before it runs."""
_POLL_S = 0.05


class Completion(BaseModel):
    """One answer as it came, the tokens that the server counted, and what it cost when it was paid for.

    A later version may have stored more of it: what is paid for stays readable.
    """

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)
    base_url: str
    model: str
    stored: float = Field(description="Unix time, seconds")
    content: str
    reasoning: str
    finish_reason: str
    prompt_tokens: int = Field(ge=0)
    cached_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    cost_usd: float | None = Field(ge=0)

    @property
    def text(self) -> str:
        """What the model says, without what it thinks and without the envelope in which a schema may have put it.

        The thought may stand before the text, in `<think>…</think>` (the first mark may be part of the server's template
        and missing), or in a field of its own. A server that takes everything for thought leaves the text in that field.
        Empty where the answer was cut before the text began.
        """
        whole = self.content
        if not whole.strip() and self.finish_reason != "length":
            whole = self.reasoning
        whole = whole.lstrip()
        if whole.startswith("{"):
            return unwrapped(whole)
        before, mark, after = whole.partition("</think>")
        if mark and (before.startswith("<think>") or "<think>" not in before):
            return unwrapped(after.lstrip())
        return "" if whole.startswith("<think>") else whole

    @property
    def usage(self) -> Usage:
        """Tokens and dollars."""
        return Usage(self.prompt_tokens, self.cached_tokens, self.completion_tokens, self.cost_usd)


as_json = json.JSONEncoder(sort_keys=True).encode
"""A value as JSON, the same whatever the order of its keys."""


def request_key(base_url: str, request: dict[str, Any], sample: int, at_hand: Mapping[str, str] | None = None) -> str:
    """The address of a response: a hash of the base URL, the whole request as sent, and the sample index.

    Args:
        base_url: where the request goes.
        request: as it is sent.
        sample: which of several answers to the same request.
        at_hand: fields of the request that are written as JSON already. Most of what is hashed is the conversation and the
            schema, which one request has in all its forms.
    """
    at_hand = at_hand or {}
    fields = ", ".join([f"{as_json(name)}: {at_hand.get(name) or as_json(request[name])}" for name in sorted(request)])
    return hashlib.sha256(f"[{as_json(base_url.rstrip('/'))}, {{{fields}}}, {as_json(sample)}]".encode()).hexdigest()


def note_name(base_url: str, model: str) -> str:
    """Under what notes about a model behind an endpoint are stored; what follows a space says which note."""
    return f"{base_url.rstrip('/')} {model}"


class Responses:
    """The store. Several processes may use it at once; the folder appears with the first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._asking: set[str] = set()

    @cached_property
    def _cache(self) -> Any:
        import diskcache

        with self._database():
            # By default it would keep up to 96 MB of the database in memory, as it grows; the system's own cache of files serves as well.
            return diskcache.Cache(str(self.folder), disk=diskcache.JSONDisk, eviction_policy="none", sqlite_mmap_size=0, sqlite_cache_size=2**9)

    @contextmanager
    def _database(self) -> Iterator[None]:
        """Damage to the database itself, a full disk and the like are the user's to mend: nothing paid is thrown away in silence."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise InputError(f"the response cache {self.folder} cannot be used: {error}",
                             f"see to the disk, or move {self.folder} away to begin a new one; what is in it would then be paid for again") from None

    @cached_property
    def _locks(self) -> int:
        assert self._cache is not None
        return os.open(self.folder / "asking.lock", os.O_RDWR | os.O_CREAT, 0o644)

    @cached_property
    def _keys(self) -> sqlite3.Connection:
        assert self._cache is not None
        return sqlite3.connect(self.folder / "cache.db", timeout=self._cache.timeout)

    def first(self, keys: Sequence[str]) -> tuple[str, Completion] | None:
        """The first of some keys that has a response, with it. One query for all of them: most of the time none has."""
        with self._database():
            written = [bytes(self._cache.disk.put(key)[0]) for key in keys]
            there = {row for row, in self._keys.execute(f"SELECT key FROM Cache WHERE key IN ({', '.join('?' * len(keys))})", written).fetchall()}
        found = ((key, self.get(key)) for key, row in zip(keys, written, strict=True) if row in there)
        return next(((key, completion) for key, completion in found if completion), None)

    def get(self, key: str) -> Completion | None:
        """The response under a key, or None. An entry that is damaged is deleted; one of another shape is left to whoever can read it."""
        entry = self._read(key)
        if entry is None:
            return None
        try:
            return Completion.model_validate(entry)
        except ValidationError:
            return None

    def _read(self, key: str) -> Any | None:
        with self._database():
            try:
                return self._cache.get(key, retry=True)
            except (zlib.error, ValueError, EOFError):
                self._cache.delete(key, retry=True)
                return None

    def put(self, key: str, completion: Completion) -> None:
        """Store a response: when this returns, a kill of the process no longer loses it."""
        with self._database():
            self._cache.set(key, completion.model_dump(), retry=True)

    @asynccontextmanager
    async def asking(self, key: str) -> AsyncIterator[None]:
        """Be the only one, in any process, that asks for this response.

        A byte of a file is locked, at an offset taken from the key; the system lets go of it when the process ends in
        whatever way, so no claim outlives its owner.
        """
        offset = int(key[:15], 16)
        while key in self._asking or not self._lock(offset):
            await asyncio.sleep(_POLL_S)
        self._asking.add(key)
        try:
            yield
        finally:
            self._asking.discard(key)
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, offset)

    def _lock(self, offset: int) -> bool:
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def note(self, name: str) -> dict[str, Any]:
        """What was noted about an endpoint; empty if nothing was."""
        found = self._read(f"note:{name}")
        return found if isinstance(found, dict) else {}

    def set_note(self, name: str, note: dict[str, Any]) -> None:
        """Remember something about an endpoint from run to run."""
        with self._database():
            self._cache.set(f"note:{name}", note, retry=True)

    def entries(self) -> Iterator[tuple[str, Completion]]:
        """Every response with its key, in the order in which they came."""
        if not (self.folder / "cache.db").is_file():
            return
        for key in self._cache:
            if isinstance(key, str) and not key.startswith("note:") and (completion := self.get(key)):
                yield key, completion

    def prune(self, drop: Callable[[Completion], bool]) -> list[Completion]:
        """Delete the responses that `drop` picks; returns them. Notes about endpoints none of whose responses is left go too."""
        gone, left = [], set()
        for key, completion in list(self.entries()):
            if drop(completion):
                self._cache.delete(key, retry=True)
                gone.append(completion)
            else:
                left.add(note_name(completion.base_url, completion.model))
        for name in {note_name(completion.base_url, completion.model) for completion in gone} - left:
            for key in list(self._cache):
                if isinstance(key, str) and key.startswith(f"note:{name} "):
                    self._cache.delete(key, retry=True)
        return gone

    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def close(self) -> None:
        """Let go of the database and of every claim."""
        for name in ("_locks", "_keys", "_cache"):
            if (opened := self.__dict__.pop(name, None)) is not None:
                os.close(opened) if name == "_locks" else opened.close()

