"""Let the teacher hold one conversation for every scenario, with the real tools; or take recorded ones instead.

Reads   data/companies/, the logs and the mapping of `teacher_gen.recorded`
Writes  data/teacher_gen/traces.parquet, data/teacher_gen/recorded.parquet, metrics/teacher_gen.json

A conversation that breaks a rule is held again, with another sample, up to `attempts` times; every attempt is kept in
the table, so that verify sees and counts what the teacher really produced. Conversations that have ended lie on disk until all have,
and the table is written, so that memory does not hold them. Every answer of a real endpoint is kept in
.cache/responses: a run that was stopped, or ended at `budget_usd`, goes on from there. With `source: recorded` nobody is
asked: the traces are the logs', and recorded.parquet holds what became of every line; else it has no rows. With `samples`
the teacher is asked again at some turns of the held-out companies, to see how far it agrees with itself.
"""

from __future__ import annotations

import asyncio
import ctypes
import sys
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import Field
from tqdm import tqdm

from agent.endpoint import Endpoint, EndpointParams, open_endpoints
from agent.kb import KnowledgeBase
from agent.loop import Transcript, converse
from agent.spend import Spend
from agent.world import World
from schemas.company import Company, Scenario
from schemas.recorded import Recorded, RecordedGenMetrics, Source
from schemas.self_agreement import GenerationMetrics
from schemas.tables import Traces
from schemas.traces import Message
from stages._chunks import Parts
from stages._recorded import Logs, RecordedParams, read_logs
from stages._rules import examine
from stages._self_agreement import (
    Turn,
    ask_again,
    draw_turns,
    in_words,
    kept,
    self_agreement,
)
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

if TYPE_CHECKING:
    import polars as pl

TRACES = Path("data/teacher_gen/traces.parquet")
RECORDED = Path("data/teacher_gen/recorded.parquet")
METRICS = Path("metrics/teacher_gen.json")
ROWS_AT_ONCE = 2**12
"""Messages of conversations that have ended, until they are put away on disk: 4 MB. Where tens of thousands wait, memory goes up and down by 27."""


class TeacherGenParams(Params):
    """`teacher_gen`."""

    source: Source = Field(strict=False)
    recorded: RecordedParams
    attempts: int = Field(ge=1)
    samples: int = Field(ge=0, description="how often the teacher is asked again at the drawn turns; 0 or 1 = not at all")
    budget_usd: float | None = Field(gt=0, description="what all that may cost, paid now or before; null = no cap")
    teacher: EndpointParams
    customer: EndpointParams


Done = Callable[[int, Company, Scenario, list[Transcript]], None]
"""Takes the attempts at a scenario, with its place in the corpus, as they have ended."""


def _give_back() -> None:
    """Let glibc give free pages between living objects back to the system, a kilobyte a conversation; by itself it does so at the heap's end only."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Held:
    """What has been held: its rows, which lie on disk, and what else is asked of it in the end.

    Args:
        folder: where rows lie; it is made here.
        teacher: whose conversations they are.
        again: companies whose conversations the teacher is asked about again; they are kept in memory.
    """

    def __init__(self, folder: Path, teacher: EndpointParams, again: Collection[str] = ()) -> None:
        self._teacher, self._again = teacher, again
        self._parts = Parts(folder, Traces, "place", rows=ROWS_AT_ONCE)
        self._rows: list[dict[str, Any]] = []
        self._kept: dict[int, tuple[Company, Scenario, list[Message]]] = {}
        self.paid_usd, self.cut_short = 0.0, 0

    def add(self, place: int, company: Company, scenario: Scenario, transcripts: list[Transcript]) -> None:
        """As `Done`."""
        self.paid_usd += sum(cost.cost_usd or 0.0 for transcript in transcripts for cost in transcript.costs)
        self.cut_short += sum(transcript.cut_short for transcript in transcripts)
        self._rows += ({"place": place, **row} for attempt, transcript in enumerate(transcripts)
                       for row in _rows(company, scenario, attempt, self._teacher, transcript))
        if len(self._rows) >= ROWS_AT_ONCE:
            self._put_away()
        if company.slug in self._again and (messages := kept(company, scenario, transcripts)):
            self._kept[place] = company, scenario, messages

    def _put_away(self) -> None:
        import polars as pl

        self._parts.add(pl.DataFrame(self._rows, schema_overrides={"failure": pl.String, "scenario": pl.String, "cost_usd": pl.Float64}))
        self._rows.clear()
        _give_back()

    def turns(self) -> list[Turn]:
        """Those to ask at again."""
        return draw_turns(self._kept[place] for place in sorted(self._kept))

    def table(self) -> pl.DataFrame:
        """All rows, in the order of the corpus."""
        if self._rows:
            self._put_away()
        return self._parts.scan().sort("place", "attempt", "index").drop("place").collect()


async def hold_conversations(companies: dict[str, Company], params: TeacherGenParams, simulator_url: str | None,
                             held_out: Collection[str] = ()) -> tuple[pl.DataFrame, dict[str, Any] | None]:
    """All conversations, at once as far as the endpoints allow: a table in the order of the corpus, and the teacher's agreement with itself.

    Raises:
        InputError: the budget is used up, or an endpoint is down, refuses the key or does not know the model. What was
            answered is in the cache.
    """
    spend = Spend(params.budget_usd, "teacher_gen")
    again = held_out if params.samples > 1 else ()
    with TemporaryDirectory() as folder:
        if params.budget_usd is not None:  # it covers what was paid before
            await hold_and_ask(companies, params, None, spend, Held(Path(folder) / "paid_before", params.teacher, again), offline=True)
        held = Held(Path(folder) / "held", params.teacher, again)
        agreement = await hold_and_ask(companies, params, simulator_url, spend, held)
        if spend.reason:
            raise spend.reason
        print(f"teacher_gen: {spend.summary()}", file=sys.stderr)
        if held.cut_short:
            print(f"teacher_gen: {held.cut_short} answers were cut at max_tokens; raise it if they are many", file=sys.stderr)
        return held.table(), agreement


async def hold_and_ask(companies: dict[str, Company], params: TeacherGenParams, simulator_url: str | None, spend: Spend, held: Held, *,
                       offline: bool = False) -> dict[str, Any] | None:
    """Every attempt at every scenario, then the teacher's agreement with itself where `samples` asks for it; `offline` as far as the cache goes."""
    await hold_all(companies, params, simulator_url, spend, held.add, offline=offline)
    if params.samples < 2 or spend.reason:
        return None
    turns = held.turns()
    answers = await ask_again(turns, params.samples, params.teacher, simulator_url, spend, held.paid_usd, offline=offline)
    return self_agreement(turns, answers, params.samples)


async def hold_all(companies: dict[str, Company], params: TeacherGenParams, simulator_url: str | None, spend: Spend, done: Done, *,
                   offline: bool = False) -> None:
    """Every attempt at every scenario; `offline` as far as the cache goes."""
    jobs = [(company, scenario) for company in companies.values() for scenario in company.scenarios]
    lengths = [sum(1 + len(turn.agent) for turn in scenario.turns) for _, scenario in jobs]
    bases = {slug: KnowledgeBase(company.articles) for slug, company in companies.items()}
    finished_usd, finished = 0.0, 0
    # Those that promise to be longest first, so that the last ones to end are short (LPT; Graham 1969).
    order = iter(sorted(range(len(jobs)), key=lambda number: -lengths[number]))
    async with open_endpoints(spend, simulator_url, params.teacher, params.customer, offline=offline) as (teacher, customer):
        # In messages as written: the first conversations are the longest, and would promise more time and dollars than it takes.
        with tqdm(total=sum(lengths), desc="teacher_gen", unit="message", file=sys.stderr, disable=offline, miniters=0) as bar:

            async def one_after_the_other() -> None:
                nonlocal finished_usd, finished
                for number in order:
                    company, scenario = jobs[number]
                    transcripts = await _attempts(company, scenario, bases[company.slug], params.attempts, teacher, customer)
                    done(number, company, scenario, transcripts)
                    finished_usd += sum(cost.cost_usd or 0.0 for transcript in transcripts for cost in transcript.costs)
                    finished += lengths[number]
                    bar.update(lengths[number])
                    bar.set_postfix_str(spend.progress(finished_usd / finished * sum(lengths)), refresh=False)

            async with asyncio.TaskGroup() as group:
                # Twice as many conversations as slots keep every slot busy while tools run.
                for _ in range(2 * params.teacher.max_concurrency):
                    group.create_task(one_after_the_other())


async def _attempts(company: Company, scenario: Scenario, kb: KnowledgeBase, attempts: int,
                    teacher: Endpoint, customer: Endpoint) -> list[Transcript]:
    transcripts = []
    for attempt in range(attempts):
        world = World(company, kb, scenario.tickets, scenario.ticket_start)
        transcripts.append(await converse(company, scenario, world, teacher, customer, sample=attempt))
        if transcripts[-1].failure or examine(transcripts[-1].messages, company, scenario) is None:
            break
    return transcripts


def _rows(company: Company, scenario: Scenario, attempt: int, teacher: EndpointParams, transcript: Transcript) -> list[dict[str, Any]]:
    common = {
        "conversation_id": f"{company.slug}/{scenario.id}/{attempt}", "company": company.slug, "scenario": scenario.id,
        "attempt": attempt, "teacher": teacher_name(teacher), "failure": transcript.failure}
    return [
        {**common, "index": index, "role": message.role.value, "content": message.content, **asdict(cost)}
        for index, (message, cost) in enumerate(zip(transcript.messages, transcript.costs, strict=True))
    ] or [{**common, "index": 0, "role": "customer", "content": "", **asdict(transcript.unplaced)}]


def teacher_name(endpoint: EndpointParams) -> str:
    """What tables and metrics call the model: the simulator is never called anything else."""
    return "simulator" if endpoint.simulated else endpoint.model


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
    import bm25s  # noqa: F401  (for the first search, which would hold up every conversation for as long as the import takes)
    import polars as pl

    params = load_params("teacher_gen", TeacherGenParams)
    data = load_params("data", DataParams)
    if params.source is Source.RECORDED:
        take_recorded(params.recorded, data)
        return
    companies = used_companies(data)
    with simulator_for("actors", params.teacher, params.customer) as url:
        frame, agreement = asyncio.run(hold_conversations(companies, params, url, data.held_out))
    write_table(TRACES, frame, Traces)
    write_table(RECORDED, Logs().table(), Recorded)
    agent = frame.filter(pl.col("role") == "agent")
    metrics: dict[str, Any] = {
        "teacher": teacher_name(params.teacher),
        "customer": teacher_name(params.customer),
        "scenarios_per_company": data.scenarios_per_company,
        "scenarios": frame.select("company", "scenario").n_unique(),
        "conversations": frame["conversation_id"].n_unique(),
        "agent_turns": len(agent),
        "infrastructure_failures": frame.filter(pl.col("failure").is_not_null())["conversation_id"].n_unique(),
        **{name: int(frame[name].sum()) for name in ("prompt_tokens", "cached_tokens", "completion_tokens")},
        "cost_usd": None if frame["cost_usd"].has_nulls() else float(frame["cost_usd"].sum()),
    }
    if agreement:
        metrics["self_agreement"] = agreement
    write_metrics(METRICS, metrics, GenerationMetrics)
    say(f"teacher_gen: {metrics['conversations']} conversations of {metrics['scenarios']} scenarios, {metrics['agent_turns']} agent turns "
        f"by {metrics['teacher']}, {metrics['infrastructure_failures']} infrastructure failures")
    if agreement:
        say(in_words(agreement, teacher_name(params.teacher)))


if __name__ == "__main__":
    run(main)
