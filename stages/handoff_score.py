"""Score how likely every agent turn is to be handed off.

Reads   data/verify/{train,calibration,held_out}.parquet, data/predict/base_states.parquet
Writes  data/handoff_score/scores.parquet, models/handoff_score.json, metrics/handoff_score.json

`p_escalate` stacks two logistic regressions (Wolpert 1992, "Stacked generalization"), which err on different turns: a
linear probe (Alain and Bengio 2016, "Understanding intermediate layers using linear classifier probes") on what enters
layer `handoff_score.layer` at the end of a turn's prompt, and a bag of the words that the customer has said. All of it is
fitted on the training companies' turns; the probe's strength, and how the two are weighed, on left-out companies among them.

It is asked before a word is written, as P(IK) is in Kadavath et al. 2022: what the student thinks and the probability of
`escalate` behind it rank the turns worse, and cost a thought (metrics/LOG.md). So whatever is then written, valid or not, and however
many tokens an action's name has, does not enter it. No adapter lies below the layer (`qlora_train.first_layer`), so base
and student share the score, and training the student anew leaves it as it is. Whoever runs the student has it for a
millisecond a turn, halfway through reading the prompt that is read anyway. So it is here: the base model's predictions leave what
it takes of the held-out turns, and training what it takes of its own (agent/layer_states.py); calibration conversations alone are
read, by half the model.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.encode import Encoder
from agent.handoff_score import HandoffScore, Linear
from agent.probe_layer import HandoffScoreParams, check_layer
from agent.student import StudentParams, load_base, load_tokenizer
from schemas.errors import InputError
from schemas.tables import PromptStates, Scores, Verified
from schemas.yardsticks import HandoffScoreMetrics
from stages._bag_of_words import bag_of_words_model, heard
from stages._encoded import Item, encode_table
from stages._logistic import best_strength, figures, left_out_log_odds, logistic, mean_auc
from stages._stage import load_params, read_table, run, say, write_metrics, write_table

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

    from agent.layer_states import LayerStates

TRAIN = Path("data/verify/train.parquet")
CALIBRATION = Path("data/verify/calibration.parquet")
HELD_OUT = Path("data/verify/held_out.parquet")
STATES = Path("data/predict/base_states.parquet")
SCORES = Path("data/handoff_score/scores.parquet")
MODEL = Path("models/handoff_score.json")
METRICS = Path("metrics/handoff_score.json")


States = dict[tuple[str, int], "np.ndarray"]
"""(conversation_id, number of the agent turn) -> what enters the layer at the end of its prompt, (H)."""


def prompt_states(conversations: list[Item], states: LayerStates, what: str) -> States:
    """Of conversations that are read, as far as they have not been."""
    states.compute([encoded for *_, encoded in conversations], what)
    return {(name, number): state.double().numpy() for _, name, encoded in conversations
            for number, state in enumerate(states.rest(encoded)[encoded.prompt_ends()])}


def kept_states(path: Path) -> States:
    """Of the conversations that the base model has taken the turns of.

    Raises:
        InputError: as `read_table`.
    """
    import numpy as np

    return {(name, number): np.array(state) for name, number, state in read_table(path, PromptStates).select(
        "conversation_id", "number", "state").iter_rows()}


def states_of(turns: pl.DataFrame, states: States) -> np.ndarray:
    """The states of the turns of a table that `heard` made, in its order, (N, H).

    Raises:
        InputError: a turn has none.
    """
    import numpy as np
    import polars as pl

    numbered = list(turns.select("conversation_id", number=pl.int_range(pl.len()).over("conversation_id")).iter_rows())
    if missing := sum(turn not in states for turn in numbered):
        raise InputError(f"{STATES} lacks {missing} of {len(numbered)} agent turns", "dvc repro --force --single-item predict_base")
    return np.stack([states[turn] for turn in numbered])


def fit(states: np.ndarray, said: list[str], handoff: np.ndarray, companies: np.ndarray, layer: int) -> tuple[HandoffScore, float, float]:
    """A score fitted on training turns.

    Args:
        states: shape (N, H).
        said: the customer's words at each of the N turns.
        handoff: whether each is handed off.
        companies: the company of each.
        layer: what the states enter.

    Returns:
        the score, the probe's inverse regularisation, and the score's AUC, the mean over companies that its two parts were not
        fitted on; the two weights between the parts were.

    Raises:
        InputError: too few hand-offs.
    """
    import numpy as np
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def probe_of(strength: float) -> Any:
        return make_pipeline(StandardScaler(), logistic(strength))

    strength, of_probe = best_strength(probe_of, states, handoff, companies)
    probe, words = probe_of(strength), bag_of_words_model()
    left_out = np.column_stack([of_probe, left_out_log_odds(words, np.array(said, dtype=object), handoff, companies)])
    stack = logistic(1.0).fit(left_out, handoff)
    auc = mean_auc(stack.decision_function(left_out), handoff, companies)

    scaler, regression = (step for _, step in probe.fit(states, handoff).steps)
    weight = regression.coef_[0] / scaler.scale_
    vectorizer, counts = (step for _, step in words.fit(said, handoff).steps)
    return HandoffScore(
        layer=layer, probe=Linear(weight=weight.tolist(), bias=float(regression.intercept_[0] - scaler.mean_ @ weight)),
        terms=vectorizer.get_feature_names_out().tolist(), idf=vectorizer.idf_.tolist(),
        words=Linear(weight=counts.coef_[0].tolist(), bias=float(counts.intercept_[0])),
        stack=Linear(weight=stack.coef_[0].tolist(), bias=float(stack.intercept_[0]))), strength, auc


def main() -> None:
    import polars as pl

    params, student = load_params("handoff_score", HandoffScoreParams), load_params("student", StudentParams)
    tables = {split: read_table(path, Verified) for split, path in (("train", TRAIN), ("calibration", CALIBRATION), ("held_out", HELD_OUT))}
    turns = {split: heard(table, split) for split, table in tables.items()}
    states = {"held_out": states_of(turns["held_out"], kept_states(STATES))}

    from agent.layer_states import LayerStates

    encoder = Encoder(load_tokenizer(student))
    model = load_base(student).eval()
    check_layer(params.layer, model)
    started, entering = time.monotonic(), LayerStates(model, params.layer)
    conversations = {"train": encode_table(tables["train"], encoder),
                     "calibration": [(group, name, encoded.prompts()) for group, name, encoded in encode_table(tables["calibration"], encoder)]}
    for split, items in conversations.items():
        states[split] = states_of(turns[split], prompt_states(items, entering, f"hand-off score: {split}"))
    seconds = time.monotonic() - started

    said = {split: of["said"].list.join("\n").to_list() for split, of in turns.items()}
    handoff = {split: (of["gold_action"] == "escalate").to_numpy() for split, of in turns.items()}
    score, strength, auc = fit(states["train"], said["train"], handoff["train"], turns["train"]["company"].to_numpy(), params.layer)
    scores = {split: score(states[split], said[split]) for split in ("calibration", "held_out")}
    table = pl.concat([turns[split].select("conversation_id", "index").with_columns(p_escalate=pl.Series(of)) for split, of in scores.items()])
    write_table(SCORES, table.sort("conversation_id", "index"), Scores)
    score.save(MODEL)
    measured = figures(strength, auc, scores, handoff, turns["held_out"]["company"].to_numpy())
    write_metrics(METRICS, {"student": student.weights, "layer": params.layer, **measured}, HandoffScoreMetrics)
    aucs = ", ".join(f"{slug} {of['auc']:.2f}" if of else f"{slug} –" for slug, of in measured["held_out"].items())
    say(f"handoff_score: {sum(map(len, turns.values()))} turns, {seconds:.0f} s to read what had not been; "
        f"AUC on left-out training companies {auc:.2f}, held out: {aucs}")


if __name__ == "__main__":
    run(main)
