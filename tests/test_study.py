"""README's study: its two commits exist, hold what README says of them, and compare in a clone without a remote."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from tests.helpers import documented
from tests.layout import ROOT

RATES = ("escalate_recall", "over_escalation", "action_accuracy", "valid_output")
SIDES = {"v2": "v2:plain", "v2.1": "v2.1:plain", "v2 at the threshold": "v2:tuned", "v2.1 at the threshold": "v2.1:tuned"}
"""What README calls a revision as it decodes, and under its own threshold."""
NAMED = re.findall(r"^\| (v2(?:\.1)?) \| `([0-9a-f]{7,40})` \| (\d+) \| (.*) \|$", documented("The study"), re.MULTILINE)
STUDY = {name: commit for name, commit, _, _ in NAMED}


def git(*words, cwd=ROOT):
    return subprocess.run(["git", *words], cwd=cwd, capture_output=True, text=True, check=False)


pytestmark = pytest.mark.skipif(git("rev-parse", "--is-shallow-repository").stdout.strip() != "false" and "GITHUB_ACTIONS" not in os.environ,
                                reason="without the history there is no study")


def at(commit, path):
    shown = git("show", f"{commit}:{path}")
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


def counts(commit):
    """rate -> (k, n) of the student, both held-out companies together."""
    companies = json.loads(at(commit, "metrics/eval_exact_counts.json")).values()
    return {rate: tuple(sum(models["student"][rate][key] for models in companies) for key in "kn") for rate in RATES}


def test_readme_names_both_revisions():
    assert [name for name, *_ in NAMED] == ["v2", "v2.1"]
    assert git("rev-parse", f"{STUDY['v2.1']}^").stdout == git("rev-parse", STUDY["v2"]).stdout != "", "first v2, then v2.1"


@pytest.mark.parametrize("name, commit, factor, cells", NAMED)
def test_a_revision_holds_what_readme_says(name, commit, factor, cells):
    assert yaml.safe_load(at(commit, "params.yaml"))["oversample"]["escalation_factor"] == int(factor)
    assert (factor == "1") == (name == "v2")
    assert cells.split(" | ") == ["{}/{}".format(*counts(commit)[rate]) for rate in RATES]
    lock = yaml.safe_load(at(commit, "dvc.lock"))["stages"]
    assert lock["oversample"]["params"]["params.yaml"]["oversample"]["escalation_factor"] == int(factor)
    assert json.loads(at(commit, "metrics/oversample.json"))["escalation_factor"] == int(factor)


def test_the_factor_of_v2_1_is_the_one_that_calibration_chose():
    sweep = json.loads((ROOT / "metrics/sweep.json").read_text(encoding="utf-8"))
    assert dict((name, int(factor)) for name, _, factor, _ in NAMED)["v2.1"] == sweep["chosen_on_calibration"]


def test_readme_sets_what_was_aimed_at_beside_what_was_reached():
    models = json.loads(at(STUDY["v2.1"], "metrics/eval_exact_counts.json"))
    decoded, tuned = counts(STUDY["v2.1"]), compared(ROOT, "v2.1", "v2.1 at the threshold")
    recall, over = ([decoded[rate], (tuned[rate]["k_b"], tuned[rate]["n"])] for rate in ("escalate_recall", "over_escalation"))
    by_company = {company: of["student"] for company, of in models.items()}
    gained = compared(ROOT, "v2", "v2.1")["escalate_recall"]

    def percent(k, n):
        return f"{100 * k / n:.1f} %"

    rows = {
        "at least 60 hand-offs a company": ", ".join(f"{company} {of['escalate_recall']['n']}" for company, of in by_company.items()),
        "recall at least 85 %": f"no: {percent(*recall[0])}; at the threshold {percent(*recall[1])}",
        "over-escalation at most 5 %": "{} ({}); at the threshold {}".format(percent(*over[0]), ", ".join(
            f"{company} {percent(of['over_escalation']['k'], of['over_escalation']['n'])}" for company, of in by_company.items()), percent(*over[1])),
        "recall above v2's, p < .001": f"{100 * gained['difference']:+.1f} points, p {gained['cluster_p']:.3f}",
        "accuracy above base's in both": ", ".join("{} {} against {} of {}".format(
            company, *(of[model]["action_accuracy"]["k"] for model in ("student", "base")), of["student"]["action_accuracy"]["n"])
            for company, of in models.items())}
    for aim, reached in rows.items():
        assert f"| {aim} | {reached} |" in documented("The study")
    for of in models.values():
        student, base = of["student"]["action_accuracy"], of["base"]["action_accuracy"]
        assert student["n"] == base["n"] and student["low"] > base["high"], "even the intervals are apart"


def compared(folder, *sides):
    """rate -> the pooled row of the student; a side as README calls it."""
    revisions = [f"{STUDY[name]}:{policy}" for name, policy in (SIDES[side].split(":") for side in sides)]
    done = subprocess.run([sys.executable, "-m", "stages.compare", *revisions, "--format", "json", "--no-judge"], cwd=folder, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {row["rate"]: row for row in json.loads(done.stdout)["rows"] if (row["company"], row["model"]) == ("pooled", "student")}


def cell(pair):
    """A rate of the second side, and what sets it apart from the first's, as README shows it."""
    difference, low, high = (100 * pair[key] for key in ("difference", "low", "high"))
    p = f"{pair['cluster_p']:.3f}" if pair["cluster_p"] >= 0.0005 else "<0.001"
    return f"{pair['k_b']}/{pair['n']}, {difference:+.1f} ({low:+.1f} to {high:+.1f}), p {p}"


@pytest.mark.parametrize("a, b", [("v2", "v2.1"), ("v2.1", "v2 at the threshold"), ("v2.1", "v2.1 at the threshold"),
                                  ("v2 at the threshold", "v2.1 at the threshold")])
def test_readme_sets_thresholds_and_oversampling_against_each_other_as_compare_does(a, b):
    rates = compared(ROOT, a, b)
    assert " | ".join(["", a, b, *(cell(rates[rate]) for rate in RATES[:3]), ""]).strip() in documented("The study")


def dvc(folder, what):
    """`dvc metrics|plots diff` of the study's two revisions."""
    done = subprocess.run([sys.executable, "-m", "dvc", what, "diff", "--json", STUDY["v2"], STUDY["v2.1"]],
                          cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_two_compare_in_a_clone_without_a_remote(tmp_path):
    clone = tmp_path / "clone"
    assert git("clone", "--quiet", f"file://{ROOT}", str(clone)).returncode == 0
    plain, before, after = compared(clone, "v2", "v2.1"), counts(STUDY["v2"]), counts(STUDY["v2.1"])
    for rate in RATES[:3]:
        assert (plain[rate]["k_a"], plain[rate]["n"]) == before[rate] and (plain[rate]["k_b"], plain[rate]["n"]) == after[rate]
    tuned = compared(clone, "v2 at the threshold", "v2.1 at the threshold")
    assert all(tuned[rate]["gained"] == tuned[rate]["lost"] == 0 for rate in RATES[:2]), "they share the score, so they hand off the same turns"
    old, new = (json.loads(at(STUDY[name], "metrics/eval_exact.json")) for name in ("v2", "v2.1"))
    changes = dvc(clone, "metrics")["metrics/eval_exact.json"]
    for company in old:
        before, after = (side[company]["student"]["escalate_recall"] for side in (old, new))
        change = changes[f"{company}.student.escalate_recall"]
        assert (change["old"], change["new"]) == (before, after) and change["diff"] == pytest.approx(after - before)
    drawn = {name: {revision for one in plots for revision in one["revisions"]} for name, plots in dvc(clone, "plots")["data"].items()}
    assert all(drawn[name] == {STUDY["v2"], STUDY["v2.1"]} for name in drawn if "loss" in name or "recall against" in name), drawn
    assert any("loss" in name for name in drawn) and any("recall against" in name for name in drawn)
