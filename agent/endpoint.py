"""The door to models behind an OpenAI-compatible server: teacher, customer and judge."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, get_args
from urllib.parse import urlsplit

import aiohttp
import httpx2
import openai
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent.concurrency import ConcurrencyLimit
from agent.responses import RESPONSES, Completion, Responses, as_json, note_name, request_key
from agent.spend import FREE, EndpointFailure, Price, Room, Spend, Stopped, Usage
from agent.wire import Answer, Counted, Dialect, MaxTokens, Metered, Output, ignores_schema, retry_after, strict
from schemas.errors import InputError

SIMULATOR = "simulator"
"""The `base_url` that means: start the bundled simulator for the time of the stage."""
TRIES = 8
"""How often a request is sent before its conversation is given up: about a minute of waiting at most, Retry-After apart."""
PAID_TRIES = 2
"""The same, where the server answered and charged for something that cannot be used."""
SILENT_TRIES = 2
"""The same, where the server has never answered and lets the time run out: each costs `timeout_s`."""
BACKOFF_S, MAX_BACKOFF_S, MAX_RETRY_AFTER_S = 0.5, 30.0, 300.0
GIVEN_UP_IN_A_ROW = 8
"""Calls given up one after the other, over all conversations, after which the endpoint counts as down."""
GIVEN_UP_AT_FIRST = 3
"""The same, before the endpoint has answered anything."""
CHARS_PER_TOKEN = 3
"""For servers that report no usage; fewer than the usual four, so that the dollars are rather too many."""
OURS = {"model", "messages", "temperature", "max_tokens", "max_completion_tokens", "seed", "response_format", "stream", "n"}
"""Fields of a request that have a parameter of their own, or that would change what an answer is."""
KEY_LENGTH, KEY_PIECE = 12, 6
"""A key this long is taken out of answers; an error message that holds a piece this long of it is not repeated."""


class EndpointParams(BaseModel):
    """One model behind an OpenAI-compatible server."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    base_url: str = Field(min_length=1)
    model: str = Field(min_length=1)
    api_key_env: str | None
    temperature: float | None = Field(ge=0, description="null leaves it to the server")
    max_tokens: int = Field(gt=0)
    extra: dict[str, Any] = Field(default={}, description="further fields of the request, sent as they are")
    max_concurrency: int = Field(gt=0)
    timeout_s: float = Field(gt=0, description="for one try, from the first byte sent to the last one received")
    price: Price | None

    @property
    def simulated(self) -> bool:
        """Whether the bundled simulator plays this model."""
        return self.base_url == SIMULATOR


def check_endpoint(params: EndpointParams) -> None:
    """Refuse what would put a secret where it can be read, or spoil the requests. The messages repeat no URL and no key.

    Raises:
        InputError: the base URL holds credentials or a query, is no URL, `api_key_env` is no variable's name, or `extra`
            holds a field that is ours.
    """
    if params.api_key_env is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]*", params.api_key_env):
        raise InputError(f"api_key_env of the model '{params.model}' is not the name of an environment variable (A–Z, 0–9 and _)",
                         "write the key into an environment variable, and that variable's name into params.yaml")
    if taken := sorted(OURS & params.extra.keys()):
        raise InputError(f"extra of the model '{params.model}' may not hold '{taken[0]}'", "it has a parameter of its own, or is not for you to set")
    if params.simulated:
        return
    try:
        parts = urlsplit(params.base_url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0  # a port that is none raises
    except ValueError:
        whole = False
    if not whole:
        raise InputError(f"base_url of the model '{params.model}' is neither a URL nor '{SIMULATOR}'", "write it as https://host/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InputError(f"base_url of the model '{params.model}' holds credentials or a query",
                         "write it as https://host/v1, and name the environment variable that holds the key in api_key_env")


def api_key(params: EndpointParams) -> str:
    """The key, from the environment and nowhere else.

    Raises:
        InputError: the environment variable that should hold it is not set, or holds what cannot be sent.
    """
    if params.api_key_env is None:
        return "none"
    key = os.environ.get(params.api_key_env, "").strip()
    if not key:
        raise InputError(f"the environment variable {params.api_key_env} is not set", f"export {params.api_key_env}=…")
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"the environment variable {params.api_key_env} holds characters that no key has", f"export {params.api_key_env}=… anew")
    return key


class _Again(Exception):
    """This try failed, and another may do better."""

    def __init__(self, why: str, wait_s: float | None = None, *, unreachable: bool = False, silent: bool = False, paid: bool = False) -> None:
        super().__init__(why)
        self.why, self.wait_s, self.unreachable, self.silent, self.paid = why, wait_s, unreachable, silent, paid


class _Refused(Exception):
    """The server does not take this request (400, 422 and the like): sending it again is of no use."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"HTTP {status}")
        self.status, self.words = status, words


@dataclass(frozen=True)
class _Format:
    """A response format as it is sent, and as `as_json` writes it."""

    taken: dict[str, Any]
    written: str


@lru_cache
def _formats(schema: str) -> dict[Output, _Format]:
    """How output is asked for that keeps to a schema, given as JSON: a company has one for all its calls."""
    taken = json.loads(schema)
    formats: dict[Output, dict[str, Any]] = {
        "json_schema": {"type": "json_schema", "json_schema": {"name": "step", "strict": True, "schema": strict(taken)}},
        "json_object": {"type": "json_object", "schema": taken}}
    return {output: _Format(taken, as_json(taken)) for output, taken in formats.items()}


@dataclass(frozen=True)
class _Question:
    """What is asked, apart from the form in which a server takes it; `keys` are those of the forms, as far as they were asked for."""

    messages: list[dict[str, str]]
    sample: int
    schema: dict[str, Any] | None
    keys: dict[Dialect, str] = field(default_factory=dict)

    @cached_property
    def formats(self) -> dict[Output, _Format]:
        """How structured output is asked for; none for a text."""
        return _formats(json.dumps(self.schema)) if self.schema is not None else {}

    @cached_property
    def written(self) -> dict[str, str]:
        """The fields that are the same in all forms of the request, as JSON."""
        return {"messages": as_json(self.messages), "seed": as_json(self.sample)}


class Endpoint:
    """Sends chat requests; keeps every answer, so that none is paid for twice.

    Args:
        url: where the server is; that of the simulator is not its `base_url`.
        http: what the requests go through, without a timeout of its own.
        responses: the store. None for the simulator, which costs nothing and answers from files that may change.
        offline: answer from the store or not at all.
    """

    def __init__(self, params: EndpointParams, url: str, key: str, http: httpx2.AsyncClient, responses: Responses | None, spend: Spend, *,
                 offline: bool = False) -> None:
        self.params = params
        self._key, self._responses, self._spend, self._offline = key, responses, spend, offline
        fixed = {"model": params.model, **dict.fromkeys(get_args(MaxTokens), params.max_tokens), "temperature": params.temperature} | params.extra
        self._written = {name: as_json(value) for name, value in fixed.items()}
        self._client = openai.AsyncOpenAI(base_url=url, api_key=key, timeout=None, max_retries=0, http_client=http)
        self._url = f"{self._client.base_url}chat/completions"  # whole: the client would put it together anew for every call
        self._price = FREE if params.simulated else params.price
        self._limit = ConcurrencyLimit(params.max_concurrency, spend.pause)
        self._dialects: dict[bool, Dialect] = {}
        self._settling = asyncio.Lock()
        self._answered = self._answered_before = False  # in this run, and in an earlier one
        self._given_up = 0

    async def chat(self, messages: list[dict[str, str]], sample: int = 0, schema: dict[str, Any] | None = None) -> Completion:
        """One completion.

        Args:
            messages: OpenAI chat messages.
            sample: which of several answers to the same request; sent as the seed.
            schema: a JSON schema of the answer, for servers that can hold the model to it.

        Raises:
            EndpointFailure: no usable answer after all tries, or (`Stopped`) the stage is ending early.
        """
        # The simulator answers from what is written: there is nothing to hold to a schema.
        question = _Question(messages, sample, None if self.params.simulated else schema)
        try:
            if self._offline:
                if stored := self._stored(question):
                    return stored
                raise EndpointFailure("not in the cache")
            if self._responses is None:
                return await self._ask(question)
            async with self._responses.asking(self._key_of(question, Dialect())):
                # Looked for only now: whoever asked before us, here or in another process, has it.
                return self._stored(question) or await self._ask(question)
        except InputError as error:
            self._spend.stop(error)
            raise Stopped(str(error)) from None

    def _key_of(self, question: _Question, dialect: Dialect) -> str:
        if dialect not in question.keys:
            written = self._written | question.written
            if taken := question.formats.get(dialect.output):
                written["response_format"] = taken.written
            question.keys[dialect] = request_key(self.params.base_url, self._request(question, dialect), question.sample, written)
        return question.keys[dialect]

    def _stored(self, question: _Question) -> Completion | None:
        """The answer to the request as we would send it now or may have sent it when we knew the server less, or it took other fields."""
        if self._responses is None:
            return None
        known, _ = self._dialect(question)
        dialects = itertools.product(get_args(Output) if question.schema else [known.output], (True, False), get_args(MaxTokens))
        forms = sorted(itertools.starmap(Dialect, dialects), key=lambda dialect: dialect != known)
        if (found := self._responses.first([self._key_of(question, dialect) for dialect in forms])) is None:
            return None
        key, stored = found
        self._answered_before = True
        self._spend.reused += not self._offline
        if stored.cost_usd is None and self._price:  # the price was not known then
            cost = self._price.of(stored.prompt_tokens, stored.cached_tokens, stored.completion_tokens)
            stored = stored.model_copy(update={"cost_usd": cost})
        self._spend.count(key, stored.usage)
        return stored

    def _request(self, question: _Question, dialect: Dialect) -> dict[str, Any]:
        request: dict[str, Any] = {"model": self.params.model, "messages": question.messages, dialect.max_tokens: self.params.max_tokens}
        if self.params.temperature is not None:
            request["temperature"] = self.params.temperature
        if dialect.seed:
            request["seed"] = question.sample
        if taken := question.formats.get(dialect.output):
            request["response_format"] = taken.taken
        return request | self.params.extra

    def _dialect(self, question: _Question) -> tuple[Dialect, bool]:
        """What is known of the server, and whether it is settled."""
        structured = question.schema is not None
        if structured not in self._dialects and self._responses is not None and (note := self._responses.note(self._note_name(structured))):
            self._dialects[structured] = Dialect(**note)
        return self._dialects.get(structured, Dialect()), structured in self._dialects or self.params.simulated

    def _note_name(self, structured: bool) -> str:
        return f"{note_name(self.params.base_url, self.params.model)} {'schema' if structured else 'plain'}"

    def _settle(self, question: _Question, dialect: Dialect) -> None:
        structured = question.schema is not None
        self._dialects[structured] = dialect
        if self._responses is not None:
            self._responses.set_note(self._note_name(structured), asdict(dialect))

    async def _ask(self, question: _Question) -> Completion:
        """Ask the server; the first call of all goes alone, to find out which parts of a request the server takes."""
        if not self._dialect(question)[1]:
            async with self._settling:
                if not self._dialect(question)[1]:  # else whoever went before us has found out
                    return await self._ask_in(question)
        return await self._ask_in(question)

    async def _ask_in(self, question: _Question) -> Completion:
        known, settled = self._dialect(question)
        dialect = known
        while True:
            request = self._request(question, dialect)
            try:
                completion = await self._tries(question, dialect)
            except _Refused as refused:
                forbidden = refused.status == 403  # whatever the form of the request
                if forbidden or (lesser := dialect.lesser(request, refused.words, settled)) is None:
                    raise self._give_up(f"HTTP {refused.status}", refused.words, down=forbidden, forbidden=forbidden) from None
                dialect = lesser
                continue
            # Later on, a step that breaks the schema is an odd one; a refusal says nothing of it.
            if not settled and "response_format" in request and completion.finish_reason == "stop" and ignores_schema(completion.text):
                dialect = replace(dialect, output="text")
            if not settled or dialect != known:  # a call that learnt nothing does not overrule one that did
                self._settle(question, dialect)
            return completion

    async def _tries(self, question: _Question, dialect: Dialect) -> Completion:
        paid = silent = 0
        for attempt in range(TRIES):
            try:
                return await self._one_try(question, dialect)
            except _Again as again:
                last = again
            paid += last.paid
            silent += last.silent
            if paid == PAID_TRIES or (silent >= SILENT_TRIES and not self._answered) or attempt + 1 == TRIES:
                break
            if not last.wait_s:  # where the server named a time, the limit keeps it
                await self._spend.pause(random.uniform(0, min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (attempt + 1))))
        raise self._give_up(last.why, "", down=not last.paid, unreachable=last.unreachable, silent=silent >= SILENT_TRIES)

    def _give_up(self, why: str, words: str, *, down: bool, unreachable: bool = False, silent: bool = False,
                 forbidden: bool = False) -> EndpointFailure:
        """Record a call that is given up; the whole stage stops if the endpoint is plainly down.

        A request that the server refuses or answers with nothing is no sign of that once the endpoint has answered others.
        """
        if down or not (self._answered or self._answered_before):
            self._given_up += 1
        said = f" ({words})" if words else ""
        if not self._answered and unreachable:
            self._spend.stop(InputError(f"{self.params.base_url} cannot be reached", "check base_url in params.yaml, and that the server runs"))
        elif not self._answered and silent:
            self._spend.stop(InputError(f"{self.params.base_url} gave {why} to {SILENT_TRIES} tries, and has answered nothing yet",
                                        "check base_url in params.yaml, and that the server is not stuck; for a slow one, raise timeout_s"))
        elif self._given_up >= (GIVEN_UP_IN_A_ROW if self._answered else GIVEN_UP_AT_FIRST):
            self._spend.stop(self._key_refused(403) if forbidden else InputError(
                f"{self.params.base_url} gave no usable answer to {self._given_up} calls in a row, the last time: {why}{said}",
                "every answer so far is kept: run again once the endpoint is well"))
        return EndpointFailure(why)

    async def _one_try(self, question: _Question, dialect: Dialect) -> Completion:
        request = json.dumps(self._request(question, dialect), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
        worst_usd = self._price.of(len(request), 0, self.params.max_tokens) if self._price else 0.0
        async with self._limit.slot() as started, self._spend.room_for(worst_usd) as room:
            try:
                async with asyncio.timeout(self.params.timeout_s):
                    response = await self._client.post(self._url, content=request, cast_to=httpx2.Response)
            except TimeoutError:
                room.lost()
                raise _Again(f"no answer within {self.params.timeout_s:g} s", silent=True) from None
            except openai.APIStatusError as error:
                raise self._status(error, started) from None
            except openai.APIConnectionError as error:
                # What went wrong is two causes down: on the way up a connection refused and one that broke both become a timeout.
                if error.__cause__ and isinstance(error.__cause__.__cause__, aiohttp.ClientConnectorError):
                    raise _Again("no connection", unreachable=True) from None
                room.lost()
                raise _Again("the connection broke") from None
            completion = self._read(response.text, question, dialect, room)
            self._limit.succeeded()
            return completion

    def _status(self, error: openai.APIStatusError, started: float) -> Exception:
        """What a status code means for this call, and for the stage."""
        status, words = error.status_code, self._words(error)
        url = self.params.base_url
        if status == 401 or (status == 403 and not self._answered):
            return self._key_refused(status)
        if status == 402:
            return InputError(f"{url} wants to be paid first (HTTP 402)", "every answer so far is kept: top up the account and run again")
        if status == 404:
            return InputError(f"{url} does not serve the model '{self.params.model}' (HTTP 404)", "correct base_url or model in params.yaml")
        # llama-cpp-python's server answers 500 where it does not know a response format.
        if (status not in (408, 409, 425, 429) and status < 500) or (status == 500 and "response_format" in words):
            return _Refused(status, words)
        wait_s = retry_after(error.response.headers.get("retry-after"))
        if wait_s is not None and wait_s > MAX_RETRY_AFTER_S:
            return InputError(f"{url} asks to wait {wait_s:.0f} s (HTTP {status})", "every answer so far is kept: run again after that time")
        if status in (429, 503, 529):
            self._limit.overloaded(started, wait_s)
        return _Again(f"HTTP {status}", wait_s if status in (429, 503, 529) else None)

    def _key_refused(self, status: int) -> InputError:
        variable = self.params.api_key_env
        hint = f"check the environment variable {variable}" if variable else "name the environment variable that holds the key in api_key_env"
        return InputError(f"{self.params.base_url} refuses the key (HTTP {status})", hint)

    def _words(self, error: openai.APIStatusError) -> str:
        """What the server says is wrong, at most 200 characters and without the key."""
        body = error.body if isinstance(error.body, dict) else {}
        words = " ".join(str(body.get("message") or body.get("detail") or error.response.text).split())
        if self.params.api_key_env and any(self._key[at : at + KEY_PIECE] in words for at in range(max(1, len(self._key) - KEY_PIECE + 1))):
            return "its words are left out, for they hold a part of the key"
        return words[:200]

    def _read(self, body: str, question: _Question, dialect: Dialect, room: Room) -> Completion:
        """The answer in a response's body, stored before anything else happens."""
        if self.params.api_key_env and len(self._key) >= KEY_LENGTH:
            body = body.replace(self._key, "[key]")
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            room.lost()
            raise _Again("the answer is no JSON") from None
        try:
            answer = Answer.model_validate(document)
        except ValidationError:
            self._unusable(document, room)
            raise _Again("the answer is no chat completion", paid=True) from None
        choice = answer.choices[0]
        content = choice.message.content or choice.message.refusal or ""
        reasoning = choice.message.reasoning_content or choice.message.reasoning or ""
        finish = "refusal" if choice.message.refusal and not choice.message.content else choice.finish_reason or ""
        completion = Completion(
            base_url=self.params.base_url, model=self.params.model, stored=time.time(), content=content, reasoning=reasoning,
            finish_reason=finish, **asdict(self._usage(answer.usage, question.messages, content + reasoning)))
        if not completion.text.strip() and completion.finish_reason != "length":
            room.paid(None, completion.usage)
            raise _Again("the answer holds no text", paid=True)
        key = None
        if self._responses is not None:
            self._responses.put(key := self._key_of(question, dialect), completion)
        room.paid(key or f"{self._spend.sent}", completion.usage)
        self._answered, self._given_up = True, 0
        return completion

    def _usage(self, counted: Counted | None, messages: list[dict[str, str]], text: str) -> Usage:
        if counted is None:
            prompt, cached, written = len(json.dumps(messages, ensure_ascii=False)) // CHARS_PER_TOKEN, 0, len(text) // CHARS_PER_TOKEN
        else:
            prompt, written = counted.prompt_tokens, counted.completion_tokens
            cached = min(prompt, (counted.prompt_tokens_details and counted.prompt_tokens_details.cached_tokens) or 0)
        return Usage(prompt, cached, written, self._price.of(prompt, cached, written) if self._price else None)

    def _unusable(self, document: Any, room: Room) -> None:
        """Count what an answer that cannot be used cost, where it says so."""
        try:
            counted = Metered.model_validate(document).usage
        except ValidationError:
            room.lost()
        else:
            room.paid(None, self._usage(counted, [], ""))


@asynccontextmanager
async def open_endpoints(spend: Spend, simulator_url: str | None, *sections: EndpointParams,
                         offline: bool = False) -> AsyncIterator[Sequence[Endpoint]]:
    """Endpoints for the time of a `with` block, with one store and one budget.

    Args:
        spend: what they spend together.
        simulator_url: where the simulator is, for those that it plays.
        offline: answer from the store or not at all; no key is needed.

    Raises:
        InputError: a key is not set, an endpoint is not well described, or a budget is set and a price is missing.
    """
    for params in sections:
        check_endpoint(params)
        if spend.budget_usd is not None and not params.simulated and params.price is None:
            raise InputError(f"{spend.section}.budget_usd is set, and the model '{params.model}' has no price, so nothing would be counted",
                             "write its price (input, cached_input and output, dollars per million tokens) into params.yaml")
    if spend.budget_usd is not None and (real := [params for params in sections if not params.simulated]) and all(p.price == FREE for p in real):
        raise InputError(f"{spend.section}.budget_usd is set, and every price is zero, so it would never be reached",
                         "write the price of the models into params.yaml, or set budget_usd to null")
    keys = ["none" if offline else api_key(params) for params in sections]
    # On aiohttp a call takes a third less of this process's time than on httpx. The time of a try is kept by us alone.
    async with openai.DefaultAioHttpClient(timeout=None) as http:
        responses = Responses(RESPONSES)
        try:
            yield [Endpoint(params, (simulator_url or "http://simulator") if params.simulated else params.base_url, key, http,
                            None if params.simulated else responses, spend, offline=offline)
                   for params, key in zip(sections, keys, strict=True)]
        finally:
            responses.close()
