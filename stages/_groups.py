"""Conversations read a group at a time, and the turns of a group by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from tqdm import tqdm

from stages._conversations import Item


def each_group(conversations: list[Item], size: int, what: str) -> Iterator[list[Item]]:
    """Groups to read together, with a progress bar that counts turns."""
    from agent.decode import groups

    with tqdm(total=sum(len(encoded.spans) for _, _, encoded in conversations), desc=what, unit="turn", file=sys.stderr) as bar:
        for group in groups(conversations, size):
            yield group
            bar.update(sum(len(encoded.spans) for _, _, encoded in group))


def turn_names(group: list[Item]) -> list[tuple[str, int]]:
    """(conversation id, number of the agent turn) for every turn of a group, in the order of reading."""
    return [(name, number) for _, name, encoded in group for number in range(len(encoded.spans))]
