"""Several conversations in one line behind the beginning that they share: no padding, attention kept inside each.

Sequence packing (Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination") with one difference: the
common beginning, a company's system prompt, stands in the line once and every conversation attends to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AttentionInterface

from agent.student import attention, backbone

BLOCK = 128
"""Queries that attend at once."""
BLOCKS_PAY = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Whether products are oneDNN's here; where they are MKL's, torch's fused attention is faster than ours."""
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


class _InBlocks(torch.autograd.Function):
    """Causal attention of the last R of S tokens, for scaled queries (KV, R x G, D), G neighbours to a token; keys and values (KV, S, D).

    A block of queries at a time, over the keys that its last one sees: plain products, which oneDNN computes at more than twice the
    rate of torch's fused attention on a CPU, and nothing but half of a block on the diagonal is computed in vain. The weights of
    every block lie in the same memory: kept, they would take 4 bytes a head and pair of tokens in every layer. So the backward pass
    computes them again (Dao et al. 2022, "FlashAttention"), but with a whole softmax, since all of a block's keys are there.
    """

    @staticmethod
    def forward(ctx: Any, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: int) -> torch.Tensor:
        ctx.save_for_backward(queries, keys, values)
        ctx.group = group
        weigh, outs = _Weights(queries, keys, group), torch.empty_like(queries)
        for block, seen in weigh.blocks():
            outs[:, block] = weigh(queries[:, block], seen) @ values[:, :seen]
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        queries, keys, values = ctx.saved_tensors
        weigh, by_value = _Weights(queries, keys, ctx.group), values.transpose(1, 2).contiguous()
        of_queries, of_keys, of_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        room = weigh.room()
        for block, seen in weigh.blocks():
            query, grad = queries[:, block], grads[0][:, block]
            weights = weigh(query, seen)
            of_values[:, :seen] += weights.transpose(1, 2) @ grad
            scores = torch.bmm(grad, by_value[:, :, :seen], out=room[:weights.numel()].view_as(weights))
            torch.ops.aten._softmax_backward_data.out(scores, weights, -1, scores.dtype, grad_input=scores)
            of_queries[:, block] = scores @ keys[:, :seen]
            of_keys[:, :seen] += scores.transpose(1, 2) @ query
        return of_queries, of_keys, of_values, None


class _Weights:
    """The weights of a block of queries at a time, as `_InBlocks` takes queries and keys; every block's in the same memory."""

    def __init__(self, queries: torch.Tensor, keys: torch.Tensor, group: int) -> None:
        self._group, self._tokens, self._keys = group, queries.shape[1] // group, keys.transpose(1, 2).contiguous()
        self._later = queries.new_full((BLOCK, BLOCK), float("-inf")).triu_(1).repeat_interleave(group, dim=0)
        self._room = self.room()

    def room(self) -> torch.Tensor:
        """Memory for the weights of any block."""
        kv, _, size = self._keys.shape
        return self._keys.new_empty(kv * self._group * min(BLOCK, self._tokens) * size)

    def blocks(self) -> Iterator[tuple[slice, int]]:
        """Every block's queries, and how many keys they are weighed over."""
        for start in range(0, self._tokens, BLOCK):
            end = min(start + BLOCK, self._tokens)
            yield slice(start * self._group, end * self._group), self._keys.shape[2] - self._tokens + end

    def __call__(self, queries: torch.Tensor, seen: int) -> torch.Tensor:
        """Weights of a block's queries, (KV, N, D), over its keys: (KV, N, seen), until the next block's are asked for."""
        kv, count, _ = queries.shape
        scores = torch.bmm(queries, self._keys[:, :, :seen], out=self._room[:kv * count * seen].view(kv, count, seen))
        scores[:, :, -(count // self._group):] += self._later[:count, :count // self._group]
        return torch.softmax(scores, dim=-1, out=scores)


def _in_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """`causal` by `_InBlocks`."""
    kv, tokens = key.shape[1], query.shape[2]
    queries = (query[0] * scale).unflatten(0, (kv, -1)).transpose(1, 2)
    outs: torch.Tensor = _InBlocks.apply(queries.flatten(1, 2), key[0], value[0], queries.shape[2])
    return outs.unflatten(1, (tokens, -1)).transpose(1, 2).flatten(0, 1)[None]


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
    in_blocks = BLOCKS_PAY and query.device.type == "cpu" and query.dtype == torch.float32
    return (_in_blocks if in_blocks else _fused)(query, key, value, scale)


def _scale(query: torch.Tensor, scaling: float | None) -> float:
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def _packed_attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
                      packed: tuple[int, tuple[int, ...]], scaling: float | None = None, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Attention of a line, (1, heads, T, D), as transformers calls it: (1, T, heads, D)."""
    cut, lengths = packed
    queries, keys, values = (each.split((cut, *lengths), dim=2) for each in (query, key, value))
    scale = _scale(query, scaling)
    outs = [causal(queries[0], keys[0], values[0], scale)] if cut else []
    for row, own_keys, own_values in zip(queries[1:], keys[1:], values[1:], strict=True):
        outs.append(causal(row, torch.cat([keys[0], own_keys], dim=2), torch.cat([values[0], own_values], dim=2), scale))
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register("handoff_packed", _packed_attention)


def _causal_attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
                      scaling: float | None = None, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Attention of one sequence, or of its last tokens, as transformers calls it."""
    return causal(query, key, value, _scale(query, scaling)).transpose(1, 2).contiguous(), None


AttentionInterface.register(CAUSAL, _causal_attention)
