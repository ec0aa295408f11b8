"""A table in chunks is the whole table, checked as the whole would be; work comes back in order from every core."""

import os

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from schemas.errors import InputError
from schemas.tables import Traces, Verified
from stages import _chunks
from stages._chunks import Parts, checked_chunks, chunks, on_all_cores, publish
from stages._stage import read_table, write_table
from stages._turns import escalations
from tests.helpers import agent, customer, traces, verified

TALK = [customer("is it open?"), agent("reply", "It is."), customer("thanks"), agent("reply", "Till then.")]
TABLE = traces(*[("teashop", f"s{i}", 0, TALK[: 2 + 2 * (i % 2)]) for i in range(9)])


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "data/teacher_gen/traces.parquet"
    write_table(path, TABLE, Traces)
    return path


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 100])
def test_chunks_cut_no_conversation_and_lose_none(path, rows):
    found = list(checked_chunks(path, Traces, rows))
    assert_frame_equal(pl.concat(found), TABLE, check_column_order=False)
    assert all(chunk["index"][0] == 0 for chunk in found) and len(found) == (1 if rows > len(TABLE) else len(found)) > (rows < 6)
    assert sum(chunk["conversation_id"].n_unique() for chunk in found) == 9


def test_an_empty_table_is_one_empty_chunk(path):
    write_table(path, TABLE.clear(), Traces)
    chunk, = checked_chunks(path, Traces)
    assert chunk.is_empty() and chunk.schema == read_table(path, Traces).schema
    assert [len(chunk) for chunk in chunks(pl.scan_parquet(path).filter(pl.col("company") == "nobodys"))] == [0]


@pytest.mark.parametrize("spoil", [
    lambda table: pl.concat([table, table[:2]]), lambda table: pl.concat([table[:20], table[21:]]), lambda table: table.drop("role"),
    lambda table: table.with_columns(index=pl.col("index") + 1), lambda table: table.with_columns(role=pl.lit("boss")),
], ids=["a name in two chunks", "a gap in the last chunk", "a column missing", "none begins", "an unknown role"])
def test_a_bad_table_is_refused_in_the_words_of_every_stage(path, spoil):
    spoil(TABLE).write_parquet(path)
    with pytest.raises(InputError) as whole:
        read_table(path, Traces)
    with pytest.raises(InputError) as found:
        list(checked_chunks(path, Traces, 4))
    assert (str(found.value), found.value.hint) == (str(whole.value), whole.value.hint)


@pytest.mark.parametrize("cut", [1, 3, 50])
def test_parts_become_the_file_that_the_whole_becomes(tmp_path, cut):
    table = verified({f"c{i}": TALK for i in range(10)})
    parts = Parts(tmp_path / "parts", Verified)
    for begin in range(0, len(table), 4 * cut):
        parts.add(table[begin: begin + 4 * cut].with_columns(more=pl.lit(1)))
    parts.add(table.clear())
    publish(tmp_path / "a.parquet", parts.scan())
    write_table(tmp_path / "b.parquet", table, Verified)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes() and not list(tmp_path.glob("*.partial"))


def test_no_more_rows_wait_than_it_is_told(tmp_path):
    parts, table = Parts(tmp_path / "parts", Verified, rows=8), verified({f"c{i}": TALK for i in range(5)})
    written = []
    for begin in range(0, len(table), 4):
        parts.add(table[begin: begin + 4])
        written.append(len(list((tmp_path / "parts").iterdir())))
    assert written == [0, 1, 1, 2, 2] and parts.scan().collect().equals(table)


def test_a_part_keeps_the_columns_that_it_is_told_to(tmp_path):
    parts = Parts(tmp_path / "parts", Verified, "place")
    parts.add(verified({"a": TALK}).with_row_index("place").with_columns(more=pl.lit(1)))
    assert set(parts.scan().collect_schema()) == {*Verified.to_schema().columns, "place"}


def both(number):
    return os.getpid(), number * number


@pytest.mark.parametrize("cores, count, processes", [(1, 9, 0), (2, 2, 0), (2, 0, 0), (2, 3, 2), (2, 9, 2)])
def test_work_comes_back_in_order_from_every_core(monkeypatch, cores, count, processes):
    monkeypatch.setattr(_chunks.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    taken = []
    found = [(item, result) for item, result in on_all_cores(both, (taken.append(i) or i for i in range(count)))]
    assert [(item, square) for item, (_, square) in found] == [(i, i * i) for i in range(count)] and len(taken) == count
    assert len({pid for _, (pid, _) in found} - {os.getpid()}) <= processes and (os.getpid() in {pid for _, (pid, _) in found}) == (
        processes == 0 < count)


def test_no_more_is_taken_than_is_worked_on(monkeypatch):
    monkeypatch.setattr(_chunks.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    taken = []
    work = on_all_cores(both, (taken.append(i) or i for i in range(50)))
    assert next(work)[0] == 0 and len(taken) == 4
    work.close()


def test_a_workers_refusal_keeps_its_hint(monkeypatch):
    monkeypatch.setattr(_chunks.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    bad = verified({"a": [customer("hi"), agent("reply", "hi")]}).with_columns(content=pl.lit("no step"))
    with pytest.raises(InputError, match="an agent message that is no step") as error:
        list(on_all_cores(escalations, [bad] * 3))
    assert error.value.hint == "dvc repro --force verify"
