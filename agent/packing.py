"""Several conversations in one line behind the beginning that they share: no padding, attention kept inside each.

Sequence packing (Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination") with one difference: the
common beginning, a company's system prompt, stands in the line once and every conversation attends to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import itemgetter
from typing import Any

import torch
from transformers import AttentionInterface

from agent.compiled import TILE, Line, library_for
from agent.student import attention, backbone

CAUSAL = "handoff_causal"
"""The name under which a model attends by `causal`, as `agent.student.attention` takes it."""


def read_packed(model: Any, prefix: torch.Tensor, rows: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Run several sequences that begin alike; the common beginning is computed once.

    The gradient flows through the shared keys and values, so it equals that of running every sequence whole.

    Args:
        model: a causal language model with full attention in every layer, or some of its layers.
        prefix: the common beginning: token ids, shape (1, P), or what enters the first layer, (1, P, H); P may be 0.
        rows: the rest of every sequence, one after the other: token ids, (1, R), or what enters the first layer, (1, R, H).
        lengths: how many tokens of `rows` each sequence has.

    Returns:
        hidden states of `rows`, shape (R, H).
    """
    cut = prefix.shape[1]
    positions = torch.cat([torch.arange(cut), *(torch.arange(cut, cut + length) for length in lengths)])[None].to(rows.device)
    with attention(model, "handoff_packed"):
        hidden = backbone(model)(**entering(torch.cat([prefix, rows], dim=1)), position_ids=positions, use_cache=False, packed=(cut, tuple(lengths)))
    return hidden.last_hidden_state[0, cut:]


def entering(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Token ids or states, by the name that a model takes them under."""
    return {"inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens}


class _Causal(torch.autograd.Function):
    """Causal attention of a line of sequences by attention.c, which says what everything is.

    Tiles of keys are weighed as they come, so that scores never leave a core's own cache: two thirds of the time of the same products called
    one after the other. Nothing but half of a tile on the diagonal is computed in vain, and no weights are kept.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequences: torch.Tensor, scale: float) -> torch.Tensor:
        query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
        out, sums = query.new_empty(query.shape[2], query.shape[1], query.shape[3]), query.new_empty(query.shape[1:3])
        _compiled("causal", query, key, value, sequences, scale, out=out, sums=sums)
        ctx.save_for_backward(query, key, value, sequences, out, sums)
        ctx.scale = scale
        return out.transpose(0, 1)[None]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sequences, out, sums = ctx.saved_tensors
        of_queries, of_keys, of_values = (each.new_zeros(each.shape[2], each.shape[1], each.shape[3]) for each in (query, key, value))
        common = int(sequences[3].max())
        of_common = query.new_zeros(sequences.shape[1], 2, key.shape[1], common, query.shape[3])
        _compiled("causal_back", query, key, value, sequences, ctx.scale, out=out, sums=sums, grad=grads[0][0].transpose(0, 1).contiguous(),
                  of_queries=of_queries, of_keys=of_keys, of_values=of_values, of_common=of_common)
        of_keys[:common] += of_common[:, 0].sum(dim=0).transpose(0, 1)
        of_values[:common] += of_common[:, 1].sum(dim=0).transpose(0, 1)
        return (*(each.transpose(0, 1)[None] for each in (of_queries, of_keys, of_values)), None, None)


def _compiled(function: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequences: torch.Tensor, scale: float,
              **others: torch.Tensor) -> None:
    """Call a function of attention.c.

    Args:
        function: its name.
        query: (1, heads, R, D).
        key: (1, KV, S, D).
        value: as `key`.
        sequences: where each one's queries and keys begin, how many tokens it has, and how many keys of the line's beginning it sees: (4, N).
        scale: what scores are multiplied with.
        others: what else it reads or writes, contiguous, by the names of attention.c.
    """
    heads, tokens, size = query.shape[1:]
    longest, threads = int((sequences[2] + sequences[3]).max()), torch.get_num_threads()
    # Five lists of keys, three tiles of rows and two of scores are what the backward pass needs, more than the forward pass; one tile is to spare.
    room = 5 * (longest + -longest % TILE) * size + 4 * TILE * size + 2 * TILE * TILE
    rooms = query.new_empty(threads, room)
    held = dict(zip(("queries_from", "keys_from", "counts", "before"), sequences, strict=True)) | others
    held |= {"queries": query, "keys": key, "values": value, "rooms": rooms}
    getattr(library_for(query), function)(Line(
        sequences=sequences.shape[1], tokens=tokens, heads=heads, kv=key.shape[1], size=size, common=int(sequences[3].max()),
        query_row=query.stride(2), query_head=query.stride(1), key_row=key.stride(2), key_head=key.stride(1),
        value_row=value.stride(2), value_head=value.stride(1), **{name: each.data_ptr() for name, each in held.items()},
        room=room, threads=threads, scale=scale))


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """The same by torch's own attention, which takes its softmax in float32 whatever it is given."""
    from torch.nn.attention.bias import causal_lower_right

    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    mask = causal_lower_right(query.shape[2], key.shape[2])
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of the last R of S tokens, each over itself and all before it.

    Args:
        query: (1, heads, R, D).
        key: (1, KV, S, D), each for heads / KV neighbouring queries.
        value: as `key`.
        scale: what scores are multiplied with.

    Returns:
        (1, heads, R, D).
    """
    if library_for(query):
        rows, before = query.shape[2], key.shape[2] - query.shape[2]
        out: torch.Tensor = _Causal.apply(query, key, value, torch.tensor([[0], [before], [rows], [before]]), scale)
        return out
    return _fused(query, key, value, scale)


def _scale(query: torch.Tensor, scaling: float | None) -> float:
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def _packed_attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
                      packed: tuple[int, tuple[int, ...]], scaling: float | None = None, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Attention of a line, (1, heads, T, D), as transformers calls it: (1, T, heads, D)."""
    cut, lengths = packed
    scale = _scale(query, scaling)
    if library_for(query):
        starts = accumulate(lengths[:-1], initial=cut)
        # The longest first, so that no core waits for one at the end.
        sequences = sorted([(start, start, length, cut) for start, length in zip(starts, lengths, strict=True)], key=itemgetter(2), reverse=True)
        if cut:
            sequences.append((0, 0, cut, 0))
        out = _Causal.apply(query, key, value, torch.tensor(sequences).T.contiguous(), scale)
    else:
        queries, keys, values = (each.split((cut, *lengths), dim=2) for each in (query, key, value))
        outs = [causal(queries[0], keys[0], values[0], scale)] if cut else []
        for row, own_keys, own_values in zip(queries[1:], keys[1:], values[1:], strict=True):
            outs.append(causal(row, torch.cat([keys[0], own_keys], dim=2), torch.cat([values[0], own_values], dim=2), scale))
        out = torch.cat(outs, dim=2)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("handoff_packed", _packed_attention)


def _causal_attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
                      scaling: float | None = None, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Attention of one sequence, or of its last tokens, as transformers calls it."""
    return causal(query, key, value, _scale(query, scaling)).transpose(1, 2).contiguous(), None


AttentionInterface.register(CAUSAL, _causal_attention)
