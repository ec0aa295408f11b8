"""llama.cpp's server (llama-cpp-python) with the student's own weights, adapter included."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_S = 300
CONTEXT = 4096
"""Tokens of prompt and answer: twice the longest conversation that is trained on."""


class LlamaMissing(Exception):
    """llama.cpp cannot take part; the message says why."""


@contextmanager
def _serving(python: str, model: Any, package_file: Path, kind: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        weights, log = Path(folder) / "student.gguf", Path(folder) / "log"
        write_gguf(model, package_file, weights, kind)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        # -1 is all cores; without it, llama-cpp-python takes half of them. The prompt of the last request stays in its cache.
        command = [python, "-m", "llama_cpp.server", "--model", str(weights), "--host", "127.0.0.1", "--port", str(port), "--n_ctx", str(CONTEXT),
                   "--n_threads", "-1", "--n_threads_batch", "-1"]
        with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as process:
            try:
                url = f"http://127.0.0.1:{port}/v1"
                deadline = time.monotonic() + START_S
                while not _answers(f"{url}/models"):
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(f"llama.cpp's server did not start: {log.read_text()[-500:]}")
                    time.sleep(0.2)
                _complete(url, "<|im_start|>", 1)
                yield url
            finally:
                process.terminate()


def llama_server(model: Any, weights: str, kind: str) -> Any:
    """A context manager that gives the server's address.

    Args:
        model: plain unpacked weights.
        weights: the package that carries the GGUF file they came from.
        kind: how to hold them, `f32`, `f16` or `q8_0`.

    Raises:
        LlamaMissing: there is no interpreter that has the server, or the weights are not those of such a package.
    """
    python = os.environ.get("HANDOFF_LLAMA_PYTHON")
    if not python:
        raise LlamaMissing("HANDOFF_LLAMA_PYTHON names no interpreter that has llama-cpp-python[server]")
    if subprocess.run([python, "-c", "import llama_cpp.server"], capture_output=True, check=False).returncode:
        raise LlamaMissing("the interpreter of HANDOFF_LLAMA_PYTHON has no llama-cpp-python[server]")
    package = importlib.util.find_spec(weights.replace("-", "_")) if "/" not in weights else None
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not files:
        raise LlamaMissing(f"'{weights}' is no package with a GGUF file, which vocabulary and shapes are taken from")
    if hasattr(model, "get_base_model"):
        raise LlamaMissing("student.unpack_once is off, so the adapter is not part of the weights")
    return _serving(python, model, files[0], kind)


def write_gguf(model: Any, source: Path, target: Path, kind: str) -> None:
    """Write a Llama model's weights as a GGUF file, with vocabulary and shapes from the file that they came from."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    held = {tensor.name for tensor in reader.tensors}
    for name, tensor in model.state_dict().items():
        ours = names.get_name(name, try_suffixes=(".weight",))
        if ours not in held:
            continue  # the head, where it is the embedding
        values = tensor.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # llama.cpp turns neighbouring pairs, transformers halves
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        quant = gguf.GGMLQuantizationType[kind.upper() if values.ndim > 1 else "F32"]
        writer.add_tensor(ours, gguf.quants.quantize(values, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


def _complete(url: str, prompt: str, max_new_tokens: int) -> str:
    # Left out, the server's penalty on repeated tokens is 1.1, and what it says is not greedy.
    body = json.dumps({"prompt": prompt, "max_tokens": max_new_tokens, "temperature": 0.0, "repeat_penalty": 1.0}).encode()
    request = urllib.request.Request(f"{url}/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)["choices"][0]["text"]


def completed(url: str, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> tuple[list[str], float]:
    """What the server says to each prompt, greedily, one after the other, and seconds."""
    texts = [tokenizer.decode(prompt, clean_up_tokenization_spaces=False) for prompt in prompts]
    started = time.monotonic()
    said = [_complete(url, text, max_new_tokens) for text in texts]
    return said, time.monotonic() - started
