"""What an edit reaches, and that the committed lock and metrics are of this code."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_sharing import call

ROOT = Path(__file__).parent.parent
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def names(entries):
    return {next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries or []}


def outs(stage):
    return names(stage.get("outs")) | names(stage.get("metrics"))


def downstream(changed):
    """The stages that read, directly or not, what the changed ones write."""
    reached = set(changed)
    while True:
        written = set().union(*(outs(STAGES[name]) for name in reached))
        more = {name for name, stage in STAGES.items() if names(stage["deps"]) & written} - reached
        if not more:
            return reached
        reached |= more


def reading(param):
    return {name for name, stage in STAGES.items() if any(param == p or param.startswith(f"{p}.") for p in stage.get("params", []))}


LAST = {"report"}
"""Reads what every other stage says."""
STUDENT = {"qlora_train", "predict_student", "eval_exact", "eval_judge", "calibrate"}


@pytest.mark.parametrize("param, reached", [
    ("oversample.escalation_factor", {"oversample"} | STUDENT),
    ("qlora_train.learning_rate", STUDENT),
    ("eval_judge.judge", {"eval_judge"}),
    ("simulator.judge", {"eval_judge"}),
    ("verify.calibration_one_in", {"verify", "oversample", "handoff_score", "predict_base", "yardsticks"} | STUDENT),
    ("handoff_score.layer", {"predict_base", "handoff_score", "eval_exact", "eval_judge", "calibrate"}),
    ("calibrate.rule", {"calibrate"}),
    ("gate.min_recall", set()),
])
def test_an_edited_parameter_reruns_what_it_must_and_no_more(param, reached):
    assert downstream(reading(param)) == reached | LAST


@pytest.mark.parametrize("file, reached", [
    ("simulator/judge.py", {"eval_judge"}),
    ("stages/eval_judge.py", {"eval_judge"}),
    ("stages/oversample.py", {"oversample"} | STUDENT),
    ("agent/endpoint.py", {"teacher_gen", "verify", "oversample", "handoff_score", "predict_base", "yardsticks"} | STUDENT),
    ("agent/decode.py", {"predict_base", "handoff_score", "predict_student", "eval_exact", "eval_judge", "calibrate"}),
    ("agent/prefill.py", {"handoff_score", "predict_base"} | STUDENT),  # training reads through it what the layers below the adapter say
    ("stages/_threshold.py", {"calibrate"}),
    ("stages/_bag_of_words.py", {"corpus", "handoff_score", "yardsticks", "eval_exact", "eval_judge", "calibrate"}),
])
def test_an_edited_file_reruns_what_it_must_and_no_more(file, reached):
    assert downstream({name for name, stage in STAGES.items() if file in names(stage["deps"])}) == reached | LAST


def test_every_stage_but_the_check_of_the_companies_reaches_the_report_and_the_report_reaches_none():
    assert {stage for stage in STAGES if "report" not in downstream({stage})} == {"corpus"}
    assert downstream({"report"}) == LAST


@pytest.mark.parametrize("stage", ["teacher_gen", "eval_judge"])
def test_local_inference_never_makes_a_paid_stage_stale(stage):
    assert not {"agent/student.py", "agent/decode.py", "agent/encode.py"} & names(STAGES[stage]["deps"])


def test_the_committed_lock_is_of_this_code_these_companies_and_these_parameters():
    """`dvc status` in a clone without data reports missing outputs as deleted; a modified file means the lock is stale."""
    status = json.loads(subprocess.run(["dvc", "status", "--json"], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    stale = {(stage, path): state for stage, changes in status.items() for change in changes if isinstance(change, dict)
             for kind, paths in change.items() if isinstance(paths, dict)
             for path, state in paths.items() if state not in ("deleted", "not in cache")}
    assert not stale


def test_metrics_and_predictions_are_in_git_and_small():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name, stage in STAGES.items():
        for metric in names(stage.get("metrics")):
            assert metric in tracked, f"{name}: {metric}"
    for path in ("data/eval_exact/predictions.parquet", "data/eval_exact/calibration.parquet"):
        assert path in tracked and (ROOT / path).stat().st_size < 1_000_000
    assert "models/operating_point.json" in tracked


@pytest.mark.parametrize("command", [["metrics", "show"], ["metrics", "diff"], ["dag"], ["params", "diff"]])
def test_dvc_commands_work_as_they_come(command):
    done = subprocess.run(["dvc", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_the_data_stages_write_what_the_committed_lock_names(tmp_path):
    """On this machine too, whichever wrote the lock."""
    call("git", "clone", "--quiet", "--shared", str(ROOT), "clone", cwd=tmp_path)
    clone = tmp_path / "clone"
    lock = yaml.safe_load((clone / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    for stage in ("teacher_gen", "verify", "oversample"):
        named = {out["path"]: out["md5"] for out in lock[stage]["outs"]}
        for path in named:
            (clone / path).unlink(missing_ok=True)
        call(sys.executable, "-m", f"stages.{stage}", cwd=clone, env={"PYTHONPATH": str(clone), "HANDOFF_CACHE": str(tmp_path / "cache")})
        assert {path: hashlib.md5((clone / path).read_bytes()).hexdigest() for path in named} == named


@pytest.mark.long
def test_a_clone_pulls_what_this_repository_committed_and_has_nothing_to_run(tmp_path):
    """All stages with their real outputs, through a folder as remote; tests/test_sharing.py has the same through S3, without a model."""
    if json.loads(call("dvc", "status", "--json", cwd=ROOT).stdout):
        pytest.skip("needs a workspace with the outputs of the committed run: dvc repro, or dvc pull")
    for name in ("first", "second"):
        call("git", "clone", "--quiet", "--shared", str(ROOT), name, cwd=tmp_path)
        call("dvc", "remote", "add", "--local", "--default", "storage", str(tmp_path / "storage"), cwd=tmp_path / name)
    call("dvc", "config", "--local", "cache.dir", str(ROOT / ".dvc/cache"), cwd=tmp_path / "first")
    call("dvc", "push", cwd=tmp_path / "first")
    second = tmp_path / "second"
    call("dvc", "pull", cwd=second)
    assert call("dvc", "status", cwd=second).stdout.strip() == "Data and pipelines are up to date."
    assert "Running" not in call("dvc", "repro", cwd=second).stdout and not call("git", "status", "--porcelain", cwd=second).stdout
