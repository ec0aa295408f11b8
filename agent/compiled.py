"""Our C, made for this very processor when it is first needed. Where it cannot be, or for other tensors, torch computes the same."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

SOURCES = tuple(Path(__file__).with_name(name) for name in ("attention.c", "elementwise.c"))
TILE = 64
"""As in attention.c."""
COMMAND = ("cc", "-O3", "-march=native", "-fopenmp", "-fschedule-insns", "-shared", "-fPIC")
"""OpenMP's threads are torch's own where torch brings its library under the system's name, `libgomp.so.1`. Without -fschedule-insns GCC reads the
rows of a product from memory at every use instead of once, a quarter slower."""


class Line(ctypes.Structure):
    """As in attention.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("sequences", "tokens", "heads", "kv", "size", "common")),
        *((f"{name}_{step}", ctypes.c_int64) for name in ("query", "key", "value") for step in ("row", "head")),
        *((name, ctypes.c_void_p) for name in ("queries_from", "keys_from", "counts", "before")),
        *((name, ctypes.c_void_p) for name in ("queries", "keys", "values", "grad")),
        *((name, ctypes.c_void_p) for name in ("out", "sums", "of_queries", "of_keys", "of_values", "of_common", "rooms")),
        ("room", ctypes.c_int64), ("threads", ctypes.c_int64), ("scale", ctypes.c_float))


_P, _N, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "attend": (*[_P] * 6, *[_N] * 5, *[_P] * 3),
    "causal": (ctypes.POINTER(Line),),
    "causal_back": (ctypes.POINTER(Line),),
    "norm": (_P, _P, _F, _N, _N, _N, _P, _P),
    "norm_back": (*[_P] * 4, _N, _N, _N, _P),
    "gated": (_P, _N, _P, _N, _N, _N, _N, _P),
    "gated_back": (_P, _N, _P, _N, _P, _N, _N, _N, _P, _P),
    "rotate": (_P, _N, _P, _P, _N, _N, _N, _F, _N, _P),
}
"""What they take; none returns anything."""


def library_for(states: torch.Tensor) -> Any:
    """Our C, if it takes rows like these, (..., D); otherwise None."""
    return library() if states.device.type == "cpu" and states.dtype == torch.float32 and states.shape[-1] % TILE == 0 else None


@cache
def library() -> Any:
    """Our C; None without a C compiler that has OpenMP.

    Not kept: what is made for one processor may not run on another, and making it takes a second.
    """
    return make(COMMAND)


def make(command: Sequence[str]) -> Any:
    """Our C, made by this command; None where that fails."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "compiled.so"
        try:
            subprocess.run([*command, "-o", made, *SOURCES, "-lm"], check=True, capture_output=True)
            found = ctypes.CDLL(str(made))
        except (OSError, subprocess.CalledProcessError):
            return None
    for name, takes in FUNCTIONS.items():
        function = getattr(found, name)
        function.argtypes, function.restype = takes, None
    return found
