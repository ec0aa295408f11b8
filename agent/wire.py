"""What OpenAI-compatible servers take and answer, and how they differ."""

from __future__ import annotations

import email.utils
import math
import re
import time
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from schemas.action import ActionError, ActionFault, parse_action


class _Wire(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


def _whole(text: Any) -> Any:
    # Half a surrogate pair, escaped, is JSON but no text that could be stored or sent.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(text, str) else text


_Text = Annotated[str, BeforeValidator(_whole)] | None


class _Message(_Wire):
    content: _Text = None
    reasoning_content: _Text = None
    reasoning: _Text = None
    refusal: _Text = None


class _Choice(_Wire):
    message: _Message
    finish_reason: str | None = None


class _Details(_Wire):
    cached_tokens: int | None = Field(default=None, ge=0, strict=False)


class Counted(_Wire):
    """The tokens that a server says it counted; some write them as 5.0."""

    prompt_tokens: int = Field(ge=0, strict=False)
    completion_tokens: int = Field(default=0, ge=0, strict=False)
    prompt_tokens_details: _Details | None = None


def _if_readable(usage: Any, read: ValidatorFunctionWrapHandler) -> Any:
    # An answer is paid for and good, whatever the server says it counted.
    try:
        return read(usage)
    except ValidationError:
        return None


class Answer(_Wire):
    """What is read of a chat completion; everything else in it is left alone."""

    choices: list[_Choice] = Field(min_length=1)
    usage: Annotated[Counted | None, WrapValidator(_if_readable)] = None


class Metered(_Wire):
    """The usage of an answer that is of no use otherwise."""

    usage: Counted


Output = Literal["json_schema", "json_object", "text"]
MaxTokens = Literal["max_tokens", "max_completion_tokens"]


@dataclass(frozen=True)
class Dialect:
    """Which of the optional parts of a request the server takes; found out with the first call, and noted in the cache."""

    output: Output = "json_schema"
    seed: bool = True
    max_tokens: MaxTokens = "max_tokens"

    def lesser(self, request: dict[str, Any], words: str, settled: bool) -> Dialect | None:
        """The next one to try after a refusal: without what the server's words name, else with less of structured output.

        A server that has taken such requests before (`settled`) refuses this one for another reason, unless it says so.
        """
        if "max_completion_tokens" in words and self.max_tokens == "max_tokens":
            return replace(self, max_tokens="max_completion_tokens")
        if "seed" in words and self.seed:
            return replace(self, seed=False)
        if "response_format" in request and (not settled or "response_format" in words or "schema" in words):
            return replace(self, output="json_object" if self.output == "json_schema" else "text")
        return None


_ENVELOPE = re.compile(r'\A\{\s*"step"\s*:\s*(\{.*\})\s*\}\s*\Z', re.DOTALL)


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema as OpenAI's strict mode takes it (developers.openai.com/api/docs/guides/structured-outputs, "Supported schemas").

    There the root is an object and no `anyOf`, so what is asked for stands under `step`; every value has a type; and
    the length of a text cannot be asked for. Whoever reads the answer checks that.
    """
    return {"type": "object", "properties": {"step": _strict(schema)}, "required": ["step"], "additionalProperties": False}


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    taken = {name: value for name, value in schema.items() if name not in ("minLength", "maxLength")}
    if "anyOf" in taken:
        taken["anyOf"] = [_strict(variant) for variant in taken["anyOf"]]
    if "properties" in taken:
        taken["properties"] = {name: _strict(value) for name, value in taken["properties"].items()}
    return taken if taken.keys() & {"type", "anyOf"} else {"type": "string", **taken}


def unwrapped(text: str) -> str:
    """A text without the envelope that `strict` asks for, if it came in one."""
    return found[1] if (found := _ENVELOPE.match(text)) else text


def ignores_schema(text: str) -> bool:
    """Whether a text shows that nothing held the model to the schema: no JSON object, or an action that is none of the six.

    A grammar may let line breaks into a string (llama-cpp-python's does), which JSON does not: no step, but no sign of that either.
    """
    try:
        parse_action(re.sub(r"[\x00-\x1f]", " ", text))
    except ActionError as error:
        return error.fault in (ActionFault.NOT_ONE_JSON_OBJECT, ActionFault.UNKNOWN_ACTION)
    return False


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110, 10.2.3: a number or a date); None without a usable one."""
    if not header:
        return None
    try:
        wait_s = float(header)
    except ValueError:
        try:
            wait_s = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, wait_s) if math.isfinite(wait_s) else None
