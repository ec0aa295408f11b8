"""Files as they stand in a revision, and the per-turn predictions of one under a policy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from schemas.errors import InputError
from schemas.operating import OperatingPoint, Policy
from stages._policy import parse_predictions, scored_rows, tuned

if TYPE_CHECKING:
    import polars as pl

WORKSPACE = "workspace"
PREDICTIONS = Path("data/eval_exact/predictions.parquet")
OPERATING_POINT = Path("models/operating_point.json")
LOCK = Path("dvc.lock")
HELD_OUT = "data/verify/held_out.parquet"


def read_revision(path: Path, rev: str) -> bytes:
    """A file of the workspace, a commit, a branch, a tag or an experiment, whether git or DVC's cache keeps it.

    Raises:
        InputError: there is no such revision, it has no such file, or its data is not on this machine.
    """
    if rev == WORKSPACE:
        if not path.is_file():
            raise InputError(f"{path} does not exist in the workspace", "dvc pull brings one that was shared; to write it, run: dvc repro")
        return path.read_bytes()

    import dvc.api
    from dvc.exceptions import DvcException, FileMissingError, PathMissingError
    from dvc.scm import RevError

    try:
        return dvc.api.read(path.as_posix(), rev=rev, mode="rb")
    except RevError:
        raise InputError(f"there is no revision '{rev}'", "git log, git branch and dvc exp list show the revisions") from None
    except (PathMissingError, FileMissingError, FileNotFoundError):
        raise InputError(f"{path} of revision '{rev}' is neither in git nor in DVC's cache on this machine",
                         f"dvc pull --all-commits {path} brings what was shared; or check that revision out and run: dvc repro") from None
    except (DvcException, OSError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"{path} of revision '{rev}' cannot be read: {why}", "dvc doctor shows what is wrong here") from None


def has_file(path: Path, rev: str) -> bool:
    """Whether a revision has a file, be its content on this machine or not.

    Raises:
        InputError: there is no such revision.
    """
    if rev == WORKSPACE:
        return path.is_file()

    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc.scm import RevError

    try:
        return bool(DVCFileSystem(rev=rev).exists(path.as_posix()))
    except RevError:
        raise InputError(f"there is no revision '{rev}'", "git log, git branch and dvc exp list show the revisions") from None
    except DvcException as error:
        raise InputError(f"revision '{rev}' cannot be read: {' '.join(str(error).split())}", "dvc doctor shows what is wrong here") from None


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a revision under a policy, written `REV` (plain), `REV:plain` or `REV:tuned`."""

    rev: str
    policy: Policy

    @classmethod
    def parse(cls, text: str) -> Side:
        """From its written form.

        Raises:
            InputError: an unknown policy, or no revision.
        """
        rev, colon, policy = text.partition(":")
        if not rev or (colon and policy not in list(Policy)):
            raise InputError(f"'{text}' is no side of a comparison", "write REV, REV:plain or REV:tuned; 'workspace' is a revision too")
        return cls(rev, Policy(policy) if colon else Policy.PLAIN)

    def __str__(self) -> str:
        return f"{self.rev}:{self.policy.value}"


def operating_point(rev: str) -> OperatingPoint:
    """The threshold that a revision ships with.

    Raises:
        InputError: it has none, or not one in this version's form.
    """
    try:
        return OperatingPoint.model_validate_json(read_revision(OPERATING_POINT, rev))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{OPERATING_POINT} of '{rev}' is no operating point: {'.'.join(map(str, first['loc']))}: {first['msg']}",
                         "dvc repro --force calibrate writes it anew") from None


def predictions(side: Side) -> pl.DataFrame:
    """The scored row of every turn and model, `action` under the side's policy; tuned has the student alone, since it alone ships.

    Raises:
        InputError: the revision lacks what is needed.
    """
    import polars as pl

    content = read_revision(PREDICTIONS, side.rev)
    rows = scored_rows(parse_predictions(content, f"{PREDICTIONS} of '{side.rev}'", with_score=side.policy is Policy.TUNED))
    if side.policy is Policy.PLAIN:
        return rows
    return tuned(rows.filter(pl.col("model") == "student"), operating_point(side.rev).threshold)


def held_out_hash(rev: str) -> str | None:
    """The MD5 of the held-out conversations that a revision's eval_exact read, by its dvc.lock; None where there is none.

    Raises:
        InputError: the lock file is no YAML.
    """
    try:
        lock = yaml.safe_load(read_revision(LOCK, rev))
    except InputError:
        return None
    except yaml.YAMLError as error:
        raise InputError(f"{LOCK} of '{rev}' is not YAML: {' '.join(str(error).split())[:200]}",
                         "git checkout brings the committed one back; a merge leaves its marks in it until they are resolved") from None
    try:
        deps = lock["stages"]["eval_exact"]["deps"]
        return next((dep.get("md5") for dep in deps if dep["path"] == HELD_OUT), None)
    except (KeyError, TypeError):
        return None


def same_turns(a: Side, b: Side, left: pl.DataFrame, right: pl.DataFrame) -> None:
    """Refuse two tables whose turns cannot be joined.

    Raises:
        InputError: other turns, other gold steps, or other conversations behind them.
    """
    turn = ["company", "conversation_id", "index"]
    keys = [*turn, "gold_action", "gold_reason"]
    hint = "compare revisions that evaluated on the same data: in one of them, dvc repro eval_exact on the other's data"
    for one, other, first, second in ((a, b, left, right), (b, a, right, left)):
        if alone := len(first.select(keys).unique().join(second.select(keys).unique(), on=keys, how="anti", nulls_equal=True)):
            raise InputError(f"{alone} turns of {one.rev} are not in {other.rev}: they were measured on different evaluation sets", hint)
    hashes = held_out_hash(a.rev), held_out_hash(b.rev)
    if None not in hashes and len(set(hashes)) > 1:
        raise InputError(f"{a.rev} and {b.rev} have the same turns but other conversations around them ({HELD_OUT} differs in dvc.lock)", hint)


def same_grader(a: str, b: str) -> None:
    """Refuse two revisions that read the same text as different steps, whatever their thresholds then make of the steps.

    Every decoding counts, also those that no figure is taken from: a student that was trained again says hardly anything
    twice, the base model says all of it twice.

    Raises:
        InputError: the grader changed between them.
    """
    import polars as pl

    left, right = (parse_predictions(read_revision(PREDICTIONS, rev), f"{PREDICTIONS} of '{rev}'", with_score=False) for rev in (a, b))
    keys = ["conversation_id", "index", "model", "decoding", "raw"]
    both = left.join(right, on=keys, how="inner", suffix="_b")
    if changed := len(both.filter(pl.col("action").ne_missing(pl.col("action_b")))):
        raise InputError(f"{changed} equal texts are read as different steps in {a} and {b}: the grader changed between them",
                         "dvc repro eval_exact in the older one, with the newer code, makes them comparable")


def read_json(path: Path, rev: str, model: type[BaseModel]) -> dict[str, Any]:
    """A JSON file of a revision, as it is once `model` has read it.

    Raises:
        InputError: it is not there, or is no such file.
    """
    try:
        content: dict[str, Any] = json.loads(read_revision(path, rev))
        model.model_validate(content)
    except ValueError as error:
        raise InputError(f"{path} of '{rev}' cannot be read: {' '.join(str(error).split())[:200]}",
                         "git checkout brings the committed file back") from None
    return content
