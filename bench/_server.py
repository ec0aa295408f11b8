"""`python -m bench._server DELAY_S SLOTS CONVERSATIONS`: an OpenAI-compatible server that costs next to nothing itself.

SLOTS requests at a time take DELAY_S seconds each, others wait; with 0 slots none waits. With 0 conversations the answer is
always the same step; else teacher and customer play that many scenarios, without flaws. Prints its address, stops when
standard input closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from bench._copies import many_scenarios
from schemas.action import make_action
from simulator.actors import Player, Rates

STEP = make_action("It is so.", "reply", {}, "It is.").to_json()
Answer = Callable[[list[dict[str, str]], int], str]
Slots = AbstractAsyncContextManager[Any]


async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: Answer, delay_s: float, slots: Slots) -> None:
    """Answer the requests of one connection, one after the other."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            content = await reader.readexactly(length)
            async with slots:
                started, request = loop.time(), json.loads(content)
                body = json.dumps({
                    "choices": [{"message": {"content": answer(request["messages"], request.get("seed") or 0)}, "finish_reason": "stop"}],
                    "usage": {"prompt_tokens": length // 4, "completion_tokens": 60}}).encode()
                if (wait_s := started + delay_s - loop.time()) > 0:
                    await asyncio.sleep(wait_s)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()


async def serve(answer: Answer, delay_s: float, slots: int) -> None:
    """Serve until standard input closes."""
    free: Slots = asyncio.Semaphore(slots) if slots else contextlib.nullcontext()
    server = await asyncio.start_server(lambda reader, writer: converse(reader, writer, answer, delay_s, free), "127.0.0.1", 0,
                                        limit=2**20, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    delay_s, slots, count = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    flawless = Rates(**dict.fromkeys(Rates.model_fields, 0.0))
    asyncio.run(serve(Player(many_scenarios(count), flawless).answer if count else lambda messages, seed: STEP, delay_s, slots))


if __name__ == "__main__":
    main()
