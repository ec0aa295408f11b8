"""The result table is the metrics files' and README's."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench._measure import RESULTS
from stages._show import markdown, plain
from stages.table import EXACT, JUDGE, rows, shared_score
from tests.helpers import HELD_OUT, documented

ROOT = Path(__file__).parent.parent


@pytest.fixture
def readme():
    """README's text; it tells of the committed run, so what somebody has run since is no fault of it."""
    def changed(path):
        return subprocess.run(["git", "diff", "--quiet", "HEAD", "--", path], cwd=ROOT, check=False).returncode == 1

    if changed("metrics/*.json") and not changed("README.md"):
        pytest.skip("the metrics are of a run of one's own, README's are the committed ones")
    return (ROOT / "README.md").read_text(encoding="utf-8")


def current():
    return rows(json.loads((ROOT / EXACT).read_text()), json.loads((ROOT / JUDGE).read_text()))


def test_every_rate_shows_its_count():
    header, *body = current()
    assert header[:2] == ["company", "model"] and len(body) == 2 * len(HELD_OUT)
    for row in body:
        for cell in row[2:]:
            percent, count = cell.split(" % ")
            k, n = map(int, count.strip("()").split("/"))
            assert float(percent) == pytest.approx(100 * k / n, abs=0.051)


def test_the_table_in_readme_is_the_one_of_the_metrics(readme):
    assert markdown(current()) in readme


def test_the_benchmarks_in_readme_are_those_of_the_metrics(readme):
    """Every figure on top of the file, as precisely as it is shown."""
    measured = json.loads((ROOT / RESULTS).read_text(encoding="utf-8"))
    shown = dict(re.findall(r"^\|[^|]*\| `(\w+)` \| ([\d.]+) \|", documented("Benchmarks"), re.MULTILINE))
    assert shown.keys() == measured.keys() - {"machine", "details"}
    for name, figure in shown.items():
        assert figure == f"{measured[name]:.{len(figure.partition('.')[2])}f}", name


def test_readme_says_what_trls_student_does_beside_ours(readme):
    of = json.loads((ROOT / RESULTS).read_text(encoding="utf-8"))["details"]["trl_student"]["rates"]["pooled"]
    accuracy, found, needless = (of[rate] for rate in ("action_accuracy", "escalate_recall", "over_escalation"))
    points = "{:+.1f} points (95 %: {:+.1f} to {:+.1f})".format(*(100 * accuracy[name] for name in ("difference", "low", "high")))
    text = " ".join(documented("Benchmarks").split())
    assert f"in {accuracy['k_trl']} of {accuracy['n']} held-out turns, ours in {accuracy['k_ours']}: {points}" in text
    handoffs = f"{found['k_trl']} of {found['n']} hand-offs at {needless['k_trl']} of {needless['n']} needless ones"
    assert f"{handoffs}, ours {found['k_ours']} at {needless['k_ours']}" in text


def test_readmes_first_screen_says_what_calibrate_measured(readme):
    detail = json.loads((ROOT / "metrics/calibrate_detail.json").read_text(encoding="utf-8"))
    of = detail["held_out"]["pooled"]
    text = " ".join(readme.split("Two commands:")[0].split())
    for model, policy in (("student", "plain"), ("student", "at_threshold"), ("bag_of_words", "at_threshold"), ("embedding", "at_threshold")):
        found, needless = (of[model][policy][rate] for rate in ("escalate_recall", "over_escalation"))
        assert f"{found['k']} of {found['n']} at {needless['k']} of {needless['n']}" in text, (model, policy)
    plain, bag = of["student"]["plain"], of["bag_of_words"]["at_threshold"]
    worse = bag["escalate_recall"]["k"] >= plain["escalate_recall"]["k"] and bag["over_escalation"]["k"] <= plain["over_escalation"]["k"]
    assert worse == ("A bag of words does better on both." in text)
    for model, name in (("student", "this score"), ("bag_of_words", "bag of words"), ("embedding", "embedding")):
        assert f"{name} {of[model]['auc']['value']:.2f}" in text
    for yardstick, said in (("bag_of_words", "points above the bag of words (95 %: "), ("embedding", "above the embedding (")):
        pair = detail["against_yardsticks"][yardstick]["escalate_recall"]
        difference, low, high = (f"{100 * pair[name]:+.1f}" for name in ("difference", "low", "high"))
        assert f"{difference} {said}{low} to {high}" in text, yardstick


def test_readme_says_in_words_what_the_threshold_does(readme):
    detail = json.loads((ROOT / "metrics/calibrate_detail.json").read_text(encoding="utf-8"))
    of = detail["held_out"]["pooled"]["student"]
    (found, needless), (found_now, needless_now) = ([of[policy][rate] for rate in ("escalate_recall", "over_escalation")]
                                                    for policy in ("plain", "at_threshold"))
    text = " ".join(documented(r"What does the threshold do\?").split())
    assert f"of {found['n']} hand-offs the student finds {found_now['k']} instead of {found['k']}" in text
    assert f"of {needless['n']} turns that need no person it hands off {needless_now['k']} instead of {needless['k']}" in text
    now, before = (of[policy]["expected_cost"]["value"] for policy in ("at_threshold", "plain"))
    assert f"{now:.1f} minutes of people's time instead of {before:.1f}" in text
    missed, brier = detail["thresholds"]["student"]["miss_rate"], of["brier"]
    assert f"misses {missed['k']} of {missed['n']} hand-offs" in text and f"up to {100 * missed['upper_95']:.0f} in 100" in text
    assert f"(Brier score {brier['raw']:.3f} against {brier['constant']:.3f})" in text and f"mends that ({brier['recalibrated']:.3f})" in text


def test_readme_says_how_the_bound_did_on_the_held_out_companies(readme):
    at = json.loads((ROOT / "metrics/calibrate_detail.json").read_text(encoding="utf-8"))["held_out"]["pooled"]["student"]["at_conformal"]
    found, needless = at["escalate_recall"], at["over_escalation"]
    assert f"misses {found['n'] - found['k']} of {found['n']}, at {needless['k']} of {needless['n']} needless" in " ".join(readme.split())


def test_the_short_metrics_agree_with_the_counts():
    for name in ("eval_exact", "eval_judge"):
        short, counts = (json.loads((ROOT / f"metrics/{file}.json").read_text()) for file in (name, f"{name}_counts"))
        for company, models in short.items():
            for model, rates in models.items():
                for rate, value in rates.items():
                    k, n = counts[company][model][rate]["k"], counts[company][model][rate]["n"]
                    assert value == pytest.approx(k / n if n else 0, abs=5e-5)


def test_the_bundled_held_out_companies_have_sixty_handoffs():
    measured = json.loads((ROOT / EXACT).read_text())
    assert all(measured[slug]["student"]["escalate_recall"]["n"] >= 60 for slug in ("streaming", "travel") if slug in measured)


def test_the_table_names_teacher_and_judge():
    shown = subprocess.run([sys.executable, "-m", "stages.table"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert plain(current()) in shown and "Teacher: simulator. Judge: simulator." in shown and "SLICE" not in shown


def test_an_unknown_revision_is_one_sentence():
    done = subprocess.run([sys.executable, "-m", "stages.table", "--rev", "nowhere"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "hint: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("base, shared", [(0.8, True), (0.7, False)])
def test_whether_base_and_student_share_a_score_is_seen_from_their_areas(base, shared):
    of = {model: {"auc": {"value": value, "recall_at_5_percent": 0.3}} for model, value in (("base", base), ("student", 0.8))}
    assert shared_score({"held_out": {"north": of, "pooled": of}}) == shared


def test_a_reader_that_has_enough_is_no_error():
    """As `| head`: nothing is told on standard error."""
    shown = subprocess.Popen([sys.executable, "-m", "stages.table"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    shown.stdout.close()
    with shown.stderr as told:
        assert told.read() == b""
    assert shown.wait() == 1
