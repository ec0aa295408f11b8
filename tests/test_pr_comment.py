"""What a pull request shows, made from real revisions, and the workflow that posts it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stages.pr_comment import EXACT, LIMIT, MARKER, Block, code, defused, drawn, fenced, fitted, size
from tests.helpers import closed_port, serving
from tests.layout import ROOT
from tests.test_study import STUDY

WORKFLOW = ROOT / ".github/workflows/pull-request.yml"
JOBS = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]
PLOT = "metrics/qlora_train/plots/metrics/loss.tsv"
OLD, NEW = STUDY["v2"], STUDY["v2.1"]
HOSTILE = ["a | b", "a \\| b", "a \\\\| b", "`x` | ``y``", "</details><!-- <img src=//x.example>", "@everyone", "![x](//x.example/p.png)", "http://x.example",
           "www.x.example", "[a]: //x.example", "**b** _i_ ~~s~~", "```", "&lt;b&gt;", "one\n\n# two", "", " ", "\u202eback", "x" * 1000]


def git(folder, *arguments):
    who = ["-c", "user.name=Nobody", "-c", "user.email=nobody@example.com"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


HERE = {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
"""Python takes this repository's code, whatever the working directory holds."""


def comment(*revisions, folder=ROOT):
    """The command's text, written in `folder` by this code."""
    done = subprocess.run([sys.executable, "-m", "stages.pr_comment", *revisions], cwd=folder, env=os.environ | HERE,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def charts_of(text):
    """What stands above every chart -> the numbers of its x axis, its y axis and its lines, which must be ones that Mermaid reads."""
    charts = {}
    for title, body in re.findall(r"^(.*)\n\n```mermaid\n((?:.*\n)*?)```", text, re.MULTILINE):
        found = [re.findall(r"\S+", numbers.replace("-->", " ").replace(",", " "))
                 for numbers in re.findall(r"-axis \"[^\"]*\" (.*)|    line \[(.*)\]", body) for numbers in numbers if numbers]
        assert title not in charts and all(re.fullmatch(r"-?\d+(\.\d+)?", number) for numbers in found for number in numbers)
        charts[title] = [[float(number) for number in numbers] for numbers in found]
    return charts


def html(markdown):
    """As a parser of GitHub's tables and raw HTML renders it, bare addresses left alone."""
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone of this repository, to commit to."""
    folder = tmp_path_factory.mktemp("clone") / "handoff"
    git(ROOT, "clone", "--quiet", "--shared", str(ROOT), str(folder))
    return folder


def committed(folder, **files):
    """Commit the texts, by path, and give the comment on that commit."""
    for path, text in files.items():
        (folder / path).write_text(text, encoding="utf-8")
    git(folder, "commit", "--quiet", "--all", "--message", "change")
    return comment("HEAD^", folder=folder)


def test_two_real_revisions_show_every_rate_that_differs():
    text = comment(OLD, NEW)
    assert text.startswith(f"{MARKER}\n## Results: `{OLD}` ({OLD}) → `{NEW}` ({NEW})\n")
    before, after = (of_revision(rev, EXACT) for rev in (OLD, NEW))
    assert before != after
    for company, models in after.items():
        for model, rates in models.items():
            for name, value in rates.items():
                was = before.get(company, {}).get(model, {}).get(name)
                shown = f"| `eval_exact: {company}.{model}.{name}` | {'–' if was is None else was} | {value} |"
                assert (shown in text) == (was != value)
    assert text.count("<details>") == text.count("</details>") and size(text) <= LIMIT


def test_no_change_is_said_in_sentences(clone):
    text = committed(clone, **{"README.md": "Nothing to measure here.\n"})
    assert "No rate changed." in text and "No parameter changed." in text and "`training loss` is the same in both." in text
    assert "Other metrics" not in text


def test_an_unknown_revision_is_one_sentence():
    done = subprocess.run([sys.executable, "-m", "stages.pr_comment", "nowhere"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: there is no commit 'nowhere'") and "hint: " in done.stderr and "Traceback" not in done.stderr


def test_changed_parameters_metrics_and_plot_are_shown(clone):
    params = (clone / "params.yaml").read_text(encoding="utf-8")
    factor = yaml.safe_load(params)["oversample"]["escalation_factor"]
    header, *points = (clone / PLOT).read_text(encoding="utf-8").splitlines()
    rates = json.loads((clone / EXACT).read_text(encoding="utf-8"))
    rates["travel"]["student"]["escalate_recall"] = 0.5
    text = committed(clone, **{
        "params.yaml": params.replace(f"escalation_factor: {factor}", f"escalation_factor: {factor + 4}"), EXACT.as_posix(): json.dumps(rates),
        PLOT: "\n".join([header, *(re.sub(r"[\d.]+$", "1.5", point) for point in points)]) + "\n"})
    assert f"| `params: oversample.escalation_factor` | {factor} | {factor + 4} | +4 |" in text
    assert re.search(r"\| `eval_exact: travel\.student\.escalate_recall` \| 0\.\d+ \| 0\.5 \| \+0\.\d+ \|", text)
    (title, (x, y, old, new)), = charts_of(text).items()
    assert title == "`training loss`: grey `HEAD^`, blue `HEAD`" and x == [0, len(points) - 1]
    assert old == pytest.approx([float(point.split()[-1]) for point in points], rel=1e-3) and new == [1.5] * len(points)
    assert y == pytest.approx([min(old + new), max(old + new)])


def test_plots_over_other_ranges_get_a_chart_each_with_one_height(clone):
    lines = (clone / PLOT).read_text(encoding="utf-8").splitlines()
    text = committed(clone, **{PLOT: "\n".join([*lines[:10], lines[10].replace("1.5", "9.5")]) + "\n"})
    (first, second), heights = zip(*(chart[:2] for chart in charts_of(text).values()), strict=True)
    assert (first, second) == ([0, len(lines) - 2], [0, 9]) and heights == ([1.5, 9.5], [1.5, 9.5])


def test_every_source_of_a_plot_is_a_line_of_its_own(tmp_path):
    """The plots of dvc.yaml, and one of other fields of two files, as DVC prints them for two commits."""
    plots = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["plots"]
    plots.append({"mixed": {"x": "a", "y": {"one.csv": ["b", "c"], "two.csv": ["d"]}}})
    git(tmp_path, "init", "--quiet")
    subprocess.run(["dvc", "init", "--quiet"], cwd=tmp_path, check=True)
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"plots": plots}), encoding="utf-8")
    wanted = {}
    for commit in range(2):
        columns: dict[str, dict[str, list[float]]] = {}
        for name, plot in ((name, plot) for each in plots for name, plot in each.items()):
            sources = plot["y"] if isinstance(plot["y"], dict) else {name: plot["y"]}
            for path, fields in ((path, fields if isinstance(fields, list) else [fields]) for path, fields in sources.items()):
                for field in fields:
                    number = sum(map(len, columns.values()))
                    xs, ys = [1, 2, 4, 8] if plot["x"] == "factor" else [0, 1, 2, 3], [number + commit / 2, 0.00004, 12340000, number]
                    columns.setdefault(path, {plot["x"]: xs})[field] = ys
                    part = [Path(path).name] * (len(sources) > 1) + [field] * (len({str(one) for one in sources.values()}) > 1 or len(fields) > 1)
                    title = code(": ".join([plot.get("title", name), *filter(None, ["::".join(part)])]))
                    wanted.setdefault(f"{title}: grey `before`, blue `after`", []).append((xs, ys))
        for path, of in columns.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            rows = [",".join(of), *(",".join(f"{value:f}" for value in row) for row in zip(*of.values(), strict=True))]
            text = "\n".join(rows) + "\n"
            (tmp_path / path).write_text(text.replace(",", "\t") if path.endswith("tsv") else text, encoding="utf-8")
        git(tmp_path, "add", "--all")
        git(tmp_path, "commit", "--quiet", "--message", "change")
    done = subprocess.run(["dvc", "plots", "diff", "--json", "HEAD^", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True)
    charts = charts_of("".join(map(str, drawn(json.loads(done.stdout), {"HEAD^": "before", "HEAD": "after"}))))
    assert charts.keys() == wanted.keys() and len(wanted) == 12
    for title, (ends, _, *lines) in charts.items():
        for line, (xs, ys) in zip(lines, wanted[title], strict=True):
            assert ends == [xs[0], xs[-1]] and (line == ys or len(line) > len(ys)), title
            where = np.linspace(*ends, len(line))  # as Mermaid spreads them
            assert np.interp(where, xs, ys) == pytest.approx(line, rel=1e-3), title
    assert "0.00004" in done.stdout


def test_marks_at_one_x_become_the_line_of_their_means():
    """As students of several seeds do, of which one factor has more than another."""
    values = [{"rev": "a", "x": x, "y": y} for x, y in ((1, 0.2), (1, 0.4), (2, 0.5), (1, 0.6), (3, 0.1))]
    content = {"mark": {"type": "point"}, "encoding": {axis: {"field": axis} for axis in "xy"}, "data": {"values": values}}
    text = "".join(map(str, drawn({"data": {"sweep": [{"type": "vega", "revisions": ["a"], "content": content}]}}, {})))
    assert charts_of(text) == {"`sweep`: `a`": [[1, 3], [0.1, 0.5], [0.4, 0.5, 0.1]]} and 'y-axis "y, mean"' in text


@pytest.mark.parametrize("value, shown", [(0.00004, "0.00004"), (12345.6, "12350"), (-0.5, "-0.5"), (0, "0"), (1e7, "10000000")])
def test_numbers_have_no_exponent_in_a_chart(value, shown):
    plot = {"revisions": ["a"], "content": {"encoding": {axis: {"field": axis} for axis in "xy"},
                                            "data": {"values": [{"rev": "a", "x": value + step, "y": value} for step in (0, 1)]}}}
    text = "".join(map(str, drawn({"data": {"plot": [{"type": "vega", **plot}]}}, {})))
    assert f'y-axis "y" {shown} --> {shown}\n    line [{shown}, {shown}]' in text and charts_of(text)


def test_a_plot_of_words_is_named(clone):
    text = committed(clone, **{PLOT: "step\tloss\n0\tmuch\n1\tless\n"})
    assert f"`{PLOT}` is no line over numbers" in text and "mermaid" not in text


def test_text_from_parameters_and_metrics_stays_in_its_cell(clone):
    params = yaml.safe_load((clone / "params.yaml").read_text(encoding="utf-8"))
    params["student"] |= {f"other{number}": text for number, text in enumerate(HOSTILE)}
    rates = json.loads((clone / EXACT).read_text(encoding="utf-8"))
    rates |= dict.fromkeys(HOSTILE, rates["travel"])
    text = committed(clone, **{"params.yaml": yaml.safe_dump(params), EXACT.as_posix(): json.dumps(rates)})
    cells: Counter[int] = Counter()
    for table in re.findall(r"<table>.*?</table>", html(text), re.DOTALL):
        found = Counter(row.count("<td") for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL))
        assert set(found) <= {0, table.count("<th>") + table.count("<th ")}, "a row has as many cells as its table has columns"
        cells += found
    assert cells[4] > 2 * len(HOSTILE)
    assert not re.search("<(img|a|h1|em|strong|s)[ >]", html(text)) and html(text).count("<details>") == html(text).count("</details>") == 1


@pytest.mark.parametrize("value", HOSTILE)
def test_a_cell_shows_its_text_and_nothing_else(value):
    cell, = re.findall("<td><code>(.*?)</code></td>", html(f"| a |\n|---|\n| {code(value)} |\n"))
    wanted = " ".join(value.split()).replace("\u202e", "\ufffd")
    assert unescape(cell) == (wanted if len(wanted) <= 120 else wanted[:119] + "…")


def test_a_table_from_elsewhere_keeps_its_form_and_loses_the_rest():
    honest = "## Title\n\n| a | b |\n| --- | --: |\n| **x** `y` | [0.1, 0.3] |\n"
    assert html(defused(honest)) == html(honest)
    found = defused("</details> <!-- [a](//b) ![c](//d) http://e.example www.f.example @everyone o/r#1\n```\nx")
    assert not re.search(r"<(a|img|!--|/details|pre)\b", html(found)) and not re.search(r"@\w|#\d|://|www\.", found)


def test_the_gate_is_asked_only_of_what_is_checked_out(clone):
    text = comment("HEAD^", "HEAD^", folder=clone)
    assert "### Gate: not asked" in text and "`HEAD^`." in text


def test_the_gate_is_not_asked_of_what_is_not_committed(clone):
    """It would judge other figures than those that the comment compares."""
    counts = "metrics/eval_judge_counts.json"
    (clone / "README.md").write_text("Nothing that it reads.\n", encoding="utf-8")
    assert "### Gate: not asked" not in comment("HEAD^", folder=clone)
    rates = json.loads((clone / counts).read_text(encoding="utf-8"))
    (clone / counts).write_text(json.dumps(rates | {"judge": "another"}), encoding="utf-8")
    text = comment("HEAD^", folder=clone)
    git(clone, "checkout", "--quiet", ".")
    assert f"### Gate: not asked\n\nIt judges what is checked out, and there `{counts}` is not as committed." in text


def test_what_gate_and_comparison_refuse_stands_in_their_place(clone):
    """In a commit without the predictions both have nothing to judge."""
    (clone / "data/eval_exact/predictions.parquet").unlink()
    text = committed(clone)
    git(clone, "reset", "--quiet", "--hard", "HEAD^")
    assert "### Gate: not passed" in text
    refused = dict(re.findall(r"`python -m stages\.(\w+)` has no result:\n\n```text\nerror: (.*)\nhint: .*\n```", text))
    assert list(refused) == ["gate", "compare"] and "predictions.parquet of revision 'HEAD'" in refused["compare"]


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A clone that stands where CI does: on a merge of the study's v2.1 into its v2."""
    if subprocess.run(["git", "cat-file", "-e", f"{OLD}^{{commit}}"], cwd=ROOT, capture_output=True, check=False).returncode:
        assert "GITHUB_ACTIONS" not in os.environ
        pytest.skip("needs this repository's history")
    folder = tmp_path_factory.mktemp("merged") / "handoff"
    git(ROOT, "clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(folder))
    merge = git(folder, "commit-tree", f"{NEW}^{{tree}}", "-p", OLD, "-p", NEW, "-m", "merge")
    git(folder, "checkout", "--quiet", merge)
    return folder


def of_revision(rev, path):
    return json.loads(git(ROOT, "show", f"{rev}:{path}"))


def step(name, folder, **env):
    """Run a step of the workflow as a runner does, with this code and this Python in front."""
    found, = (one for job in JOBS.values() for one in job["steps"] if one.get("name") == name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(["bash", "-e", "-c", found["run"]], cwd=folder, env={**os.environ, **HERE, "PATH": path, **env},
                          capture_output=True, text=True, check=False)


def test_ci_shows_gate_comparison_parameters_and_charts_under_names_that_a_clone_has(merged):
    """Of the study's two revisions: every figure stands where the stages that measured it put it, too."""
    done = step("Write the comment", merged, BASE=JOBS["report"]["env"]["BASE"], GITHUB_BASE_REF="main", HEAD_SHA=git(merged, "rev-parse", NEW),
                GITHUB_STEP_SUMMARY="summary.md")
    assert done.returncode == 0, done.stderr
    text = (merged / "comment.md").read_text(encoding="utf-8")
    assert (merged / "summary.md").read_text(encoding="utf-8") == text
    assert text.startswith(f"{MARKER}\n## Results: `main` ({OLD}) → `{NEW}` merged into it\n") and "HEAD^1" not in text
    assert git(merged, "rev-parse", "--short", "HEAD") not in text and "has no result" not in text

    tables = {heading: [row.split(" | ") for row in re.findall(r"^\| (.*) \|$", part, re.MULTILINE)]
              for heading, part in re.findall(r"^### (.*?)\n(.*?)(?=^### |\Z)", text, re.DOTALL | re.MULTILINE)}
    header, _, *rules = tables["Gate: not passed"]
    assert header == ["rule", "wanted", "at the threshold", "95 % interval", "without", "verdict"] and len(rules) == 5
    shipped, decoded = ({company: of["student"][policy] for company, of in of_revision(NEW, "metrics/calibrate.json").items() if isinstance(of, dict)}
                        for policy in ("at_threshold", "plain"))
    for (rule, _, value, _, plain, verdict), name, worst in zip(rules, ("escalate_recall", "over_escalation"), (min, max), strict=False):
        company = worst(shipped, key=lambda company: shipped[company][name])
        assert rule.startswith(f"{name}, ") and value.startswith(f"{100 * shipped[company][name]:.1f} %") and value.endswith(company)
        assert plain.startswith(f"{100 * decoded[company][name]:.1f} %") and re.match("pass|fail|cannot tell: needs about", verdict)
    assert re.fullmatch(rf"[+-][\d.]+ min against {OLD}:tuned", rules[2][2]), "the base has data, and the same turns"

    header, _, *compared = tables["Paired comparison"]
    assert header[-2:] == ["McNemar p", "p by conversation"] and header[:5] == ["company", "model", "rate", "A", "B"]
    cells = {tuple(row[:3]): row[3:] for row in compared}
    for company in ("streaming", "travel"):
        for name in ("action_accuracy", "escalate_recall", "over_escalation"):
            shown = cells[company, "student", name]
            assert shown[:2] == [f"{100 * of_revision(rev, EXACT)[company]['student'][name]:.1f} %" for rev in (OLD, NEW)]
            assert 0 < float(shown[-2]) <= 1 and 0 < float(shown[-1]) <= 1
    assert {company for company, *_ in cells} == {"streaming", "travel", "pooled"}

    old, new = (yaml.safe_load(git(ROOT, "show", f"{rev}:params.yaml"))["oversample"]["escalation_factor"] for rev in (OLD, NEW))
    assert ["`params: oversample.escalation_factor`", str(old), str(new), f"{new - old:+}"] in tables["Parameters"]
    assert ["file: value", "`main`", f"`{NEW}`", "change"] == tables["Parameters"][0]
    charts = charts_of(text)
    losses = {rev: git(ROOT, "show", f"{rev}:{PLOT}").splitlines()[1:] for rev in (OLD, NEW)}
    drawn_of = {title: chart[2:] for title, chart in charts.items() if title.startswith("`training loss`")}
    assert sorted(len(line) for lines in drawn_of.values() for line in lines) == sorted(map(len, losses.values())) and f"`{NEW}`" in "".join(drawn_of)
    assert "recall against over-escalation, held-out companies: curve_student.csv` is the same in both." in text, "v2 and v2.1 share the score"


def test_a_request_is_red_for_what_it_makes_worse(merged):
    """The study's student does not pass, neither before nor after: that is no news of the request."""
    base = JOBS["report"]["env"]["BASE"]
    done = step("Gate", merged, BASE=base)
    assert done.returncode == 0 and "The gate does not pass." in done.stdout, done.stderr
    assert f"{base} does not pass either: escalate_recall, lower limit" in done.stdout


def test_plots_that_fail_are_a_warning_after_the_comment_is_kept(merged):
    done = step("Draw the plots", merged, BASE="nowhere")
    assert done.returncode == 0 and "::warning title=dvc plots diff::" in done.stdout and "nowhere" in done.stderr
    names = [one.get("name", one.get("uses", "")).split("@")[0] for one in JOBS["report"]["steps"]]
    assert names.index("Write the comment") < names.index("Draw the plots") < names.index("actions/upload-artifact")


@pytest.fixture
def stored(tmp_path):
    """A repository whose data is in a folder `remote` and nowhere else, and that names no remote."""
    folder = tmp_path / "repository"
    table = folder / "data/eval_judge/judgements.parquet"
    table.parent.mkdir(parents=True)
    table.write_text("verdicts", encoding="utf-8")
    for name in ("requirements-s3.txt", "constraints.txt"):
        (folder / name).touch()
    git(folder, "init", "--quiet")
    for command in ("init", "add data/eval_judge/judgements.parquet", "remote add --default storage ../remote", "push", "remote remove storage"):
        subprocess.run(["dvc", *command.split()], cwd=folder, capture_output=True, check=True)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "data")
    shutil.rmtree(folder / ".dvc/cache")
    table.unlink()
    return folder


@pytest.mark.parametrize("remote, told", [
    (None, ["::notice title=dvc pull::no DVC remote is configured, so nothing was restored"]), ("../remote", []),
    ("unreachable", ["::warning title=dvc pull::the remote gave no data, or not all of it; the log says why"])])
def test_data_is_restored_or_the_run_says_why_not_and_goes_on(stored, remote, told):
    if remote:
        url = closed_port() if remote == "unreachable" else remote
        subprocess.run(["dvc", "remote", "add", "--default", "storage", url], cwd=stored, check=True)
    done = step("Restore data", stored, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
    assert (done.returncode, re.findall("::.*", done.stdout)) == (0, told), done.stderr
    assert (stored / "data/eval_judge/judgements.parquet").is_file() == (remote == "../remote")


@pytest.mark.parametrize("text", ["plain", "```\nclosed?", "````` five"])
def test_a_fence_is_not_closed_by_its_text(text):
    assert html(fenced(text)).count("<pre>") == 1 and html(fenced(text)).endswith("</code></pre>\n")


def test_a_long_comment_is_cut_to_the_limit_and_says_so():
    short, rows = Block(["one", "two"]), Block([f"| é{number} |" for number in range(20_000)], "<details>\n\n| x |\n| - |", "\n</details>")
    whole = fitted(f"{MARKER}\n", [short], "foot")
    assert "Cut" not in whole and "two" in whole
    cut = fitted(f"{MARKER}\n", [short, rows, Block(["mermaid" * 10_000]), short], "foot")
    assert cut.startswith(MARKER) and "**Cut to" in cut and cut.endswith("foot") and 0.9 * LIMIT < size(cut) <= LIMIT
    assert cut.count("<details>") == cut.count("</details>") == 1 and "| é0 |" in cut and "mermaid" not in cut


def test_the_workflow_is_valid():
    done = subprocess.run(["check-jsonschema", "--builtin-schema", "vendor.github-workflows", str(WORKFLOW)],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_job_that_may_write_runs_no_code_of_the_request():
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    assert workflow[True] == "pull_request" and workflow["permissions"] == {}, "YAML reads the key `on` as true"
    assert {name: job["permissions"] for name, job in JOBS.items()} == {"report": {"contents": "read"}, "comment": {"pull-requests": "write"}}
    assert [step.get("uses", "").split("@")[0] for step in JOBS["comment"]["steps"]] == ["actions/download-artifact", ""]
    assert "github.event.pull_request.head.repo.full_name == github.repository" in JOBS["comment"]["if"]


def test_only_the_step_that_restores_data_knows_a_secret():
    assert [step["name"] for job in JOBS.values() for step in job["steps"] if "secrets." in str(step)] == ["Restore data"]
    assert WORKFLOW.read_text(encoding="utf-8").count("secrets.") == 2, "its two, and none above the steps"


def test_the_history_is_there_that_the_base_and_the_study_are_read_from():
    checkout, *_ = JOBS["report"]["steps"]
    assert checkout["uses"].startswith("actions/checkout@") and checkout["with"]["fetch-depth"] == 0


def test_steps_take_values_from_the_environment_and_first_party_actions_by_hash():
    for step in (step for job in JOBS.values() for step in job["steps"]):
        assert "${{" not in step.get("run", "") and re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}|", step.get("uses", ""))


POST = JOBS["comment"]["steps"][-1]


@pytest.fixture
def posted(tmp_path):
    """The step as it stands, run by real gh against a server that keeps comments like GitHub's and whose listing can be made to fail."""
    bot = {"login": "github-actions[bot]"}
    others = [{"id": 1, "user": {"login": "somebody"}, "body": f"{MARKER}\nnot ours"}, {"id": 2, "user": bot, "body": "else"}]
    kept = SimpleNamespace(others=others, comments=list(others), broken=None, asked=[])

    async def listed(request):
        return kept.broken or JSONResponse(kept.comments)

    async def created(request):
        kept.comments.append({"id": 3, "user": bot, **await request.json()})
        return JSONResponse(kept.comments[-1], status_code=201)

    async def updated(request):
        next(one for one in kept.comments if one["id"] == request.path_params["number"]).update(await request.json())
        return JSONResponse({})

    path = "/repos/own/er/issues"
    app = Starlette(routes=[Route(f"{path}/7/comments", listed), Route(f"{path}/7/comments", created, methods=["POST"]),
                            Route(f"{path}/comments/{{number:int}}", updated, methods=["PATCH"])])

    async def by_proxy(scope, receive, send):
        """A proxy is asked for a whole URL."""
        kept.asked += [scope["method"]] if scope["type"] == "http" else []
        await app(scope | {"path": urlsplit(scope.get("path", "")).path}, receive, send)

    with serving(by_proxy) as url:
        def post(text):
            (tmp_path / "comment.md").write_text(f"{MARKER}\n{text}\n", encoding="utf-8")
            # gh speaks plain HTTP to github.localhost only, and a proxy takes that name to our server.
            return step(POST["name"], tmp_path, http_proxy=url.removesuffix("/v1"), GH_HOST="github.localhost", GH_TOKEN="x",
                        GH_CONFIG_DIR=str(tmp_path / "gh"), GITHUB_REPOSITORY="own/er", PULL="7", MARKER=POST["env"]["MARKER"])

        kept.post, kept.ours = post, lambda text: {"id": 3, "user": bot, "body": f"{MARKER}\n{text}\n"}
        yield kept


@pytest.mark.skipif(not shutil.which("gh") and "GITHUB_ACTIONS" not in os.environ, reason="needs GitHub's gh, which GitHub's runners have")
def test_the_comment_is_posted_once_and_then_updated(posted):
    for text in ("first, 5 > 3", "second"):
        done = posted.post(text)
        assert done.returncode == 0, done.stderr
        assert posted.comments == [*posted.others, posted.ours(text)]


@pytest.mark.skipif(not shutil.which("gh") and "GITHUB_ACTIONS" not in os.environ, reason="needs GitHub's gh, which GitHub's runners have")
@pytest.mark.parametrize("answer", [JSONResponse({"message": "Server Error"}, status_code=502), Response(status_code=502)])
def test_a_listing_that_fails_is_a_failed_step_and_no_second_comment(posted, answer):
    assert posted.post("first").returncode == 0
    posted.broken, posted.asked[:] = answer, []
    done = posted.post("second")
    assert done.returncode != 0 and done.stderr
    assert posted.asked == ["GET"] and posted.comments == [*posted.others, posted.ours("first")]


def test_workflow_and_command_agree_on_the_marker():
    assert POST["env"]["MARKER"] == MARKER
