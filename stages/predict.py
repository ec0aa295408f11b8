"""Let a model take every agent turn of the held-out companies, given the gold history up to that turn.

    python -m stages.predict base|student

Reads   data/verify/held_out.parquet, models/qlora_train/ (student)
Writes  data/predict/<model>.parquet, data/predict/base_states.parquet (base)

Greedy. The base model is decoded twice: free, and under the JSON schema of a step, since free it hardly ever produces
the object and its other figures would say nothing. What it holds of each prompt is kept for the hand-off score, which would
have to read the same conversations again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from tqdm import tqdm

from agent.encode import Encoder
from agent.probe_layer import HandoffScoreParams, check_layer
from agent.student import StudentParams, load_base, load_student, load_tokenizer
from schemas.action import action_json_schema
from schemas.errors import InputError
from schemas.tables import PromptStates, Replies, Verified
from stages._encoded import Item, encode_table
from stages._stage import Params, load_params, read_table, run, say, write_table

if TYPE_CHECKING:
    from agent.decode import TurnDecoder

HELD_OUT = Path("data/verify/held_out.parquet")
ADAPTER = Path("models/qlora_train")
BASE_REPLIES = Path("data/predict/base.parquet")
STUDENT_REPLIES = Path("data/predict/student.parquet")
STATES = Path("data/predict/base_states.parquet")


class PredictParams(Params):
    """`predict`."""

    max_new_tokens: int = Field(ge=1)
    turns_at_once: int = Field(ge=1, description="a further conversation is begun while fewer turns than this are decoded; bounds the memory")


def decode_all(conversations: list[Item], decoder: TurnDecoder, with_schema: bool) -> list[dict[str, Any]]:
    """One row for every agent turn and way of decoding.

    Args:
        conversations: the encoded conversations.
        decoder: decodes them.
        with_schema: whether to decode under the schema too.
    """
    from agent.decode import Choice, SchemaChoice

    tokenizer = decoder.tokenizer
    ways: dict[str, Callable[[], Choice]] = {"free": lambda: Choice(tokenizer)}
    if with_schema:
        import llguidance.hf

        engine, schema = llguidance.hf.from_tokenizer(tokenizer), action_json_schema(bounded=True)
        ways["schema"] = lambda: SchemaChoice(tokenizer, engine, schema)
    encoded, rows = [item[2] for item in conversations], []
    with tqdm(total=sum(len(each.spans) for each in encoded), desc="predict", unit="turn", file=sys.stderr) as bar:
        for at, by_way in decoder.decode(encoded, list(ways.values())):
            rows += [{"conversation_id": conversations[at][1], "number": number, "decoding": decoding, "raw": reply.text, "other": reply.other}
                     for decoding, replies in zip(ways, by_way, strict=True) for number, reply in enumerate(replies)]
            bar.update(len(by_way[0]))
    return rows


def main() -> None:
    if sys.argv[1:] not in (["base"], ["student"]):
        raise InputError(f"predict takes one of 'base' and 'student', not {' '.join(sys.argv[1:]) or 'nothing'}", "python -m stages.predict student")
    which = sys.argv[1]
    params = load_params("predict", PredictParams)
    student = load_params("student", StudentParams)
    held_out = read_table(HELD_OUT, Verified)

    layer = load_params("handoff_score", HandoffScoreParams).layer if which == "base" else None

    import polars as pl

    from agent.decode import TurnDecoder

    tokenizer = load_tokenizer(student)
    model = load_base(student).eval() if which == "base" else load_student(student, ADAPTER)
    if layer is not None:
        check_layer(layer, model)
    conversations = encode_table(held_out, Encoder(tokenizer))
    decoder = TurnDecoder(model, tokenizer, params.max_new_tokens, params.turns_at_once, layer)
    started = time.monotonic()
    replies = decode_all(conversations, decoder, which == "base")
    seconds = time.monotonic() - started
    if layer is not None:
        write_table(STATES, pl.DataFrame(
            [(conversations[at][1], number, state.float().numpy()) for at, states in decoder.states.items() for number, state in enumerate(states)],
            orient="row", schema={"conversation_id": pl.String, "number": pl.Int64, "state": pl.List(pl.Float32)},
        ).sort("conversation_id", "number"), PromptStates)
    table = pl.DataFrame(replies, schema_overrides={"other": pl.String}).with_columns(pl.lit(which).alias("model"))
    write_table(BASE_REPLIES if which == "base" else STUDENT_REPLIES, table.sort("conversation_id", "number", "decoding"), Replies)
    say(f"predict {which}: {len(replies)} replies in {seconds:.0f} s")


if __name__ == "__main__":
    run(main)
