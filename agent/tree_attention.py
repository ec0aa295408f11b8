"""Attention of the tokens of a step of decoding: each over its prefix, its conversation and what its branch has written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface

from agent.compiled import TILE, library_for

Layer = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer: (lists, KV, S / T, D, T), as a product with queries takes T of them at once, and (lists, KV, S, D)."""


class Seen:
    """Which keys the rows of a step see.

    Args:
        layers: the lists of keys, and their values, of all layers.
        lists: which list of keys each of B blocks of rows sees.
        firsts: the first row of each block, and the end of the last one, B + 1.
        ends: how many keys of its list every row of the step sees, from the first one on, and at least one.
    """

    def __init__(self, layers: Sequence[Layer], lists: Sequence[int], firsts: Sequence[int], ends: torch.Tensor) -> None:
        self.lists, self.firsts, self.ends, self._like = torch.tensor(lists), torch.tensor(firsts), ends, layers[0][1]

    @cached_property
    def padded(self) -> _Padded:
        """The same by torch's means."""
        rows, counts = slice(*self.firsts[[0, -1]].tolist()), self.firsts.diff()
        blocks = torch.arange(len(counts)).repeat_interleave(counts)
        places = torch.arange(len(blocks)) - (self.firsts[:-1] - rows.start)[blocks]
        ends = torch.ones(len(counts), int(counts.max()), 1, dtype=torch.long)
        ends[blocks, places, 0] = self.ends[rows]
        longest = int(ends.max())
        count = min(longest + -longest % TILE, self._like.shape[2])
        hidden = torch.zeros(*ends.shape[:2], count).masked_fill_(torch.arange(count) >= ends, float("-inf"))[:, None]
        device = self._like.device
        return _Padded(rows, count, blocks.to(device), places.to(device), hidden.to(device), None if len(self._like) == 1 else self.lists.to(device))


@dataclass(frozen=True, slots=True)
class _Padded:
    """Blocks of rows that are as long as the longest one."""

    rows: slice
    """Those of the step that stand in the blocks."""
    count: int
    """Keys behind these nobody sees."""
    blocks: torch.Tensor
    """The block of every row, (R)."""
    places: torch.Tensor
    """Where in its block it stands, (R)."""
    hidden: torch.Tensor
    """What is added to the scores, (B, 1, places, count)."""
    lists: torch.Tensor | None
    """Every block's list, (B); None where there is one of both."""


Part = list[tuple[Layer, Seen]]
"""What the rows of a step attend to in one layer, each in one of them."""


def lay_out(keys: torch.Tensor, values: torch.Tensor) -> Layer:
    """Keys and values, (lists, KV, S, D), laid out for `attend`; with zeros behind them, so that S is a multiple of TILE."""
    keys, values = (pad(each, (0, 0, 0, -each.shape[2] % TILE)) for each in (keys, values))
    at_once = TILE if library_for(values) else keys.shape[2]
    return keys.unflatten(2, (-1, at_once)).transpose(3, 4).contiguous(), values.contiguous()


def attend(queries: torch.Tensor, held: Layer, seen: Seen, outs: torch.Tensor, sums: torch.Tensor) -> None:
    """Attention of some rows of a step over some keys.

    Args:
        queries: (KV, R, D), scaled and contiguous.
        held: keys and values, as `lay_out` gives them.
        seen: which rows, and what of the keys.
        outs: as `queries`: their rows are written.
        sums: (KV, R, 1), float32: for their rows the logarithm of the sum of their scores' exponentials.
    """
    if library := library_for(queries):
        _compiled(library, queries, *held, seen, outs, sums)
    else:
        _plain(queries, *held, seen, outs, sums)


def joined(outs: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Attention over several parts of the keys, (parts, KV, R, D) with (parts, KV, R, 1), as `attend` gives them (online softmax;
    Milakov and Gimelshein 2018): (KV, R, D)."""
    return (outs * sums.softmax(dim=0)).sum(dim=0)


def _plain(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: Seen, outs: torch.Tensor, sums: torch.Tensor) -> None:
    """`attend` by torch's products. The softmax is taken in float32."""
    padded = seen.padded
    read = queries.new_zeros(len(padded.hidden), len(queries), padded.hidden.shape[2], queries.shape[2])
    read[padded.blocks, :, padded.places] = queries[:, padded.rows].transpose(0, 1)
    keys, values = keys[:, :, 0, :, :padded.count], values[:, :, :padded.count]
    if padded.lists is not None:
        keys, values = keys[padded.lists], values[padded.lists]
    scores = (read @ keys).float()
    scores += padded.hidden
    top = scores.amax(dim=-1, keepdim=True)
    weights = torch.softmax(scores, dim=-1, out=scores)
    # The greatest weight is that of the top score: 1 / sum(exp(score - top)). torch.exp takes longer than a whole softmax.
    found = weights.to(values.dtype) @ values, top - weights.amax(dim=-1, keepdim=True).log()
    outs[:, padded.rows], sums[:, padded.rows] = (each[padded.blocks, :, padded.places].transpose(0, 1) for each in found)


def _compiled(library: Any, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: Seen, outs: torch.Tensor,
              sums: torch.Tensor) -> None:
    """`attend` by attention.c."""
    heads, rows, size = queries.shape
    count = values.shape[2]
    room = queries.new_empty(4, count)
    library.attend(*(each.data_ptr() for each in (queries, keys, values, seen.lists, seen.firsts, seen.ends)),
                   len(seen.lists), heads, rows, size, count, *(each.data_ptr() for each in (room, outs, sums)))


class Step(Protocol):
    """What a step's tokens attend to."""

    def parts(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> list[Part]:
        """The parts of it in a layer, counted from 0, with the keys and values of the step's own tokens, (KV, N, D)."""


def _tree_attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
                    step: Step, scaling: float | None = None, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Attention of a step's tokens, which come in one line, (1, heads, N, D), as transformers calls it: (1, N, heads, D).

    All else in the model takes the tokens as they come, so that nothing is computed for padding.
    """
    kv, size = key.shape[1], query.shape[-1]
    # Rows by token, then by head, so that those of a conversation are neighbours.
    rows = query[0].unflatten(0, (kv, -1)).transpose(1, 2)
    heads = rows.shape[2]
    queries = (rows * (size ** -0.5 if scaling is None else scaling)).reshape(kv, -1, size).contiguous()
    parts = step.parts(module.layer_idx, key[0], value[0])
    outs, sums = queries.new_empty(len(parts), *queries.shape), queries.new_empty(len(parts), *queries.shape[:2], 1, dtype=torch.float32)
    for part, out, total in zip(parts, outs, sums, strict=True):
        for held, seen in part:
            attend(queries, held, seen, out, total)
    return joined(outs, sums).to(query.dtype).unflatten(1, (-1, heads)).transpose(0, 1).reshape(1, query.shape[2], -1, size), None


AttentionInterface.register("handoff_trees", _tree_attention)
