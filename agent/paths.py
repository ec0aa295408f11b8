"""Where things live that are made once and belong to no stage."""

from __future__ import annotations

import os
from pathlib import Path

CACHE = Path(os.environ.get("HANDOFF_CACHE", ".cache"))
"""Paid responses, converted weights, training checkpoints: outside every DVC output, never in git. `HANDOFF_CACHE` moves
it, so that experiments in other folders share it."""
