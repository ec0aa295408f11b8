"""Reading conversations: every token once, and what they all begin with once for all of them."""

from __future__ import annotations

from typing import Any

import torch

from agent.encode import Encoded
from agent.packing import CAUSAL
from agent.student import attention, backbone, shares_prefix
from schemas.errors import InputError


class Prefill:
    """Reads conversations with one model; a system prompt that has been read is kept.

    One conversation at a time: on a CPU a longer batch is no faster, and it would be padded.

    Args:
        model: a causal language model in evaluation mode, or some of its layers.

    Raises:
        InputError: the model has layers whose memory is no list of past keys and values, so that a beginning cannot be shared.
    """

    def __init__(self, model: Any) -> None:
        if not shares_prefix(model):
            raise InputError("the student has layers with linear or sliding-window attention; its agent turns cannot be decoded side by side",
                             "choose student.weights with full attention in every layer, e.g. of the SmolLM2, Llama or Qwen3 families")
        self._network, self._config = backbone(model), model.config
        self._prefixes: dict[tuple[int, ...], tuple[torch.Tensor, Any]] = {}

    def prefix(self, ids: tuple[int, ...]) -> torch.Tensor:
        """The last hidden states of a beginning, (P, H)."""
        return self._prefix(ids)[0]

    @torch.inference_mode()
    def rest(self, encoded: Encoded) -> tuple[torch.Tensor, Any]:
        """Read one conversation.

        Returns:
            the last hidden states of what stands behind its prefix, (S - P, H), and the cache of keys and values of all of it,
            (1, heads, S, D) a layer.
        """
        prefix = tuple(encoded.ids[:encoded.prefix])
        cache = self._empty()
        for number, layer in enumerate(self._prefix(prefix)[1].layers):
            cache.update(layer.keys, layer.values, number)
        return self._read(encoded.ids[len(prefix):], cache)

    def __call__(self, encoded: Encoded) -> tuple[torch.Tensor, Any]:
        """Read one conversation as far as its last agent turn's prompt goes.

        Returns:
            the last hidden state of every agent turn's prompt, shape (turns, H), and the cache as `rest` gives it.
        """
        hidden, cache = self.rest(encoded.prompts())
        return hidden[encoded.prompt_ends()], cache

    @torch.inference_mode()
    def _prefix(self, ids: tuple[int, ...]) -> tuple[torch.Tensor, Any]:
        if ids not in self._prefixes:
            self._prefixes[ids] = self._read(list(ids), self._empty())
        return self._prefixes[ids]

    def _empty(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._config)

    def _read(self, ids: list[int], cache: Any) -> tuple[torch.Tensor, Any]:
        with attention(self._network, CAUSAL):
            read = self._network(input_ids=torch.tensor([ids], device=self._network.device), cache=cache, use_cache=True)
        return read.last_hidden_state[0], cache
