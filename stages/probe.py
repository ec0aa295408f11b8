"""Score how likely every agent turn is to be handed off, by a probe of the student's middle layer.

Reads   data/verify/{train,calibration,held_out}.parquet
Writes  data/probe/scores.parquet, models/handoff_probe.safetensors, metrics/probe.json

`p_escalate` is a regularised logistic regression on what enters layer LAYER at the end of a turn's prompt (a linear
probe: Alain and Bengio 2016, "Understanding intermediate layers using linear classifier probes"; asked before a word is
written, as P(IK) is in Kadavath et al. 2022). It is fitted on the training companies' turns and nothing else, its
strength chosen on left-out companies among them.

The score comes before the thought because the thought decides: once it stands, the probability of `escalate` at the
action's place is near 0 or 1. So whatever is then written, valid or not, and however many tokens an action's name has,
does not enter it. No adapter lies below LAYER (`qlora_train.first_layer`), so base and student share the score, and
training the student anew leaves it as it is. Whoever runs the student has it for nothing, halfway through reading the
prompt; here it takes half a reading of the three splits.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from agent.encode import Encoder
from agent.student import StudentParams, load_base, load_tokenizer, only_layers
from schemas.errors import InputError
from schemas.tables import Scores, Verified
from schemas.yardsticks import ProbeMetrics
from stages._conversations import Item, encode_table, handoffs
from stages._groups import each_group, turn_names
from stages._logistic import best_strength, figures, logistic
from stages._stage import Params, load_params, read_table, run, say, write_metrics, write_table

if TYPE_CHECKING:
    import numpy as np

TRAIN = Path("data/verify/train.parquet")
CALIBRATION = Path("data/verify/calibration.parquet")
HELD_OUT = Path("data/verify/held_out.parquet")
SCORES = Path("data/probe/scores.parquet")
PROBE = Path("models/handoff_probe.safetensors")
METRICS = Path("metrics/probe.json")
READ_AT_ONCE = 4
"""Conversations that are read together; more are no faster, and take more memory."""


class ProbeParams(Params):
    """`probe`."""

    layer: int = Field(ge=1, description="the probe reads what enters this layer, counted from 0")


def prompt_states(conversations: list[Item], model: Any, layer: int, what: str) -> dict[tuple[str, int], np.ndarray]:
    """What enters a layer at the end of every agent turn's prompt, (H).

    Raises:
        InputError: there is no such layer.
    """
    from agent.decode import read_turns

    if layer > (layers := model.config.get_text_config().num_hidden_layers):
        raise InputError(f"probe.layer is {layer}, and the student has layers 0 to {layers - 1}", "lower it in params.yaml")
    with only_layers(model, 0, layer):
        return {turn: state.double().cpu().numpy() for group in each_group(conversations, READ_AT_ONCE, what)
                for turn, state in zip(turn_names(group), read_turns(model, [encoded for _, _, encoded in group]).states, strict=True)}


@dataclass(frozen=True)
class Probe:
    """Log-odds of a hand-off = states (N, H) @ `weight` (H) + `bias`; and what it was chosen by."""

    weight: np.ndarray
    bias: float
    strength: float
    left_out_auc: float

    def scores(self, states: np.ndarray) -> np.ndarray:
        """p_escalate, (N), of states, (N, H)."""
        from scipy.special import expit

        return expit(states @ self.weight + self.bias)


def fit(states: np.ndarray, handoff: np.ndarray, companies: np.ndarray) -> Probe:
    """A probe fitted on states (N, H), its strength chosen on left-out companies.

    Raises:
        InputError: too few hand-offs.
    """
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(states)
    scaled = scaler.transform(states)
    strength, auc = best_strength(scaled, handoff, companies)
    model = logistic(strength).fit(scaled, handoff)
    weight = model.coef_[0] / scaler.scale_
    return Probe(weight, float(model.intercept_[0] - scaler.mean_ @ weight), strength, auc)


def save(probe: Probe, layer: int) -> None:
    """Write the probe for whoever runs the student: `weight`, `bias`, and the layer as metadata."""
    import numpy as np
    from safetensors.numpy import save_file

    PROBE.parent.mkdir(parents=True, exist_ok=True)
    save_file({"weight": probe.weight.astype(np.float32), "bias": np.array([probe.bias], np.float32)}, PROBE, metadata={"layer": str(layer)})


def main() -> None:
    import numpy as np
    import polars as pl

    params, student = load_params("probe", ProbeParams), load_params("student", StudentParams)
    tables = {split: read_table(path, Verified) for split, path in (("train", TRAIN), ("calibration", CALIBRATION), ("held_out", HELD_OUT))}

    import torch

    encoder = Encoder(load_tokenizer(student))
    model = load_base(student).eval()
    started = time.monotonic()
    with torch.inference_mode():
        turns = {split: prompt_states(encode_table(table, encoder), model, params.layer, f"probe {split}") for split, table in tables.items()}
    seconds = time.monotonic() - started
    flags = {split: handoffs(table) for split, table in tables.items()}
    companies = {split: dict(table.select("conversation_id", "company").iter_rows()) for split, table in tables.items()}
    states = {split: np.stack(list(of.values())) for split, of in turns.items()}
    handoff = {split: np.array([flags[split][name][number] for name, number in of]) for split, of in turns.items()}
    company = {split: np.array([companies[split][name] for name, _ in of]) for split, of in turns.items()}

    probe = fit(states["train"], handoff["train"], company["train"])
    scores = {split: probe.scores(states[split]) for split in ("calibration", "held_out")}
    rows = [(name, number, float(score)) for split, of in scores.items() for (name, number), score in zip(turns[split], of, strict=True)]
    table = pl.DataFrame(rows, orient="row", schema={"conversation_id": pl.String, "number": pl.Int64, "p_escalate": pl.Float64})
    write_table(SCORES, table.sort("conversation_id", "number"), Scores)
    save(probe, params.layer)
    measured = figures(probe.strength, probe.left_out_auc, scores, handoff, company["held_out"])
    write_metrics(METRICS, {"student": student.weights, "layer": params.layer, **measured}, ProbeMetrics)
    aucs = ", ".join(f"{slug} {of['auc']:.2f}" if of else f"{slug} –" for slug, of in measured["held_out"].items())
    say(f"probe: {sum(map(len, turns.values()))} turns read in {seconds:.0f} s; "
        f"AUC on left-out training companies {probe.left_out_auc:.2f}, held out: {aucs}")


if __name__ == "__main__":
    run(main)
