"""The door to models behind an OpenAI-compatible server: teacher, customer and judge."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import openai
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ConfigDict, Field

from agent.paths import CACHE
from schemas.errors import InputError

RESPONSES = CACHE / "responses"
"""Paid responses, outside every DVC output: DVC deletes a stage's outputs before it runs."""
SIMULATOR = "simulator"
"""The `base_url` that means: start the bundled simulator for the time of the stage."""
RETRIES = 6


class EndpointParams(BaseModel):
    """One model behind an OpenAI-compatible server."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    base_url: str = Field(min_length=1)
    model: str = Field(min_length=1)
    api_key_env: str | None
    temperature: float = Field(ge=0)
    max_tokens: int = Field(gt=0)
    max_concurrency: int = Field(gt=0)
    timeout_s: float = Field(gt=0)


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer and the tokens that the server counted for it."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class EndpointFailure(Exception):
    """The endpoint gave no usable answer after all retries. Never the model's fault."""


class Endpoint:
    """Sends chat requests; keeps every answer, so that none is paid for twice.

    The cache key covers the base URL, the model, the whole request and the sample index. The simulator costs nothing
    and answers from files that may change, so it is not cached.
    """

    def __init__(self, params: EndpointParams, url: str, key: str, cache: Any | None) -> None:
        self.params = params
        self._client = openai.AsyncOpenAI(base_url=url, api_key=key, timeout=params.timeout_s, max_retries=RETRIES)
        self._slots = asyncio.Semaphore(params.max_concurrency)
        self._cache = cache

    async def chat(self, messages: list[dict[str, str]], sample: int = 0) -> Completion:
        """One completion.

        Args:
            messages: OpenAI chat messages.
            sample: which of several answers to the same request; sent as the seed.

        Raises:
            EndpointFailure: no answer after the client's retries.
            InputError: the server refuses the key or does not know the model.
        """
        request: dict[str, Any] = {
            "model": self.params.model, "messages": messages, "temperature": self.params.temperature,
            "max_tokens": self.params.max_tokens, "seed": sample}
        key = hashlib.sha256(json.dumps([self.params.base_url, request], sort_keys=True).encode()).hexdigest()
        if self._cache is not None and (stored := self._cache.get(key)) is not None:
            return Completion(**stored)
        async with self._slots:
            completion = await self._send(request)
        if self._cache is not None:
            self._cache.set(key, asdict(completion))
        return completion

    async def _send(self, request: dict[str, Any]) -> Completion:
        try:
            answer = await self._client.chat.completions.create(**request)
        except (openai.AuthenticationError, openai.PermissionDeniedError):
            raise InputError(f"{self.params.base_url} refuses the key", f"check the environment variable {self.params.api_key_env}") from None
        except openai.NotFoundError:
            raise InputError(f"{self.params.base_url} does not serve the model '{self.params.model}'",
                             "correct base_url or model in params.yaml") from None
        except openai.OpenAIError as error:
            raise EndpointFailure(type(error).__name__) from error
        if not isinstance(answer, ChatCompletion):
            raise EndpointFailure("the answer is no chat completion")
        if not answer.choices or answer.choices[0].message.content is None:
            raise EndpointFailure("the answer holds no text")
        usage = answer.usage
        return Completion(answer.choices[0].message.content,
                          usage.prompt_tokens if usage else 0, usage.completion_tokens if usage else 0)


@asynccontextmanager
async def open_endpoint(params: EndpointParams, simulator_url: str | None) -> AsyncIterator[Endpoint]:
    """An endpoint for the time of a `with` block.

    Raises:
        InputError: the environment variable that should hold the key is not set.
    """
    key = os.environ.get(params.api_key_env, "") if params.api_key_env else "none"
    if not key:
        raise InputError(f"the environment variable {params.api_key_env} is not set", f"export {params.api_key_env}=…")
    simulated = params.base_url == SIMULATOR
    url = simulator_url if simulated else params.base_url
    assert url is not None, "a simulated endpoint needs the simulator's address"
    endpoint = Endpoint(params, url, key, None if simulated else _open_cache())
    try:
        yield endpoint
    finally:
        await endpoint._client.close()


def _open_cache() -> Any:
    import diskcache

    return diskcache.Cache(str(RESPONSES), disk=diskcache.JSONDisk, eviction_policy="none")
