"""The gate judges what ships, passes only what the turns at hand show, and is not to be had by pleasing the judge."""

import json
import subprocess

import numpy as np
import polars as pl
import pytest

from stages._intervals import wilson
from stages.gate import CANNOT_TELL, FAIL, PASS, limit_rule, more_turns
from tests.deciding import command, lay_out, predictions, put_counts, turns, with_action
from tests.helpers import inside

LENIENT = {"min_recall": 0.5, "max_over_escalation": 0.1, "max_cost_increase": 0.25, "min_valid_output": 0.95, "max_unscored": 0.05}
MANY = turns(conversations=200)


def calibrated(folder, rows, **counts):
    lay_out(folder, rows, gate=LENIENT)
    put_counts(folder, rows, **counts)
    done = command(folder, "calibrate")
    assert done.returncode == 0, done.stderr
    return folder


def gate(folder, *arguments):
    """Exit code, and verdict by the first word of the rule."""
    done = command(folder, "gate", *arguments, "--format", "json")
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert (done.returncode == 0) == found["passed"]
    return done.returncode, {rule["rule"].split()[0].rstrip(","): rule for rule in found["rules"]}


def edit(folder, old, new):
    path = folder / "params.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return calibrated(tmp_path_factory.mktemp("gate"), predictions(MANY, strength=4.0))


def test_a_good_student_passes_though_plain_it_never_hands_off(good):
    code, rules = gate(good)
    assert code == 0 and rules["escalate_recall"]["verdict"] == "pass" and rules["escalate_recall"]["plain"] == "0.0 % (0/100)"
    assert rules["expected"]["verdict"] == "skipped" and "--base" in rules["expected"]["why"]
    done = command(good, "gate", "--format", "markdown")
    table, below = done.stdout.split("\n\n")
    assert done.returncode == 0 and "at the threshold" in table and "without" in table and "The gate passes." in below


def test_what_is_judged_is_what_ships_and_not_how_the_model_decodes(tmp_path):
    """Right in every plain step, with a score that is noise: the threshold spoils it, and the gate says so."""
    right = pl.col("gold_action")
    calibrated(tmp_path, with_action(predictions(MANY, strength=0.0), right))
    code, rules = gate(tmp_path)
    assert code == 1 and rules["escalate_recall"]["verdict"] == "fail" and rules["escalate_recall"]["plain"] == "100.0 % (100/100)"


def test_the_write_ups_trap_an_acceptable_rate_of_88_percent_does_not_buy_over_escalation_of_21(tmp_path):
    """Base: 88 % acceptable at 20.9 % over-escalation; v2.1: 83 % at 4.5 %. The one with the lower acceptable rate passes."""
    verdicts = {}
    for name, acceptable, over in (("base", 0.88, 0.209), ("v2.1", 0.83, 0.045)):
        rows = predictions(MANY)
        draw = np.random.default_rng(0).permutation(len(rows)) / len(rows)
        # A score of 1 hands off: every hand-off that is due, and a share of the others.
        rows = rows.with_columns(p_escalate=pl.when((pl.col("gold_action") == "escalate") | pl.Series(draw < over)).then(1.0).otherwise(0.0))
        folder = tmp_path / name
        folder.mkdir()
        calibrated(folder, rows, acceptable=acceptable)
        verdicts[name] = gate(folder)
    code, rules = verdicts["base"]
    assert code == 1 and rules["over_escalation"]["verdict"] == "fail" and rules["escalate_recall"]["verdict"] == "pass"
    code, rules = verdicts["v2.1"]
    assert code == 0 and rules["over_escalation"]["verdict"] == "pass"


@pytest.mark.parametrize("counts, rule", [({"valid": 0.9}, "valid_output"), ({"unscored": 60}, "unscored")])
def test_bad_output_and_a_judge_that_gives_no_verdict_fail(tmp_path, counts, rule):
    calibrated(tmp_path, predictions(MANY, strength=4.0), **counts)
    code, rules = gate(tmp_path)
    assert code == 1 and [name for name, of in rules.items() if of["verdict"] == "fail"] == [rule]


def test_what_the_turns_cannot_show_fails_unless_one_says_otherwise(good, tmp_path):
    calibrated(tmp_path, predictions(turns(conversations=10), strength=4.0))
    code, rules = gate(tmp_path)
    assert code == 1 and rules["escalate_recall"]["verdict"] == "cannot tell" and "more hand-off turns" in rules["escalate_recall"]["why"]
    edit(tmp_path, "cannot_tell_passes: false", "cannot_tell_passes: true")
    assert gate(tmp_path)[0] == 0


def rates(k, n, **more):
    low, high = wilson(k, n)
    rate = {"k": k, "n": n, "low": low, "high": high, "cluster_low": None, "cluster_high": None, **more}
    return {"at_threshold": {"r": rate}, "plain": {"r": rate}}


@pytest.mark.parametrize("companies, verdict, where", [
    ({"a": rates(95, 100), "b": rates(90, 100)}, PASS, "b"), ({"a": rates(95, 100), "b": rates(30, 100)}, FAIL, "b"),
    ({"a": rates(9, 10), "b": rates(95, 100)}, CANNOT_TELL, "a"), ({"a": rates(2, 3), "b": rates(60, 100)}, FAIL, "b"),
    ({"a": rates(95, 100, cluster_low=0.7, cluster_high=0.99)}, CANNOT_TELL, "a"), ({"a": rates(0, 0)}, CANNOT_TELL, "a")])
def test_a_lower_limit_is_taken_in_the_worst_company_from_the_wider_interval(companies, verdict, where):
    """A company that fails outweighs one whose few turns leave a lower limit, and a wider interval by conversation counts."""
    found = limit_rule("r", companies, 0.8, True, "hand-off")
    assert found.verdict == verdict and found.value.endswith(where)


@pytest.mark.parametrize("k, n, limit", [(9, 10, 0.8), (55, 62, 0.8), (3, 62, 0.1), (50, 62, 0.79)])
def test_the_number_of_turns_that_would_tell_tells(k, n, limit):
    low, high = wilson(k, n)
    assert low < limit < high
    total = n + more_turns(k, n, limit)
    low, high = wilson(round(k / n * total), total)
    assert not low < limit < high
    assert more_turns(4, 5, 0.8) is None and more_turns(0, 0, 0.8) is None


def git(folder, *arguments):
    with inside(folder):
        subprocess.run(["git", "-c", "user.email=a@example.com", "-c", "user.name=a", *arguments], capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """`weak` (a score that is nearly noise) and `strong`, with the workspace at `strong`."""
    folder = tmp_path_factory.mktemp("history")
    git(folder, "init", "-q")
    with inside(folder):
        subprocess.run(["dvc", "init", "-q"], check=True)
    for name, strength in (("weak", 0.5), ("strong", 4.0)):
        calibrated(folder, predictions(MANY, strength=strength))
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", name)
        git(folder, "tag", name)
    return folder


def test_cost_is_compared_with_the_base_revision_on_the_same_turns(history):
    better, same = gate(history, "--base", "weak"), gate(history, "--base", "strong")
    assert better[0] == 0 and better[1]["expected"]["value"].startswith("-") and "weak:tuned" in better[1]["expected"]["value"]
    assert same[0] == 0 and same[1]["expected"]["interval"] == "+0.00 to +0.00"


def test_a_dearer_student_fails_against_its_base(history, tmp_path):
    with inside(tmp_path):
        subprocess.run(["git", "clone", "-q", str(history), "copy"], check=True)
    folder = calibrated(tmp_path / "copy", predictions(MANY, strength=0.5))
    code, rules = gate(folder, "--base", "strong")
    assert code == 1 and rules["expected"]["verdict"] == "fail" and rules["expected"]["value"].startswith("+")


def test_figures_that_are_not_of_the_predictions_beside_them_are_refused(tmp_path):
    calibrated(tmp_path, predictions(MANY, strength=4.0))
    predictions(MANY, strength=0.1).write_parquet(tmp_path / "data/eval_exact/predictions.parquet")
    done = command(tmp_path, "gate")
    assert done.returncode == 1 and "predictions and threshold say" in done.stderr and "hint: dvc repro calibrate" in done.stderr


def test_an_unknown_base_is_one_sentence(history):
    done = command(history, "gate", "--base", "nowhere")
    assert done.returncode == 1 and "no revision 'nowhere'" in done.stderr and "Traceback" not in done.stderr
