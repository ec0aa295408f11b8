"""The hand-off score, with the real base model on a few short conversations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml

from agent.handoff_score import HandoffScore
from agent.layer_states import LayerStates
from agent.probe_layer import check_layer
from schemas.errors import InputError
from schemas.tables import PromptStates, Scores, Verified
from stages._bag_of_words import heard
from stages._encoded import encode_table
from stages._stage import read_table, write_table
from stages.handoff_score import kept_states, prompt_states, states_of
from tests.deciding import command
from tests.students import ALL, HANDOFF, LONG, SEARCH, SYSTEM, base, encoder, table, tokenizer

ROOT = Path(__file__).parent.parent
LAYER = 15


def splits(**changed):
    """Two training companies with hand-offs, one conversation to calibrate on and one held out."""
    training = [table({f"{name}{i}": messages for i in range(2) for name, messages in ALL.items()}, company) for company in ("teashop", "tearoom")]
    return {"train": pl.concat(training), "calibration": table({"c": HANDOFF}), "held_out": table({"h": LONG}, "tavern"), **changed}


def put(folder, tables):
    (folder / "data/verify").mkdir(parents=True)
    for split, part in tables.items():
        write_table(folder / f"data/verify/{split}.parquet", part, Verified)
    states = prompt_states(encode_table(tables["held_out"], encoder()), LayerStates(base(), LAYER, folder / "states"), "test")
    keep(folder, [(*turn, state.astype("float32")) for turn, state in states.items()])
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["handoff_score"]["layer"] = LAYER
    params["predict"]["max_new_tokens"] = 4
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")


def keep(folder, states):
    """What predict_base leaves."""
    table = pl.DataFrame(states, orient="row", schema={"conversation_id": pl.String, "number": pl.Int64, "state": pl.List(pl.Float32)})
    write_table(folder / "data/predict/base_states.parquet", table, PromptStates)


@pytest.fixture
def run(monkeypatch):
    """The stage in this process, with the model that is loaded already."""
    monkeypatch.setattr("stages.handoff_score.load_base", lambda _: base())
    monkeypatch.setattr("stages.handoff_score.load_tokenizer", lambda _: tokenizer())

    def run(folder, tables):
        put(folder, tables)
        return command(folder, "handoff_score")

    return run


def scores(folder):
    return {(name, index): p for name, index, p in read_table(folder / "data/handoff_score/scores.parquet", Scores).iter_rows()}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    base()  # the weights are converted by now
    folder = tmp_path_factory.mktemp("score")
    put(folder, splits())
    (folder / "data/predict/base_states.parquet").unlink()
    for stage in ("predict base", "handoff_score"):
        ended = subprocess.run([sys.executable, "-m", *f"stages.{stage}".split()], cwd=folder, capture_output=True, text=True, check=False, env={
            "HANDOFF_CACHE": str(ROOT / ".cache"), **os.environ, "PYTHONPATH": str(ROOT)})
        assert ended.returncode == 0, ended.stderr
    return folder


def test_what_the_base_models_predictions_leave_is_what_a_reading_gives(done, tmp_path):
    kept = kept_states(done / "data/predict/base_states.parquet")
    read = prompt_states(encode_table(splits()["held_out"], encoder()), LayerStates(base(), LAYER, tmp_path), "test")
    assert kept.keys() == read.keys() and all(kept[turn] == pytest.approx(read[turn], abs=1e-3) for turn in read)


def test_it_scores_every_turn_that_it_was_not_fitted_on(done):
    found = scores(done)
    assert set(found) == {("teashop/c/0", 1), *(("tavern/h/0", index) for index in (1, 3, 5))}
    assert found["teashop/c/0", 1] > 0.5 > max(found["tavern/h/0", index] for index in (1, 3, 5)), "it has seen these very words"
    metrics = json.loads((done / "metrics/handoff_score.json").read_text(encoding="utf-8"))
    assert metrics["layer"] == LAYER and set(metrics["held_out"]) == {"tavern"} and metrics["left_out_company_auc"] == 1


def test_held_out_and_calibration_turns_do_not_reach_the_fit(run, done, tmp_path):
    assert run(tmp_path, splits(held_out=table({"h": HANDOFF}, "tavern"), calibration=table({"c": HANDOFF, "d": SEARCH}))).returncode == 0
    assert scores(tmp_path)["teashop/c/0", 1] == pytest.approx(scores(done)["teashop/c/0", 1], abs=1e-6)


def test_the_file_beside_the_adapter_gives_the_scores_of_the_table(done):
    score, example = HandoffScore.load(done / "models/handoff_score.json"), encoder().conversation(SYSTEM, LONG)
    indices = [index for index, message in enumerate(LONG) if message.role == "agent"]
    for (start, _), index in zip(example.spans, indices, strict=True):
        with torch.inference_mode():
            prompt = torch.tensor([example.ids[:start]], device=base().device)
            states = base()(prompt, output_hidden_states=True).hidden_states[score.layer][0, -1:].cpu()
        said = "\n".join(message.content for message in LONG[:index] if message.role == "customer")
        assert score(states.double().numpy(), [said])[0] == pytest.approx(scores(done)["tavern/h/0", index], abs=1e-3)


def test_both_the_state_and_the_words_count(done):
    score = HandoffScore.load(done / "models/handoff_score.json")
    assert min(score.stack.weight) > 0 and len(score.probe.weight) == 576 and len(score.terms) == len(score.idf) == len(score.words.weight)
    state = [score.probe.weight]
    assert score(state, ["somebody changed my email"])[0] > score(state, ["is the oolong organic?"])[0]
    assert score(state, ["thanks"])[0] > score([[-value for value in score.probe.weight]], ["thanks"])[0]


@pytest.mark.parametrize("content", [None, "", "{}", "[1]", '{"layer": "x"}'])
def test_a_file_that_is_no_score_is_one_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "score.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"score\.json is no hand-off score") as error:
        HandoffScore.load(tmp_path / "score.json")
    assert "dvc pull" in error.value.hint


def test_a_turns_state_is_that_of_its_prompt_and_of_nothing_that_comes_after(tmp_path):
    states = prompt_states(encode_table(table({"s": SEARCH}), encoder()), LayerStates(base(), 30, tmp_path), "test")
    example = encoder().conversation(SYSTEM, SEARCH)
    for number, (start, _) in enumerate(example.spans):
        with torch.inference_mode():
            alone = base().model(torch.tensor([example.ids[:start]], device=base().device)).last_hidden_state[0, -1].cpu()
        assert torch.allclose(torch.tensor(states["teashop/s/0", number]).float(), alone, atol=1e-3)


def test_a_layer_that_is_not_there_is_one_sentence():
    check_layer(29, base())
    with pytest.raises(InputError, match=r"handoff_score\.layer is 30, and the student has layers 0 to 29"):
        check_layer(30, base())


def test_turns_that_predict_base_left_no_state_of_are_one_sentence(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    keep(tmp_path, [("tavern/h/0", 0, [0.5] * 4), ("tavern/h/0", 2, [0.25] * 4)])
    states = kept_states(tmp_path / "data/predict/base_states.parquet")
    assert states["tavern/h/0", 2].tolist() == [0.25] * 4
    with pytest.raises(InputError, match="lacks 1 of 3 agent turns") as error:
        states_of(heard(table({"h": LONG}, "tavern"), "held_out"), states)
    assert "predict_base" in error.value.hint


def test_too_few_hand_offs_are_one_sentence_and_leave_no_output(run, tmp_path):
    ended = run(tmp_path, splits(train=table({"s": SEARCH, "h": HANDOFF})))
    assert ended.returncode == 1 and "the training split is too small for a hand-off score" in ended.stderr and "hint: " in ended.stderr
    assert not (tmp_path / "data/handoff_score").exists() and not (tmp_path / "models").exists()


def test_an_empty_split_is_one_sentence(run, tmp_path):
    ended = run(tmp_path, splits(calibration=table({"c": HANDOFF}).clear()))
    assert ended.returncode == 1 and "the calibration split is empty" in ended.stderr and "hint: data.scenarios_per_company" in ended.stderr
