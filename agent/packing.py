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

# What scaled_dot_product_attention runs on a CPU, called by name since only these give and take the log-sum-exp that joins two parts.
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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


def _parts(cut: int, lengths: Sequence[int]) -> Iterator[slice]:
    """Where each sequence stands in the line."""
    for length in lengths:
        yield slice(cut, cut + length)
        cut += length


class _Packed(torch.autograd.Function):
    """Attention on a CPU: of the prefix over itself, of all rows over the prefix at once, and of every row over itself.

    A row's two parts are joined by their log-sum-exp, and each part's backward pass takes the joined result (as in Liu et al. 2023,
    "Ring Attention"). Nothing is computed that a mask would hide but half of every block on a diagonal.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cut: int, lengths: tuple[int, ...],
                scale: float) -> torch.Tensor:
        out, total = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)

        def attend(queries: slice, keys: slice, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
            result: tuple[torch.Tensor, torch.Tensor] = _forward(query[:, :, queries], key[:, :, keys], value[:, :, keys], 0.0, causal, scale=scale)
            return result

        before = slice(0, cut)
        if cut:
            out[:, :, before], total[:, :, before] = attend(before, before, True)
            shared, log_shared = attend(slice(cut, None), before, False)
        for row in _parts(cut, lengths):
            own, log_own = attend(row, row, True)
            if cut:
                here = slice(row.start - cut, row.stop - cut)
                both = torch.logaddexp(log_own, log_shared[:, :, here])
                own = own * (log_own - both).exp()[..., None] + shared[:, :, here] * (log_shared[:, :, here] - both).exp()[..., None]
                log_own = both
            out[:, :, row], total[:, :, row] = own, log_own
        ctx.save_for_backward(query, key, value, out, total)
        ctx.cut, ctx.lengths, ctx.scale = cut, lengths, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, out, total = ctx.saved_tensors
        sums = [torch.zeros_like(each) for each in (query, key, value)]

        def attend(queries: slice, keys: slice, causal: bool) -> None:
            found = _backward(grads[0][:, :, queries], query[:, :, queries], key[:, :, keys], value[:, :, keys], out[:, :, queries],
                              total[:, :, queries], 0.0, causal, scale=ctx.scale)
            for into, where, part in zip(sums, (queries, keys, keys), found, strict=True):
                into[:, :, where] += part

        before = slice(0, ctx.cut)
        if ctx.cut:
            attend(before, before, True)
            attend(slice(ctx.cut, None), before, False)
        for row in _parts(ctx.cut, ctx.lengths):
            attend(row, row, True)
        return *sums, None, None, None


def anywhere(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cut: int, lengths: tuple[int, ...], scale: float) -> torch.Tensor:
    """What `_Packed` computes, on any device: every row over the prefix and itself."""
    from torch.nn.attention.bias import causal_lower_right

    sdpa, outs = torch.nn.functional.scaled_dot_product_attention, []
    if cut:
        outs.append(sdpa(query[:, :, :cut], key[:, :, :cut], value[:, :, :cut], is_causal=True, scale=scale))
    for row in _parts(cut, lengths):
        keys, values = (torch.cat([each[:, :, :cut], each[:, :, row]], dim=2) for each in (key, value))
        length = row.stop - row.start
        outs.append(sdpa(query[:, :, row], keys, values, attn_mask=causal_lower_right(length, cut + length), scale=scale))
    return torch.cat(outs, dim=2)


def _packed_attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
                      packed: tuple[int, tuple[int, ...]], scaling: float | None = None, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Attention of a line, (1, heads, T, D), as transformers calls it: (1, T, heads, D)."""
    # Copies of shared keys and values for every query head: the backward pass splits its work by heads.
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    attend = _Packed.apply if query.device.type == "cpu" else anywhere
    out: torch.Tensor = attend(query, key, value, *packed, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("handoff_packed", _packed_attention)
