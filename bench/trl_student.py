"""A student that TRL's SFTTrainer trained with plain settings, beside ours, on the held-out companies' turns.

It trains on the whole table, copies read as copies, with everything else as in `bench train`, and takes the turns as
stages.predict lets ours. About an hour on two cores; the adapter stays under `.cache/bench`, and with it a second call only decodes.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import chdir
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from agent.paths import CACHE
from bench._measure import circumstances
from bench.train import TRAIN, adapted_model, conversations_a_batch, trl_round
from schemas.bench import PairedRate, TrlStudentPart
from schemas.errors import InputError
from schemas.tables import Oversampled, Replies, Verified
from stages._stage import load_params, read_table, say

if TYPE_CHECKING:
    from agent.student import StudentParams
    from stages.qlora_train import QloraTrainParams


def add_arguments(_: argparse.ArgumentParser) -> None:
    """None: a part of the table would make another student."""


def train(student: StudentParams, params: QloraTrainParams, adapter: Path) -> None:
    """Train on the whole table with TRL's trainer, and keep the adapter."""
    from agent.encode import Encoder
    from agent.student import load_tokenizer
    from stages._encoded import encode_table

    tokenizer = load_tokenizer(student)
    conversations = [encoded for _, _, encoded in encode_table(read_table(TRAIN, Oversampled), Encoder(tokenizer))]
    batch = conversations_a_batch(conversations, params)
    model = adapted_model(student.model_copy(update={"unpack_once": False}), params)
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        seconds, loss = trl_round(model, tokenizer, params, conversations, batch, Path(folder))
    say(f"TRL's trainer: {len(conversations)} conversations, {batch} a batch, loss {loss:.3f}, {seconds:.0f} s")
    model.save_pretrained(str(adapter))


def measure(_: argparse.Namespace) -> TrlStudentPart:
    """Train, decode, and set both students' steps beside each other.

    Raises:
        InputError: there is no training table, or our student has not taken every held-out turn.
    """
    import polars as pl

    from agent.decode import TurnDecoder
    from agent.encode import Encoder
    from agent.student import StudentParams, load_student, load_tokenizer
    from stages._encoded import encode_table
    from stages.compare import exact
    from stages.eval_exact import gold_turns, parse_replies
    from stages.predict import HELD_OUT, STUDENT_REPLIES, PredictParams, decode_all
    from stages.qlora_train import QloraTrainParams, run_key

    here = circumstances()
    params, student = load_params("qlora_train", QloraTrainParams), load_params("student", StudentParams)
    predict = load_params("predict", PredictParams)
    held_out = read_table(HELD_OUT, Verified)
    gold = gold_turns(held_out)

    def steps(replies: pl.DataFrame) -> pl.DataFrame:
        return gold.join(parse_replies(replies), on=["conversation_id", "number"], how="inner")

    ours = steps(read_table(STUDENT_REPLIES, Replies))
    if len(ours) != len(gold):
        raise InputError(f"our student replied to {len(ours)} of {len(gold)} held-out turns", "dvc repro predict_student")
    adapter = CACHE / "bench" / f"trl_student-{run_key(params, student)}"
    if not (adapter / "adapter_model.safetensors").is_file():
        train(student, params, adapter)
    tokenizer = load_tokenizer(student)
    decoder = TurnDecoder(load_student(student, adapter), tokenizer, predict.max_new_tokens, predict.turns_at_once)
    rows = decode_all(encode_table(held_out, Encoder(tokenizer)), decoder, with_schema=False)
    found = exact(steps(pl.DataFrame(rows, schema_overrides={"other": pl.String})), ours)
    return TrlStudentPart(**here, rates={company: {name: PairedRate(k_trl=pair.k_a, k_ours=pair.k_b, **{
        field: value for field, value in asdict(pair).items() if field in PairedRate.model_fields}) for name, pair in rates.items()}
        for company, rates in found.items()})
