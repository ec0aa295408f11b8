"""Scores from replies that are known."""

import json

import polars as pl
import pytest

from schemas.counts import ExactCounts
from schemas.errors import InputError
from schemas.tables import Predictions, Replies, Scores, Verified
from stages import eval_exact
from stages._rates import rate
from stages._stage import write_table
from stages.eval_exact import gold_turns, parse_replies, score
from tests.students import ALL, step, table

GOLD = table()


def replies(texts, model="student", decoding="free"):
    """`texts`: conversation -> one raw text a turn."""
    return pl.DataFrame([{"conversation_id": f"teashop/{name}/0", "number": n, "model": model, "decoding": decoding, "raw": raw,
                          "other": "reply"}
                         for name, raws in texts.items() for n, raw in enumerate(raws)])


def perfect():
    return {name: [m.content for m in messages if m.role == "agent"] for name, messages in ALL.items()}


def scored(texts, model="student", decoding="free"):
    rows = gold_turns(GOLD).with_columns(p_escalate=pl.lit(0.25)).join(
        parse_replies(replies(texts, model, decoding)), on=["conversation_id", "number"], how="inner")
    Predictions.validate(rows.select(list(Predictions.to_schema().columns)))
    return score(rows, model)


def test_gold_turns_are_all_agent_turns():
    gold = gold_turns(GOLD)
    assert gold["gold_action"].to_list() == ["search_kb", "reply", "reply", "escalate", "clarify", "create_ticket", "reply"]
    assert gold.filter(pl.col("gold_action") == "escalate")["gold_reason"].to_list() == ["security"]


def test_the_gold_replies_score_full_marks():
    assert scored(perfect()) == {"action_accuracy": (7, 7), "escalate_recall": (1, 1), "over_escalation": (0, 6), "valid_output": (7, 7)}


def test_a_missed_handoff_costs_recall_and_accuracy():
    assert scored(perfect() | {"handoff": [step("reply", "No worries.").content]}) == {
        "action_accuracy": (6, 7), "escalate_recall": (0, 1), "over_escalation": (0, 6), "valid_output": (7, 7)}


def test_a_needless_handoff_costs_over_escalation_and_accuracy():
    texts = perfect()
    texts["search"][1] = step("escalate", "Over to a person.", reason="legal").content
    assert scored(texts) == {"action_accuracy": (6, 7), "escalate_recall": (1, 1), "over_escalation": (1, 6), "valid_output": (7, 7)}


@pytest.mark.parametrize("raw", ["", "I will escalate this.", '{"action": "escalate"}', step("escalate", "x", reason="legal").content + " done"])
def test_text_that_is_no_step_is_wrong_and_no_handoff(raw):
    assert scored(perfect() | {"handoff": [raw]}) == {
        "action_accuracy": (6, 7), "escalate_recall": (0, 1), "over_escalation": (0, 6), "valid_output": (6, 7)}


def test_the_base_model_is_scored_under_the_schema_but_for_valid_output():
    rows = gold_turns(GOLD).join(parse_replies(pl.concat([
        replies(perfect(), "base", "schema"), replies({name: ["prose"] * len(texts) for name, texts in perfect().items()}, "base", "free")])),
        on=["conversation_id", "number"], how="inner")
    assert score(rows, "base") == {"action_accuracy": (7, 7), "escalate_recall": (1, 1), "over_escalation": (0, 6), "valid_output": (0, 7)}


def test_replies_are_a_checked_table():
    Replies.validate(replies(perfect()))


@pytest.mark.parametrize("kept, empty", [(list(ALL), []), (["search"], ["escalate_recall"]), (["handoff"], ["over_escalation"])])
def test_the_stage_says_one_line_and_warns_of_a_rate_without_turns(tmp_path, monkeypatch, capsys, kept, empty):
    monkeypatch.chdir(tmp_path)
    gold, texts = table({name: ALL[name] for name in kept}), {name: perfect()[name] for name in kept}
    handoff_scores = gold_turns(gold).select("conversation_id", "index").with_columns(p_escalate=pl.lit(0.25))
    for path, frame, schema in (
            (eval_exact.HELD_OUT, gold, Verified), (eval_exact.CALIBRATION, gold, Verified), (eval_exact.HANDOFF_SCORES, handoff_scores, Scores),
            (eval_exact.BASE_REPLIES, pl.concat([replies(texts, "base", "free"), replies(texts, "base", "schema")]), Replies),
            (eval_exact.STUDENT_REPLIES, replies(texts), Replies)):
        write_table(path, frame, schema)
    eval_exact.main()
    result, *warnings = capsys.readouterr().out.splitlines()
    assert result.startswith("eval_exact, base -> student: teashop action_accuracy ") and result.count(" -> ") == 5
    assert warnings == [f"warning: teashop: no turn counts for {name} of base and student: the 0.0 in the metrics is 0 of 0" for name in empty]
    measured = json.loads(eval_exact.METRICS.read_text())["teashop"]["student"]
    assert [measured[name] for name in empty] == [0.0] * len(empty)
    counted = ExactCounts.model_validate_json(eval_exact.COUNTS.read_text()).root["teashop"]["student"]
    assert [name for name, of in counted if of.n == 0] == empty


def test_no_held_out_conversation_at_all_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, frame in ((eval_exact.HELD_OUT, GOLD.clear()), (eval_exact.CALIBRATION, GOLD)):
        write_table(path, frame, Verified)
    with pytest.raises(InputError, match="holds no conversation"):
        eval_exact.main()


def test_an_empty_rate_says_nothing():
    assert rate(0, 0) == {"k": 0, "n": 0, "low": 0.0, "high": 1.0}
