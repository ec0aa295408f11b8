"""What enters one layer of the student, for every token of a conversation: computed once, kept on disk.

Layers without an adapter say the same at every training step, whatever the seed and the oversampling factor, and to the
hand-off score. So whoever asks first computes; the folder is no output of the pipeline and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from agent.encode import Encoded
from agent.fused import fused
from agent.paths import CACHE
from agent.prefill import Prefill
from agent.prepacked import prepacked
from agent.student import backbone, only_layers, shares_prefix

STATES = CACHE / "states"


class LayerStates:
    """The states that enter one layer of a model: as many numbers a token as the hidden size, in the model's own type; handed out on the CPU.

    Args:
        model: a causal language model, the layers below `layer` without an adapter.
        layer: counted from 0.
        folder: where they are kept, in a folder of their own for these very weights.
    """

    def __init__(self, model: Any, layer: int, folder: Path = STATES) -> None:
        self._model, self._layer = model, layer
        self._shared = shares_prefix(model)
        self._folder = folder / self._weights()

    def compute(self, conversations: Sequence[Encoded], what: str) -> None:
        """Compute what is not there yet; `what` names the progress bar."""
        missing = [encoded for encoded in conversations if not self._path(encoded.ids).is_file()]
        if not missing:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with torch.inference_mode(), only_layers(self._model, 0, self._layer), prepacked(self._model), fused(self._model):
            prefill = Prefill(self._model) if self._shared else None
            for encoded in tqdm(missing, desc=what, unit="conv", file=sys.stderr):
                if prefill:
                    self._keep(encoded.ids[:encoded.prefix], prefill.prefix(tuple(encoded.ids[:encoded.prefix])))
                    self._keep(encoded.ids, prefill.rest(encoded)[0])
                else:
                    ids = torch.tensor([encoded.ids], device=self._model.device)
                    self._keep(encoded.ids, backbone(self._model)(input_ids=ids).last_hidden_state[0])

    def prefix(self, encoded: Encoded) -> torch.Tensor:
        """The states of a computed conversation's prefix, (P, H)."""
        return self._load(encoded.ids[:encoded.prefix]) if self._shared else self._load(encoded.ids)[:encoded.prefix]

    def rest(self, encoded: Encoded) -> torch.Tensor:
        """The states of what stands behind a computed conversation's prefix, (S - P, H)."""
        return self._load(encoded.ids) if self._shared else self._load(encoded.ids)[encoded.prefix:]

    def _weights(self) -> str:
        """Names the layers below and their weights."""
        digest = hashlib.sha256(f"{self._layer} {self._shared} {torch.__version__}".encode())
        network = backbone(self._model)
        for module in (network.get_input_embeddings(), *network.layers[:self._layer]):
            for name, tensor in module.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def _path(self, ids: Sequence[int]) -> Path:
        return self._folder / f"{hashlib.sha256(repr(tuple(ids)).encode()).hexdigest()[:24]}.safetensors"

    def _keep(self, ids: Sequence[int], states: torch.Tensor) -> None:
        path = self._path(ids)
        if not path.is_file():
            partial = path.with_suffix(f".{os.getpid()}.partial")
            save_file({"states": states.contiguous()}, partial)
            partial.replace(path)

    def _load(self, ids: Sequence[int]) -> torch.Tensor:
        return load_file(self._path(ids))["states"]
