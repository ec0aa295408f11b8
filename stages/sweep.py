"""Train the student with several oversampling factors, and say which one the calibration turns choose.

    python -m stages.sweep FACTOR ... [--seeds SEED ...] [--held-out]

Reads   params.yaml, data/verify/{train,calibration,held_out}.parquet, dvc.lock with the adapter that the workspace has
Writes  metrics/sweep.json, metrics/sweep/calibration.csv

Not a stage: nothing depends on it, and it takes a training for every factor and seed. A student is trained as the pipeline
trains it, by its own stages in a folder under .cache/sweep; what has been trained and decoded there, by this code from these data and
parameters, is not done again, so a run that was stopped goes on. Nor is what metrics/sweep.json says of students of the same code, data and
parameters: a sweep can be made in parts, on several machines, with its metrics committed in between.

Every factor is trained with the first seed. On these students' calibration turns alone, as they decode, the rule in `calibrate` chooses the
factor. Then the smallest factor and the chosen one are trained with the other seeds, to show how far chance puts them apart: the choice never
compares factors by unequal numbers of students. `--held-out` measures these two factors on the held-out companies too, once the choice is made.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from agent.decode import TurnDecoder
from agent.encode import Encoder
from agent.paths import CACHE
from agent.student import StudentParams, load_student, load_tokenizer
from schemas.errors import InputError
from schemas.operating import Rule
from schemas.sweep import SweepMetrics
from schemas.tables import Replies, Verified
from stages._encoded import encode_table
from stages._rates import rate
from stages._show import markdown
from stages._stage import PARAMS, load_params, read_table, run, say, write_metrics, write_table
from stages._threshold import allowed, in_words
from stages.calibrate import CalibrateParams
from stages.eval_exact import CALIBRATION, HELD_OUT, gold_turns, parse_replies, score
from stages.oversample import OVERSAMPLED, TRAIN, OversampleParams
from stages.predict import PredictParams, decode_all
from stages.qlora_train import ADAPTER, QloraTrainParams

if TYPE_CHECKING:
    import polars as pl

SWEEP = CACHE / "sweep"
METRICS = Path("metrics/sweep.json")
CURVE = Path("metrics/sweep/calibration.csv")
LOCK = Path("dvc.lock")
ROOT = Path(__file__).parent.parent
RATES = ("escalate_recall", "over_escalation", "action_accuracy", "valid_output")


@dataclass(frozen=True)
class Outcome:
    """What a factor's student does at the calibration turns."""

    missed: int
    handoffs: int
    needless: int
    others: int


def best(outcomes: dict[int, Outcome], rule: Rule, cost_missed: float, cost_needless: float, max_over_escalation: float) -> int:
    """The factor that the rule asks for; the smallest of several.

    `max_over_escalation`: the fewest missed with at most that share of the other turns handed off; where no factor keeps to it,
    the fewest needless. `expected_cost`: the least cost.
    """
    if rule is Rule.EXPECTED_COST:
        return min(outcomes, key=lambda factor: (outcomes[factor].missed * cost_missed + outcomes[factor].needless * cost_needless, factor))
    kept = {factor: (one.missed, one.needless) for factor, one in outcomes.items() if one.needless <= allowed(max_over_escalation, one.others)}
    order = kept or {factor: (one.needless, one.missed) for factor, one in outcomes.items()}
    return min(order, key=lambda factor: (order[factor], factor))


def trained(factor: int, seed: int) -> Path:
    """The folder with the adapter of one factor and seed, trained if it is not there.

    Raises:
        InputError: a stage ended badly.
    """
    everything, key = _training(factor, seed)
    folder = SWEEP / f"factor{factor}-seed{seed}-{key}"
    if (folder / ADAPTER / "adapter_config.json").is_file():
        return folder
    (folder / TRAIN).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(TRAIN, folder / TRAIN)
    (folder / PARAMS).write_text(yaml.safe_dump(everything, allow_unicode=True), encoding="utf-8")
    _run_stage("oversample", folder)
    if workspace_has(folder / OVERSAMPLED, {section: everything[section] for section in ("student", "qlora_train")}):
        shutil.copytree(ADAPTER, folder / ADAPTER)
    else:
        _run_stage("qlora_train", folder)
    return folder


def _training(factor: int, seed: int) -> tuple[dict[str, Any], str]:
    """The parameters of a training, and a name for all that it follows from."""
    everything = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    everything["oversample"]["escalation_factor"], everything["qlora_train"]["seed"] = factor, seed
    made_by = [code(stage) for stage in ("oversample", "qlora_train")]
    return everything, _digest([made_by, *(everything[section] for section in ("student", "qlora_train", "oversample"))], TRAIN)


def follows_from(factor: int, seed: int, split: Path, params: PredictParams) -> str:
    """A name for all that the counts of a student on a split follow from: code, parameters and data."""
    return _digest([_training(factor, seed)[1], code("predict_student"), code("eval_exact"), params.max_new_tokens], split)


def counted() -> dict[str, dict[str, tuple[int, int]]]:
    """What the last sweep counted, by `follows_from`; nothing if there was none."""
    if not METRICS.is_file():
        return {}
    runs = json.loads(METRICS.read_text(encoding="utf-8"))["runs"]
    return {rates["follows_from"]: {name: (rates[name]["k"], rates[name]["n"]) for name in RATES}
            for one in runs for split in (CALIBRATION, HELD_OUT) if "follows_from" in (rates := one.get(split.stem) or {})}


def code(stage: str) -> dict[str, str]:
    """path -> MD5 of the code that a stage runs, by dvc.yaml: as for DVC, what other code made is not this code's."""
    deps = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]["deps"]
    return {path: hashlib.md5((ROOT / path).read_bytes()).hexdigest() for path in deps if path.endswith((".py", ".c", ".h"))}


def workspace_has(rows: Path, params: dict[str, Any]) -> bool:
    """Whether the workspace's adapter was trained on these rows with these parameters by this code, by its dvc.lock."""
    if not (LOCK.is_file() and (ADAPTER / "adapter_config.json").is_file()):
        return False
    stage = yaml.safe_load(LOCK.read_text(encoding="utf-8")).get("stages", {}).get("qlora_train", {})
    read = {dep["path"]: dep.get("md5") for dep in stage.get("deps", [])}
    return (read == {OVERSAMPLED.as_posix(): hashlib.md5(rows.read_bytes()).hexdigest(), **code("qlora_train")}
            and stage.get("params", {}).get("params.yaml") == params)


def _run_stage(stage: str, folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HANDOFF_CACHE": str(CACHE.resolve())}
    if subprocess.run([sys.executable, "-m", f"stages.{stage}"], cwd=folder, env=environment, check=False).returncode:
        raise InputError(f"{stage} did not end well in {folder}", "see above; the same command goes on from here")


def _digest(what: Any, file: Path) -> str:
    return hashlib.sha256(json.dumps([what, hashlib.sha256(file.read_bytes()).hexdigest()], sort_keys=True).encode()).hexdigest()[:16]


def replies(folder: Path, split: Path, params: PredictParams, student: StudentParams) -> pl.DataFrame:
    """What a student says at every agent turn of a split, decoded if it has not been."""
    import polars as pl

    table = read_table(split, Verified)
    path = folder / f"{split.stem}-{_digest([code('predict_student'), params.max_new_tokens], split)}.parquet"
    if not path.is_file():
        tokenizer = load_tokenizer(student)
        decoder = TurnDecoder(load_student(student, folder / ADAPTER), tokenizer, params.max_new_tokens, params.turns_at_once)
        rows = decode_all(encode_table(table, Encoder(tokenizer)), decoder, False)
        write_table(path, pl.DataFrame(rows, schema_overrides={"other": pl.String}).with_columns(model=pl.lit("student")), Replies)
    return gold_turns(table).join(parse_replies(read_table(path, Replies)), on=["conversation_id", "number"], how="inner")


def outcome(rates: dict[str, tuple[int, int]]) -> Outcome:
    """From the counts of the rates."""
    (caught, handoffs), (needless, others) = rates["escalate_recall"], rates["over_escalation"]
    return Outcome(handoffs - caught, handoffs, needless, others)


def table(runs: list[dict[str, Any]], split: str) -> list[list[str]]:
    """Header and one row for every student that was measured on a split; counts, which say by themselves how many turns there are."""
    return [["factor", "seed", *(name.replace("_", " ") for name in RATES)], *(
        [str(one["factor"]), str(one["seed"]), *(f"{one[split][name]['k']}/{one[split][name]['n']}" for name in RATES)]
        for one in runs if split in one)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("factors", nargs="+", type=int, metavar="FACTOR", help="oversample.escalation_factor")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="qlora_train.seed: the first for every factor, the others for the "
                        "smallest and the chosen one; that of params.yaml where left out")
    parser.add_argument("--held-out", action="store_true", help="measure the smallest and the chosen factor on the held-out companies too")
    options = parser.parse_args()
    if (least := min(options.factors)) < 1:
        raise InputError(f"a factor of {least} is none", "factors are whole numbers from 1, e.g. python -m stages.sweep 1 2 4 8")
    student, predict = load_params("student", StudentParams), load_params("predict", PredictParams)
    calibrate = load_params("calibrate", CalibrateParams)
    load_params("oversample", OversampleParams)
    first, *others = dict.fromkeys(options.seeds or [load_params("qlora_train", QloraTrainParams).seed])

    before = counted()

    def measured(factor: int, seed: int, split: Path) -> dict[str, tuple[int, int]]:
        name = follows_from(factor, seed, split, predict)
        rates = before.get(name) or score(replies(trained(factor, seed), split, predict, student), "student")
        of = outcome(rates)
        print(f"sweep: factor {factor}, seed {seed}, {split.stem}: {of.handoffs - of.missed} of {of.handoffs} hand-offs, "
              f"{of.needless} of {of.others} needless{', as counted before' if name in before else ''}", file=sys.stderr)
        return rates

    found = {(factor, first): {CALIBRATION: measured(factor, first, CALIBRATION)} for factor in sorted(set(options.factors))}
    terms = calibrate.rule, calibrate.cost_missed, calibrate.cost_needless, calibrate.max_over_escalation
    chosen = best({factor: outcome(rates[CALIBRATION]) for (factor, _), rates in found.items()}, *terms)
    for factor in sorted({least, chosen}):
        for seed in others:
            found[factor, seed] = {CALIBRATION: measured(factor, seed, CALIBRATION)}
        if options.held_out:
            for seed in (first, *others):
                found[factor, seed][HELD_OUT] = measured(factor, seed, HELD_OUT)

    runs = [{"factor": factor, "seed": seed, **{
        split.stem: {"follows_from": follows_from(factor, seed, split, predict), **{name: rate(*rates[name]) for name in RATES}}
        for split, rates in of.items()}} for (factor, seed), of in sorted(found.items())]
    write_metrics(METRICS, {"rule": in_words(*terms), "chosen_on_calibration": chosen, "chosen_with_seed": first, "runs": runs}, SweepMetrics)
    CURVE.parent.mkdir(parents=True, exist_ok=True)
    with CURVE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["factor", "seed", *RATES])
        for one in runs:
            shares = [one["calibration"][name] for name in RATES]
            writer.writerow([one["factor"], one["seed"], *(round(share["k"] / max(1, share["n"]), 4) for share in shares)])
    for split in (CALIBRATION.stem, HELD_OUT.stem)[:1 + options.held_out]:
        print(f"{split}:\n\n{markdown(table(runs, split))}\n")
    say(f"sweep: the rule chooses factor {chosen}: {in_words(*terms)} Set oversample.escalation_factor: {chosen} in params.yaml, then dvc repro")


if __name__ == "__main__":
    run(main)
