"""Training batches: conversations of one company behind the system prompt that they share."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.encode import Encoded

if TYPE_CHECKING:
    import torch

    from agent.layer_states import LayerStates

IGNORE = -100
"""The target where there is nothing to learn."""


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation to learn from: `group` is what it shares its prefix with, `times` how often it stands in the table."""

    group: str
    encoded: Encoded
    times: int


def count_copies(conversations: list[tuple[str, str, Encoded]]) -> list[Example]:
    """The conversations without their copies, in the order in which each comes first."""
    times = Counter(tuple(encoded.ids) for _, _, encoded in conversations)
    first = {tuple(encoded.ids): (group, encoded) for group, _, encoded in reversed(conversations)}
    return [Example(*first[ids], count) for ids, count in times.items()]


def make_batches(examples: list[Example], budget: int, seed: int) -> list[list[Example]]:
    """Put the conversations into batches of one company, at most `budget` tokens computed at once; a longer one stands alone.

    A batch computes its common prefix once. In seeded order, each conversation goes into the first batch with room for it
    (first fit), and so do the batches.
    """
    chance = random.Random(seed)
    batches: list[list[Example]] = []
    tokens: list[int] = []
    for example in chance.sample(examples, len(examples)):
        prefix, rest = example.encoded.prefix, len(example.encoded.ids) - example.encoded.prefix
        for number, batch in enumerate(batches):
            if batch[0].group == example.group and tokens[number] + rest <= budget:
                batch.append(example)
                tokens[number] += rest
                break
        else:
            batches.append([example])
            tokens.append(prefix + rest)
    chance.shuffle(batches)
    return batches


class Collator:
    """Turns batches into tensors.

    Args:
        share: whether the common prefix is computed once for a batch.
        states: what enters the first layer that is trained, computed for all conversations; None where all layers are.

    Attributes:
        tokens_read: of the conversations in all batches that were trained on.
    """

    def __init__(self, share: bool, states: LayerStates | None = None) -> None:
        self.share, self._states = share, states
        self.tokens_read = 0

    def __call__(self, batch: list[Example]) -> dict[str, torch.Tensor]:
        """One batch.

        Returns:
            `prefix` (1, P) and `rows` (1, R), all conversations one after the other, both with a last dimension H where they are
            states; `lengths` (B) of the rows; `targets` (R), the agent's token that follows, else `IGNORE`; `times` (R).
        """
        import torch

        self.tokens_read += sum(len(example.encoded.ids) for example in batch)
        conversations = [example.encoded for example in batch]
        prefix, rows = self._prefix(conversations[0]), [self._rest(encoded) for encoded in conversations]
        if not self.share:
            prefix, rows = prefix[:0], [torch.cat([self._prefix(encoded), row]) for encoded, row in zip(conversations, rows, strict=True)]
        lengths = torch.tensor([len(row) for row in rows])
        labels = [encoded.labels(IGNORE)[len(encoded.ids) - len(row):] for encoded, row in zip(conversations, rows, strict=True)]
        return {"prefix": prefix[None], "rows": torch.cat(rows)[None], "lengths": lengths,
                "targets": torch.tensor([target for of_row in labels for target in [*of_row[1:], IGNORE]]),
                "times": torch.tensor([example.times for example in batch]).repeat_interleave(lengths)}

    def _prefix(self, encoded: Encoded) -> torch.Tensor:
        import torch

        return self._states.prefix(encoded) if self._states else torch.tensor(encoded.ids[:encoded.prefix], dtype=torch.long)

    def _rest(self, encoded: Encoded) -> torch.Tensor:
        import torch

        return self._states.rest(encoded) if self._states else torch.tensor(encoded.ids[encoded.prefix:], dtype=torch.long)
