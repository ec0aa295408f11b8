"""Randomness that depends on nothing but what it is drawn for."""

from __future__ import annotations

import hashlib
import json


class Draw:
    """Random numbers that are a hash of their occasion: the same on every machine, in any order of requests."""

    def __init__(self, *what: object) -> None:
        self._what = what

    def integer(self, name: str, below: int) -> int:
        digest = hashlib.sha256(json.dumps([*map(str, self._what), name]).encode()).digest()
        return int.from_bytes(digest[:8], "big") % below

    def happens(self, name: str, rate: float) -> bool:
        return self.integer(name, 1_000_000) < rate * 1_000_000

    def choice(self, name: str, options: list[str]) -> str:
        return options[self.integer(name, len(options))]
