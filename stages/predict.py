"""Let a model take every agent turn of the held-out companies, given the gold history up to that turn.

    python -m stages.predict base|student

Reads   data/verify/{held_out,calibration}.parquet, models/qlora_train/ (student), data/verify/train.parquet (base)
Writes  data/predict/<model>.parquet, data/predict/<model>_calibration.parquet

Greedy. The base model is decoded twice: free, and under the JSON schema of a step, since free it hardly ever produces
the object and its other figures would say nothing.

`p_escalate` says how likely the model is to hand off at a turn. It looks before the thought is written, since the thought
decides: once it stands, the probability of `escalate` at the action's place is near 0 or 1. The student's is that of the
hand-off head trained with its adapter (`agent.student.HandoffHead`), read off the state that decoding starts from, so it
costs nothing beyond reading the prompt; whatever the student then writes, valid or not, and however many tokens an
action's name has, does not enter it. The base model has no such head: its score is a logistic probe (Alain and Bengio 2016,
"Understanding intermediate layers using linear classifier probes") on what enters layer PROBE_LAYER at the prompt's end,
fitted on the training companies' turns, its strength chosen on left-out companies among them. It costs half a reading of
all three splits. Calibration turns are scored and not decoded.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from tqdm import tqdm

from agent.encode import Encoded, Encoder
from agent.student import (
    StudentParams,
    load_base,
    load_student,
    load_tokenizer,
    only_layers,
)
from schemas.action import action_json_schema
from schemas.errors import InputError
from schemas.tables import Replies, Scores, Verified
from stages._conversations import encode_table, handoffs
from stages._logistic import best_strength, logistic
from stages._stage import Params, load_params, read_table, run, say, write_table

if TYPE_CHECKING:
    import polars as pl
    import torch

TRAIN = Path("data/verify/train.parquet")
CALIBRATION = Path("data/verify/calibration.parquet")
HELD_OUT = Path("data/verify/held_out.parquet")
ADAPTER = Path("models/qlora_train")
BASE_REPLIES = Path("data/predict/base.parquet")
BASE_CALIBRATION = Path("data/predict/base_calibration.parquet")
STUDENT_REPLIES = Path("data/predict/student.parquet")
STUDENT_CALIBRATION = Path("data/predict/student_calibration.parquet")
PROBE_LAYER = 15
"""Where the base model is probed: the middle of its 30 layers, which halves the cost of reading. Other layers were not compared."""
Item = tuple[str, str, Encoded]
"""What may be read together, conversation id, tokens."""


class PredictParams(Params):
    """`predict`."""

    max_new_tokens: int = Field(ge=1)
    group_conversations: int = Field(ge=1, description="conversations read at once, all their turns decoded at once; bounds the memory")


def each_group(conversations: list[Item], size: int, what: str) -> Any:
    """Groups to read together, with a progress bar that counts turns."""
    from agent.decode import groups

    with tqdm(total=sum(len(encoded.spans) for _, _, encoded in conversations), desc=what, unit="turn", file=sys.stderr) as bar:
        for group in groups(conversations, size):
            yield group
            bar.update(sum(len(encoded.spans) for _, _, encoded in group))


def turn_names(group: list[Item]) -> list[tuple[str, int]]:
    """(conversation id, number of the agent turn) for every turn of a group, in the order of reading."""
    return [(name, number) for _, name, encoded in group for number in range(len(encoded.spans))]


def prompt_states(conversations: list[Item], model: Any, params: PredictParams, what: str) -> dict[tuple[str, int], torch.Tensor]:
    """The state at the end of every turn's prompt, (H): the last one of the layers that the model has."""
    from agent.decode import read_turns

    return {turn: state for group in each_group(conversations, params.group_conversations, what)
            for turn, state in zip(turn_names(group), read_turns(model, [encoded for _, _, encoded in group]).states, strict=True)}


def probe(splits: dict[str, list[Item]], flags: dict[str, list[bool]], companies: dict[str, str], model: Any,
          params: PredictParams) -> dict[tuple[str, int], float]:
    """The base model's score at every turn of `calibration` and `held_out`, by a probe fitted on `train`.

    Args:
        splits: the encoded conversations of the three splits.
        flags: which agent turns of a training conversation hand off.
        companies: the company of a training conversation.
        model: the base model.
        params: how many conversations to read at once.
    """
    import numpy as np
    import torch
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with only_layers(model, 0, min(PROBE_LAYER, model.config.get_text_config().num_hidden_layers)):
        states = {split: prompt_states(items, model, params, f"probe {split}") for split, items in splits.items()}
    features = {split: torch.stack(list(of.values())).double().numpy() for split, of in states.items()}
    scaler = StandardScaler().fit(features["train"])
    train, handoff = scaler.transform(features["train"]), np.array([flags[name][number] for name, number in states["train"]])
    strength, auc = best_strength(train, handoff, np.array([companies[name] for name, _ in states["train"]]))
    say(f"predict base: probe of layer {PROBE_LAYER}, AUC on left-out training companies {auc:.2f}")
    fitted = make_pipeline(scaler, logistic(strength).fit(train, handoff))
    return {turn: float(score) for split in ("calibration", "held_out")
            for turn, score in zip(states[split], fitted.predict_proba(features[split])[:, 1], strict=True)}


def decode_all(conversations: list[Item], model: Any, tokenizer: Any, params: PredictParams, with_schema: bool,
               score: Callable[[list[tuple[str, int]], torch.Tensor], list[float]]) -> list[dict[str, Any]]:
    """One row for every agent turn and way of decoding.

    Args:
        conversations: the encoded conversations.
        model: the model, in evaluation mode.
        tokenizer: its tokenizer.
        params: the stage's parameters.
        with_schema: whether to decode under the schema too.
        score: p_escalate of turns, from their names and the states at the end of their prompts, (N, H).
    """
    from agent.decode import Choice, SchemaChoice, TurnDecoder, read_turns

    decoder = TurnDecoder(model, tokenizer, params.max_new_tokens)
    engine: Any = None
    schema = action_json_schema(bounded=True)
    if with_schema:
        import llguidance.hf

        engine = llguidance.hf.from_tokenizer(tokenizer)
    rows = []
    for group in each_group(conversations, params.group_conversations, "predict"):
        names, read = turn_names(group), read_turns(model, [encoded for _, _, encoded in group])
        scores = score(names, read.states)
        ways = {"free": Choice(tokenizer)}
        if with_schema:
            ways["schema"] = SchemaChoice(tokenizer, engine, schema, len(names))
        for decoding, choice in ways.items():
            rows += [{"conversation_id": name, "number": number, "decoding": decoding, "raw": reply.text, "other": reply.other, "p_escalate": p}
                     for (name, number), reply, p in zip(names, decoder.decode(read, choice), scores, strict=True)]
    return rows


def predict_base(encode: Callable[[pl.DataFrame], list[Item]], student: StudentParams, tokenizer: Any,
                 params: PredictParams) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Replies and calibration scores of the base model."""
    tables = {"train": read_table(TRAIN, Verified), "calibration": read_table(CALIBRATION, Verified), "held_out": read_table(HELD_OUT, Verified)}
    splits = {split: encode(table) for split, table in tables.items()}
    model = load_base(student).eval()
    companies = dict(tables["train"].select("conversation_id", "company").iter_rows())
    scores = probe(splits, handoffs(tables["train"]), companies, model, params)
    replies = decode_all(splits["held_out"], model, tokenizer, params, True, lambda names, states: [scores[name] for name in names])
    return replies, score_rows({turn: scores[turn] for turn in turn_names(splits["calibration"])})


def predict_student(encode: Callable[[pl.DataFrame], list[Item]], student: StudentParams, tokenizer: Any,
                    params: PredictParams) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Replies and calibration scores of the student."""
    calibration, held_out = encode(read_table(CALIBRATION, Verified)), encode(read_table(HELD_OUT, Verified))
    model, head = load_student(student, ADAPTER)
    replies = decode_all(held_out, model, tokenizer, params, False, lambda names, states: head(states).sigmoid().tolist())
    states = prompt_states(calibration, model, params, "scores of the calibration split")
    return replies, score_rows({turn: float(head(state[None]).sigmoid()) for turn, state in states.items()})


def score_rows(scores: dict[tuple[str, int], float]) -> list[dict[str, Any]]:
    """Scores as rows of their table."""
    return [{"conversation_id": name, "number": number, "p_escalate": score} for (name, number), score in scores.items()]


def main() -> None:
    if sys.argv[1:] not in (["base"], ["student"]):
        raise InputError(f"predict takes one of 'base' and 'student', not {' '.join(sys.argv[1:]) or 'nothing'}", "python -m stages.predict student")
    which = sys.argv[1]
    params = load_params("predict", PredictParams)
    student = load_params("student", StudentParams)
    for path in (HELD_OUT, CALIBRATION):
        read_table(path, Verified)

    import polars as pl
    import torch

    tokenizer = load_tokenizer(student)
    encoder = Encoder(tokenizer)
    started = time.monotonic()
    with torch.inference_mode():
        replies, scores = (predict_base if which == "base" else predict_student)(
            lambda table: encode_table(table, encoder), student, tokenizer, params)
    seconds = time.monotonic() - started
    order, model = ["conversation_id", "number"], pl.lit(which).alias("model")
    replied, scored = (BASE_REPLIES, BASE_CALIBRATION) if which == "base" else (STUDENT_REPLIES, STUDENT_CALIBRATION)
    write_table(replied, pl.DataFrame(replies, schema_overrides={"other": pl.String}).with_columns(model).sort(*order, "decoding"), Replies)
    write_table(scored, pl.DataFrame(scores).with_columns(model).sort(order), Scores)
    say(f"predict {which}: {len(replies)} replies and {len(scores)} scores in {seconds:.0f} s")


if __name__ == "__main__":
    run(main)
