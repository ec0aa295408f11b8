"""What the report reads, made from real conversations of the held-out companies and the committed metrics."""

import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import polars as pl

from schemas.tables import Judgements, Predictions, Rejected, Verified
from stages.eval_exact import gold_turns, parse_replies
from tests.deciding import command, lay_out
from tests.helpers import HELD_OUT, agent, customer, played, real, traces, workspace
from tests.layout import ROOT

HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\"> & <!-- \u2028"
REASONS = ["unsupported_fact", "handoff_missed", "not_one_json_object"]


def conversations(copies):
    """conversation id -> (company, messages); the first one is by somebody who writes markup."""
    found = {"streaming/hostile/0": ("streaming", [customer(HOSTILE), agent("reply", f"So you say: {HOSTILE}")])}
    for copy in range(copies):
        for slug in sorted(HELD_OUT):
            found |= {f"{slug}/{scenario.id}/{copy}": (slug, played(real(slug), scenario)) for scenario in real(slug).scenarios}
    return found


def held_out_table(found):
    return pl.DataFrame([
        {"conversation_id": name, "company": company, "index": index, "role": message.role.value, "content": message.content, "system": "You help.",
         "scenario": name.split("/")[1], "kind": "ordinary"}
        for name, (company, messages) in found.items() for index, message in enumerate(messages)])


def predictions_table(held_out):
    """Base answers everything under the schema and nothing without it; the student takes the gold step, searches instead of each hand-off, and
    breaks off at every tenth turn."""
    gold = gold_turns(held_out)
    steps = held_out.filter(role="agent")["content"].to_list()
    search = agent("search_kb", query="hand over?").content
    student = [text[:40] if number % 10 == 9 else search if action == "escalate" else text
               for number, (text, action) in enumerate(zip(steps, gold["gold_action"], strict=True))]
    reply = agent("reply", "It is so.").content
    raws = {("base", "free"): ["It is so."] * len(gold), ("base", "schema"): [reply] * len(gold), ("student", "free"): student}
    rows = pl.concat([gold.with_columns(model=pl.lit(model), decoding=pl.lit(decoding), raw=pl.Series(raw))
                      for (model, decoding), raw in raws.items()])
    score = pl.when(pl.col("gold_action") == "escalate").then(0.6).otherwise(0.2)
    rows = parse_replies(rows.with_columns(p_escalate=score, other=pl.lit(None, pl.String)))
    return rows.select(list(Predictions.to_schema().columns)).sort("company", "conversation_id", "index", "model", "decoding")


def judgements_table(predictions):
    scored = predictions.filter((pl.col("model") == "student") | (pl.col("decoding") == "schema"))
    verdicts = ["acceptable", "acceptable", "not_acceptable", "acceptable", "unscored"]
    return scored.with_columns(verdict=pl.Series([verdicts[number % 5] for number in range(len(scored))]), answer=pl.lit("{}"))


@cache
def rejected_table():
    slug = "gym"
    company = real(slug)
    return pl.concat([
        traces((slug, scenario.id, 0, [*played(company, scenario), agent("reply", HOSTILE)])).with_columns(
            teacher=pl.lit("simulator"), reject_reason=pl.lit(REASONS[number % 3]), reject_detail=pl.lit(HOSTILE), reject_index=pl.lit(1, pl.Int64))
        for number, scenario in enumerate(company.scenarios[:9])])


@cache
def tables(copies):
    """held_out and predictions."""
    held_out = held_out_table(conversations(copies))
    return held_out, predictions_table(held_out)


def write(folder, name, frame, schema):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.select(list(schema.to_schema().columns)).write_parquet(path)


@cache
def calibrated(copies):
    """What `calibrate` itself writes about these predictions: path -> content."""
    _, predictions = tables(copies)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lay_out(folder, predictions)
        done = command(folder, "calibrate")
        assert done.returncode == 0, done.stderr
        return {path.relative_to(folder): path.read_bytes()
                for path in [*folder.glob("models/*"), *folder.glob("metrics/calibrate*.json"), *folder.glob("metrics/calibrate/*")]}


def report_inputs(folder, copies=1, **report):
    """Make `folder` one in which the report runs: its parameters, `copies` of every held-out conversation, what calibrate writes about them, and the
    committed metrics of the other stages."""
    workspace(folder, report=report)
    shutil.copytree(ROOT / "metrics", folder / "metrics", ignore=shutil.ignore_patterns("calibrate*"))
    for path, content in calibrated(copies).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    held_out, predictions = tables(copies)
    write(folder, "data/verify/held_out.parquet", held_out, Verified)
    write(folder, "data/verify/rejected.parquet", rejected_table(), Rejected)
    write(folder, "data/eval_exact/predictions.parquet", predictions, Predictions)
    write(folder, "data/eval_judge/judgements.parquet", judgements_table(predictions), Judgements)
    return folder


COMMIT = "git -c user.name=t -c user.email=t@localhost commit -qm"


def report_repository(folder):
    """`report_inputs` in a repository whose last commit, v1, holds what the report compares with."""
    report_inputs(folder, compare_with="v1")
    for line in ("git init -q", "dvc init -q", "git add -f metrics models data/eval_exact .dvc", f"{COMMIT} v1", "git tag v1"):
        subprocess.run(line.split(), cwd=folder, capture_output=True, check=True)
    return folder
