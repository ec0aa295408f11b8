"""What a pull request shows, made from real revisions, and the workflow that posts it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html import unescape
from urllib.parse import urlsplit

import pytest
import yaml
from markdown_it import MarkdownIt
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from stages.pr_comment import EXACT, LIMIT, MARKER, Block, code, defused, fenced, fitted, size
from tests.helpers import serving
from tests.layout import ROOT

WORKFLOW = ROOT / ".github/workflows/pull-request.yml"
JOBS = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]
PLOT = "metrics/qlora_train/plots/metrics/loss.tsv"
HOSTILE = ["a | b", "a \\| b", "a \\\\| b", "`x` | ``y``", "</details><!-- <img src=//x.example>", "@everyone", "![x](//x.example/p.png)", "http://x.example",
           "www.x.example", "[a]: //x.example", "**b** _i_ ~~s~~", "```", "&lt;b&gt;", "one\n\n# two", "", " ", "\u202eback", "x" * 1000]


def git(folder, *arguments):
    who = ["-c", "user.name=Nobody", "-c", "user.email=nobody@example.com"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def comment(*revisions, folder=ROOT):
    """The command's text, written in `folder` by this code."""
    done = subprocess.run([sys.executable, "-m", "stages.pr_comment", *revisions], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    new, old = git(ROOT, "log", "-2", "--format=%h", "--", "metrics/*.json").split()
    text = comment(old, new)
    assert text.startswith(f"{MARKER}\n## Results: `{old}` ({old}) → `{new}` ({new})\n")
    before, after = ({} if git(ROOT, "ls-tree", rev, "--", EXACT.as_posix()) == "" else json.loads(git(ROOT, "show", f"{rev}:{EXACT}"))
                     for rev in (old, new))
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
    chart, = re.findall(r"```mermaid\n(.*?)\n```", text, re.DOTALL)
    assert "grey HEAD^, blue HEAD" in chart and chart.count("    line [") == 2 and f"0 --> {len(points) - 1}" in chart


def test_plots_over_other_ranges_get_a_chart_each_with_one_height(clone):
    lines = (clone / PLOT).read_text(encoding="utf-8").splitlines()
    text = committed(clone, **{PLOT: "\n".join([*lines[:10], lines[10].replace("1.5", "9.5")]) + "\n"})
    charts = re.findall(r"```mermaid\n(.*?)\n```", text, re.DOTALL)
    assert [re.findall(r"-axis \"step\" (.*)", chart)[0] for chart in charts] == [f"0 --> {len(lines) - 2}", "0 --> 9"]
    assert {re.findall(r"-axis \"loss\" (.*)", chart)[0] for chart in charts} == {"1.5 --> 9.5"}


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


def test_what_gate_and_comparison_refuse_stands_in_their_place(clone):
    """In a commit without the predictions both have nothing to judge."""
    (clone / "data/eval_exact/predictions.parquet").unlink()
    text = committed(clone)
    git(clone, "reset", "--quiet", "--hard", "HEAD^")
    assert "### Gate: not passed" in text
    refused = dict(re.findall(r"`python -m stages\.(\w+)` has no result:\n\n```text\nerror: (.*)\nhint: .*\n```", text))
    assert list(refused) == ["gate", "compare"] and "predictions.parquet of revision 'HEAD'" in refused["compare"]


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


def test_steps_take_values_from_the_environment_and_first_party_actions_by_hash():
    for step in (step for job in JOBS.values() for step in job["steps"]):
        assert "${{" not in step.get("run", "") and re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}|", step.get("uses", ""))


POST = JOBS["comment"]["steps"][-1]


@pytest.mark.skipif(not shutil.which("gh"), reason="needs GitHub's gh, which GitHub's runners have")
def test_the_comment_is_posted_once_and_then_updated(tmp_path):
    """The step as it stands, run by real gh against a server that keeps comments like GitHub's."""
    bot = {"login": "github-actions[bot]"}
    others = [{"id": 1, "user": {"login": "somebody"}, "body": f"{MARKER}\nnot ours"}, {"id": 2, "user": bot, "body": "else"}]
    comments = list(others)

    async def listed(request):
        return JSONResponse(comments)

    async def created(request):
        comments.append({"id": 3, "user": bot, **await request.json()})
        return JSONResponse(comments[-1], status_code=201)

    async def updated(request):
        next(one for one in comments if one["id"] == request.path_params["number"]).update(await request.json())
        return JSONResponse({})

    path = "/repos/own/er/issues"
    app = Starlette(routes=[Route(f"{path}/7/comments", listed), Route(f"{path}/7/comments", created, methods=["POST"]),
                            Route(f"{path}/comments/{{number:int}}", updated, methods=["PATCH"])])

    async def by_proxy(scope, receive, send):
        """A proxy is asked for a whole URL."""
        await app(scope | {"path": urlsplit(scope.get("path", "")).path}, receive, send)

    with serving(by_proxy) as url:
        # gh speaks plain HTTP to github.localhost only, and a proxy takes that name to our server.
        environment = {**os.environ, "http_proxy": url.removesuffix("/v1"), "GH_HOST": "github.localhost", "GH_TOKEN": "x",
                       "GH_CONFIG_DIR": str(tmp_path / "gh"), "GITHUB_REPOSITORY": "own/er", "PULL": "7", "MARKER": POST["env"]["MARKER"]}
        for text in ("first, 5 > 3", "second"):
            (tmp_path / "comment.md").write_text(f"{MARKER}\n{text}\n", encoding="utf-8")
            done = subprocess.run(["bash", "-e", "-c", POST["run"]], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert comments == [*others, {"id": 3, "user": bot, "body": f"{MARKER}\n{text}\n"}]


def test_workflow_and_command_agree_on_the_marker():
    assert POST["env"]["MARKER"] == MARKER
