"""Tables between stages are checked on the way out and on the way in, and appear whole or not at all."""

import pandera.errors
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from schemas.errors import InputError
from schemas.tables import Calibration, Conversations, Judgements, Oversampled, Predictions, Rejected, Replies, Scores, Traces, Verified
from schemas.yardsticks import YardstickScores
from stages._stage import read_table, write_table
from tests.helpers import agent, customer, traces, verified

TALK = [customer("is it open?"), agent("reply", "It is."), customer("thanks"), agent("reply", "Till then.")]
TRACES = traces(("teashop", "open", 0, TALK), ("teashop", "close", 1, TALK[:2]))
VERIFIED = verified({"a": TALK, "b": TALK[:2]})
WHY = {"reject_reason": "unfinished", "reject_detail": "ends on a customer message", "reject_index": 1}
GOOD = {
    Conversations: VERIFIED.select("conversation_id", "company", "index", "role", "content"),
    Traces: TRACES,
    Verified: VERIFIED,
    Rejected: TRACES.with_columns(**{name: pl.lit(value, dtype=pl.Int64 if name == "reject_index" else None) for name, value in WHY.items()}),
    Oversampled: VERIFIED.with_columns(copy=pl.lit(0, dtype=pl.Int64)),
    Replies: pl.DataFrame({"conversation_id": ["a"], "number": [0], "model": ["base"], "decoding": ["free"], "raw": ["{"], "other": ["reply"]}),
    Scores: pl.DataFrame({"conversation_id": ["a"], "index": [1], "p_escalate": [0.25]}),
    Predictions: pl.DataFrame({
        "company": ["teashop"], "conversation_id": ["a"], "index": [1], "model": ["base"], "decoding": ["free"], "gold_action": ["reply"],
        "gold_reason": [None], "raw": ["{"], "action": [None], "reason": [None], "fault": ["not_one_json_object"], "p_escalate": [0.25],
        "other_action": [None]}, schema_overrides=dict.fromkeys(("gold_reason", "action", "reason", "other_action"), pl.String)),
    Calibration: pl.DataFrame({
        "company": ["teashop"], "conversation_id": ["a"], "index": [1], "gold_action": ["reply"], "p_escalate": [0.25]}),
    YardstickScores: pl.DataFrame({
        "split": ["held_out"], "company": ["teashop"], "conversation_id": ["a"], "index": [1], "model": ["embedding"], "gold_action": ["reply"],
        "p_escalate": [0.25]}),
    Judgements: pl.DataFrame({
        "company": ["teashop"], "conversation_id": ["a"], "index": [1], "model": ["base"], "gold_action": ["reply"], "action": [None],
        "verdict": ["unscored"], "answer": ["well"]}, schema_overrides={"action": pl.String}),
}


def name(value):
    return value.__name__ if isinstance(value, type) else None


def put(column, value, row=1):
    """Set one cell."""
    return lambda table: table.with_columns(
        pl.when(pl.int_range(pl.len()) == row).then(pl.lit(value, dtype=table.schema[column])).otherwise(column).alias(column))


def swapped(table):
    return pl.concat([table[:1], table[2:3], table[1:2], table[3:]])


CONVERSATION_FAULTS = {
    "messages out of order": swapped,
    "a gap in the index": lambda table: pl.concat([table[:1], table[2:]]),
    "the first message missing": lambda table: table[1:],
    "a message twice": lambda table: pl.concat([table[:2], table[1:]]),
    "the first message twice": lambda table: pl.concat([table[:1], table]),
    "two conversations interleaved": lambda table: pl.concat([table[:2], table[4:], table[2:4]]),
    "a name in two places": lambda table: pl.concat([table, table[:2]]),
    "an unknown role": put("role", "system"),
    "a negative index": put("index", -1),
    "no name": put("conversation_id", "", 0),
    "no content": put("content", None),
    "no role": put("role", None),
    "no company": put("company", None),
    "no index": put("index", None),
    "an index that is text": lambda table: table.with_columns(pl.col("index").cast(pl.String)),
    "an extra column": lambda table: table.with_columns(extra=pl.lit(1)),
    "a missing column": lambda table: table.drop("content"),
    "no order to check": lambda table: table.drop("index"),
}
OWN_FAULTS = [
    (Traces, put("attempt", -1)), (Traces, put("teacher", None)), (Traces, put("prompt_tokens", -1)), (Traces, put("completion_tokens", None)),
    (Verified, put("kind", "odd")), (Verified, put("system", None)), (Rejected, put("reject_reason", "because")),
    (Rejected, put("reject_reason", None)), (Rejected, put("reject_detail", None)), (Oversampled, put("copy", -1)), (Oversampled, put("copy", None)),
    (Replies, put("decoding", "greedy", 0)), (Replies, put("number", -1, 0)), (Replies, put("raw", None, 0)),
    (Predictions, put("model", "teacher", 0)), (Predictions, put("gold_action", None, 0)), (Predictions, put("fault", "odd", 0)),
    (Predictions, put("reason", "odd", 0)), (Predictions, put("p_escalate", 1.01, 0)), (Predictions, put("p_escalate", float("nan"), 0)),
    (Predictions, put("other_action", "odd", 0)), (Calibration, put("p_escalate", None, 0)),
    (Scores, put("p_escalate", None, 0)), (Scores, put("p_escalate", 1.5, 0)),
    (Calibration, put("p_escalate", -0.1, 0)), (YardstickScores, put("model", "student", 0)), (YardstickScores, put("split", "train", 0)),
    (Judgements, put("verdict", "fine", 0)), (Judgements, put("answer", None, 0)), (Judgements, put("action", "odd", 0))]
NULLABLE = [(Traces, "scenario"), (Traces, "failure"), (Verified, "scenario"), (Verified, "kind"), (Rejected, "reject_index"),
            (Predictions, "gold_reason"), (Predictions, "action"), (Predictions, "fault"), (Predictions, "p_escalate"),
            (Predictions, "other_action"), (Judgements, "action")]


@pytest.mark.parametrize("schema", GOOD, ids=name)
def test_a_good_table_passes_and_so_does_an_empty_one(schema):
    assert_frame_equal(schema.validate(GOOD[schema]), GOOD[schema])
    assert schema.validate(GOOD[schema].clear()).is_empty()


@pytest.mark.parametrize("fault", CONVERSATION_FAULTS)
@pytest.mark.parametrize("schema", [Conversations, Traces, Verified, Rejected, Oversampled], ids=name)
def test_a_conversation_table_refuses(schema, fault):
    with pytest.raises((pandera.errors.SchemaError, pl.exceptions.ColumnNotFoundError)):
        schema.validate(CONVERSATION_FAULTS[fault](GOOD[schema]))


@pytest.mark.parametrize("schema, fault", OWN_FAULTS, ids=name)
def test_a_table_refuses_what_its_own_columns_cannot_hold(schema, fault):
    with pytest.raises(pandera.errors.SchemaError):
        schema.validate(fault(GOOD[schema]))


@pytest.mark.parametrize("schema, column", NULLABLE, ids=name)
def test_null_is_allowed_where_it_means_something(schema, column):
    assert schema.validate(put(column, None, 0)(GOOD[schema]))[column][0] is None


@pytest.mark.parametrize("schema", GOOD, ids=name)
def test_what_is_written_is_read_again(tmp_path, schema):
    write_table(tmp_path / "data/verify/train.parquet", GOOD[schema], schema)
    assert_frame_equal(read_table(tmp_path / "data/verify/train.parquet", schema), GOOD[schema], check_column_order=False)
    assert [path.name for path in tmp_path.glob("data/verify/*")] == ["train.parquet"]


def test_columns_are_written_in_the_order_of_the_schema(tmp_path):
    write_table(tmp_path / "t.parquet", GOOD[Traces].select(sorted(GOOD[Traces].columns)), Traces)
    assert pl.read_parquet(tmp_path / "t.parquet").columns == list(Traces.to_schema().columns)


@pytest.mark.parametrize("fault", ["messages out of order", "an unknown role", "no content", "a missing column"])
def test_a_bad_table_leaves_the_old_file_and_no_part_of_a_new_one(tmp_path, fault):
    path = tmp_path / "train.parquet"
    write_table(path, GOOD[Verified], Verified)
    before = path.read_bytes()
    with pytest.raises((pandera.errors.SchemaError, pl.exceptions.ColumnNotFoundError)):
        write_table(path, CONVERSATION_FAULTS[fault](GOOD[Verified]), Verified)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["train.parquet"]


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "train.parquet"
    write_table(path, GOOD[Verified], Verified)
    monkeypatch.setattr(pl.DataFrame, "write_parquet", lambda table, file, **_: (file.write_bytes(b"PAR1"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        write_table(path, GOOD[Verified][:2], Verified)
    assert_frame_equal(read_table(path, Verified), GOOD[Verified], check_column_order=False)


def test_a_missing_table_names_the_stage_that_writes_it(tmp_path):
    with pytest.raises(InputError, match=r"train\.parquet does not exist") as error:
        read_table(tmp_path / "data/verify/train.parquet", Verified)
    assert error.value.hint == "run the stage that writes it: dvc repro verify"


@pytest.mark.parametrize("content", [b"", b"not parquet at all", b"PAR1"])
def test_a_file_that_is_no_parquet_is_said_to_be_none(tmp_path, content):
    path = tmp_path / "data/verify/train.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not a Verified table") as error:
        read_table(path, Verified)
    assert error.value.hint == "delete it and run: dvc repro --force verify"


@pytest.mark.parametrize("fault", CONVERSATION_FAULTS)
def test_a_table_changed_on_disk_is_refused_in_one_line(tmp_path, fault):
    CONVERSATION_FAULTS[fault](GOOD[Verified]).write_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match="is not a Verified table") as error:
        read_table(tmp_path / "train.parquet", Verified)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
