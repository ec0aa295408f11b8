"""Print the result table from the metrics files.

    python -m stages.table            text
    python -m stages.table markdown   as in README
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from schemas.errors import InputError
from stages._stage import run

EXACT = Path("metrics/eval_exact_counts.json")
JUDGE = Path("metrics/eval_judge_counts.json")
COLUMNS = {"action_accuracy": "action accuracy", "escalate_recall": "escalation recall", "over_escalation": "over-escalation",
           "valid_output": "valid output", "acceptable": "acceptable"}
NOTE = ("valid output is measured free-running; base's other figures are decoded under the JSON schema, the student's free-running. "
        "Teacher and judge: {judge}.")


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path} does not exist", "dvc repro writes it")
    return json.loads(path.read_text(encoding="utf-8"))


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
    exact, judge = _load(EXACT), _load(JUDGE)
    table = rows(exact, judge)
    slice_of = json.loads(Path("metrics/teacher_gen.json").read_text(encoding="utf-8"))["scenarios_per_company"]
    print(markdown(table) if sys.argv[1:] == ["markdown"] else plain(table))
    print(("A SLICE of the scenarios, to see that it runs; the figures mean nothing. " if slice_of else "") + NOTE.format(judge=judge["judge"]))


if __name__ == "__main__":
    run(main)
