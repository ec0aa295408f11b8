"""Let a model take every agent turn of the held-out companies, given the gold history up to that turn.

    python -m stages.predict base|student

Reads   data/verify/held_out.parquet, models/qlora_train/ (student)
Writes  data/predict/<model>.parquet

Greedy. The base model is decoded twice: free, and under the JSON schema of a step, since free it hardly ever produces
the object and its other figures would say nothing.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from agent.encode import Encoder
from agent.student import StudentParams, load_base, load_student, load_tokenizer
from schemas.action import action_json_schema
from schemas.errors import InputError
from schemas.tables import Replies, Verified
from stages._conversations import Item, encode_table
from stages._groups import each_group, turn_names
from stages._stage import Params, load_params, read_table, run, say, write_table

HELD_OUT = Path("data/verify/held_out.parquet")
ADAPTER = Path("models/qlora_train")
BASE_REPLIES = Path("data/predict/base.parquet")
STUDENT_REPLIES = Path("data/predict/student.parquet")


class PredictParams(Params):
    """`predict`."""

    max_new_tokens: int = Field(ge=1)
    group_conversations: int = Field(ge=1, description="conversations read at once, all their turns decoded at once; bounds the memory")


def decode_all(conversations: list[Item], model: Any, tokenizer: Any, params: PredictParams, with_schema: bool) -> list[dict[str, Any]]:
    """One row for every agent turn and way of decoding.

    Args:
        conversations: the encoded conversations.
        model: the model, in evaluation mode.
        tokenizer: its tokenizer.
        params: the stage's parameters.
        with_schema: whether to decode under the schema too.
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
        ways = {"free": Choice(tokenizer)}
        if with_schema:
            ways["schema"] = SchemaChoice(tokenizer, engine, schema, len(names))
        for decoding, choice in ways.items():
            rows += [{"conversation_id": name, "number": number, "decoding": decoding, "raw": reply.text, "other": reply.other}
                     for (name, number), reply in zip(names, decoder.decode(read, choice), strict=True)]
    return rows


def main() -> None:
    if sys.argv[1:] not in (["base"], ["student"]):
        raise InputError(f"predict takes one of 'base' and 'student', not {' '.join(sys.argv[1:]) or 'nothing'}", "python -m stages.predict student")
    which = sys.argv[1]
    params = load_params("predict", PredictParams)
    student = load_params("student", StudentParams)
    held_out = read_table(HELD_OUT, Verified)

    import polars as pl
    import torch

    tokenizer = load_tokenizer(student)
    model = load_base(student).eval() if which == "base" else load_student(student, ADAPTER)
    started = time.monotonic()
    with torch.inference_mode():
        replies = decode_all(encode_table(held_out, Encoder(tokenizer)), model, tokenizer, params, which == "base")
    seconds = time.monotonic() - started
    table = pl.DataFrame(replies, schema_overrides={"other": pl.String}).with_columns(pl.lit(which).alias("model"))
    write_table(BASE_REPLIES if which == "base" else STUDENT_REPLIES, table.sort("conversation_id", "number", "decoding"), Replies)
    say(f"predict {which}: {len(replies)} replies in {seconds:.0f} s")


if __name__ == "__main__":
    run(main)
