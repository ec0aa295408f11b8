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
from typing import TYPE_CHECKING, Any

from pydantic import Field
from tqdm import tqdm

from agent.encode import Encoder
from agent.student import StudentParams, load_base, load_student, load_tokenizer
from schemas.action import action_json_schema
from schemas.errors import InputError
from schemas.tables import Replies, Verified
from stages._conversations import encode_table
from stages._stage import Params, load_params, read_table, run, say, write_table

if TYPE_CHECKING:
    import polars as pl

HELD_OUT = Path("data/verify/held_out.parquet")
ADAPTER = Path("models/qlora_train")
BASE_REPLIES = Path("data/predict/base.parquet")
STUDENT_REPLIES = Path("data/predict/student.parquet")


class PredictParams(Params):
    """`predict`."""

    max_new_tokens: int = Field(ge=1)
    group_conversations: int = Field(ge=1, description="conversations read at once, all their turns decoded at once; bounds the memory")


def decode_all(table: pl.DataFrame, model: Any, tokenizer: Any, params: PredictParams, with_schema: bool) -> list[dict[str, Any]]:
    """One row for every agent turn and way of decoding, in the table's order."""
    from agent.decode import Choice, SchemaChoice, TurnDecoder, groups

    conversations = encode_table(table, Encoder(tokenizer))
    decoder = TurnDecoder(model, tokenizer, params.max_new_tokens)
    engine: Any = None
    schema = action_json_schema(bounded=True)
    if with_schema:
        import llguidance.hf

        engine = llguidance.hf.from_tokenizer(tokenizer)
    rows = []
    with tqdm(total=sum(len(encoded.spans) for _, _, encoded in conversations), desc="predict", unit="turn", file=sys.stderr) as bar:
        for group in groups(conversations, params.group_conversations):
            names = [(name, number) for _, name, encoded in group for number in range(len(encoded.spans))]
            ways = {"free": Choice(tokenizer)}
            if with_schema:
                ways["schema"] = SchemaChoice(tokenizer, engine, schema, len(names))
            for decoding, texts in zip(ways, decoder.decode([encoded for _, _, encoded in group], *ways.values()), strict=True):
                rows += [{"conversation_id": name, "number": number, "decoding": decoding, "raw": text}
                         for (name, number), text in zip(names, texts, strict=True)]
            bar.update(len(names))
    return rows


def main() -> None:
    if sys.argv[1:] not in (["base"], ["student"]):
        raise InputError(f"predict takes one of 'base' and 'student', not {' '.join(sys.argv[1:]) or 'nothing'}", "python -m stages.predict student")
    which = sys.argv[1]
    params = load_params("predict", PredictParams)
    student = load_params("student", StudentParams)
    table = read_table(HELD_OUT, Verified)

    import polars as pl

    tokenizer = load_tokenizer(student)
    model = load_base(student).eval() if which == "base" else load_student(student, ADAPTER)
    started = time.monotonic()
    rows = decode_all(table, model, tokenizer, params, with_schema=which == "base")
    seconds = time.monotonic() - started
    frame = pl.DataFrame(rows).with_columns(pl.lit(which).alias("model")).sort("conversation_id", "number", "decoding")
    write_table(BASE_REPLIES if which == "base" else STUDENT_REPLIES, frame, Replies)
    say(f"predict {which}: {len(frame)} replies, {len(frame) / seconds:.1f} a second")


if __name__ == "__main__":
    run(main)
