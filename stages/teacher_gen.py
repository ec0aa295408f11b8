"""Let the teacher hold one conversation for every scenario, with the real tools; or take recorded ones instead.

Reads   data/companies/, the logs and the mapping of `teacher_gen.recorded`
Writes  data/teacher_gen/traces.parquet, data/teacher_gen/recorded.parquet, metrics/teacher_gen.json

A conversation that breaks a rule is held again, with another sample, up to `attempts` times; every attempt is kept in
the table, so that verify sees and counts what the teacher really produced. With `source: recorded` nobody is asked: the
traces are the logs', and recorded.parquet holds what became of every line; else it has no rows.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import Field
from tqdm import tqdm

from agent.endpoint import SIMULATOR, Endpoint, EndpointParams, open_endpoint
from agent.kb import KnowledgeBase
from agent.loop import Transcript, converse
from agent.world import World
from schemas.company import Company, Scenario
from schemas.errors import InputError
from schemas.metrics import TeacherGenMetrics
from schemas.recorded import Recorded, RecordedGenMetrics, Source
from schemas.tables import Traces
from stages._recorded import Logs, RecordedParams, read_logs
from stages._rules import examine
from stages._simulated import simulator_for
from stages._stage import (
    DataParams,
    Params,
    load_params,
    run,
    say,
    used_companies,
    write_metrics,
    write_table,
)

TRACES = Path("data/teacher_gen/traces.parquet")
RECORDED = Path("data/teacher_gen/recorded.parquet")
METRICS = Path("metrics/teacher_gen.json")


class TeacherGenParams(Params):
    """`teacher_gen`."""

    source: Source = Field(strict=False)
    recorded: RecordedParams
    attempts: int = Field(ge=1)
    teacher: EndpointParams
    customer: EndpointParams


async def hold_conversations(companies: dict[str, Company], params: TeacherGenParams, simulator_url: str | None) -> list[dict[str, Any]]:
    """All conversations, at once as far as the endpoints allow; rows in the order of the corpus."""
    async with open_endpoint(params.teacher, simulator_url) as teacher, open_endpoint(params.customer, simulator_url) as customer:
        bases = {slug: KnowledgeBase(company.articles) for slug, company in companies.items()}
        jobs = [(company, scenario) for company in companies.values() for scenario in company.scenarios]
        # Twice as many conversations as slots keep every slot busy while tools run.
        room = asyncio.Semaphore(2 * params.teacher.max_concurrency)
        bar = tqdm(total=len(jobs), desc="teacher_gen", unit="conv", file=sys.stderr)

        async def job(company: Company, scenario: Scenario) -> list[dict[str, Any]]:
            async with room:
                rows = await _attempts(company, scenario, bases[company.slug], params, teacher, customer)
                bar.update()
                return rows

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job(company, scenario)) for company, scenario in jobs]
        bar.close()
        return [row for task in tasks for row in task.result()]


async def _attempts(company: Company, scenario: Scenario, kb: KnowledgeBase, params: TeacherGenParams,
                    teacher: Endpoint, customer: Endpoint) -> list[dict[str, Any]]:
    rows = []
    for attempt in range(params.attempts):
        world = World(company, kb, scenario.tickets, scenario.ticket_start)
        transcript = await converse(company, scenario, world, teacher, customer, sample=attempt)
        rows += _rows(company, scenario, attempt, params.teacher, transcript)
        if transcript.failure or examine(transcript.messages, company, scenario) is None:
            break
    return rows


def _rows(company: Company, scenario: Scenario, attempt: int, teacher: EndpointParams, transcript: Transcript) -> list[dict[str, Any]]:
    common = {
        "conversation_id": f"{company.slug}/{scenario.id}/{attempt}", "company": company.slug, "scenario": scenario.id,
        "attempt": attempt, "teacher": teacher_name(teacher), "failure": transcript.failure}
    empty = {"index": 0, "role": "customer", "content": "", "prompt_tokens": 0, "completion_tokens": 0}
    return [
        {**common, "index": index, "role": message.role.value, "content": message.content, "prompt_tokens": cost[0], "completion_tokens": cost[1]}
        for index, (message, cost) in enumerate(zip(transcript.messages, transcript.costs, strict=True))
    ] or [{**common, **empty}]


def teacher_name(endpoint: EndpointParams) -> str:
    """What tables and metrics call the model: the simulator is never called anything else."""
    return "simulator" if endpoint.base_url == SIMULATOR else endpoint.model


def take_recorded(params: RecordedParams, data: DataParams) -> None:
    """The stage with `source: recorded`.

    Raises:
        InputError: logs or mapping cannot be used.
    """
    import polars as pl

    logs = read_logs(params, data)
    write_table(TRACES, pl.DataFrame(logs.traces, schema_overrides={"failure": pl.String, "scenario": pl.String}), Traces)
    write_table(RECORDED, logs.table(), Recorded)
    metrics = logs.metrics()
    write_metrics(METRICS, metrics, RecordedGenMetrics)
    counts = metrics["recorded"]
    worst = ", ".join(f"{reason} {count}" for reason, count in Counter(counts["reasons"]).most_common(3) if count)
    say(f"teacher_gen: {counts['in']} recorded conversations, {counts['mapped']} mapped, {counts['unmapped']} not ({worst or 'none'}), "
        f"{metrics['agent_turns']} agent turns")


def main() -> None:
    import polars as pl

    params = load_params("teacher_gen", TeacherGenParams)
    data = load_params("data", DataParams)
    if params.source is Source.RECORDED:
        take_recorded(params.recorded, data)
        return
    companies = used_companies(data)
    with simulator_for("actors", params.teacher, params.customer) as url:
        try:
            rows = asyncio.run(hold_conversations(companies, params, url))
        except* InputError as group:
            raise group.exceptions[0] from None
    frame = pl.DataFrame(rows, schema_overrides={"failure": pl.String, "scenario": pl.String})
    write_table(TRACES, frame, Traces)
    write_table(RECORDED, Logs().table(), Recorded)
    agent = frame.filter(pl.col("role") == "agent")
    metrics = {
        "teacher": teacher_name(params.teacher),
        "customer": teacher_name(params.customer),
        "scenarios_per_company": data.scenarios_per_company,
        "scenarios": frame.select("company", "scenario").n_unique(),
        "conversations": frame["conversation_id"].n_unique(),
        "agent_turns": len(agent),
        "infrastructure_failures": frame.filter(pl.col("failure").is_not_null())["conversation_id"].n_unique(),
        "prompt_tokens": int(frame["prompt_tokens"].sum()),
        "completion_tokens": int(frame["completion_tokens"].sum()),
    }
    write_metrics(METRICS, metrics, TeacherGenMetrics)
    say(f"teacher_gen: {metrics['conversations']} conversations of {metrics['scenarios']} scenarios, {metrics['agent_turns']} agent turns "
        f"by {metrics['teacher']}, {metrics['infrastructure_failures']} infrastructure failures")


if __name__ == "__main__":
    run(main)
