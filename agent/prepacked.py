"""Linear layers whose weights oneDNN has laid out for its kernels, for as long as they do not change.

Laying them out at every use takes a third of the time of a few dozen rows, and a tenth where a whole conversation is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch


class _Prepacked(torch.nn.Module):
    """A linear layer whose weights are laid out once."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self._weight, self._bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None), linear.bias

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: it never changes."""
        return self

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(states, self._weight, self._bias, "none", [], "")
        return out


@contextmanager
def prepacked(model: Any) -> Iterator[None]:
    """Let the model's plain linear layers be prepacked, where that is possible, for the time of a `with` block."""
    plain = {name: module for name, module in model.named_modules() if type(module) is torch.nn.Linear
             and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()}
    for name, module in plain.items():
        model.set_submodule(name, _Prepacked(module))
    try:
        yield
    finally:
        for name, module in plain.items():
            model.set_submodule(name, module)
