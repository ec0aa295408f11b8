"""LoRA in fewer products: the adapter is added to the weights once a step, not computed beside them for every token.

`x W' + s (x A') B'` is `x (W + s B A)'`. With many more tokens in a batch than the adapter has ranks, adding `s B A` to `W` costs
next to nothing, and most of the thin products, a scaling and a sum over all tokens fall away. The gradients are the same. A step
holds a merged copy of the weights that have an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch


class _Merged(torch.autograd.Function):
    """A linear layer with its adapter, (T, in) -> (T, out); `weight` (out, in) is frozen, `down` (r, in) and `up` (out, r) are trained.

    The merged weights have `down` below and `up` beside them, so that what the adapter's own gradients need of states and gradients comes
    out of the same products.
    """

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
        outputs, inputs = weight.shape
        both = weight.new_empty(outputs + len(down), inputs + len(down))
        torch.addmm(weight, up, down, alpha=scale, out=both[:outputs, :inputs])
        both[outputs:, :inputs], both[:outputs, inputs:] = down, up
        out, lowered = (states @ both[:, :inputs].T).split((outputs, len(down)), dim=1)
        ctx.save_for_backward(states, both, lowered)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor, torch.Tensor, None]:
        (states, both, lowered), grad = ctx.saved_tensors, grads[0]
        wanted = states.shape[1] if ctx.needs_input_grad[0] else 0
        of_states, of_lowered = (grad @ both[:grad.shape[1], states.shape[1] - wanted:]).split((wanted, lowered.shape[1]), dim=1)
        of_down = (of_lowered.T @ states).mul_(ctx.scale)
        of_up = (grad.T @ lowered).mul_(ctx.scale)
        return of_states if wanted else None, None, of_down, of_up, None


def _forward(layer: Any, states: torch.Tensor) -> torch.Tensor:
    (name,) = layer.active_adapters
    out: torch.Tensor = _Merged.apply(
        states.flatten(0, -2), layer.base_layer.weight, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
    return out.unflatten(0, states.shape[:-1])


@contextmanager
def merged_lora(model: Any) -> Iterator[None]:
    """Let a model's LoRA layers, of one adapter without dropout, work merged for the time of a `with` block.

    Only those over plain float32 weights without a bias: packed weights would have to be unpacked, and bfloat16 ones would round the adapter away.
    """
    from peft.tuners.lora import Linear

    plain = [module for module in model.modules() if type(module) is Linear and type(module.base_layer) is torch.nn.Linear
             and module.base_layer.weight.dtype == torch.float32 and module.base_layer.bias is None]
    for module in plain:
        module.forward = partial(_forward, module)
    try:
        yield
    finally:
        for module in plain:
            del module.forward
