"""Yardsticks see the customer's words so far, are fitted on the training split alone, and are scored on the other two."""

import json
import shutil
from itertools import pairwise

import numpy as np
import polars as pl
import pytest

from schemas.yardsticks import YardstickScores
from stages._logistic import STRENGTHS, best_strength, left_out_log_odds, logistic, mean_auc
from stages._stage import read_table
from stages.yardsticks import embed, heard, model_folder
from tests.deciding import command
from tests.helpers import agent, customer, tool, verified

TALK = [customer("is it open?"), agent("search_kb", query="hours"), tool("Hours: nine to five."), agent("reply", "Till five."),
        customer("somebody else used my account"), agent("escalate", "A colleague takes over.", reason="security")]


def conversations(company, handoffs, others):
    """A Verified table: the hand-offs are about a stolen account, the others about opening hours."""
    talks = {f"{company}/h{i}": [customer(f"somebody stole my account number {i}"), agent("escalate", "A colleague.", reason="security")]
             for i in range(handoffs)}
    talks |= {f"{company}/o{i}": [customer(f"when do you open on day {i}"), agent("reply", "At nine.")] for i in range(others)}
    return verified(talks).with_columns(company=pl.lit(company))


def test_a_turn_hears_the_customer_so_far_and_nobody_else():
    turns = heard(pl.concat([verified({"a": TALK}), verified({"b": TALK[:1] + TALK[3:4]})]), "train")
    assert turns["said"].to_list() == [["is it open?"], ["is it open?"], ["is it open?", "somebody else used my account"], ["is it open?"]]
    assert turns["gold_action"].to_list() == ["search_kb", "reply", "escalate", "reply"] and turns["index"].to_list() == [1, 3, 5, 1]


def test_sentences_that_mean_the_same_lie_close():
    near, same, far = embed(["someone broke into my account", "a stranger logged in as me", "how long does oolong tea keep?"], model_folder())
    assert np.linalg.norm(near) == pytest.approx(1) and near @ same > near @ far + 0.2


def test_a_text_has_the_same_vector_in_any_company():
    texts = ["short", "a rather longer text about a parcel that never came", "medium text"]
    together, alone = embed(texts, model_folder(), batch=3), np.vstack([embed([text], model_folder()) for text in texts])
    assert np.allclose(together, alone, atol=1e-5)


def test_a_company_is_scored_by_a_fit_that_has_not_seen_it():
    """A feature that only names the company says nothing about one that was left out; fitted on all, it would say everything."""
    companies = np.repeat(["a", "b", "c"], 20)
    handoff = np.tile([True, False], 30)
    own = np.zeros((60, 3))
    for column, company in enumerate("abc"):
        own[(companies == company) & handoff, column] = 1
    for features, auc in ((own, 0.5), (handoff[:, None].astype(float), 1.0)):
        assert mean_auc(left_out_log_odds(logistic(1.0), features, handoff, companies), handoff, companies) == auc


def test_the_strength_is_the_best_one_up_to_the_first_that_is_no_better():
    """Real fits: with one telling column among noise the weakest regularisation is not the best; the search need not go there."""
    rng = np.random.default_rng(3)
    companies, handoff = np.repeat(list("abcd"), 50), np.tile([True, False, False, False, False], 40)
    features = np.column_stack([handoff + rng.normal(size=200), rng.normal(size=(200, 60))])
    auc = {strength: mean_auc(left_out_log_odds(logistic(strength), features, handoff, companies), handoff, companies) for strength in STRENGTHS}
    tried = []
    best, log_odds = best_strength(lambda strength: tried.append(strength) or logistic(strength), features, handoff, companies)
    rising = [b > a for a, b in pairwise(auc.values())]
    expected = STRENGTHS[rising.index(False)]
    assert best == expected < STRENGTHS[-1] and tried == [*STRENGTHS[:STRENGTHS.index(best) + 2]]
    assert mean_auc(log_odds, handoff, companies) == auc[best]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("yardsticks")
    (folder / "data/verify").mkdir(parents=True)
    for name, companies in (("train", ("east", "west")), ("calibration", ("east",)), ("held_out", ("north",))):
        pl.concat([conversations(company, 4, 8) for company in companies]).write_parquet(folder / f"data/verify/{name}.parquet")
    done = command(folder, "yardsticks")
    assert done.returncode == 0, done.stderr
    return folder


def test_both_yardsticks_score_every_turn_they_were_not_fitted_on(work):
    table = read_table(work / "data/yardsticks/scores.parquet", YardstickScores)
    assert {key: len(part) for key, part in table.group_by("split", "model")} == {
        (split, model): 12 for split in ("calibration", "held_out") for model in ("bag_of_words", "embedding")}
    metrics = json.loads((work / "metrics/yardsticks.json").read_text())
    assert all(of["held_out"]["north"]["auc"] == 1 for of in metrics.values()), "stolen accounts and opening hours are easy to tell apart"


def test_the_gold_steps_of_the_other_splits_do_not_change_a_score(work, tmp_path):
    """With every gold step of calibration and held-out turned into a reply, all scores are as before: they were not fitted on."""
    shutil.copytree(work / "data", tmp_path / "data")
    shutil.rmtree(tmp_path / "data/yardsticks", ignore_errors=True)
    for name in ("calibration", "held_out"):
        path = tmp_path / f"data/verify/{name}.parquet"
        reply = agent("reply", "At nine.").content
        pl.read_parquet(path).with_columns(content=pl.when(pl.col("role") == "agent").then(pl.lit(reply)).otherwise("content")).write_parquet(path)
    assert command(tmp_path, "yardsticks").returncode == 0
    before, after = (pl.read_parquet(folder / "data/yardsticks/scores.parquet") for folder in (work, tmp_path))
    assert before["p_escalate"].equals(after["p_escalate"]) and set(after["gold_action"]) == {"reply"}
