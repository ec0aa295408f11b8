"""Conversations that hand off are repeated whole, everything else stays as it was."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from schemas.errors import InputError
from schemas.tables import Oversampled, Verified
from stages import oversample
from stages._stage import read_table, write_table
from stages._turns import escalations, turn_counts
from tests.helpers import agent, customer, inside, tool, verified, workspace

REPLIES = [customer("do you sell oolong?"), agent("search_kb", query="oolong"), tool("Teas: all."), agent("reply", "We do."),
           customer("please escalate the kettle"), agent("reply", "It is on the stove.")]
HANDOFF = [customer("my account"), agent("clarify", "What about it?"), customer("it is robbed"), agent("escalate", "Over.", reason="security")]
SHORT = [customer("a person"), agent("escalate", "Over to a colleague.", reason="human_requested")]
CONVERSATIONS = {f"r{i}": REPLIES for i in range(6)} | {f"h{i}": HANDOFF for i in range(3)} | {"s0": SHORT}
HANDOFFS = {"h0", "h1", "h2", "s0"}


@pytest.fixture
def table():
    return verified(CONVERSATIONS)


def repeated(table, factor, seed=1, at_once=oversample.CONVERSATIONS):
    order = oversample.shuffled(escalations(table), factor, seed)
    with TemporaryDirectory() as folder:
        return pl.concat(oversample.repeat(table.lazy(), order, Path(folder) / "near", at_once))


def order(table):
    return table["conversation_id"].unique(maintain_order=True).to_list()


def test_factor_one_changes_nothing_but_the_order(table):
    once = repeated(table, 1)
    assert once["copy"].unique().to_list() == [0] and order(once) != order(table)
    assert_frame_equal(once.select(table.columns).sort("conversation_id", "index"), table.sort("conversation_id", "index"))


@pytest.mark.parametrize("factor", [2, 4, 7])
def test_exactly_the_conversations_that_escalate_stand_so_often(table, factor):
    many = repeated(table, factor)
    counts = many.filter(pl.col("index") == 0)["scenario"].value_counts()
    assert dict(counts.iter_rows()) == {name: factor if name in HANDOFFS else 1 for name in CONVERSATIONS}
    assert set(order(many)) == set(CONVERSATIONS) | {f"{name}#{copy}" for name in HANDOFFS for copy in range(1, factor)}


@pytest.mark.parametrize("factor", [1, 4])
def test_every_copy_is_whole_and_its_rows_stand_together_in_order(table, factor):
    many = repeated(table, factor)
    columns = [name for name in Oversampled.to_schema().columns if name in many.columns]
    assert Oversampled.validate(many.select(columns)).height == len(many)
    for copy in many.partition_by("conversation_id", maintain_order=True):
        original = table.filter(pl.col("conversation_id") == copy["scenario"][0]).drop("conversation_id")
        assert_frame_equal(copy.select(original.columns), original)


@pytest.mark.parametrize("at_once", [1, 3, 22])
def test_how_many_are_ordered_at_once_makes_no_difference(table, at_once):
    assert_frame_equal(repeated(table, 4, at_once=at_once), repeated(table, 4))


def test_the_order_is_shuffled_and_depends_on_the_seed_alone(table):
    assert_frame_equal(repeated(table, 4), repeated(table, 4))
    orders = {seed: order(repeated(table, 4, seed)) for seed in range(5)}
    assert len({tuple(names) for names in orders.values()}) == 5
    assert {tuple(sorted(names)) for names in orders.values()} == {tuple(sorted(orders[0]))}


def test_turns_and_handoffs_are_counted_in_agent_turns(table):
    counts = escalations(table)
    assert dict(counts.select("conversation_id", "turns").iter_rows()) == {
        name: 3 if name.startswith("r") else 2 if name.startswith("h") else 1 for name in CONVERSATIONS}
    assert turn_counts(counts) == {"conversations": 10, "agent_turns": 25, "handoff_turns": 4, "escalate_share": 4 / 25}
    assert turn_counts(counts.clear()) == {"conversations": 0, "agent_turns": 0, "handoff_turns": 0, "escalate_share": 0}


@pytest.mark.parametrize("factor, after", [
    (1, {"conversations": 10, "agent_turns": 25, "handoff_turns": 4, "escalate_share": 0.16}),
    (4, {"conversations": 22, "agent_turns": 46, "handoff_turns": 16, "escalate_share": 0.3478})])
def test_the_stage_writes_the_table_and_both_shares(tmp_path, table, factor, after, capsys):
    workspace(tmp_path, oversample={"escalation_factor": factor})
    with inside(tmp_path):
        write_table(oversample.TRAIN, table, Verified)
        oversample.main()
        metrics = json.loads(oversample.METRICS.read_text())
        written = read_table(oversample.OVERSAMPLED, Oversampled)
    assert metrics == {"escalation_factor": factor, "after": after, "before": {
        "conversations": 10, "agent_turns": 25, "handoff_turns": 4, "escalate_share": 0.16}}
    assert_frame_equal(written, repeated(table, factor), check_column_order=False)
    assert "10 conversations become" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [0, -1, 2.5, "4"])
def test_a_factor_that_makes_no_sense_stops_the_run(tmp_path, factor):
    workspace(tmp_path, oversample={"escalation_factor": factor})
    with inside(tmp_path), pytest.raises(InputError, match=r"oversample\.escalation_factor"):
        oversample.main()
