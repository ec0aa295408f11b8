"""The HTTP side of the simulator: an OpenAI-compatible server around a function that answers."""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

Answer = Callable[[list[dict[str, str]], int], str]
"""(messages, seed) -> text. Raises LookupError for a conversation that is from no scenario."""
CHARS_PER_TOKEN = 4
"""Usage is counted as characters divided by this: the simulator has no tokenizer."""


def make_app(answer: Answer) -> Starlette:
    """The HTTP side: `POST /v1/chat/completions` and `GET /v1/models`."""

    async def completions(request: Request) -> JSONResponse:
        body = await request.json()
        messages = body["messages"]
        try:
            text = answer(messages, body.get("seed") or 0)
        except LookupError:
            return JSONResponse({"error": {"message": "the simulator knows no scenario that goes like this"}}, status_code=422)
        prompt = sum(len(message["content"]) for message in messages) // CHARS_PER_TOKEN
        completion = max(1, len(text) // CHARS_PER_TOKEN)
        return JSONResponse({
            "id": "simulated", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}})

    async def models(_: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [{"id": "simulated", "object": "model", "owned_by": "simulator"}]})

    return Starlette(routes=[Route("/v1/chat/completions", completions, methods=["POST"]), Route("/v1/models", models)])
