"""An OpenAI-compatible server on loopback, written byte by byte, that misbehaves as it is told and counts what it was sent."""

import asyncio
import contextlib
import hashlib
import json
import socket
import struct
import threading
import time
from collections import Counter
from contextlib import contextmanager

OK = "ok"


def completion(text, finish="stop", **message):
    """A chat completion; usage is a token for four characters, a quarter of the prompt cached."""
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [
        {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}]}


def usage(request, text):
    prompt = sum(len(message["content"]) for message in request["messages"]) // 4
    written = max(1, len(text or "") // 4)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": prompt // 4}}


FAULTS = {
    "429": (429, {}, '{"error": {"message": "slow down"}}'),
    "429, wait": (429, {"retry-after": "0.05"}, "{}"),
    "500": (500, {}, "{}"),
    "503": (503, {}, "busy"),
    "529": (529, {}, '{"error": {"message": "overloaded"}}'),
    "no choices": (200, {}, '{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 0}}'),
    "no text": (200, {}, json.dumps(completion(None))),
    "wrong shape": (200, {}, '{"choices": {"message": "hello"}}'),
    "a list": (200, {}, "[1, 2]"),
    "html": (200, {"content-type": "text/html"}, "<html>Bad gateway</html>"),
    "empty body": (200, {}, ""),
}


class Hostile:
    """`fault(request, nth)` names what to do with the nth (0, 1, …) arrival of a request, or gives (status, headers, body)."""

    def __init__(self, answer, fault=lambda request, nth: OK, delay_s=0.0):
        self.answer, self.fault, self.delay_s = answer, fault, delay_s
        self.arrived, self.log, self.paid = Counter(), [], []
        self.open = self.most_open = 0
        self.url = ""

    @staticmethod
    def digest(request):
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()

    async def serve(self, reader, writer):
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                length = next(int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("content-length"))
                request = json.loads(await reader.readexactly(length))
                self.open += 1
                self.most_open = max(self.most_open, self.open)
                try:
                    if not await self.reply(request, head, writer):
                        break
                finally:
                    self.open -= 1

    async def reply(self, request, head, writer):
        """Whether the connection can go on."""
        digest = self.digest(request)
        fault = self.fault(request, self.arrived[digest])
        self.arrived[digest] += 1
        self.log.append((time.monotonic(), fault, request, head))
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "reset":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            return False
        if isinstance(fault, tuple) or fault in FAULTS:
            status, headers, body = fault if isinstance(fault, tuple) else FAULTS[fault]
        else:
            text = self.answer(request["messages"], request.get("seed") or 0)
            document = completion(text) if isinstance(text, str) else text
            document["usage"] = usage(request, document["choices"][0]["message"]["content"])
            self.paid.append(document["usage"])
            status, headers, body = 200, {}, json.dumps(document)
        data = body.encode()
        head = {"content-type": "application/json", "content-length": str(len(data)), **headers}
        writer.write(f"HTTP/1.1 {status} X\r\n".encode() + b"".join(f"{name}: {value}\r\n".encode() for name, value in head.items()) + b"\r\n")
        if fault == "half":
            writer.write(data[: len(data) // 2])
            await writer.drain()
            return False
        if fault == "trickle":
            for byte in data * 1000:
                writer.write(bytes([byte]) if byte != data[-1] else b" ")
                await writer.drain()
                await asyncio.sleep(0.02)
        writer.write(data)
        await writer.drain()
        return True

    def count(self, fault):
        """How many requests were answered so."""
        return sum(found == fault for _, found, _, _ in self.log)


@contextmanager
def hostile(answer, fault=lambda request, nth: OK, delay_s=0.0):
    """A hostile server for the time of the block."""
    server = Hostile(answer, fault, delay_s)
    loop = asyncio.new_event_loop()
    listening = loop.run_until_complete(asyncio.start_server(server.serve, "127.0.0.1", 0, limit=2**20))
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server
    finally:
        async def end():
            listening.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0.01)  # the transports close in the loop's next rounds

        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
