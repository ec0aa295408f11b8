"""Recorded conversations as teacher: a folder of JSONL logs becomes traces, line by line, and no line is lost in silence."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from schemas.company import slug_fault
from schemas.errors import InputError
from schemas.mapping import Mapping, load_mapping
from schemas.recorded import Recorded, UnmappedReason
from stages._chat_log import LoggedMessage, Mapped, Unmapped, map_conversation
from stages._stage import DataParams, Params, used_companies

if TYPE_CHECKING:
    import polars as pl

TEACHER = "recorded"
"""What tables and metrics call the teacher of recorded conversations."""


class RecordedParams(Params):
    """`teacher_gen.recorded`."""

    path: str = Field(min_length=1)
    mapping: str = Field(min_length=1)


class _LoggedConversation(BaseModel):
    """One line; its other keys are metadata."""

    model_config = ConfigDict(extra="allow")
    conversation_id: str | int | None = None
    company: str | None = None
    messages: list[LoggedMessage]


@dataclass
class Logs:
    """What a folder of logs holds: rows for the Traces and the Recorded table."""

    traces: list[dict[str, Any]] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)

    def table(self) -> pl.DataFrame:
        """The Recorded table, in the order of the logs."""
        import polars as pl

        return pl.DataFrame(self.lines, schema=recorded_schema())

    def metrics(self) -> dict[str, Any]:
        """metrics/teacher_gen.json. A log is never cut to a slice, has no scenarios, and cost nothing."""
        reasons = Counter(line["reason"] for line in self.lines if line["reason"])
        mapped = len(self.lines) - reasons.total()
        return {
            "teacher": TEACHER, "customer": TEACHER, "scenarios_per_company": 0, "scenarios": 0, "conversations": mapped,
            "agent_turns": sum(row["role"] == "agent" for row in self.traces), "infrastructure_failures": 0,
            "prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0, "cost_usd": 0.0,
            "recorded": {
                "in": len(self.lines), "mapped": mapped, "unmapped": reasons.total(),
                "reasons": {reason.value: reasons[reason] for reason in UnmappedReason},
                "left_out": sum(line["left_out"] for line in self.lines)}}


def recorded_schema() -> dict[str, Any]:
    """The Recorded table's columns, as polars types."""
    return {name: column.dtype.type for name, column in Recorded.to_schema().columns.items()}


def read_logs(params: RecordedParams, data: DataParams) -> Logs:
    """Every conversation under a folder of logs, mapped or with the reason why not.

    Raises:
        InputError: the folder or the mapping cannot be read, nothing in it could be mapped, or the companies in it cannot be parted.
    """
    mapping, logs, seen = load_mapping(Path(params.mapping)), Logs(), set[str]()
    for file, number, raw in _lines(Path(params.path)):
        line: dict[str, Any] = {
            "file": file, "line": number, "conversation_id": None, "company": None, "system": None, "left_out": 0, "metadata": "{}",
            "reason": None, "detail": None, "index": None, "raw": None}
        logs.lines.append(line)
        try:
            name, mapped = _read(raw, mapping, line, seen)
        except Unmapped as error:
            line |= {"reason": error.reason.value, "detail": error.detail, "index": error.index, "raw": raw.decode("utf-8", "replace")}
            continue
        line |= {"conversation_id": name, "system": mapped.system, "left_out": mapped.left_out}
        logs.traces += [
            {"conversation_id": name, "company": line["company"], "scenario": None, "attempt": 0, "teacher": TEACHER, "failure": None,
             "index": index, "role": message.role.value, "content": message.content,
             "prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0, "cost_usd": 0.0}
            for index, message in enumerate(mapped.messages)]
    _check(logs, params, data)
    return logs


def _lines(folder: Path) -> Iterator[tuple[str, int, bytes]]:
    """(file, line, text) of every line that is not blank, in all .jsonl files of a folder and its subfolders, in order of their names."""
    if not folder.is_dir():
        raise InputError(f"the folder of logs {folder} does not exist", "teacher_gen.recorded.path in params.yaml names it")
    files = sorted(path for path in folder.rglob("*.jsonl") if path.is_file())
    if not files:
        raise InputError(f"{folder} holds no .jsonl file", "one line of JSON a conversation; README, 'Use your own logs'")
    for path in files:
        try:
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if text := (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip():
                        yield path.relative_to(folder).as_posix(), number, text
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error}", "teacher_gen.recorded.path in params.yaml names the folder") from None


def _read(raw: bytes, mapping: Mapping, line: dict[str, Any], seen: set[str]) -> tuple[str, Mapped]:
    """One line: the name of its conversation in the traces, and the conversation. `line` gets what is known on the way.

    Raises:
        Unmapped: it cannot be turned into a trace.
    """
    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_repeats)
        # Half a surrogate pair, escaped, is JSON but no text that could be stored.
        json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Unmapped(UnmappedReason.BROKEN_LINE, str(error)) from None
    if not isinstance(data, dict):
        raise Unmapped(UnmappedReason.BROKEN_LINE, f"a JSON {type(data).__name__}")
    line["metadata"] = json.dumps({key: value for key, value in data.items() if key not in _LoggedConversation.model_fields}, ensure_ascii=False)
    try:
        log = _LoggedConversation.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = first["loc"]
        raise Unmapped(UnmappedReason.BROKEN_CONVERSATION, f"{'.'.join(map(str, place))}: {first['msg']}",
                       place[1] if len(place) > 1 and isinstance(place[1], int) else None) from None
    line["company"] = log.company
    if fault := slug_fault(log.company) if log.company else "none given":
        raise Unmapped(UnmappedReason.NO_COMPANY, fault)
    # An absent id becomes a name made of the conversation, which stays when lines move.
    given = "" if log.conversation_id is None else str(log.conversation_id).strip()
    own = given or "unnamed-" + hashlib.sha256(json.dumps(data["messages"], sort_keys=True).encode()).hexdigest()[:12]
    name = f"{log.company}/{own}/0"
    if name in seen:
        raise Unmapped(UnmappedReason.DUPLICATE_ID, repr(own))
    mapped = map_conversation(log.messages, mapping)
    seen.add(name)
    return name, mapped


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return data


def _check(logs: Logs, params: RecordedParams, data: DataParams) -> None:
    if not logs.lines:
        raise InputError(f"the .jsonl files under {params.path} are empty", "one line of JSON a conversation; README, 'Use your own logs'")
    if not logs.traces:
        first = logs.lines[0]
        worst = Counter(line["reason"] for line in logs.lines).most_common(1)[0]
        raise InputError(
            f"none of the {len(logs.lines)} conversations under {params.path} could be mapped, {worst[1]} of them for {worst[0]}; "
            f"the first: {first['file']} line {first['line']}: {first['reason']}: {' '.join(first['detail'].split())}",
            f"mend the logs or {params.mapping}; README, 'Use your own logs'")
    companies, held_out = {row["company"] for row in logs.traces}, set(data.held_out)
    used_companies(data, companies)
    if not companies & held_out or companies <= held_out:
        raise InputError(
            f"of the companies in the logs ({', '.join(sorted(companies))}) {'all are' if companies <= held_out else 'none is'} held out, "
            f"so there is nothing to {'train' if companies <= held_out else 'measure'} on",
            "let data.held_out in params.yaml name some of them, and not all")
