"""Two revisions of a real repository, compared in it and in a fresh clone of it."""

import json
import subprocess

import polars as pl
import pytest
import yaml

from schemas.operating import OperatingPoint
from stages._paired import compare_pairs
from tests.deciding import command, lay_out, predictions, put_counts, turns, with_action
from tests.helpers import inside


def sh(folder, *command):
    with inside(folder):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def compare(folder, *arguments):
    return command(folder, "compare", *arguments)


def rows_of(folder, *arguments):
    done = compare(folder, *arguments, "--format", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {(row["company"], row["model"], row["rate"]): row for row in found["rows"]}, found["notes"]


def refused(folder, *arguments):
    done = compare(folder, *arguments)
    assert (done.returncode, done.stdout) == (1, "") and "Traceback" not in done.stderr
    error, hint = done.stderr.strip().split("\n")
    assert error.startswith("error: ") and hint.startswith("hint: ")
    return error, hint


def commit(folder, tag):
    sh(folder, "git", "add", "-A")
    sh(folder, "git", "commit", "-qm", tag)
    sh(folder, "git", "tag", tag)


def judgements(rows, good):
    return rows.filter(pl.col("model") == "student").select(
        "company", "conversation_id", "index", "model", "gold_action", "action",
        verdict=pl.when(pl.col("index") == 1).then(pl.lit("unscored")).when(good).then(pl.lit("acceptable")).otherwise(pl.lit("not_acceptable")),
        answer=pl.lit("well"))


def late(rows):
    """The rows with a hand-off at every last turn of a conversation."""
    return with_action(rows, pl.when((pl.col("index") == 5) & (pl.col("model") == "student")).then(pl.lit("escalate")).otherwise(pl.lit("reply")))


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "origin"
    folder.mkdir()
    sh(folder, "git", "init", "-q", "-b", "main")
    sh(folder, "git", "config", "user.email", "somebody@example.com")
    sh(folder, "git", "config", "user.name", "somebody")
    sh(folder, "dvc", "init", "-q")
    (folder / "data/eval_judge").mkdir(parents=True)
    lay_out(folder, predictions().drop("p_escalate", "other_action"))
    commit(folder, "v1")
    for tag, rows, good in (("v2", predictions(), pl.col("gold_action") == "reply"), ("v2.1", late(predictions()), pl.lit(True))):
        lay_out(folder, rows)
        assert command(folder, "calibrate").returncode == 0
        judgements(rows, good).write_parquet(folder / "data/eval_judge/judgements.parquet")
        sh(folder, "dvc", "add", "-q", "data/eval_judge/judgements.parquet")
        commit(folder, tag)
    put_counts(folder, predictions(), judge="some-model")
    commit(folder, "other-judge")
    lay_out(folder, predictions(turns(conversations=41)))
    commit(folder, "other-turns")
    lay_out(folder, predictions().with_columns(raw=pl.lit("reply"), action=pl.lit("clarify")))
    commit(folder, "other-grader")
    lay_out(folder, late(predictions()))
    (folder / "data/eval_exact/predictions.parquet").unlink()
    return folder


@pytest.fixture(scope="module")
def clone(repository, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone") / "fresh"
    sh(repository, "git", "clone", "-q", str(repository), str(folder))
    return folder


def test_every_rate_is_paired_turn_by_turn(repository):
    rows, notes = rows_of(repository, "v2", "v2.1")
    recall, over, accuracy = (rows["pooled", "student", name] for name in ("escalate_recall", "over_escalation", "action_accuracy"))
    assert (recall["k_a"], recall["k_b"], recall["n"], recall["gained"], recall["lost"]) == (0, 40, 40, 40, 0)
    assert (over["k_a"], over["k_b"], over["n"]) == (0, 40, 200)
    assert (accuracy["gained"], accuracy["lost"], accuracy["difference"]) == (40, 40, 0)
    assert recall["mcnemar_p"] < 1e-9 and accuracy["mcnemar_p"] == 1 and over["low"] > 0
    assert {company for company, _, _ in rows} == {"north", "south", "pooled"}
    assert "base: the same steps on both sides, not shown" in notes


def test_acceptable_is_compared_over_the_turns_that_both_judges_scored(repository):
    rows, _ = rows_of(repository, "v2", "v2.1")
    found = rows["pooled", "student", "acceptable"]
    assert (found["k_a"], found["k_b"], found["n"]) == (120, 160, 160), "a third is unscored"


def test_a_fresh_clone_without_the_data_compares_what_git_has_and_says_what_is_missing(clone):
    rows, notes = rows_of(clone, "v2", "v2.1")
    assert rows["pooled", "student", "escalate_recall"]["k_b"] == 40 and ("pooled", "student", "acceptable") not in rows
    assert any("acceptable is not compared" in note and "dvc pull" in note for note in notes)


@pytest.mark.parametrize("a, b", [("v2", "v2:tuned"), ("v2:tuned", "v2.1:tuned"), ("v2.1", "v2:tuned")])
def test_policies_are_compared_under_each_revisions_own_threshold(repository, a, b):
    rows, notes = rows_of(repository, a, b)
    for side, key in ((a, "k_a"), (b, "k_b")):
        rev, _, policy = side.partition(":")
        table = predictions() if rev == "v2" else late(predictions())
        mine = table.filter((pl.col("model") == "student") & (pl.col("gold_action") == "escalate"))
        point = OperatingPoint.model_validate_json(sh(repository, "git", "show", f"{rev}:models/operating_point.json"))
        handed = mine["p_escalate"] >= point.threshold if policy else mine["action"] == "escalate"
        assert rows["pooled", "student", "escalate_recall"][key] == handed.sum()
    assert {model for _, model, _ in rows} == {"student"}
    assert "acceptable is not compared: the judge saw what the models decoded, not what the threshold makes of it" in notes


def test_a_revision_from_before_the_scores_is_compared_plain(repository):
    assert rows_of(repository, "v1", "v2")[0]["pooled", "student", "action_accuracy"]["n"] == 240
    error, hint = refused(repository, "v1:tuned", "v2:tuned")
    assert "predictions.parquet of 'v1' has no p_escalate" in error and "compared plain" in hint


def test_the_workspace_is_a_revision(clone):
    assert rows_of(clone, "other-grader", "workspace", "--no-judge")[0]["pooled", "student", "action_accuracy"]["difference"] == 0


@pytest.mark.parametrize("a, b, error, hint", [
    ("v2", "other-turns", "6 turns of other-turns are not in v2", "the same data"), ("v2", "other-judge", "was judged by 'simulator'", "--no-judge"),
    ("v2", "other-grader", "equal texts are read as different steps", "eval_exact"),
    ("v2:tuned", "other-grader:tuned", "equal texts are read as different steps", "eval_exact"),
    ("v2", "other-grader:tuned", "equal texts are read as different steps", "eval_exact"), ("v2", "v9", "no revision 'v9'", "git log"),
    ("v1", "workspace", "does not exist in the workspace", "dvc pull"), ("v2", "v2:loud", "no side of a comparison", "REV:tuned")])
def test_what_cannot_be_compared_is_refused_with_a_hint(repository, a, b, error, hint):
    said = refused(repository, a, b)
    assert error in said[0] and hint in said[1]


def test_two_judges_can_be_left_out(repository):
    rows, _ = rows_of(repository, "v2", "other-judge", "--no-judge")
    assert not [key for key in rows if key[2] == "acceptable"]


def test_two_judges_are_no_matter_where_no_verdict_is_compared(repository):
    rows, notes = rows_of(repository, "v2:tuned", "other-judge:tuned")
    assert rows["pooled", "student", "escalate_recall"]["n"] == 40 and not [key for key in rows if key[2] == "acceptable"]
    assert any(note.startswith("acceptable is not compared") for note in notes)


def test_other_conversations_around_the_same_turns_are_refused(repository, tmp_path):
    folder = tmp_path / "locked"
    sh(repository, "git", "clone", "-q", str(repository), str(folder))
    sh(folder, "git", "checkout", "-q", "v2")
    sh(folder, "git", "config", "user.email", "somebody@example.com")
    sh(folder, "git", "config", "user.name", "somebody")
    for md5 in ("a" * 32, "b" * 32):
        stage = {"cmd": "x", "deps": [{"path": "data/verify/held_out.parquet", "md5": md5}]}
        (folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {"eval_exact": stage}}))
        sh(folder, "git", "add", "dvc.lock")
        sh(folder, "git", "commit", "-qm", md5)
    assert "other conversations around them" in refused(folder, "HEAD~1", "HEAD")[0]


def copied(repository, tmp_path, revision):
    """A clone at a revision, to change something in."""
    folder = tmp_path / "copy"
    sh(repository, "git", "clone", "-q", str(repository), str(folder))
    sh(folder, "git", "checkout", "-q", revision)
    return folder


def test_a_changed_grader_is_seen_in_the_texts_that_no_figure_is_taken_from(repository, tmp_path):
    """The student was trained again and says nothing twice; the base model's free texts are the same, and read differently."""
    folder = copied(repository, tmp_path, "v2")
    free = (pl.col("model") == "base") & (pl.col("decoding") == "free")
    rows = predictions().with_columns(raw=pl.when(pl.col("model") == "student").then(pl.col("raw") + " again").otherwise("raw"))
    lay_out(folder, rows)
    assert compare(folder, "v2", "workspace", "--no-judge").returncode == 0
    lay_out(folder, rows.with_columns(action=pl.when(free).then(pl.lit("clarify")).otherwise("action")))
    assert "240 equal texts are read as different steps" in refused(folder, "v2", "workspace", "--no-judge")[0]


@pytest.mark.parametrize("text", [None, "{}", "{"])
def test_verdicts_of_nobody_knows_which_judge_are_not_compared(repository, tmp_path, text):
    folder = copied(repository, tmp_path, "v2")
    counts = folder / "metrics/eval_judge_counts.json"
    counts.unlink()
    if text:
        counts.write_text(text)
    rows, notes = rows_of(folder, "v2", "workspace")
    assert not [key for key in rows if key[2] == "acceptable"]
    assert sum(note.startswith("acceptable is not compared, for who judged") for note in notes) == 1


@pytest.mark.parametrize("lock, told", [
    ("<<<<<<< HEAD\nschema: '2.0'\n=======\n", "error: dvc.lock of 'workspace' is not YAML: "), ("", None), ("[]", None)])
def test_a_lock_file_in_the_middle_of_a_merge_is_one_sentence(repository, tmp_path, lock, told):
    folder = copied(repository, tmp_path, "v2")
    (folder / "dvc.lock").write_text(lock)
    if told:
        assert refused(folder, "v2", "workspace", "--no-judge")[0].startswith(told)
    else:
        assert compare(folder, "v2", "workspace", "--no-judge").returncode == 0


def test_what_rests_on_a_few_conversations_says_so(repository, tmp_path):
    folder = copied(repository, tmp_path, "v2")
    few = pl.col("conversation_id").is_in(["north/0", "north/2", "south/4", "south/6"]) & (pl.col("index") == 5) & (pl.col("model") == "student")
    lay_out(folder, with_action(predictions(), pl.when(few).then(pl.lit("escalate")).otherwise(pl.lit("reply"))))
    rows, notes = rows_of(folder, "v2", "workspace", "--no-judge")
    recall = rows["pooled", "student", "escalate_recall"]
    assert (recall["gained"], recall["changed"]) == (4, 4)
    assert recall["low"] > 0 and recall["cluster_p"] == 0.125, "the interval says more than the test"
    told, = (note for note in notes if "go by p" in note)
    assert told.startswith("student: fewer than 10 conversations changed")
    assert "north escalate_recall (2)" in told and "pooled escalate_recall (4)" in told
    assert not any("go by p" in note for note in rows_of(repository, "v2", "v2.1", "--no-judge")[1])


@pytest.mark.parametrize("form, start", [("plain", "A: v2:plain. B: v2.1:plain."), ("markdown", "A: v2:plain")])
def test_it_prints_a_table(repository, form, start):
    done = compare(repository, "v2", "v2.1", "--format", form)
    head, table, notes = done.stdout.split("\n\n")
    assert head.startswith(start) and ("| pooled | student |" in table) == (form == "markdown") and notes.startswith("note: ")
    assert "100.0 %" in table and "<0.001" in table and "too few to show" in notes


def test_a_rate_of_no_turns_compares_to_nothing():
    pair = compare_pairs([], [], [])
    assert (pair.n, pair.difference, pair.low, pair.mcnemar_p, pair.cluster_p) == (0, None, None, 1.0, 1.0)
