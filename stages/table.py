"""Print the result table from the metrics files.

    python -m stages.table                  of the workspace
    python -m stages.table --markdown       as it stands in README
    python -m stages.table --rev REV        of a commit or an experiment
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from schemas.counts import CalibrateDetail, ExactCounts, JudgeCounts
from schemas.errors import InputError
from schemas.self_agreement import GenerationMetrics
from stages._revisions import WORKSPACE, read_json
from stages._show import markdown, plain
from stages._stage import run

EXACT = Path("metrics/eval_exact_counts.json")
JUDGE = Path("metrics/eval_judge_counts.json")
GENERATED = Path("metrics/teacher_gen.json")
CALIBRATED = Path("metrics/calibrate_detail.json")
COLUMNS = {"action_accuracy": "action accuracy", "escalate_recall": "escalation recall", "over_escalation": "over-escalation",
           "valid_output": "valid output", "acceptable": "acceptable"}
NOTE = ("valid output is measured free-running; base's other figures are decoded under the JSON schema, the student's free-running. "
        "Teacher: {teacher}. Judge: {judge}.")

SHARED = "Base and student share one hand-off score: the same area under the curve (AUC), and the same turns handed off at the threshold."


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


def operating_rows(detail: dict[str, Any]) -> list[list[str]]:
    """Header and one row for every company and model: what the threshold makes of recall, over-escalation and cost."""
    table = [["company", "model", "escalation recall", "over-escalation", "minutes a turn", "at the threshold: recall", "over-escalation",
              "minutes a turn", "AUC"]]
    for company, models in detail["held_out"].items():
        for model, of in models.items():
            figures = [cell for name in ("plain", "at_threshold") for cell in (_policy(of[name]) if name in of else ["–"] * 3)]
            auc = of["auc"]["value"]
            table.append([company, model, *figures, "–" if auc is None else f"{auc:.2f}"])
    return table


def shared_score(detail: dict[str, Any]) -> bool:
    """Whether base and student have the same score, as they do unless the revision is an old one."""
    return all(of["base"]["auc"] == of["student"]["auc"] for of in detail["held_out"].values())


def _policy(figures: dict[str, Any]) -> list[str]:
    return [_show(figures["escalate_recall"]), _show(figures["over_escalation"]), f"{figures['expected_cost']['value']:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the result table.")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--rev", default=WORKSPACE)
    options = parser.parse_args()
    exact, judge, generated = (read_json(path, options.rev, model) for path, model in (
        (EXACT, ExactCounts), (JUDGE, JudgeCounts), (GENERATED, GenerationMetrics)))
    table = rows(exact, judge)
    show = markdown if options.markdown else plain
    print(show(table))
    print(NOTE.format(teacher=generated["teacher"], judge=judge["judge"]))
    if generated["scenarios_per_company"]:
        print(f"A SLICE of {generated['scenarios_per_company']} scenarios a company, to see that it runs: the figures mean nothing.")
    try:
        detail = read_json(CALIBRATED, options.rev, CalibrateDetail)
    except InputError as error:
        print(f"\nNo operating point: {error}.")
        return
    print(f"\n{show(operating_rows(detail))}")
    print(f"{detail['rule']} Costs in minutes are assumed: {detail['costs']['missed_minutes']:g} for a missed hand-off, "
          f"{detail['costs']['needless_minutes']:g} for a needless one.")
    if shared_score(detail):
        print(SHARED)


if __name__ == "__main__":
    run(main)
