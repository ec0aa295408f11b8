"""The report says what the metrics say, holds every conversation, and lets nothing in them become markup."""

import base64
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser

import polars as pl
import pytest

from schemas.action import make_action
from schemas.recorded import OriginRule, UnmappedReason
from schemas.tables import Predictions
from schemas.traces import RejectReason
from stages._paired import compare_pairs
from stages._rates import rate
from stages._report import charts, figures, viewer, words
from stages.report import CALIBRATED, CURVES, POINT, REPORT, main
from tests.deciding import command
from tests.helpers import inside
from tests.layout import ROOT
from tests.reports import COMMIT, HOSTILE, rejected_table, report_inputs, report_repository, write


class Page(HTMLParser):
    """The page's elements as (tag, attributes), and the text inside each script and style."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.raw = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append([tag, dict(attrs), ""])

    def handle_data(self, data):
        if self.cdata_elem:
            self.raw[-1][2] += data

    def inside(self, tag, **attributes):
        return next(text for name, found, text in self.raw if name == tag and attributes.items() <= found.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = report_inputs(tmp_path_factory.mktemp("report"))
    with inside(folder):
        main()
    return folder


@pytest.fixture(scope="module")
def html(folder):
    return (folder / REPORT).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


@pytest.fixture(scope="module")
def data(page):
    return json.loads(page.inside("script", id="data"))


def metrics(name):
    return json.loads((ROOT / f"metrics/{name}.json").read_text(encoding="utf-8"))


def test_two_runs_give_the_same_bytes(folder, html):
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-m", "stages.report"], cwd=folder, env=env, capture_output=True, check=True)
    assert (folder / REPORT).read_text(encoding="utf-8") == html


def test_the_page_needs_nothing_from_elsewhere(page, html):
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "img")
        assert not attributes.get("src") and not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        assert attributes.get("href", "#").startswith(("#", "data:,"))
    assert "@import" not in html and "url(" not in page.inside("style")


def test_only_the_pages_own_script_and_style_may_run(page):
    policy = next(found["content"] for tag, found in page.elements if found.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag, kind in (("script", "script-src"), ("style", "style-src")):
        digest = base64.b64encode(hashlib.sha256(next(text for name, found, text in page.raw if name == tag and "id" not in found).encode()).digest())
        assert f"{kind} 'sha256-{digest.decode()}'" in policy
    assert [found.get("type") for tag, found, _ in page.raw if tag == "script"] == ["application/json", None]


def test_the_script_makes_no_markup_of_text():
    script = (ROOT / "stages/_report/page.js").read_text(encoding="utf-8")
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc|setTimeout\(['\"]", script)
    assert '"use strict"' in script


def test_every_message_comes_back_from_the_embedded_data(folder, data):
    tables = [pl.read_parquet(folder / f"data/verify/{name}.parquet") for name in ("held_out", "rejected")]
    rows = [(one["id"], index, message) for one in data["conversations"] for index, message in enumerate(one["messages"])]
    wanted = [row for table in tables for row in table.select("conversation_id", "index", "role", "content").iter_rows()]
    assert len(rows) == len(wanted)
    for (name, index, message), (wanted_name, wanted_index, role, content) in zip(rows, wanted, strict=True):
        assert (name, index) == (wanted_name, wanted_index)
        if role == "agent":
            fields = message.get("h", ""), message.get("a"), message.get("g", {}), message.get("m", "")
            assert (message["x"] if "x" in message else make_action(*fields).to_json()) == content
        else:
            assert message == {role[0]: content}


def test_every_prediction_and_verdict_comes_back_from_the_embedded_data(folder, data):
    predictions = pl.read_parquet(folder / "data/eval_exact/predictions.parquet")
    found = {(one["id"], index, reply["w"]): reply for one in data["conversations"] for index, message in enumerate(one["messages"])
             for reply in message.get("p", [])}
    assert len(found) == len(predictions)
    verdicts = {(name, index, model): verdict for name, index, model, verdict in pl.read_parquet(
        folder / "data/eval_judge/judgements.parquet").select("conversation_id", "index", "model", "verdict").iter_rows()}
    assert set(verdicts.values()) == {"acceptable", "not_acceptable", "unscored"}
    for row in predictions.iter_rows(named=True):
        free_base = (row["model"], row["decoding"]) == ("base", "free")
        reply = found[row["conversation_id"], row["index"], "base_free" if free_base else row["model"]]
        assert (reply.get("a"), reply.get("f")) == (row["action"], row["fault"]) and reply.get("x", row["raw"]) == row["raw"]
        assert reply.get("v") == (None if free_base else verdicts[row["conversation_id"], row["index"], row["model"]])


def test_markup_in_a_conversation_is_text(html, page, data):
    assert html.count("<script") == 2 and html.count("</script") == 2 and not [tag for tag, _ in page.elements if tag == "img"]
    assert data["conversations"][0]["messages"][0] == {"c": HOSTILE}
    assert "<" not in viewer.embed({"a": "<!--<script></script>"}) and json.loads(viewer.embed("<\u2028")) == "<\u2028"


def test_markup_in_a_metrics_file_is_text(tmp_path):
    folder = report_inputs(tmp_path)
    for name in ("teacher_gen", "eval_judge_counts"):
        content = metrics(name) | {"teacher_gen": {"teacher": HOSTILE, "customer": HOSTILE}, "eval_judge_counts": {"judge": HOSTILE}}[name]
        (folder / f"metrics/{name}.json").write_text(json.dumps(content), encoding="utf-8")
    with inside(folder):
        main()
    html = (folder / REPORT).read_text(encoding="utf-8")
    assert html.count("<script") == 2 and "<img" not in html and html.count("&lt;img src=x") == 3
    assert "simulators" not in html


def test_every_rate_stands_with_its_count_and_interval(html):
    exact, judged = metrics("eval_exact_counts"), metrics("eval_judge_counts")
    for company, models in exact.items():
        for model, rates in models.items():
            for name, of in ({"acceptable": judged[company][model]["acceptable"]} | rates).items():
                if name in words.RATES:
                    low, high = (100 * rate(of["k"], of["n"])[end] for end in ("low", "high"))
                    shown = f"<b>{100 * of['k'] / of['n']:.1f} %</b> <span class=\"of\">{of['k']} of {of['n']}<br>{low:.1f}–{high:.1f} %"
                    assert shown in html, (company, model, name)


def test_the_first_screen_says_what_calibrate_and_the_gate_say(folder, html):
    at = json.loads((folder / CALIBRATED).read_bytes())["held_out"]["pooled"]["student"]["at_threshold"]
    judged = json.loads(command(folder, "gate", "--format", "json").stdout)
    curve = figures.read_columns(folder / CURVES / "curve_bag_of_words.csv", "over_escalation", "recall")
    against = json.loads((folder / CALIBRATED).read_bytes())["against_yardsticks"]["bag_of_words"]
    told = figures.verdict(at["escalate_recall"], at["over_escalation"], curve, against, judged["passed"], 0)
    more, over = against["escalate_recall"], against["over_escalation"]
    assert f"finds {more['k_a']} of these hand-offs at {over['k_a']} needless ones, the student {more['k_b']} at {over['k_b']}:" in html
    difference, low, high = (f"{100 * more[name]:+.1f}" for name in ("difference", "low", "high"))
    assert f"{difference} points of recall (95 %, whole conversations drawn: {low} to {high})" in html
    assert f'<h1 id="answer">{told["answer"]}: {told["title"]}.</h1>' in html
    assert f'A bag of words finds</span><b>{100 * told["fair"]:.1f} %</b>' in html
    assert "Teacher, customer and judge were simulators" in html
    assert all(f'<th scope="row">{rule["rule"]}</th><td data-label="verdict"><b>{rule["verdict"]}</b>' in html for rule in judged["rules"])


def against(bag, student, bags_needless=20, needless=20):
    """How a student compares with a bag of words: hand-offs found of 124, and needless ones of 709, the same as far as they go."""
    def pair(a, b, n):
        return asdict(compare_pairs([str(turn) for turn in range(n)], [turn < a for turn in range(n)], [turn < b for turn in range(n)]))

    return {"escalate_recall": pair(bag, student, 124), "over_escalation": pair(bags_needless, needless, 709)}


@pytest.mark.parametrize("words, student, standing", [
    ((30, 20), (12, 20), "worse"), ((30, 20), (50, 20), "better"), ((30, 20), (30, 20), None), ((30, 20), (26, 20), None),
    ((60, 200), (38, 21), None), ((38, 21), (60, 200), None), ((38, 21), (60, 5), "better")])
def test_more_hand_offs_at_many_more_needless_ones_are_neither_better_nor_worse(words, student, standing):
    """And a handful of conversations decides nothing: 26 for 30."""
    told = figures.verdict(rate(student[0], 124), rate(student[1], 709), [], against(words[0], student[0], words[1], student[1]), None, 0)
    assert (told["worse"], told["better"]) == (standing == "worse", standing == "better")


@pytest.mark.parametrize("found, needless, passed, answer", [
    ((0, 124), (0, 709), None, "No: the student never hands off where it should"),
    ((8, 124), (26, 709), None, "No: the student hands off worse than a bag of words"),
    ((8, 124), (26, 709), False, "No: the student hands off worse than a bag of words"),
    ((8, 124), (26, 709), True, "Yes: the gate lets this student through, though it hands off worse than a bag of words"),
    ((30, 124), (36, 709), None, "Not decided: the gate could not judge this student"),
    ((30, 124), (36, 709), False, "No: the gate does not let this student through"),
    ((120, 124), (5, 709), None, "Not decided: the gate could not judge this student"),
    ((120, 124), (5, 709), True, "Yes: the gate lets this student through"),
    ((1, 124), (0, 709), None, "Not decided: the gate could not judge this student"),
])
def test_the_answer_follows_from_the_counts(found, needless, passed, answer):
    told = figures.verdict(rate(*found), rate(*needless), [(0.0, 0.0), (0.05, 0.2661)], against(30, found[0], 26, needless[0]), passed, 0)
    assert f"{told['answer']}: {told['title']}" == answer


def test_a_slice_decides_nothing_and_no_yardstick_is_no_comparison():
    assert figures.verdict(rate(0, 4), rate(0, 30), [], None, True, 4)["answer"] == "Not decided"
    nothing = dict.fromkeys(("escalate_recall", "over_escalation"), asdict(compare_pairs([], [], [])))
    for unknown in (None, nothing):
        told = figures.verdict(rate(8, 124), rate(26, 709), [], unknown, None, 0)
        assert told["fair"] is None and told["against"] is None and not told["worse"]


@pytest.mark.parametrize("at, recall", [(0.0, 0.1), (0.05, 0.3), (0.1, 0.5), (0.5, 0.5)])
def test_a_curve_is_read_between_its_thresholds(at, recall):
    assert figures.recall_at([(0.0, 0.0), (0.0, 0.1), (0.1, 0.5)], at) == pytest.approx(recall)


def test_confusion_counts_every_turn_once(folder, html):
    predictions = pl.read_parquet(folder / "data/eval_exact/predictions.parquet").filter(model="student")
    counted = predictions.group_by("gold_action", pl.col("action").fill_null("invalid")).len()
    assert counted["len"].sum() == len(predictions)
    for gold, action, k in counted.iter_rows():
        assert f'gold={gold}&amp;model=student&amp;action={action}" aria-label="{k} turns' in html


def table_after(html, place):
    """The cells' markup of the first table after a place, row by row; the head comes first."""
    table = html.partition(place)[2].partition("</table>")[0]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)]


def test_every_reason_is_counted_as_the_models_decode_and_at_the_threshold(folder, html):
    threshold = json.loads((folder / POINT).read_bytes())["threshold"]
    turns = pl.read_parquet(folder / "data/eval_exact/predictions.parquet").filter(model="student", gold_action="escalate")
    head, *rows = table_after(html, '<h2 id="reasons">')
    assert [re.sub("<.*>", "", cell) for cell in head] == [
        "reason", "base model, as it decodes", "student, as it decodes", "student at the threshold", "with this reason, student as it decodes"]
    found = {row[0]: [re.search(r"(\d+) of (\d+)", cell).groups() for cell in row[2:4]] for row in rows}
    wanted = {reason: [(str(sum(handed)), str(len(handed))) for handed in (
        [action == "escalate" for action in part["action"]], [score >= threshold for score in part["p_escalate"]])]
        for (reason,), part in turns.group_by("gold_reason")}
    assert found == wanted and any(decoded != chosen for decoded, chosen in found.values())


def test_each_score_stands_at_5_percent_in_each_companys_chart_and_covers_no_other(folder, html):
    detail = json.loads((folder / CALIBRATED).read_bytes())["held_out"]
    for company, of in detail.items():
        if company == "pooled":
            continue
        chart = re.search(rf'<figcaption>{company}</figcaption>(<svg class="chart".*?</svg>)', html)[1]
        marks = {name: (float(x), float(y)) for name, x, y in re.findall(
            r'<g class="series (\w+) hollow"><title>[^<]*</title><[^>]*?(?:translate\(|cx=")([\d.]+)(?: |" cy=")([\d.]+)', chart)}
        assert set(marks) == set(words.SCORERS)
        for name, (_, y) in marks.items():
            recall = of[name]["auc"]["recall_at_5_percent"]
            assert f"at 5% needless hand-offs the score of {words.SCORERS[name]} finds {recall:.1%}" in chart
            assert y == pytest.approx(charts.HEIGHT - charts.BOTTOM - recall * (charts.HEIGHT - charts.BOTTOM - charts.TOP), abs=0.1)
        places = sorted(x for x, _ in marks.values())
        assert min(right - left for left, right in itertools.pairwise(places)) >= 11
        line = float(re.search(r'<line class="ideal" x1="([\d.]+)"', chart)[1])
        assert sum(places) / len(places) == pytest.approx(line, abs=0.1)


def test_a_stacked_tables_figures_carry_their_columns_headings(html):
    tables = re.findall(r'<table class="[^"]*stack">(.*?)</table>', html, re.DOTALL)
    assert len(tables) == 4
    for table in tables:
        heads = [re.sub("<svg.*</svg>", "", head) for head in re.findall(r'<th scope="col">(.*?)</th>', table)]
        rows = re.findall(r'<tr><th scope="row">.*?</tr>', table, re.DOTALL)
        assert rows
        for row in rows:
            assert re.findall(r'<td data-label="([^"]*)">', row) == heads[1:] and row.count("<td") == len(heads) - 1


def test_rejections_are_those_of_the_metrics_and_every_reason_has_words(html):
    verified = metrics("verify")
    for reason, count in verified["reasons"].items():
        assert (f'reject={reason}" aria-label="{count} conversations' in html) == (count > 0)
    assert set(words.REJECTIONS) == set(RejectReason) and set(words.NOT_APPLICABLE) == set(OriginRule)


@pytest.mark.parametrize("name, changed, shown", [
    ("teacher_gen", {"teacher": "big-model", "cost_usd": 84.7, "conversations": 847}, "<b>$84.70</b> when it was paid, $0.1000 a conversation"),
    ("teacher_gen", {"teacher": "big-model", "cost_usd": None}, "What that cost is not known: no price of the model is"),
    ("teacher_gen", {"teacher": "simulator", "cost_usd": 0.0}, "nothing was paid"),
    ("eval_judge_counts", {"judge": "big-model", "cost": {"cost_usd": 3.5}}, "The judge: <b>$3.50</b> when it was paid."),
    ("eval_judge_counts", {"judge": "big-model", "cost": {"cost_usd": None}}, "The judge: not known, no price of the model is.")])
def test_the_bills_are_shown(tmp_path, name, changed, shown):
    folder = report_inputs(tmp_path)
    (folder / f"metrics/{name}.json").write_text(json.dumps(metrics(name) | changed), encoding="utf-8")
    with inside(folder):
        main()
    assert shown in (folder / REPORT).read_text(encoding="utf-8")


def test_recorded_logs_are_called_that_and_no_teacher_is_made_up(tmp_path):
    folder = report_inputs(tmp_path)
    reasons = dict.fromkeys(map(str, UnmappedReason), 0) | {"no_agent_step": 3, "handoff_without_reason": 5}
    logs = {"in": 22, "mapped": 14, "unmapped": 8, "reasons": reasons, "left_out": 0}
    for name, changed in (("teacher_gen", {"teacher": "recorded", "customer": "recorded", "scenarios": 0, "conversations": 14, "recorded": logs}),
                          ("verify", {"not_applicable": {"ticket_category": 0, "facts": 4, "outcome": 14}})):
        (folder / f"metrics/{name}.json").write_text(json.dumps(metrics(name) | changed), encoding="utf-8")
    with inside(folder):
        main()
    html = " ".join((folder / REPORT).read_text(encoding="utf-8").split())
    assert "of 22 conversations read, 14 could be mapped and 8 not (handoff_without_reason 5, no_agent_step 3)." in html
    assert "4 could not be checked for the facts they state" in html and "14 could not be checked for their outcome" in html
    assert "ticket categories" not in html and "conversations from recorded logs, " in html and "what your agents did in the logs" in html
    for untrue in ("fictional", "held by the teacher", "when it was paid", "0 scenarios", "simulated teacher"):
        assert untrue not in html.partition('<script type="application/json"')[0], untrue


def test_what_the_gate_refuses_is_a_sentence_on_the_page(tmp_path):
    folder = report_inputs(tmp_path)
    detail = json.loads((folder / CALIBRATED).read_bytes())
    detail["held_out"]["pooled"]["student"]["at_threshold"]["escalate_recall"]["k"] -= 1
    (folder / CALIBRATED).write_text(json.dumps(detail | {"warnings": ["<weak>"]}), encoding="utf-8")
    with inside(folder):
        main()
    html = (folder / REPORT).read_text(encoding="utf-8")
    assert re.search(r"The gate could not judge: metrics/calibrate_detail\.json says escalate_recall \d+/\d+ in pooled", html)
    assert "Not decided: the gate could not judge this student" in html and "<li>&lt;weak&gt;</li>" in html


def test_what_the_threshold_does_is_shown_for_every_company_and_the_worst(folder, html):
    detail = json.loads((folder / CALIBRATED).read_bytes())
    shown = html.partition('aria-label="What the threshold does"')[2].partition("</table>")[0]
    rows = {title: cells for title, cells in re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', shown, re.DOTALL)}
    named = {"all held-out companies" if name == "pooled" else name: of["student"] for name, of in detail["held_out"].items()}
    assert list(rows) == [*named, "worst company"]
    for title, of in named.items():
        costs = [of[policy]["expected_cost"]["value"] for policy in ("plain", "at_threshold")]
        assert re.findall(r">(\d+\.\d\d)</td>", rows[title]) == [f"{cost:.2f}" for cost in costs]
    worst, row = detail["worst_company"]["student"], rows["worst company"]
    cost = worst["expected_cost"]
    assert f'>{cost["plain"]["value"]:.2f}</td>' in row and f'>{cost["value"]:.2f} <span class="of">{cost["company"]}</span></td>' in row
    for name in ("escalate_recall", "over_escalation"):
        assert f"{worst[name]['k']} of {worst[name]['n']}" in row and row.count(worst[name]["company"])


def test_what_calibrate_found_is_shown(folder, html, data):
    detail, point = (json.loads((folder / path).read_bytes()) for path in (CALIBRATED, POINT))
    assert data["threshold"] == point["threshold"] and f"P(escalate) is {point['threshold']:.3f} or more" in html
    assert f"{point['rule']['in_words']} On the calibration turns" in html and f"{point['calibration']['missed']} are missed" in html
    for of in detail["held_out"]["pooled"].values():
        assert f">{100 * of['auc']['recall_at_5_percent']:.1f} %</td>" in html
        assert f">{of['brier']['raw']:.3f} ({of['brier']['constant']:.3f})</td>" in html
    for bins in detail["held_out"]["pooled"]["student"]["reliability"].values():
        assert all(f"{one['k']} of {one['n']} were ({one['observed']:.1%})" in html for one in bins)
    assert html.count('class="line" points=') == len(words.SCORERS) + 1, "a curve a score, and the training loss"


def test_scores_are_embedded_where_the_predictions_have_them(folder):
    predictions = pl.read_parquet(folder / "data/eval_exact/predictions.parquet")
    judged = pl.read_parquet(folder / "data/eval_judge/judgements.parquet")
    bare = predictions.drop("p_escalate", "other_action", strict=False)
    assert not any("e" in reply or "o" in reply for replies in viewer.predicted(bare, judged, None).values() for reply in replies)
    scored = bare.with_columns(p_escalate=pl.lit(0.123456), other_action=pl.lit("reply"))
    assert all((reply["e"], reply["o"]) == (0.123456, "reply") for replies in viewer.predicted(scored, judged, None).values() for reply in replies)


@pytest.fixture(scope="module")
def made_repository(tmp_path_factory):
    return report_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def repository(made_repository, tmp_path):
    return shutil.copytree(made_repository, tmp_path / "repository")


def test_a_revision_stands_beside_the_student_of_today(repository):
    predictions = pl.read_parquet(repository / "data/eval_exact/predictions.parquet")
    now = predictions.with_columns(raw=pl.when(pl.col("model") == "student").then(pl.lit("nothing")).otherwise("raw"))
    write(repository, "data/eval_exact/predictions.parquet", now, Predictions)
    with inside(repository):
        main()
    html = (repository / REPORT).read_text(encoding="utf-8")
    before = predictions.filter(model="student")
    for conversation in json.loads(Page(html).inside("script", id="data"))["conversations"][:20]:
        for index, message in enumerate(conversation["messages"]):
            if replies := {reply["w"]: reply for reply in message.get("p", [])}:
                (action,) = before.filter(conversation_id=conversation["id"], index=index)["action"]
                assert replies["student"]["x"] == "nothing" and replies["compared"].get("a") == action
    assert "is the student of revision <code>v1</code>" in html and html.count("student before</th>") == 3


def test_verdicts_of_another_judge_do_not_stand_beside_those_of_today(repository):
    judged = repository / "metrics/eval_judge_counts.json"
    judged.write_text(json.dumps(json.loads(judged.read_text()) | {"judge": "big-model"}))
    with inside(repository):
        main()
    html = (repository / REPORT).read_text(encoding="utf-8")
    rows = re.findall(r'<tr><th scope="row">acceptable to the judge.*?</tr>', html, re.DOTALL)
    assert len(rows) == 3 and all(row.count("by another judge") == 1 and "by another judge" in row.rpartition("<td")[2] for row in rows)
    assert html.count("by another judge") == 3, "nothing else is left out"


@pytest.mark.parametrize("spoil", ["revision", "no metrics there"])
def test_a_revision_that_cannot_be_read_is_one_sentence(repository, spoil):
    params = repository / "params.yaml"
    if spoil == "revision":
        params.write_text(params.read_text().replace("compare_with: v1", "compare_with: nowhere"))
    else:
        for line in ("git rm -q --cached metrics/eval_exact_counts.json", f"{COMMIT} v2", "git tag -f v1"):
            subprocess.run(line.split(), cwd=repository, capture_output=True, check=True)
    done = command(repository, "report")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: report.compare_with: revision '") and "\nhint: " in done.stderr and not (repository / REPORT).exists()


@pytest.mark.parametrize("changed, told", [
    (lambda rows: rows.filter(pl.col("company") == "travel"), "they were measured on different evaluation sets"),
    (lambda rows: rows.with_columns(action=pl.lit("reply")), "the grader changed between them")])
def test_a_revision_measured_in_another_way_does_not_stand_beside_it(repository, changed, told):
    predictions = pl.read_parquet(repository / "data/eval_exact/predictions.parquet")
    write(repository, "data/eval_exact/predictions.parquet", changed(predictions), Predictions)
    done = command(repository, "report")
    assert done.returncode == 1 and told in done.stderr and "\nhint: " in done.stderr and not (repository / REPORT).exists()


@pytest.mark.parametrize("name, content", [
    ("metrics/verify.json", None), ("metrics/verify.json", "{"), ("metrics/verify.json", "{}"), ("metrics/eval_exact_counts.json", "{}"),
    ("metrics/eval_exact_counts.json", '{"travel": {"student": {}}}'), ("metrics/eval_judge_counts.json", '{"travel": {}}'),
    ("metrics/teacher_gen.json", "[]"), ("metrics/calibrate_detail.json", '{"held_out": {}, "warnings": []}'),
    ("models/operating_point.json", "{}"), ("metrics/calibrate/curve_embedding.csv", None), ("metrics/calibrate/curve_embedding.csv", "a,b\n1,2\n"),
    ("metrics/calibrate/curve_embedding.csv", "over_escalation,recall\n0,much\n")])
def test_a_file_of_figures_that_is_none_is_named(tmp_path, name, content):
    folder = report_inputs(tmp_path)
    path = folder / name
    path.unlink() if content is None else path.write_text(content)
    done = command(folder, "report")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"error: {name} cannot be read: ") and "\nhint: " in done.stderr and not (folder / REPORT).exists()


def test_a_rejected_conversation_shows_the_step_that_is_none():
    broken = rejected_table().head(2).with_columns(content=pl.when(pl.col("role") == "agent").then(pl.lit("<b>no")).otherwise("content"))
    (shown,) = viewer.conversations(broken.clear(), broken, {})
    assert shown["set"] == "rejected" and shown["detail"] == HOSTILE and {"x": "<b>no", "f": "not_one_json_object"} in shown["messages"]


def test_every_chart_is_told_in_words_and_every_place_on_the_page_exists(page):
    pictures = [found for tag, found in page.elements if tag == "svg"]
    assert pictures and all(found.get("aria-hidden") == "true" or len(found["aria-label"]) > 20 for found in pictures)
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(ids) == len(set(ids))
    for _, found in page.elements:
        for name in ("aria-labelledby", "for"):
            assert found.get(name, ids[0]) in ids
        href = found.get("href", "#/")
        assert href.startswith(("#/conversations", "#/", "data:")) or href.removeprefix("#") in ids


def luminance(colour):
    channels = [int(colour[at:at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    """WCAG 2.2's contrast ratio of two colours."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_colours_have_contrast_enough(mode):
    style = (ROOT / "stages/_report/page.css").read_text(encoding="utf-8")
    block = style.split(":root {")[1 if mode == "light" else 2].split("}")[0]
    colours = dict(re.findall(r"--([\w]+|[\w]+-[\w]+): (#[0-9a-f]{6})", block))
    for text in ("text", "quiet", "link"):
        assert min(contrast(colours[text], colours[ground]) for ground in ("ground", "card", "customer")) >= 4.5, text
    for text, ground in (("good", "good-ground"), ("bad", "bad-ground"), ("text", "mark"), ("text", "good-ground")):
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for graphic in (*words.SCORERS, "compared", "focus"):
        assert min(contrast(colours[graphic], colours[ground]) for ground in ("ground", "card")) >= 3, graphic


@pytest.mark.parametrize("low, high", [(0, 207), (0, 5), (1.79, 3.08), (0.001, 0.004), (0, 12345), (2, 2)])
def test_ticks_are_few_and_enclose_the_values(low, high):
    ticks = charts.nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 7


def test_what_a_chart_shows_is_told_as_sentences(html):
    told = re.findall(r"<summary>In words</summary><p>(.*?)</p>", html)
    assert told
    for one in told:
        assert re.fullmatch(r"base model finds [^\[\]&]*; at the threshold the student finds \d+ of \d+ hand-offs at \d+ needless ones in \d+\.", one)


def test_a_line_ends_where_its_axis_ends():
    x, y = charts.shares(0.2, "x"), charts.shares(1, "y")
    drawn = charts.chart("a", "b", x, y, [charts.Series("student", "s", line=[(0, 0), (0.1, 0.5), (0.5, 0.9)])])
    points = [tuple(map(float, pair.split(","))) for pair in re.search(r'points="([^"]*)"', drawn)[1].split()]
    assert points[-1][0] == charts.WIDTH - charts.RIGHT and len(points) == 3
    height = charts.HEIGHT - charts.BOTTOM - charts.TOP
    assert points[-1][1] == pytest.approx(charts.TOP + (1 - 0.6) * height, abs=0.1)


@pytest.mark.parametrize("k", [0, 3, 8, 10])
def test_no_interval_of_the_reliability_is_cut(k):
    drawn = figures.reliability("score", [{"predicted": 0.1, "observed": k / 10, **rate(k, 10)}])["svg"]
    low, high = map(float, re.search(r'<line class="interval" x1="[\d.]+" y1="([\d.]+)" x2="[\d.]+" y2="([\d.]+)"', drawn).groups())
    ticks = [float(tick) for tick in re.findall(r'<text class="tick end" x="[\d.]+" y="([\d.]+)"', drawn)]
    top = float(re.findall(r'<text class="tick end".*?>(\d+) %', drawn)[-1])
    unit = (ticks[0] - ticks[-1]) / top
    assert (low - high) / unit == pytest.approx(100 * (rate(k, 10)["high"] - rate(k, 10)["low"]), abs=0.2)


def test_the_labels_of_a_chart_are_escaped():
    drawn = charts.chart("<i>", '"', charts.shares(0.1, "<x>"), charts.shares(1, "<b>"), [charts.Series("student", "<s>")])
    assert not re.findall(r"<[ibxs]>", drawn) and 'aria-label="&lt;i&gt;. &#34;"' in drawn


def test_the_report_before_its_input_names_the_file_and_its_stage(tmp_path):
    folder = report_inputs(tmp_path)
    (folder / "data/verify/held_out.parquet").unlink()
    done = command(folder, "report")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[:2] == ["error: data/verify/held_out.parquet does not exist",
                                            "hint: run the stage that writes it: dvc repro verify"]
