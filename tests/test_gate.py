"""The gate judges what ships, passes only what the turns at hand show, and is not to be had by pleasing the judge."""

import json
import re
import shutil
import subprocess

import numpy as np
import polars as pl
import pytest

from stages._intervals import cluster_ratio
from stages._rates import rate
from stages.gate import CANNOT_TELL, FAIL, PASS, limit_rule, more_turns, more_turns_of_mean, why_not
from tests.deciding import command, lay_out, predictions, put_counts, turns, with_action
from tests.helpers import inside

LENIENT = {"min_recall": 0.5, "max_over_escalation": 0.15, "max_cost_increase": 0.25, "min_valid_output": 0.95, "max_unscored": 0.05}
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
    assert done.returncode == 0 and "at the threshold" in table and "without" in table
    assert "The gate passes; whether the cost rose was not asked." in below


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


@pytest.mark.parametrize("counts, rule, verdict", [
    ({"valid": 0.9}, "valid_output", "fail"), ({"unscored": 60}, "unscored", "fail"),
    ({"valid": 0.96}, "valid_output", "cannot tell"), ({"unscored": 24}, "unscored", "cannot tell")])
def test_bad_output_and_a_judge_that_gives_no_verdict_do_not_pass(tmp_path, counts, rule, verdict):
    """576 of 600 valid ones are more than 95 %, and 24 of 600 unscored fewer than 5 %, but not their whole intervals."""
    calibrated(tmp_path, predictions(MANY, strength=4.0), **counts)
    code, rules = gate(tmp_path)
    assert code == 1 and [name for name, of in rules.items() if of["verdict"] not in ("pass", "skipped")] == [rule]
    assert rules[rule]["verdict"] == verdict and ("more turns" in rules[rule]["why"]) == (verdict == "cannot tell")


def test_what_the_turns_cannot_show_fails_unless_one_says_otherwise(good, tmp_path):
    calibrated(tmp_path, predictions(turns(conversations=6), strength=4.0))
    code, rules = gate(tmp_path)
    assert code == 1 and rules["escalate_recall"]["verdict"] == "cannot tell" and "more hand-off turns" in rules["escalate_recall"]["why"]
    edit(tmp_path, "cannot_tell_passes: false", "cannot_tell_passes: true")
    assert gate(tmp_path)[0] == 0


def counted(k, n, **more):
    return {**rate(k, n), "cluster_low": None, "cluster_high": None, **more}


def rates(k, n, **more):
    return counted(k, n, **more), counted(k, n)


@pytest.mark.parametrize("companies, verdict, where", [
    ({"a": rates(95, 100), "b": rates(90, 100)}, PASS, "b"), ({"a": rates(95, 100), "b": rates(30, 100)}, FAIL, "b"),
    ({"a": rates(9, 10), "b": rates(95, 100)}, CANNOT_TELL, "a"), ({"a": rates(2, 3), "b": rates(60, 100)}, FAIL, "b"),
    ({"a": rates(95, 100, cluster_low=0.7, cluster_high=0.99)}, CANNOT_TELL, "a"), ({"a": rates(0, 0)}, CANNOT_TELL, "a")])
def test_a_lower_limit_is_taken_in_the_worst_company_from_the_wider_interval(companies, verdict, where):
    """A company that fails outweighs one whose few turns leave a lower limit, and a wider interval by conversation counts."""
    found = limit_rule("r", companies, 0.8, True, "hand-off turns")
    assert found.verdict == verdict and found.value.endswith(where)


@pytest.mark.parametrize("k, n, limit", [(9, 10, 0.8), (55, 62, 0.8), (3, 62, 0.1), (50, 62, 0.79)])
def test_the_number_of_turns_that_would_tell_tells_and_a_tenth_less_does_not(k, n, limit):
    def tells(total):
        """Wilson's interval as it stands in his article, which takes parts of a turn too."""
        p, z = k / n, 1.959964
        centre, half = p + z**2 / (2 * total), z * (p * (1 - p) / total + z**2 / (4 * total**2)) ** 0.5
        return not (centre - half) / (1 + z**2 / total) < limit < (centre + half) / (1 + z**2 / total)

    total = n + more_turns(counted(k, n), limit)
    assert not tells(n) and not tells(0.9 * total) and tells(1.001 * total)


@pytest.mark.parametrize("k, n", [(4, 5), (0, 0), (799_999, 1_000_000)])
def test_no_number_of_turns_tells_what_lies_at_the_limit(k, n):
    assert more_turns(counted(k, n), 0.8) is None and more_turns_of_mean(0.8, 0.7, 0.9, 5, 0.8) is None
    assert "no number of hand-off turns would tell" in why_not(None, "hand-off turns")


def test_turns_that_resemble_each_other_within_a_conversation_take_more():
    """Draws of whole conversations whose turns are all hit or all missed: four turns tell what one does alone."""
    draws = np.repeat(np.random.default_rng(2).permutation(np.arange(200) < 174), 4)
    low, high = cluster_ratio([str(i // 4) for i in range(800)], draws, np.ones(800))
    alone, together = (total + more_turns(of, 0.85) for total, of in (
        (200, counted(174, 200)), (800, counted(696, 800, cluster_low=low, cluster_high=high))))
    assert together / alone == pytest.approx(4, rel=0.25), "percentiles and Wilson's limit are not the same half-width at the same n"
    wide = more_turns(counted(95, 100, cluster_low=0.70, cluster_high=0.99), 0.8)
    assert wide > 100, "at .70 to .99 half as wide an interval would still hold .80: it takes more than twice the turns"


def test_the_turns_that_a_mean_takes_are_those_that_shrink_its_interval_to_the_limit():
    """Four times as many turns halve the interval; the half on the side of the limit counts."""
    for value, low, high in ((0.1, -0.3, 0.5), (0.5, 0.1, 0.9), (0.0, -0.2, 0.6)):
        assert more_turns_of_mean(value, low, high, 100, 0.3) == pytest.approx(300, abs=1)


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


def test_worse_lets_go_what_the_base_does_not_pass_either(history, tmp_path):
    with inside(tmp_path):
        subprocess.run(["git", "clone", "-q", str(history), "copy"], check=True)
    folder = tmp_path / "copy"
    git(folder, "checkout", "-q", "weak")
    done = command(folder, "gate", "--base", "weak", "--worse")
    assert gate(folder, "--base", "weak")[0] == 1 and done.returncode == 0
    assert "The gate does not pass. weak does not pass either: escalate_recall, lower limit, worst company." in done.stdout
    assert command(folder, "gate", "--base", "strong", "--worse").returncode == 1, "strong passes it"
    calibrated(folder, predictions(MANY, strength=-1.0))
    _, rules = gate(folder, "--base", "weak")
    assert rules["expected"]["verdict"] == "fail" and command(folder, "gate", "--base", "weak", "--worse").returncode == 1, "the cost is never let go"
    assert command(folder, "gate", "--worse").returncode == 2


@pytest.mark.parametrize("handoff, few, verdict", [(True, 1, "cannot tell"), (False, 3, "pass")])
def test_a_few_conversations_that_cost_more_are_bounded_without_the_bootstrap(history, tmp_path, handoff, few, verdict):
    """One of 400 missed at 60 minutes, or three handed off needlessly at 5: the interval, drawn from so few, ends below the limit either way."""
    with inside(tmp_path):
        subprocess.run(["git", "clone", "-q", str(history), "copy"], check=True)
    folder = tmp_path / "copy"
    path = folder / "data/eval_exact/predictions.parquet"
    rows = pl.read_parquet(path)
    threshold = json.loads((folder / "models/operating_point.json").read_text())["threshold"]
    right = (pl.col("gold_action") == "escalate") == (pl.col("p_escalate") >= threshold)
    kept = rows.filter(right & ((pl.col("gold_action") == "escalate") == handoff) & (pl.col("model") == "student"))
    changed = kept.unique("conversation_id", keep="first", maintain_order=True)["conversation_id", "index"].head(few)
    now = rows.join(changed.with_columns(spoilt=pl.lit(True)), on=["conversation_id", "index"], how="left").with_columns(
        p_escalate=pl.when(pl.col("spoilt")).then(0.0 if handoff else 1.0).otherwise("p_escalate")).drop("spoilt")
    calibrated(folder, now)
    edit(folder, "max_cost_increase: 0.25", "max_cost_increase: 0.2")
    rules = gate(folder, "--base", "strong")[1]
    assert rules["expected"]["verdict"] == verdict and 0.01 < float(rules["expected"]["interval"].split(" to ")[1]) < 0.2
    told = "only 1 of 400 conversations cost more: too few for the interval, and up to +0.24 min is possible"
    assert rules["expected"]["why"] == (told if handoff else "")


def test_a_base_whose_texts_were_read_differently_is_refused(history, tmp_path):
    with inside(tmp_path):
        subprocess.run(["git", "clone", "-q", str(history), "copy"], check=True)
    folder = calibrated(tmp_path / "copy", predictions(MANY, strength=4.0).with_columns(action=pl.lit("clarify")))
    done = command(folder, "gate", "--base", "strong")
    assert (done.returncode, done.stdout) == (1, "") and "the grader changed between them" in done.stderr


@pytest.mark.parametrize("name", ["eval_exact", "eval_judge"])
def test_counts_of_the_base_model_alone_are_one_sentence(good, tmp_path, name):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    path = tmp_path / f"metrics/{name}_counts.json"
    path.write_text(path.read_text().replace('"student"', '"base"'))
    done = command(tmp_path, "gate")
    assert (done.returncode, done.stdout) == (1, "") and f"{name}_counts.json has no student in " in done.stderr
    assert f"hint: dvc repro {name}" in done.stderr


@pytest.mark.parametrize("name", ["calibrate_detail", "eval_exact_counts", "eval_judge_counts"])
@pytest.mark.parametrize("text", ["{}", "{", '{"north": {"student": {}}}'])
def test_a_metrics_file_that_is_none_is_one_sentence(good, tmp_path, name, text):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    (tmp_path / f"metrics/{name}.json").write_text(text)
    done = command(tmp_path, "gate")
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith(f"error: metrics/{name}.json of 'workspace' cannot be read: ")
    assert done.stderr.count("\n") == 2 and "\nhint: " in done.stderr


def test_figures_that_are_not_of_the_predictions_beside_them_are_refused(tmp_path):
    calibrated(tmp_path, predictions(MANY, strength=4.0))
    predictions(MANY, strength=0.1).write_parquet(tmp_path / "data/eval_exact/predictions.parquet")
    done = command(tmp_path, "gate")
    assert done.returncode == 1 and "predictions and threshold say" in done.stderr and "hint: dvc repro calibrate" in done.stderr


def test_a_cost_that_is_left_open_says_how_many_turns_would_settle_it(history, tmp_path):
    with inside(tmp_path):
        subprocess.run(["git", "clone", "-q", str(history), "copy"], check=True)
    folder = calibrated(tmp_path / "copy", predictions(MANY, strength=0.5, seed=1))
    edit(folder, "max_cost_increase: 0.25", "max_cost_increase: 0.5")
    code, rules = gate(folder, "--base", "weak")
    assert code == 1 and rules["expected"]["verdict"] == "cannot tell"
    assert re.fullmatch(r"needs about [1-9]\d* more turns", rules["expected"]["why"])


@pytest.mark.parametrize("name", ["eval_exact", "eval_judge"])
def test_counts_of_other_companies_are_refused(good, tmp_path, name):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    path = tmp_path / f"metrics/{name}_counts.json"
    path.write_text(json.dumps({company: of for company, of in json.loads(path.read_text()).items() if company != "south"}))
    done = command(tmp_path, "gate")
    assert done.returncode == 1 and f"{name}_counts.json has no south" in done.stderr and f"hint: dvc repro {name}\n" in done.stderr


def test_a_base_from_before_thresholds_ships_plain_and_one_whose_threshold_is_lost_or_broken_is_refused(history, tmp_path):
    with inside(tmp_path):
        subprocess.run(["git", "clone", "-q", str(history), "copy"], check=True)
    folder = tmp_path / "copy"
    point = folder / "models/operating_point.json"
    kept = point.read_bytes()

    def commit(name):
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", name)
        git(folder, "tag", name)

    point.unlink()
    commit("before")
    point.write_text("{")
    commit("broken")
    point.unlink()
    stage = {"write": {"cmd": "true", "outs": [point.relative_to(folder).as_posix()]}}
    (folder / "dvc.yaml").write_text(json.dumps({"stages": stage}))
    (folder / ".gitignore").write_text("/models/operating_point.json\n")
    locked = {"write": {"cmd": "true", "outs": [{"path": "models/operating_point.json", "hash": "md5", "md5": "a" * 32, "size": 9}]}}
    (folder / "dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": locked}))
    commit("lost")
    point.write_bytes(kept)
    assert "before:plain" in gate(folder, "--base", "before")[1]["expected"]["value"]
    for base, why in (("broken", "is no operating point"), ("lost", "neither in git nor in DVC's cache")):
        done = command(folder, "gate", "--base", base)
        assert (done.returncode, done.stdout) == (1, "") and why in done.stderr, base


def test_an_unknown_base_is_one_sentence(history):
    done = command(history, "gate", "--base", "nowhere")
    assert done.returncode == 1 and "no revision 'nowhere'" in done.stderr and "Traceback" not in done.stderr
