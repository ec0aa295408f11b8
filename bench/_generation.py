"""`python -m bench._generation calls|conversations URL SLOTS COUNT`: teacher_gen's calls to an endpoint, timed.

`calls` makes COUNT calls after all slots are open, and prints seconds. `conversations` holds COUNT conversations as the
stage does, and prints a JSON object. Answers are kept in HANDOFF_CACHE, as the stage keeps them.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bm25s  # noqa: F401  (as the stage does, before it asks anything)
import psutil

from agent.endpoint import EndpointParams, open_endpoints
from agent.loop import Transcript
from agent.protocol import agent_chat
from agent.spend import Spend
from bench._copies import many_scenarios
from schemas.action import action_json_schema
from schemas.company import Company, Scenario
from schemas.traces import Message, Role
from stages._stage import load_params
from stages.teacher_gen import Held, TeacherGenParams, hold_all


def params(url: str, slots: int) -> EndpointParams:
    """The endpoint under measurement."""
    return EndpointParams(base_url=url, model="bench", api_key_env=None, temperature=0.7, max_tokens=400, max_concurrency=slots, timeout_s=60.0,
                          price=None)


async def call(url: str, slots: int, count: int) -> float:
    """Seconds for `count` calls of a teacher, on `slots` slots."""
    company = next(iter(many_scenarios(1).values()))
    schema = action_json_schema(company.profile.ticket_categories)
    async with open_endpoints(Spend(None, "bench"), None, params(url, slots)) as (endpoint,):

        async def rounds(numbers: range) -> None:
            left = iter(numbers)

            async def worker() -> None:
                for number in left:
                    await endpoint.chat(agent_chat(company, [Message(Role.CUSTOMER, f"Where is order {number}?")]), 0, schema)

            # As the stage does: twice as many conversations as slots.
            await asyncio.gather(*(worker() for _ in range(2 * slots)))

        await rounds(range(count, count + 2 * slots))  # each answer opens one more slot
        started = time.monotonic()
        await rounds(range(count))
        return time.monotonic() - started


def resident_mb() -> float:
    """Memory that this process holds now."""
    return psutil.Process().memory_info().rss / 2**20


async def generate(url: str, slots: int, count: int) -> dict[str, Any]:
    """Hold conversations; how many calls they took, how long, and the memory along the way."""
    companies = many_scenarios(count)
    endpoint = params(url, slots)
    section = load_params("teacher_gen", TeacherGenParams).model_copy(
        update={"teacher": endpoint, "customer": endpoint, "attempts": 1, "budget_usd": None})
    start_mb, seen = resident_mb(), [resident_mb()]

    async def look() -> None:
        while True:
            await asyncio.sleep(0.2)
            seen.append(resident_mb())

    looking = asyncio.create_task(look())
    spend = Spend(None, "bench")
    started = time.monotonic()
    with TemporaryDirectory() as folder:
        held = Held(Path(folder) / "held", endpoint)
        calls: list[int] = []

        def done(place: int, company: Company, scenario: Scenario, transcripts: list[Transcript]) -> None:
            if failed := {transcript.failure for transcript in transcripts} - {None}:
                raise RuntimeError(f"the server refuses what the stage asks: {failed}")
            calls.extend(sum(transcript.calls.values()) for transcript in transcripts)
            held.add(place, company, scenario, transcripts)

        await hold_all(companies, section, None, spend, done)
        seconds = time.monotonic() - started
        looking.cancel()
        table = held.table()
        table_mb = resident_mb()
        assert table["conversation_id"].n_unique() == len(calls)
    return {"conversations": len(calls), "calls": spend.sent, "longest": max(calls), "slots": slots, "seconds": seconds,
            "calls_per_s": spend.sent / seconds, "start_mb": start_mb, "half_mb": seen[len(seen) // 2], "peak_mb": max(seen), "table_mb": table_mb}


def main() -> None:
    what, url, slots, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    print(json.dumps(asyncio.run(generate(url, slots, count))) if what == "conversations" else asyncio.run(call(url, slots, count)))


if __name__ == "__main__":
    main()
