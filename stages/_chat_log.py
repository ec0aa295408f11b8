"""One recorded conversation in the OpenAI chat format, turned into messages of our protocol by a mapping.

What the mapping does not decide is not guessed: `Unmapped` says why, and at which message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict

from schemas.action import TOOLS, ActionError, ActionName, HandoffReason, make_action, parse_action
from schemas.mapping import LeaveOut, Mapping, ToolRule
from schemas.recorded import UnmappedReason
from schemas.traces import Message, Role

_THINK = re.compile(r"\A\s*<think>(.*?)</think>", re.DOTALL)
_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*)\n\s*```\Z", re.DOTALL)
_TAGGED_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_CALL_MARKS = re.compile(r"</?tool_call>|<function=|\[TOOL_CALLS\]|<\|python_tag\|>|</?think>|\A\{|\A```json")
"""What chat models leave in the text when a server does not read their tool calls or thoughts, and objects cut short."""


class Unmapped(Exception):
    """A conversation that cannot be turned into a trace."""

    def __init__(self, reason: UnmappedReason, detail: str, index: int | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.index = reason, detail, index


class LoggedFunction(BaseModel):
    """A call's tool and arguments."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class LoggedCall(BaseModel):
    """One entry of `tool_calls`."""

    id: str | None = None
    function: LoggedFunction


class LoggedMessage(BaseModel):
    """One message as logged; keys that we do not read are kept, since one of them may be the thought."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[LoggedCall] | None = None
    tool_call_id: str | None = None


@dataclass
class Mapped:
    """A conversation in our protocol; `system` is the log's, `left_out` counts messages of the log that the mapping leaves out."""

    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    left_out: int = 0


def map_conversation(log: Sequence[LoggedMessage], mapping: Mapping) -> Mapped:
    """Turn a conversation into ours.

    Several calls in one message become steps one after the other, each with its result. A tool that speaks to the
    customer (reply, clarify, escalate) has no result in our protocol, so its acknowledgement goes.

    Raises:
        Unmapped: something is not covered by the mapping, or cannot be said in our protocol.
    """
    opening = next((i for i, message in enumerate(log) if message.role not in ("system", "developer")), len(log))
    result = Mapped("\n".join(_text(message, i) for i, message in enumerate(log[:opening])).strip() or None)
    reader = _Reader(log, mapping, opening)
    while reader.at < len(log):
        if reader.handed_off and LeaveOut.AFTER_HANDOFF in mapping.leave_out:
            reader.left_out += len(log) - reader.at
            break
        reader.read()
    messages = reader.messages
    if LeaveOut.LAST_WORDS in mapping.leave_out:
        while len(messages) > 1 and messages[-1].role is Role.CUSTOMER:
            messages.pop()
            reader.left_out += 1
    if all(message.role is not Role.AGENT for message in messages):
        raise Unmapped(UnmappedReason.NO_AGENT_STEP, "no step of the agent in it")
    result.messages, result.left_out = messages, reader.left_out
    return result


def _text(message: LoggedMessage, index: int) -> str:
    if not isinstance(message.content, list):
        return message.content or ""
    texts = []
    for part in message.content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Unmapped(UnmappedReason.NOT_TEXT, f"a part of type {part.get('type')!r}", index)
        texts.append(part["text"])
    return "\n".join(texts)


class _Reader:
    """Walks along one log; `at` is the next message to read."""

    def __init__(self, log: Sequence[LoggedMessage], mapping: Mapping, at: int) -> None:
        self.log, self.mapping, self.at = log, mapping, at
        self.messages: list[Message] = []
        self.left_out = 0
        self.handed_off = False

    def read(self) -> None:
        """One message, and what belongs to it: the results of its calls, or the words of its hand-off."""
        message = self.log[self.at]
        match message.role:
            case "user":
                if not (text := _text(message, self.at)).strip():
                    self._refuse(UnmappedReason.EMPTY_MESSAGE, "the customer says nothing")
                self.messages.append(Message(Role.CUSTOMER, text))
                self.at += 1
            case "assistant":
                self._read_agent(message)
            case "tool":
                self._refuse(UnmappedReason.RESULT_WITHOUT_CALL, "no call right before it")
            case "system" | "developer":
                self._refuse(UnmappedReason.SYSTEM_MIDWAY, "a system message inside the conversation")
            case role:
                self._refuse(UnmappedReason.UNKNOWN_ROLE, repr(role))

    def _refuse(self, reason: UnmappedReason, detail: str, index: int | None = None) -> NoReturn:
        raise Unmapped(reason, detail, self.at if index is None else index)

    def _read_agent(self, message: LoggedMessage) -> None:
        thought, text = self._thought(message)
        if message.tool_calls:
            self._run(message.tool_calls, thought, text)
        elif not text:
            self._refuse(UnmappedReason.EMPTY_MESSAGE, "the agent says nothing and calls nothing")
        elif step := _own_step(text):
            results = self._results([None]) if step.action in TOOLS else [None]
            self._add(step.thought, step.action, step.args, step.message)
            self._add_result(results[0])
            self.at += 1 + (results[0] is not None)
        elif calls := _calls_in(text):
            self._run(calls, thought, "")
        else:
            self._speak(thought, text)

    def _thought(self, message: LoggedMessage) -> tuple[str, str]:
        """What the agent thought, as far as it is on record, and what it said."""
        text = _text(message, self.at)
        thought = ""
        if leading := _THINK.match(text):
            thought, text = leading[1], text[leading.end():]
        if self.mapping.thought and isinstance(recorded := (message.model_extra or {}).get(self.mapping.thought), str) and recorded.strip():
            thought = recorded
        return thought.strip(), text.strip()

    def _speak(self, thought: str, text: str) -> None:
        """Words to the customer: a hand-off, a question, or a reply."""
        self._check_words(text, self.at)
        if not self.messages and LeaveOut.GREETING in self.mapping.leave_out:
            self.left_out += 1
        elif phrase := next((phrase for phrase in self.mapping.handoff.phrases if phrase.pattern.search(text)), None):
            self._add(thought, ActionName.ESCALATE, {"reason": self._reason(phrase.reason)}, text)
        else:
            self._add(thought, ActionName.CLARIFY if self.mapping.clarify.search(text) else ActionName.REPLY, {}, text)
        self.at += 1

    def _check_words(self, text: str, index: int) -> None:
        if _CALL_MARKS.search(text) or _holds_object(text) or any(re.search(rf"\b{re.escape(name)}\s*\(", text) for name in self.mapping.tools):
            self._refuse(UnmappedReason.CALL_IN_TEXT, repr(text[:80]), index)

    def _run(self, calls: list[LoggedCall], thought: str, text: str) -> None:
        """The calls of one message, with their results; `text` are the words beside them."""
        start = self.at
        results = self._results([call.id for call in calls])
        self.at += 1 + sum(result is not None for result in results)
        for number, (call, result) in enumerate(zip(calls, results, strict=True)):
            if (rule := self.mapping.tools.get(call.function.name)) is None:
                self._refuse(UnmappedReason.UNKNOWN_TOOL, repr(call.function.name), start)
            args, said = self._arguments(call.function, rule, start)
            if rule.action not in TOOLS:
                if not said:
                    said, text = text, ""
                if not said and rule.action is ActionName.ESCALATE and number == len(calls) - 1:
                    thought, said = self._words_after(thought)
                if not said:
                    self._refuse(UnmappedReason.HANDOFF_WITHOUT_MESSAGE if rule.action is ActionName.ESCALATE else UnmappedReason.EMPTY_MESSAGE,
                                 f"{call.function.name} says nothing to the customer", start)
                self._check_words(said, start)
            self._add(thought, rule.action, args, said, start)
            if rule.action in TOOLS:
                self._add_result(result)
            thought = ""
        if text:
            if LeaveOut.TEXT_BESIDE_CALL not in self.mapping.leave_out:
                self._refuse(UnmappedReason.TEXT_BESIDE_CALL, repr(text[:80]), start)
            self.left_out += 1

    def _words_after(self, thought: str) -> tuple[str, str]:
        """The words of a hand-off that was called without any: the agent's next message, if it is plain words."""
        following = self.log[self.at] if self.at < len(self.log) else None
        if following is None or following.role != "assistant" or following.tool_calls:
            return thought, ""
        later, said = self._thought(following)
        self.at += 1
        return thought or later, said

    def _results(self, ids: list[str | None]) -> list[str | None]:
        """The result of each call, None where there is none; they stand right after the calls."""
        first = self.at + 1
        end = next((i for i in range(first, len(self.log)) if self.log[i].role != "tool"), len(self.log))
        given = [(self.log[i].tool_call_id, _text(self.log[i], i)) for i in range(first, end)]
        if len(ids) == len(given) == 1 and not (ids[0] and given[0][0]):
            return [given[0][1]]
        if given and (not all(ids) or len(set(ids)) < len(ids) or not all(name for name, _ in given)):
            self._refuse(UnmappedReason.UNCLEAR_IDS, f"calls {ids}, results {[name for name, _ in given]}")
        found: dict[str | None, str] = {}
        for index, (name, text) in enumerate(given, first):
            if name not in ids or name in found:
                self._refuse(UnmappedReason.RESULT_WITHOUT_CALL, f"{'a second' if name in found else 'a'} result for {name!r}", index)
            found[name] = text
        return [found.get(name) for name in ids]

    def _arguments(self, call: LoggedFunction, rule: ToolRule, index: int) -> tuple[dict[str, str], str]:
        """Our arguments, and what the call says to the customer."""
        try:
            theirs = json.loads(call.arguments) if isinstance(call.arguments, str) else call.arguments
        except (ValueError, RecursionError) as error:
            self._refuse(UnmappedReason.BAD_ARGUMENTS, f"{call.name}: not JSON: {error}", index)
        if not isinstance(theirs, dict):
            self._refuse(UnmappedReason.BAD_ARGUMENTS, f"{call.name}: a JSON {type(theirs).__name__}", index)
        known = {*rule.args.values(), *rule.ignore, *([rule.message] if rule.message else [])}
        if strange := sorted(set(theirs) - known):
            self._refuse(UnmappedReason.BAD_ARGUMENTS, f"{call.name}: the mapping does not name '{strange[0]}'", index)
        args = dict(rule.values)
        for ours, name in rule.args.items():
            value = theirs.get(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                value = json.dumps(value)
            if isinstance(value, str):
                args[ours] = value
            elif value is not None or ours != "reason":
                self._refuse(UnmappedReason.BAD_ARGUMENTS, f"{call.name}: '{name}' is {'missing' if value is None else type(value).__name__}", index)
        if rule.action is ActionName.ESCALATE:
            args["reason"] = self._reason(args.get("reason"), index)
        said = theirs.get(rule.message, "") if rule.message else ""
        if not isinstance(said, str):
            self._refuse(UnmappedReason.BAD_ARGUMENTS, f"{call.name}: '{rule.message}' is no text", index)
        return args, said.strip()

    def _reason(self, told: str | None, index: int | None = None) -> str:
        """Our reason for what the log says; the mapping's default where it says nothing that is known."""
        ours = self.mapping.handoff.reasons.get(told or "") or (told if told in list(HandoffReason) else self.mapping.handoff.default_reason)
        if ours is None:
            self._refuse(UnmappedReason.HANDOFF_WITHOUT_REASON, f"the mapping has no reason for {told!r}" if told else "none given", index)
        return str(ours)

    def _add(self, thought: str, action: str, args: dict[str, Any], message: str, index: int | None = None) -> None:
        try:
            step = make_action(thought, action, args, message)
        except ActionError as error:
            self._refuse(UnmappedReason.BAD_ARGUMENTS, error.detail, index)
        self.messages.append(Message(Role.AGENT, step.to_json()))
        self.handed_off |= step.action is ActionName.ESCALATE

    def _add_result(self, result: str | None) -> None:
        if result is not None:
            self.messages.append(Message(Role.TOOL, result))


def _own_step(text: str) -> Any:
    """The text as a step of our protocol, or None."""
    try:
        return parse_action(text)
    except ActionError:
        return None


def _calls_in(text: str) -> list[LoggedCall]:
    """The calls of a text that is nothing but calls, as chat models write them: `{"name", "arguments"}`, or such objects in `<tool_call>` tags."""
    objects = _TAGGED_CALL.findall(text)
    if not objects or _TAGGED_CALL.sub("", text).strip():
        objects = [fenced[1] if (fenced := _FENCE.match(text)) else text]
    calls = []
    for written in objects:
        try:
            data = json.loads(written)
        except (ValueError, RecursionError):
            return []
        if not isinstance(data, dict) or data.keys() not in ({"name", "arguments"}, {"name", "parameters"}):
            return []
        arguments = data.get("arguments", data.get("parameters"))
        if not isinstance(data["name"], str) or not isinstance(arguments, (str, dict)):
            return []
        calls.append(LoggedCall(function=LoggedFunction(name=data["name"], arguments=arguments)))
    return calls


def _holds_object(text: str) -> bool:
    """Whether a JSON object with something in it stands anywhere in the text."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            if decoder.raw_decode(text, match.start())[0]:
                return True
        except (ValueError, RecursionError):
            continue
    return False
