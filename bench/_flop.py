"""The floating-point operations that a training step needs, counted from shapes; a multiply and an add are two.

Only tokens that have to be computed count: a batch's shared prefix once, no padding, and the states below the first
layer with an adapter once. Per batch, with P prefix tokens, R other tokens, T = P + R, and S supervised ones:

    forward     every linear layer of W = inputs x outputs weights: 2 W T; its adapter of rank r: 2 r (inputs + outputs) T
    backward    layers from the first with an adapter on: 2 W T for the gradient of the input (frozen weights have none of
                their own), and twice the adapter's forward. Not needed, and not counted: the gradient of what enters the
                first such layer (query, key and value there: no 2 W T, and half for A); and in the last layer anything at prefix
                tokens but key and value, since nobody reads what the prefix ends in
    head        2 H V S forward and 2 H V S backward, H the hidden size and V the vocabulary
    attention   2 D pairs for scores and 2 D pairs for values in each layer, D = heads x head size, a pair being a token and
                one that it sees; twice that backward. A function of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from stages._batches import Example

ENTERING = ("q_proj", "k_proj", "v_proj")
"""Linear layers that read what enters a layer."""
READ_BY_OTHERS = ("k_proj", "v_proj")
"""Those whose output other tokens see."""


def _linear(layer: Any) -> Iterator[tuple[str, int, int, int]]:
    """Name, inputs, outputs and adapter rank (0 without one) of a layer's linear modules."""
    import torch

    for name, module in layer.named_modules():
        base = getattr(module, "base_layer", module)
        if isinstance(base, torch.nn.Linear) and (hasattr(module, "base_layer") or name.endswith("proj")):
            rank = int(next(iter(module.r.values()))) if hasattr(module, "base_layer") else 0
            yield name.rpartition(".")[2], base.in_features, base.out_features, rank


def linear_flop(model: Any, layers: Sequence[Any], first: int, batches: Sequence[Sequence[Example]]) -> tuple[int, int]:
    """Operations in linear layers and head, below and from layer `first` on.

    Args:
        model: the model with its adapter, for the head.
        layers: all its layers.
        first: the first layer with an adapter.
        batches: what is trained on.
    """
    below = above = 0
    head = model.get_output_embeddings()
    for batch in batches:
        prefix = batch[0].encoded.prefix
        rest = sum(len(example.encoded.ids) - prefix for example in batch)
        tokens = prefix + rest
        for number, layer in enumerate(layers):
            for name, inputs, outputs, rank in _linear(layer):
                weights = inputs * outputs
                if number < first:
                    below += 2 * weights * tokens
                    continue
                above += 2 * (weights + rank * (inputs + outputs)) * tokens
                back = tokens if number + 1 < len(layers) or name in READ_BY_OTHERS else rest
                needed = not (number == first and name in ENTERING)
                above += 2 * (weights * needed + rank * (inputs * (1 + needed) + 2 * outputs)) * back
        supervised = sum(example.encoded.supervised for example in batch)
        above += 4 * head.in_features * head.out_features * supervised
    return below, above


def attention_flop(config: Any, first: int, batches: Sequence[Sequence[Example]]) -> int:
    """Operations in attention scores and values, forward in all layers and backward from layer `first` on."""
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    pairs = 0
    for batch in batches:
        prefix = batch[0].encoded.prefix
        rows = [len(example.encoded.ids) - prefix for example in batch]
        pairs += prefix * (prefix + 1) // 2 + sum(row * prefix + row * (row + 1) // 2 for row in rows)
    return 4 * width * pairs * (config.num_hidden_layers + 2 * (config.num_hidden_layers - first))
