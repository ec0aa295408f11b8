"""What every stage does alike: read parameters and tables, write them whole, speak to the user."""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from schemas.company import Company, company_slugs, load_company
from schemas.errors import InputError

if TYPE_CHECKING:
    import pandera.polars as pa
    import polars as pl

PARAMS = Path("params.yaml")
PIPELINE = Path("dvc.yaml")
_P = TypeVar("_P", bound=BaseModel)


class Params(BaseModel):
    """Base of every stage's parameters: unknown keys and wrong types stop the run."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DataParams(Params):
    """`data`: which companies are only measured on, and how much of each is used."""

    held_out: list[str] = Field(min_length=1)
    scenarios_per_company: int = Field(ge=0, description="0 = all; a small number makes a slice for trying things out")


def read_params(path: Path = PARAMS) -> dict[str, Any]:
    """All of params.yaml, unchecked; empty where it is no mapping of sections.

    Raises:
        InputError: the file is missing or no YAML.
    """
    try:
        everything = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}", "git checkout params.yaml brings the default back") from None
    return everything if isinstance(everything, dict) else {}


def load_params(section: str, model: type[_P], path: Path = PARAMS) -> _P:
    """One section of params.yaml.

    Raises:
        InputError: the file or the section is missing, a key is unknown, or a value has the wrong type.
    """
    everything = read_params(path)
    if section not in everything:
        raise InputError(f"{path} has no section '{section}'", f"git diff {path} shows what changed")
    try:
        return model.model_validate(everything[section])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([section, *map(str, first["loc"])])
        if first["type"] == "extra_forbidden":
            raise InputError(f"{path}: unknown parameter '{key}'", f"known here: {', '.join(_keys(model, first['loc']))}") from None
        raise InputError(f"{path}: {key}: {first['msg']} (found {first.get('input')!r})", f"git diff {path} shows what changed") from None


def _keys(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for part in location[:-1]:
        inner = model.model_fields[str(part)].annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
    return list(model.model_fields)


def used_companies(data: DataParams, logged: Collection[str] = ()) -> dict[str, Company]:
    """The companies by slug that have a folder, each cut to the first scenarios of every kind where `scenarios_per_company` asks for a slice.

    Args:
        data: which companies are held out.
        logged: companies of which there are recorded conversations, with a folder or without.

    Raises:
        InputError: a held-out company does not exist, none is left to train on, or a file is broken.
    """
    slugs = company_slugs()
    for slug in data.held_out:
        if slug not in slugs and slug not in logged:
            raise InputError(f"params.yaml: data.held_out names '{slug}', and data/companies/{slug} does not exist",
                             f"companies here: {', '.join(sorted({*slugs, *logged})) or 'none'}")
    if not {*slugs, *logged} - set(data.held_out):
        raise InputError("every company is held out, so there is nothing to train on", "shorten data.held_out in params.yaml")
    companies = {slug: load_company(slug) for slug in slugs}
    if limit := data.scenarios_per_company:
        companies = {slug: company.model_copy(update={"scenarios": _slice(company, limit)}) for slug, company in companies.items()}
    return companies


def _slice(company: Company, limit: int) -> list[Any]:
    by_kind: dict[str, list[Any]] = {}
    for scenario in company.scenarios:
        by_kind.setdefault(scenario.kind, []).append(scenario)
    # Round robin over the kinds, so that a slice of any size holds every kind.
    ranked = sorted((position, kind, scenario.id) for kind, items in by_kind.items() for position, scenario in enumerate(items))
    chosen = {scenario_id for _, _, scenario_id in ranked[:limit]}
    return [scenario for scenario in company.scenarios if scenario.id in chosen]


def read_table(path: Path, schema: type[pa.DataFrameModel]) -> pl.DataFrame:
    """A stage's input, checked.

    Raises:
        InputError: the file does not exist, is not Parquet, or is not such a table.
    """
    import pandera.errors
    import polars as pl

    if not path.is_file():
        raise InputError(f"{path} does not exist", f"run the stage that writes it: dvc repro {_producer(path)}")
    try:
        frame = pl.read_parquet(path)
        return schema.validate(frame)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        problem = str(error).splitlines()[0]
    except (pandera.errors.SchemaError, pandera.errors.SchemaErrors) as error:
        problem = " ".join(str(error).split())[:200]
    raise InputError(f"{path} is not a {schema.__name__} table: {problem}", f"delete it and run: dvc repro --force {_producer(path)}")


def write_table(path: Path, frame: pl.DataFrame, schema: type[pa.DataFrameModel]) -> None:
    """Check and write a table; the file appears whole or not at all."""
    checked = schema.validate(frame.select(list(schema.to_schema().columns)))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    checked.write_parquet(partial, compression="zstd")
    os.replace(partial, path)


def _producer(path: Path) -> str:
    if path.parent.name == "predict":
        return f"predict_{path.stem.split('_')[0]}"
    return path.parent.name if path.parent.parent.name in {"data", "models"} else path.stem


def write_metrics(path: Path, metrics: dict[str, Any], schema: type[BaseModel] | None = None) -> None:
    """Check and write a metrics file: rates rounded to four places, so that a diff shows changes and not noise."""
    if schema:
        schema.model_validate(metrics)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(metrics), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def say(text: str) -> None:
    """The one line that a stage leaves behind, on standard output."""
    print(text, flush=True)


def run(main: Callable[[], None]) -> None:
    """Run a stage's main; a user's mistake is one sentence and a hint on standard error, exit code 1.

    Under DVC, which removes a stage's outputs before it starts it, a second hint says how they come back.
    """
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        if commands := _way_back(os.environ.get("DVC_STAGE", "")):
            print(f"hint: DVC had removed the stage's outputs; those of an earlier run come back with: {commands}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        if not _unread():
            raise
        # What is left in the buffer would raise once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _unread() -> bool:
    """Whether whoever read standard output has enough, as `head` has after some lines."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # only what is told unasked: that the other end is closed
    return bool(poll.poll(0))


def _way_back(stage: str) -> str:
    """The commands that restore a stage's outputs, from DVC's cache or from git; empty where DVC did not start us.

    Args:
        stage: as DVC names it, with its file in front where that is not the dvc.yaml of the directory.
    """
    if not stage or not PIPELINE.is_file():
        return ""
    name = stage.rpartition(":")[2]
    declared = yaml.safe_load(PIPELINE.read_text(encoding="utf-8"))["stages"].get(name, {})
    outputs = declared.get("outs", []) + declared.get("metrics", [])
    in_git = [path for entry in outputs if isinstance(entry, dict) for path, options in entry.items() if options.get("cache") is False]
    cached = [f"dvc checkout {name}"] if len(in_git) < len(outputs) else []
    return "; ".join(cached + ([f"git checkout -- {' '.join(in_git)}"] if in_git else []))
