"""What a layer computes for every number of a token, in one pass over memory instead of torch's two to ten (elementwise.c).

RMSNorm, SwiGLU and rotary position embeddings, which the families named here compute alike. Other models, and those whose numbers
are not float32 or not on a CPU, compute as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from agent.compiled import library_for
from agent.student import backbone

FAMILIES = frozenset({"Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3"})
"""As transformers begins the names of their classes."""


class _Norm(torch.autograd.Function):
    """RMSNorm of (..., H) with frozen weights, (H)."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        states = states.contiguous()
        out, inverse = torch.empty_like(states), states.new_empty(states.shape[:-1])
        library_for(states).norm(states.data_ptr(), weight.data_ptr(), epsilon, inverse.numel(), states.shape[-1], torch.get_num_threads(),
                                 inverse.data_ptr(), out.data_ptr())
        ctx.save_for_backward(states, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        states, weight, inverse = ctx.saved_tensors
        of_states, grad = torch.empty_like(states), grads[0].contiguous()
        library_for(states).norm_back(states.data_ptr(), weight.data_ptr(), inverse.data_ptr(), grad.data_ptr(), inverse.numel(), states.shape[-1],
                                      torch.get_num_threads(), of_states.data_ptr())
        return of_states, None, None


class _Gated(torch.autograd.Function):
    """SwiGLU of gates and what they let through, (N, F) each."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = (each if each.stride(-1) == 1 else each.contiguous() for each in (gate, up))
        out = gate.new_empty(gate.shape)
        library_for(gate).gated(gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), *gate.shape, torch.get_num_threads(), out.data_ptr())
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad, of_gate, of_up = grads[0].contiguous(), gate.new_empty(gate.shape), gate.new_empty(gate.shape)
        library_for(gate).gated_back(gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), grad.data_ptr(), *gate.shape,
                                     torch.get_num_threads(), of_gate.data_ptr(), of_up.data_ptr())
        return of_gate, of_up


class _Rotated(torch.autograd.Function):
    """Rotary position embedding of (T, heads, D), as all of a model's layers take it; cosines and sines (T, D)."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(states, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, sin, -1), None, None


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: float) -> torch.Tensor:
    if states.stride()[1:] != (states.shape[2], 1):
        states = states.contiguous()
    out = states.new_empty(states.shape)
    library_for(states).rotate(states.data_ptr(), states.stride(0), cos.data_ptr(), sin.data_ptr(), *states.shape, direction,
                               torch.get_num_threads(), out.data_ptr())
    return out


def _norm(module: Any, states: torch.Tensor) -> torch.Tensor:
    fits = library_for(states) and library_for(module.weight)
    out: torch.Tensor = _Norm.apply(states, module.weight, module.variance_epsilon) if fits else type(module).forward(module, states)
    return out


def _mlp(module: Any, states: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_proj(states), module.up_proj(states)
    through = _Gated.apply(gate.flatten(0, -2), up.flatten(0, -2)).unflatten(0, states.shape[:-1]) if library_for(gate) else module.act_fn(gate) * up
    out: torch.Tensor = module.down_proj(through)
    return out


def _rotary(own: Callable[..., tuple[torch.Tensor, torch.Tensor]], query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor,
            sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As a model calls it: (B, heads, T, D) and (B, KV, T, D), cosines and sines (B, T, D). The model's `own` takes batches, and other tensors."""
    if len(query) > 1 or not library_for(query):
        return own(query, key, cos, sin)
    rotated: Any = [_Rotated.apply(each[0].transpose(0, 1), cos[0].contiguous(), sin[0].contiguous()).transpose(0, 1)[None] for each in (query, key)]
    return rotated[0], rotated[1]


@contextmanager
def fused(model: Any) -> Iterator[None]:
    """Let a model compute so for the time of a `with` block, if it is of a family named here."""
    network, layer = backbone(model), type(backbone(model).layers[0])
    family = layer.__name__.removesuffix("DecoderLayer")
    if family not in FAMILIES or model.config.get_text_config().hidden_act != "silu":
        yield
        return
    forwards = {f"{family}RMSNorm": _norm, f"{family}MLP": _mlp}
    taken = [module for module in network.modules() if type(module).__name__ in forwards and "forward" not in vars(module)]
    modeling: Any = sys.modules[layer.__module__]
    own = modeling.apply_rotary_pos_emb
    for module in taken:
        module.forward = partial(forwards[type(module).__name__], module)
    modeling.apply_rotary_pos_emb = partial(_rotary, own)
    try:
        yield
    finally:
        modeling.apply_rotary_pos_emb = own
        for module in taken:
            del module.forward
