"""Keep the conversations that pass every rule, and split them: by company first, then by scenario.

Reads   data/teacher_gen/traces.parquet, data/teacher_gen/recorded.parquet (where the traces are recorded), data/companies/
Writes  data/verify/{train,calibration,held_out,rejected}.parquet, metrics/verify.json

Held-out companies go to held_out.parquet and nowhere else: this is where the two arms of the pipeline part. In equals
kept plus rejected; a rejected conversation keeps its rows, with the first rule that it breaks. A recorded conversation has
no scenario, and its company perhaps no folder: rules that need them do not apply, and are counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from agent.protocol import recorded_prompt, system_prompt
from schemas.action import parse_action
from schemas.company import Company, Kind
from schemas.errors import InputError
from schemas.recorded import OriginRule, OriginVerifyMetrics, Recorded
from schemas.tables import Rejected, Traces, Verified
from schemas.traces import Message, RejectReason, Role
from stages._rules import Rejection, examine
from stages._stage import (
    DataParams,
    Params,
    load_params,
    read_table,
    run,
    say,
    used_companies,
    write_metrics,
    write_table,
)
from stages._turns import escalations, turn_counts

if TYPE_CHECKING:
    import polars as pl

TRACES = Path("data/teacher_gen/traces.parquet")
RECORDED = Path("data/teacher_gen/recorded.parquet")
TRAIN = Path("data/verify/train.parquet")
CALIBRATION = Path("data/verify/calibration.parquet")
HELD_OUT = Path("data/verify/held_out.parquet")
REJECTED = Path("data/verify/rejected.parquet")
METRICS = Path("metrics/verify.json")
LINE_WORDS = 5
"""A line of at least this many words that also stands in a held-out company is held-out text; shorter ones are anybody's."""


class OneIn(Params):
    """One scenario in so many goes to calibration."""

    handoff: int = Field(ge=2)
    near_miss: int = Field(ge=2)
    ordinary: int = Field(ge=2)


class VerifyParams(Params):
    """`verify`."""

    calibration_one_in: OneIn


def split_of(company: Company, one_in: OneIn) -> dict[str, str]:
    """scenario id -> `train` or `calibration`, for one training company.

    Stratified by kind and reason; within a stratum in the order of a hash, so that the split depends on nothing but the
    ids, and a scenario added to one kind leaves the others where they are.
    """
    split = {}
    for kind in Kind:
        scenarios = sorted((s for s in company.scenarios if s.kind is kind),
                           key=lambda s: (s.reason or "", hashlib.sha256(f"{company.slug}/{s.id}".encode()).hexdigest()))
        every = getattr(one_in, kind.value)
        for position, scenario in enumerate(scenarios):
            split[scenario.id] = "calibration" if position % every == every - 1 else "train"
    return split


def recorded_split(name: str, hands_off: bool, one_in: OneIn) -> str:
    """`train` or `calibration` for a conversation without a scenario: by a hash of its name, so that other logs move nothing.

    Its kind is not known; all that is, is whether it hands off.
    """
    every = one_in.handoff if hands_off else one_in.ordinary
    return "calibration" if int(hashlib.sha256(name.encode()).hexdigest(), 16) % every == every - 1 else "train"


class Gate:
    """Passes conversations one by one; remembers what it has kept, for the rules that look across conversations."""

    def __init__(self, companies: dict[str, Company], held_out: Iterable[str]) -> None:
        self._companies = companies
        self._scenarios = {(slug, s.id): s for slug, company in companies.items() for s in company.scenarios}
        self._held_out = set(held_out)
        self._held_out_lines = {
            line for slug in self._held_out & companies.keys() for scenario in companies[slug].scenarios
            for text in [turn.customer for turn in scenario.turns] + [step.message for step in scenario.steps] if (line := _line(text))}
        self._kept: set[tuple[str, ...]] = set()

    def check(self, company: str, scenario: str | None, failure: str | None, messages: list[Message]) -> Rejection | None:
        """Why this conversation is rejected, or None if it is kept."""
        if failure:
            return Rejection(RejectReason.INFRASTRUCTURE, failure)
        if rejection := examine(messages, self._companies.get(company), self._scenarios.get((company, scenario or ""))):
            return rejection
        lines = tuple(" ".join(_spoken(message).lower().split()) for message in messages)
        if company not in self._held_out:
            for index, line in enumerate(lines):
                if _line(line) in self._held_out_lines:
                    return Rejection(RejectReason.HELD_OUT_TEXT, f"stands in a held-out company: {line[:60]!r}", index)
        if lines in self._kept:
            return Rejection(RejectReason.DUPLICATE, "the same conversation was kept before")
        self._kept.add(lines)
        if company in self._held_out:
            self._held_out_lines.update(filter(None, map(_line, lines)))
        return None


def _spoken(message: Message) -> str:
    """What was said to or by the customer; nothing for tool calls and results, which conversations may share."""
    if message.role is Role.CUSTOMER:
        return message.content
    return parse_action(message.content).message if message.role is Role.AGENT else ""


def _line(text: str) -> str | None:
    words = text.lower().split()
    return " ".join(words) if len(words) >= LINE_WORDS else None


def check_all(traces: pl.DataFrame, gate: Gate, held_out: set[str]) -> dict[str, Rejection | None]:
    """conversation id -> its rejection or None. Held-out companies go first, so that their text is known when the others come."""
    verdicts: dict[str, Rejection | None] = {}
    for of_held_out in (True, False):
        part = traces.filter(traces["company"].is_in(sorted(held_out)) == of_held_out)
        for conversation in part.partition_by("conversation_id", maintain_order=True):
            first = conversation.row(0, named=True)
            messages = [Message(Role(role), content) for role, content in conversation.select("role", "content").iter_rows()]
            verdicts[first["conversation_id"]] = gate.check(first["company"], first["scenario"], first["failure"], messages)
    return verdicts


def canonical(role: str, content: str) -> str:
    """The text that is learnt from: an agent's step in canonical JSON, everything else as it came."""
    return parse_action(content).to_json() if role == Role.AGENT else content


def split_tables(traces: pl.DataFrame, verdicts: dict[str, Rejection | None], companies: dict[str, Company],
                 held_out: set[str], one_in: OneIn, told: dict[str, str | None]) -> dict[str, pl.DataFrame]:
    """The kept conversations as `train`, `calibration` and `held_out`, and the `rejected` ones.

    `told` holds the system message of every recorded conversation; it counts where the company has no folder.
    """
    import polars as pl

    kinds = {(slug, s.id): s.kind.value for slug, company in companies.items() for s in company.scenarios}
    splits = {(slug, scenario): where for slug, company in companies.items() if slug not in held_out
              for scenario, where in split_of(company, one_in).items()}
    kept = traces.filter(pl.col("conversation_id").is_in([c for c, rejection in verdicts.items() if rejection is None]))
    prompts = {slug: system_prompt(company) for slug, company in companies.items()}
    keys = list(kept.select("company", "scenario").iter_rows())
    names = kept["conversation_id"].to_list()
    hands_off = set(escalations(kept).filter(pl.col("escalates") > 0)["conversation_id"])
    kept = kept.with_columns(
        pl.Series("content", [canonical(role, content) for role, content in kept.select("role", "content").iter_rows()], dtype=pl.String),
        pl.Series("system", [prompts.get(company) or recorded_prompt(company, told[name]) for name, (company, _) in zip(names, keys, strict=True)],
                  dtype=pl.String),
        pl.Series("kind", [kinds.get(key) for key in keys], dtype=pl.String),
        pl.Series("split", [
            "held_out" if key[0] in held_out else splits[key] if key[1] is not None else recorded_split(name, name in hands_off, one_in)
            for name, key in zip(names, keys, strict=True)], dtype=pl.String))
    tables = {name: kept.filter(pl.col("split") == name) for name in ("train", "calibration", "held_out")}
    broken = {c: rejection for c, rejection in verdicts.items() if rejection is not None}
    why = pl.DataFrame(
        [(name, rejection.reason.value, rejection.detail, rejection.index) for name, rejection in broken.items()], orient="row",
        schema={"conversation_id": pl.String, "reject_reason": pl.String, "reject_detail": pl.String, "reject_index": pl.Int64})
    tables["rejected"] = traces.join(why, on="conversation_id", how="inner", maintain_order="left")
    return tables


def not_applicable(traces: pl.DataFrame, companies: dict[str, Company]) -> dict[str, int]:
    """How many conversations each rule had nothing to go by for: such a conversation passes it unexamined."""
    origins = traces.unique("conversation_id")
    foreign = int((~origins["company"].is_in(list(companies))).sum())
    return {OriginRule.TICKET_CATEGORY.value: foreign, OriginRule.FACTS.value: foreign,
            OriginRule.OUTCOME.value: origins["scenario"].null_count()}


def main() -> None:
    params = load_params("verify", VerifyParams)
    data = load_params("data", DataParams)
    traces = read_table(TRACES, Traces)
    recorded = traces.filter(traces["scenario"].is_null())
    companies, held_out = used_companies(data, set(recorded["company"])), set(data.held_out)
    known = {(slug, scenario.id) for slug, company in companies.items() for scenario in company.scenarios}
    for key in traces.select("company", "scenario").unique(maintain_order=True).iter_rows():
        if key[1] is not None and key not in known:
            raise InputError(f"{TRACES} holds scenario '{key[1]}' of '{key[0]}', which data/companies does not",
                             "the traces are older than the scenarios: dvc repro teacher_gen")
    told = dict(read_table(RECORDED, Recorded).select("conversation_id", "system").iter_rows()) if len(recorded) else {}
    if missing := sorted(set(recorded["conversation_id"]) - told.keys()):
        raise InputError(f"{RECORDED} does not know the conversation {missing[0]} of {TRACES}", "dvc repro --force teacher_gen")
    verdicts = check_all(traces, Gate(companies, held_out), held_out)
    tables = split_tables(traces, verdicts, companies, held_out, params.calibration_one_in, told)
    reasons = Counter(rejection.reason.value for rejection in verdicts.values() if rejection)
    worst = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(3))
    for name, what in (("train", "train"), ("held_out", "measure")):
        if len(recorded) and tables[name].is_empty():
            raise InputError(f"of {len(verdicts)} recorded conversations none is left to {what} on; rejected: {worst or 'none'}",
                             "more logs, or what the mapping may leave out; README, 'Use your own logs'")
    for path, name, schema in ((TRAIN, "train", Verified), (CALIBRATION, "calibration", Verified),
                               (HELD_OUT, "held_out", Verified), (REJECTED, "rejected", Rejected)):
        write_table(path, tables[name], schema)

    played = verdicts.keys() - set(recorded["conversation_id"])
    kept_scenarios = {conversation.rsplit("/", 1)[0] for conversation in played if verdicts[conversation] is None}
    all_scenarios = {conversation.rsplit("/", 1)[0] for conversation in played}
    metrics: dict[str, Any] = {
        "teacher": sorted(traces["teacher"].unique())[0],
        "in": len(verdicts), "kept": len(verdicts) - reasons.total(), "rejected": reasons.total(),
        "reasons": {reason.value: reasons[reason.value] for reason in RejectReason},
        "scenarios_without_a_kept_conversation": len(all_scenarios - kept_scenarios),
        "not_applicable": not_applicable(traces, companies),
        **{name: turn_counts(escalations(tables[name])) for name in ("train", "calibration", "held_out")}}
    write_metrics(METRICS, metrics, OriginVerifyMetrics)
    say(f"verify: {metrics['in']} in, {metrics['kept']} kept, {metrics['rejected']} rejected ({worst or 'none'})")
    for company in sorted(held_out - set(tables["held_out"]["company"])):
        say(f"warning: {company} is held out and none of its conversations was kept: the results have no row for it")


if __name__ == "__main__":
    run(main)
