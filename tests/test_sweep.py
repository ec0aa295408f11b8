"""The sweep trains real students, does nothing twice, and chooses by the stated rule on the calibration turns of one seed alone."""

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
from stages import sweep as command
from stages._show import markdown
from stages._stage import write_table
from stages._threshold import allowed
from stages.eval_exact import CALIBRATION, HELD_OUT
from stages.predict import PredictParams
from stages.sweep import Outcome, best, code
from stages.sweep import table as rows_of
from tests.deciding import command as in_process
from tests.helpers import documented, inside
from tests.helpers import workspace as parameters
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


COUNTS = {1: (1, 0), 2: (2, 0), 4: (6, 2), 8: (9, 20)}
"""factor -> (hand-offs found of 10, needless of 100) of the student of the first seed; those of other seeds find nothing."""


def made_up(factor, seed):
    """The rows of a student with these counts; every turn is valid."""
    caught, needless = COUNTS[factor] if seed == 1 else (0, 0)
    handed = [True] * caught + [False] * (10 - caught) + [True] * needless + [False] * (100 - needless)
    return pl.DataFrame({"gold_action": ["escalate"] * 10 + ["reply"] * 100, "action": ["escalate" if one else "reply" for one in handed],
                         "fault": [None] * 110, "model": ["student"] * 110, "decoding": ["free"] * 110}, schema_overrides={"fault": pl.String})


@pytest.fixture
def asked(monkeypatch):
    """What the command trains and decodes, with students made up in place of both."""
    found = []
    monkeypatch.setattr(command, "follows_from", lambda factor, seed, split, _: f"{factor} {seed} {split.stem}")
    monkeypatch.setattr(command, "trained", lambda factor, seed: (factor, seed))
    monkeypatch.setattr(command, "replies", lambda student, split, *_: found.append((*student, split)) or made_up(*student))
    return found


@pytest.mark.parametrize("words, chosen, held_out", [
    (["1", "2", "4", "8", "--seeds", "1", "2", "3"], 4, False), (["8", "4", "2", "1", "--seeds", "1", "2", "3", "2", "--held-out"], 4, True),
    (["1", "2", "4", "8"], 4, False), (["1", "2", "--held-out"], 2, True), (["2", "--seeds", "1", "2", "--held-out"], 2, True)])
def test_one_seed_chooses_and_the_others_show_how_far_chance_puts_the_smallest_and_the_chosen(asked, monkeypatch, tmp_path, capsys, words, chosen,
                                                                                              held_out):
    """With the other seeds' students, who find nothing, summed or averaged in, factor 2 would be chosen of 1, 2, 4 and 8."""
    parameters(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sweep", *words])
    with inside(tmp_path):
        command.main()
    factors = sorted({int(word) for word in words[:words.index("--seeds") if "--seeds" in words else len(words)] if word.isdigit()})
    seeds = [1, 2, 3] if "3" in words else [1, 2] if "--seeds" in words else [1]
    runs = sorted({(factor, 1) for factor in factors} | {(factor, seed) for factor in (factors[0], chosen) for seed in seeds})
    assert sorted(asked) == sorted([(*one, CALIBRATION) for one in runs] + [
        (*one, HELD_OUT) for one in runs if held_out and one[0] in (factors[0], chosen)]), "and nothing twice"
    last = max(at for at, (_, seed, split) in enumerate(asked) if (seed, split) == (1, CALIBRATION))
    assert last == len(factors) - 1, "the choice is made before anything else is seen"

    found = SweepMetrics.model_validate_json((tmp_path / "metrics/sweep.json").read_bytes())
    assert (found.chosen_on_calibration, found.chosen_with_seed) == (chosen, 1)
    assert [(one.factor, one.seed) for one in found.runs] == runs
    curve = pl.read_csv(tmp_path / "metrics/sweep/calibration.csv")
    assert list(curve.select("factor", "seed").iter_rows()) == runs, "a mark of the plot for every student"
    for one, recall, over in zip(found.runs, curve["escalate_recall"], curve["over_escalation"], strict=True):
        assert (10 * recall, 100 * over) == pytest.approx(COUNTS[one.factor] if one.seed == 1 else (0, 0))
        assert (one.held_out is not None) == (held_out and one.factor in (factors[0], chosen))
    shown = capsys.readouterr().out
    assert shown.count("| factor | seed |") == 1 + held_out and "| 2 | 1 | 2/10 | 0/100 | 102/110 | 110/110 |" in shown
    assert f"chooses factor {chosen}" in shown.splitlines()[-1]


def test_what_the_last_sweep_counted_is_not_measured_again(asked, monkeypatch, tmp_path):
    """So that a sweep can be made in parts, each on a machine that has none of the students before."""
    parameters(tmp_path)

    def sweep(*factors):
        asked.clear()
        monkeypatch.setattr(sys, "argv", ["sweep", *factors])
        with inside(tmp_path):
            command.main()
        runs = json.loads((tmp_path / "metrics/sweep.json").read_bytes())["runs"]
        return [one[0] for one in asked], {one["factor"]: one["calibration"]["escalate_recall"]["k"] for one in runs}

    assert sweep("2", "4") == ([2, 4], {2: 2, 4: 6})
    assert sweep("1", "2", "4") == ([1], {1: 1, 2: 2, 4: 6}) and sweep("1", "2", "4")[0] == []
    monkeypatch.setattr(command, "follows_from", lambda factor, seed, split, _: f"other code {factor} {seed} {split.stem}")
    assert sweep("1", "2")[0] == [1, 2]


def test_a_count_follows_from_code_parameters_and_data(monkeypatch, tmp_path):
    parameters(tmp_path)
    write_table(tmp_path / "data/verify/train.parquet", table(), Verified)
    write_table(tmp_path / "data/verify/calibration.parquet", table(), Verified)
    params = PredictParams(max_new_tokens=4, turns_at_once=64)

    def name(factor=1, seed=1, params=params):
        return command.follows_from(factor, seed, CALIBRATION, params)

    with inside(tmp_path):
        names = [name(), name(2), name(seed=2), name(params=params.model_copy(update={"max_new_tokens": 5}))]
        for stage in ("qlora_train", "predict_student", "eval_exact"):
            with monkeypatch.context() as patched:
                patched.setattr(command, "code", lambda one, stage=stage: {one: "0" * 32} if one == stage else code(one))
                names.append(name())
        write_table(tmp_path / "data/verify/calibration.parquet", table(company="teahouse"), Verified)
        names.append(name())
    assert len(set(names)) == len(names)


def test_the_tables_in_readme_are_those_of_the_sweep():
    sweep = json.loads((ROOT / "metrics/sweep.json").read_text(encoding="utf-8"))
    for split in ("calibration", "held_out"):
        if any(split in one for one in sweep["runs"]):
            assert markdown(rows_of(sweep["runs"], split)) in documented("The study"), f"README's table of the {split} turns"


def test_what_readme_says_of_the_seeds_is_what_the_sweep_counted():
    sweep = json.loads((ROOT / "metrics/sweep.json").read_text(encoding="utf-8"))
    least, chosen = ([one["calibration"] for one in sweep["runs"] if one["factor"] == factor] for factor in (1, sweep["chosen_on_calibration"]))
    rates = ("escalate_recall", "over_escalation")
    (few, many), (calm, eager) = ([sorted(one[rate]["k"] for one in runs) for runs in (least, chosen)] for rate in rates)
    handoffs, others = (chosen[0][rate]["n"] for rate in rates)
    most = allowed(0.05, others)
    text = " ".join(documented("The study").split())
    assert len(least) == len(chosen) == 3 and few[-1] < many[0]
    assert f"({many[0]} to {many[-1]} against {few[0]} to {few[-1]} of {handoffs})" in text
    assert "({}, {} and {} against {}, {} and {})".format(*eager, *calm) in text
    assert f"The rule allows {most} needless hand-offs" in text and eager[-1] > most >= eager[-2] and f"its {eager[-1]} are more than {most}" in text


def test_the_curve_is_that_of_the_metrics():
    """One mark a student in `dvc plots show`."""
    sweep = json.loads((ROOT / "metrics/sweep.json").read_text(encoding="utf-8"))
    for one, row in zip(sweep["runs"], pl.read_csv(ROOT / "metrics/sweep/calibration.csv").iter_rows(named=True), strict=True):
        shares = {name: round(one["calibration"][name]["k"] / one["calibration"][name]["n"], 4) for name in command.RATES}
        assert row == {"factor": one["factor"], "seed": one["seed"], **shares}


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
    return subprocess.run([sys.executable, "-m", "stages.sweep", *words], cwd=workspace, text=True, capture_output=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "HANDOFF_CACHE": ".cache", "HF_HUB_OFFLINE": "1"})


def lock(folder, deps, params):
    """Write the entry of a dvc.lock that tells of the adapter."""
    stage = {"deps": [{"path": path, "md5": md5} for path, md5 in deps.items()],
             "params": {"params.yaml": {section: params[section] for section in ("student", "qlora_train")}}}
    (folder / "dvc.lock").write_text(yaml.safe_dump({"stages": {"qlora_train": stage}}), encoding="utf-8")


@pytest.mark.parametrize("changed", [None, "stages/qlora_train.py", "data/oversample/train.parquet", "seed"])
def test_the_workspaces_adapter_is_of_these_rows_parameters_and_this_code_or_another(tmp_path, changed):
    parameters(tmp_path)
    params = yaml.safe_load((tmp_path / "params.yaml").read_text(encoding="utf-8"))
    (tmp_path / "models/qlora_train").mkdir(parents=True)
    (tmp_path / "models/qlora_train/adapter_config.json").touch()
    (tmp_path / "rows").write_bytes(b"rows")
    deps = {"data/oversample/train.parquet": hashlib.md5(b"rows").hexdigest(), **code("qlora_train")}
    lock(tmp_path, deps | ({changed: "0" * 32} if changed in deps else {}), params)
    mine = {section: params[section] for section in ("student", "qlora_train")}
    mine["qlora_train"] = mine["qlora_train"] | ({"seed": 9} if changed == "seed" else {})
    with inside(tmp_path):
        assert command.workspace_has(Path("rows"), mine) == (changed is None)


def test_students_are_trained_once_and_measured_on_what_was_asked_for(workspace):
    first = sweep(workspace, "2", "1", "--seeds", "3", "--held-out")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("qlora_train:") == 2
    metrics = workspace / "metrics/sweep.json"
    written = metrics.read_text(encoding="utf-8")
    found = SweepMetrics.model_validate(json.loads(written))
    assert [(one.factor, one.seed, one.held_out is not None) for one in found.runs] == [(1, 3, True), (2, 3, False)], "neither finds anything"
    for rates in (found.runs[0].held_out, *(one.calibration for one in found.runs)):
        assert (rates.action_accuracy.n, rates.escalate_recall.n, rates.over_escalation.n) == (7, 1, 6)
    curve = pl.read_csv(workspace / "metrics/sweep/calibration.csv")
    assert curve["factor"].to_list() == [1, 2] and curve["valid_output"].to_list() == [0.0, 0.0], "four tokens are no step"

    again = sweep(workspace, "1", "2", "--seeds", "3", "--held-out")
    assert "qlora_train:" not in again.stdout and "turn/s" not in again.stderr and metrics.read_text(encoding="utf-8") == written
    assert not (workspace / "models").exists() and not (workspace / "data/oversample").exists(), "the workspace's own outputs stay as they are"

    # The workspace's adapter is taken where dvc.lock says that it is the very one, and only there.
    folder = next((workspace / ".cache/sweep").glob("factor2-*"))
    shutil.copytree(folder / "models", workspace / "models")
    rows = hashlib.md5((folder / "data/oversample/train.parquet").read_bytes()).hexdigest()
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    lock(workspace, {"data/oversample/train.parquet": rows, **code("qlora_train")}, params)
    shutil.rmtree(folder)
    taken = sweep(workspace, "2", "--seeds", "3")
    assert taken.returncode == 0 and "qlora_train:" not in taken.stdout, taken.stderr
    assert "held_out" not in json.loads(metrics.read_text(encoding="utf-8"))["runs"][0]


def test_other_code_makes_another_student(monkeypatch, tmp_path):
    """The folder of a student is called after the code that trains it, too."""
    parameters(tmp_path)
    ran = []

    def run_stage(stage, folder):
        ran.append((stage, folder))
        (folder / "data/oversample").mkdir(parents=True, exist_ok=True)
        (folder / "data/oversample/train.parquet").touch()

    monkeypatch.setattr(command, "_run_stage", run_stage)
    (tmp_path / "data/verify").mkdir()
    (tmp_path / "data/verify/train.parquet").touch()
    with inside(tmp_path):
        before = command.trained(2, 1)
        assert command.trained(2, 1) == before != (other := command.trained(2, 2)), "another seed is another student"
        assert ("qlora_train", before) in ran and ("qlora_train", other) in ran
        monkeypatch.setattr(command, "code", lambda stage: {f"stages/{stage}.py": "0" * 32})
        assert command.trained(2, 1) != before


def test_a_factor_below_one_is_refused():
    done = in_process(ROOT, "sweep", "0", "2")
    assert done.returncode == 1 and done.stderr.startswith("error: a factor of 0 is none") and "hint: " in done.stderr
