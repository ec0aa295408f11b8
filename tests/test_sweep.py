"""The sweep trains real students, does nothing twice, and chooses by the stated rule on the calibration turns alone."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml

from schemas.operating import Rule
from schemas.sweep import SweepMetrics
from schemas.tables import Verified
from stages._stage import write_table
from stages.sweep import Outcome, best
from tests.layout import ROOT
from tests.students import HANDOFF, LONG, SEARCH, base, customer, table

FACTORS = {1: Outcome(missed=30, handoffs=64, needless=10, others=800), 2: Outcome(20, 64, 40, 800), 4: Outcome(20, 64, 38, 800),
           8: Outcome(1, 64, 300, 800)}


@pytest.mark.parametrize("factors, rule, chosen", [
    ([1, 2, 4, 8], Rule.MAX_OVER_ESCALATION, 4),  # 2 misses as many, 8 hands off too much
    ([1, 2], Rule.MAX_OVER_ESCALATION, 2),
    ([8], Rule.MAX_OVER_ESCALATION, 8),  # no factor keeps to it
    ([1, 2, 4, 8], Rule.EXPECTED_COST, 4),  # 20 * 60 + 38 * 5 = 1390; 8: 60 + 1500 = 1560
])
def test_the_rule_chooses(factors, rule, chosen):
    assert best({factor: FACTORS[factor] for factor in factors}, rule, 60, 5, 0.05) == chosen


def test_of_equal_factors_the_smallest_is_chosen():
    assert best({4: FACTORS[4], 2: FACTORS[4]}, Rule.MAX_OVER_ESCALATION, 60, 5, 0.05) == 2
    assert best({4: FACTORS[4], 2: FACTORS[4]}, Rule.EXPECTED_COST, 60, 5, 0.05) == 2


@pytest.fixture
def workspace(tmp_path):
    """A folder with a few conversations to train on and to measure on."""
    base()  # the weights are converted by now
    for split, count in (("train", 3), ("calibration", 1), ("held_out", 1)):
        data = table({f"{split}{name}{i}": [customer(f"{messages[0].content} ({split} {i})"), *messages[1:]]
                      for i in range(count) for name, messages in {"s": SEARCH, "h": HANDOFF, "l": LONG}.items()})
        tmp_path.joinpath("data/verify").mkdir(parents=True, exist_ok=True)
        write_table(tmp_path / f"data/verify/{split}.parquet", data, Verified)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["qlora_train"] |= {"rank": 4, "first_layer": 28, "batch_tokens": 300}
    params["predict"]["max_new_tokens"] = 4
    tmp_path.joinpath("params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    tmp_path.joinpath(".cache").mkdir()
    tmp_path.joinpath(".cache/weights").symlink_to((Path(os.environ.get("HANDOFF_CACHE", ROOT / ".cache")) / "weights").resolve())
    return tmp_path


def sweep(workspace, *words):
    return subprocess.run([sys.executable, "-m", "stages.sweep", *words], cwd=workspace, text=True, capture_output=True, timeout=300, check=False,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "HANDOFF_CACHE": ".cache", "HF_HUB_OFFLINE": "1"})


def test_students_are_trained_once_and_measured_on_what_was_asked_for(workspace):
    first = sweep(workspace, "2", "1", "--seeds", "3", "--held-out")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("qlora_train:") == 2
    metrics = workspace / "metrics/sweep.json"
    written = metrics.read_text(encoding="utf-8")
    found = SweepMetrics.model_validate(json.loads(written))
    assert [(one.factor, one.seed) for one in found.runs] == [(1, 3), (2, 3)]
    for one in found.runs:
        for rates in (one.calibration, one.held_out):
            assert (rates.action_accuracy.n, rates.escalate_recall.n, rates.over_escalation.n) == (7, 1, 6)
    curve = pl.read_csv(workspace / "metrics/sweep/calibration.csv")
    assert curve["factor"].to_list() == [1, 2] and curve["valid_output"].to_list() == [0.0, 0.0], "four tokens are no step"
    assert f"factor {found.chosen_on_calibration}" in first.stdout.splitlines()[-1]

    again = sweep(workspace, "1", "2", "--seeds", "3", "--held-out")
    assert "qlora_train:" not in again.stdout and "turn/s" not in again.stderr and metrics.read_text(encoding="utf-8") == written
    assert not (workspace / "models").exists() and not (workspace / "data/oversample").exists(), "the workspace's own outputs stay as they are"

    # The workspace's adapter is taken where dvc.lock says that it is the very one, and only there.
    folder = next((workspace / ".cache/sweep").glob("factor2-*"))
    shutil.copytree(folder / "models", workspace / "models")
    rows = hashlib.md5((folder / "data/oversample/train.parquet").read_bytes()).hexdigest()
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    lock = {"stages": {"qlora_train": {"deps": [{"path": "data/oversample/train.parquet", "md5": rows}],
                                       "params": {"params.yaml": {section: params[section] for section in ("student", "qlora_train")}}}}}
    (workspace / "dvc.lock").write_text(yaml.safe_dump(lock), encoding="utf-8")
    shutil.rmtree(folder)
    taken = sweep(workspace, "2", "--seeds", "3")
    assert taken.returncode == 0 and "qlora_train:" not in taken.stdout, taken.stderr
    assert "held_out" not in json.loads(metrics.read_text(encoding="utf-8"))["runs"][0]
    other = sweep(workspace, "2", "--seeds", "4")
    assert other.stdout.count("qlora_train:") == 1, "another seed is another student"


def test_a_factor_below_one_is_refused():
    done = subprocess.run([sys.executable, "-m", "stages.sweep", "0", "2"], cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: a factor of 0 is none") and "hint: " in done.stderr
