"""Print the result table from the metrics files.

    python -m stages.table                  of the workspace
    python -m stages.table --markdown       as it stands in README
    python -m stages.table --rev REV        of a commit or an experiment
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from schemas.errors import InputError
from stages._stage import run

EXACT = Path("metrics/eval_exact_counts.json")
JUDGE = Path("metrics/eval_judge_counts.json")
GENERATED = Path("metrics/teacher_gen.json")
COLUMNS = {"action_accuracy": "action accuracy", "escalate_recall": "escalation recall", "over_escalation": "over-escalation",
           "valid_output": "valid output", "acceptable": "acceptable"}
NOTE = ("valid output is measured free-running; base's other figures are decoded under the JSON schema, the student's free-running. "
        "Teacher: {teacher}. Judge: {judge}.")


def load(path: Path, rev: str | None) -> dict[str, Any]:
    """A metrics file of the workspace, or of a revision.

    Raises:
        InputError: it is not there.
    """
    if rev is None:
        if not path.is_file():
            raise InputError(f"{path} does not exist", "dvc repro writes it")
        return json.loads(path.read_text(encoding="utf-8"))

    import dvc.api
    from dvc.exceptions import DvcException

    try:
        return json.loads(dvc.api.read(path.as_posix(), rev=rev))
    except (DvcException, OSError) as error:
        raise InputError(f"{path} of revision '{rev}' cannot be read: {error}", "git log, or dvc exp list, shows the revisions") from None


def rows(exact: dict[str, Any], judge: dict[str, Any]) -> list[list[str]]:
    """Header and one row for every company and model; every rate as percent and k/n."""
    table = [["company", "model", *COLUMNS.values()]]
    for company, models in exact.items():
        for model, rates in models.items():
            everything = {**judge[company][model], **rates}
            table.append([company, model, *(_show(everything[name]) for name in COLUMNS)])
    return table


def _show(value: dict[str, Any]) -> str:
    k, n = value["k"], value["n"]
    return f"{100 * k / n:.1f} % ({k}/{n})" if n else "– (0/0)"


def markdown(table: list[list[str]]) -> str:
    header, *body = table
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *body))


def plain(table: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the result table.")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--rev")
    options = parser.parse_args()
    exact, judge, generated = (load(path, options.rev) for path in (EXACT, JUDGE, GENERATED))
    table = rows(exact, judge)
    print(markdown(table) if options.markdown else plain(table))
    print(NOTE.format(teacher=generated["teacher"], judge=judge["judge"]))
    if generated["scenarios_per_company"]:
        print(f"A SLICE of {generated['scenarios_per_company']} scenarios a company, to see that it runs: the figures mean nothing.")


if __name__ == "__main__":
    run(main)
