"""Keep the conversations that pass every rule, and split them: by company first, then by scenario.

Reads   data/teacher_gen/traces.parquet, data/teacher_gen/recorded.parquet (where the traces are recorded), data/companies/
Writes  data/verify/{train,calibration,held_out,rejected}.parquet, metrics/verify.json

Held-out companies go to held_out.parquet and nowhere else: this is where the two arms of the pipeline part. In equals
kept plus rejected; a rejected conversation keeps its rows, with the first rule that it breaks. A recorded conversation has
no scenario, and its company perhaps no folder: rules that need them do not apply, and are counted.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import Field

from agent.protocol import recorded_prompt, system_prompt
from schemas.action import parse_action
from schemas.company import Company, Kind
from schemas.errors import InputError
from schemas.traces import Message, RejectReason, Role
from stages._chunks import ROWS, Parts, checked_chunks, chunks, digest, on_all_cores, publish
from stages._examine import EXAMINED, Examined, Examiner, spoken, words
from stages._rules import Rejection
from stages._sentences import sentences
from stages._stage import (
    DataParams,
    Params,
    load_params,
    read_table,
    run,
    say,
    used_companies,
    write_metrics,
)
from stages._turns import with_share

if TYPE_CHECKING:
    import polars as pl

TRACES = Path("data/teacher_gen/traces.parquet")
RECORDED = Path("data/teacher_gen/recorded.parquet")
TRAIN = Path("data/verify/train.parquet")
CALIBRATION = Path("data/verify/calibration.parquet")
HELD_OUT = Path("data/verify/held_out.parquet")
REJECTED = Path("data/verify/rejected.parquet")
METRICS = Path("metrics/verify.json")
PARTS = ("train", "calibration", "held_out")


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
    """Passes examined conversations one by one; remembers what it has kept, for the rules that look across conversations.

    It holds digests: 90 bytes for every conversation kept and for every sentence of the held-out companies.
    """

    def __init__(self, companies: dict[str, Company], held_out: Iterable[str]) -> None:
        self._held_out = set(held_out)
        self._held_out_sentences = {
            digest(sentence) for slug in self._held_out & companies.keys() for scenario in companies[slug].scenarios
            for text in [turn.customer for turn in scenario.turns] + [step.message for step in scenario.steps] for sentence in sentences(text)}
        self._kept: set[bytes] = set()

    def check(self, conversation: Examined, message: Callable[[int], Message]) -> Rejection | None:
        """Why this conversation is rejected, or None if it is kept; `message` has its messages by index."""
        if conversation.rejection:
            return conversation.rejection
        if conversation.company not in self._held_out:
            for index, found in enumerate(conversation.sentences):
                if not self._held_out_sentences.isdisjoint(found):
                    told = message(index)
                    said = words(spoken(told, parse_action(told.content) if told.role is Role.AGENT else None))
                    return Rejection(RejectReason.HELD_OUT_TEXT, f"stands in a held-out company: {said[:60]!r}", index)
        if conversation.spoken in self._kept:
            return Rejection(RejectReason.DUPLICATE, "the same conversation was kept before")
        self._kept.add(conversation.spoken)
        if conversation.company in self._held_out:
            self._held_out_sentences.update(chain.from_iterable(conversation.sentences))
        return None


Verdict = tuple[Examined, Rejection | None]


def check_all(traces: pl.LazyFrame, companies: dict[str, Company], gate: Gate, held_out: set[str],
              rows: int = ROWS) -> Iterator[tuple[bool, pl.DataFrame, list[Verdict]]]:
    """The table in chunks, each with whether its companies are held out and the verdicts on its conversations.

    Held-out companies go first, so that their text is known when the others come.
    """
    import polars as pl

    is_held_out = pl.col("company").is_in(sorted(held_out))
    items = ((of_held_out, chunk) for of_held_out in (True, False) for chunk in chunks(traces.filter(is_held_out == of_held_out), rows))
    for (of_held_out, chunk), examined in on_all_cores(Examiner(companies).chunk, items, lambda item: item[1].select(EXAMINED)):
        yield of_held_out, chunk, [(one, gate.check(one, partial(_message, chunk, one.first))) for one in examined]


def _message(chunk: pl.DataFrame, first: int, index: int) -> Message:
    return Message(Role(chunk["role"][first + index]), chunk["content"][first + index])


class Origins:
    """What a kept conversation's origin says of it: the part it goes to, its kind, the system prompt.

    Args:
        companies: those that have a folder.
        held_out: never trained on.
        one_in: how much goes to calibration.
        told: the system message of every recorded conversation; it counts where the company has no folder.
    """

    def __init__(self, companies: dict[str, Company], held_out: set[str], one_in: OneIn, told: dict[str, str | None]) -> None:
        self._held_out, self._one_in, self._told = held_out, one_in, told
        self._prompts = {slug: system_prompt(company) for slug, company in companies.items()}
        self._kinds = {(slug, s.id): s.kind.value for slug, company in companies.items() for s in company.scenarios}
        self._splits = {(slug, scenario): where for slug, company in companies.items() if slug not in held_out
                        for scenario, where in split_of(company, one_in).items()}

    def part(self, kept: Examined) -> str:
        """One of PARTS."""
        if kept.company in self._held_out:
            return "held_out"
        if kept.scenario is not None:
            return self._splits[kept.company, kept.scenario]
        return recorded_split(kept.name, kept.handoffs > 0, self._one_in)

    def kind(self, kept: Examined) -> str | None:
        """The scenario's, if there is one."""
        return self._kinds.get((kept.company, kept.scenario or ""))

    def prompt(self, kept: Examined) -> str:
        """The standing instructions."""
        return self._prompts.get(kept.company) or recorded_prompt(kept.company, self._told[kept.name])


def split_tables(chunk: pl.DataFrame, verdicts: list[Verdict], origins: Origins) -> dict[str, pl.DataFrame]:
    """The kept conversations as `train`, `calibration` and `held_out`, the agent's steps in canonical JSON, and the `rejected` ones."""
    import polars as pl

    canonical = {one.first + index: text for one, _ in verdicts for index, text in one.canonical}
    said = pl.DataFrame({"row": canonical.keys(), "canonical": canonical.values()}, schema={"row": pl.UInt32, "canonical": pl.String})
    kept = pl.DataFrame(
        [(one.name, origins.part(one), origins.kind(one), origins.prompt(one)) for one, rejection in verdicts if rejection is None], orient="row",
        schema={"conversation_id": pl.String, "part": pl.String, "kind": pl.String, "system": pl.String})
    why = pl.DataFrame(
        [(one.name, rejection.reason.value, rejection.detail, rejection.index) for one, rejection in verdicts if rejection], orient="row",
        schema={"conversation_id": pl.String, "reject_reason": pl.String, "reject_detail": pl.String, "reject_index": pl.Int64})
    learnt = (chunk.with_row_index("row").join(kept, on="conversation_id", how="inner", maintain_order="left")
              .join(said, on="row", how="left", maintain_order="left").with_columns(content=pl.coalesce("canonical", "content")))
    return {**{part: learnt.filter(pl.col("part") == part) for part in PARTS},
            "rejected": chunk.join(why, on="conversation_id", how="inner", maintain_order="left")}


class Tally:
    """What the metrics count."""

    def __init__(self) -> None:
        self.conversations = 0
        self.reasons: Counter[str] = Counter()
        self._without_company = self._without_scenario = 0
        self._played: set[tuple[str, str]] = set()
        self._kept: set[tuple[str, str]] = set()
        self._sums = {part: Counter[str]() for part in PARTS}
        self._companies: set[str] = set()

    def add(self, verdicts: list[Verdict], origins: Origins, companies: Collection[str]) -> None:
        """Count a chunk's conversations. A rule that has nothing to go by for one passes it unexamined: that is counted too."""
        for one, rejection in verdicts:
            self.conversations += 1
            if one.company not in companies:
                self._without_company += 1
            if one.scenario is None:
                self._without_scenario += 1
            else:
                self._played.add((one.company, one.scenario))
            if rejection:
                self.reasons[rejection.reason.value] += 1
                continue
            if one.scenario is not None:
                self._kept.add((one.company, one.scenario))
            self._companies.add(one.company)
            self._sums[origins.part(one)].update(conversations=1, turns=one.turns, handoffs=one.handoffs)

    def metrics(self, teacher: str) -> dict[str, Any]:
        """As `metrics/verify.json` has them."""
        from schemas.recorded import OriginRule

        rejected = self.reasons.total()
        return {
            "teacher": teacher, "in": self.conversations, "kept": self.conversations - rejected, "rejected": rejected,
            "reasons": {reason.value: self.reasons[reason.value] for reason in RejectReason},
            "scenarios_without_a_kept_conversation": len(self._played - self._kept), "not_applicable": {
                OriginRule.TICKET_CATEGORY.value: self._without_company, OriginRule.FACTS.value: self._without_company,
                OriginRule.OUTCOME.value: self._without_scenario},
            **{part: with_share(sums["conversations"], sums["turns"], sums["handoffs"]) for part, sums in self._sums.items()}}

    def kept_companies(self) -> set[str]:
        """Those of which a conversation that was played or recorded is kept."""
        return self._companies

    def count(self, part: str) -> int:
        """Conversations kept in a part."""
        return self._sums[part]["conversations"]


def system_messages(recorded: set[str]) -> dict[str, str | None]:
    """conversation id -> the log's system message, for all recorded conversations; each text once, however many share it.

    Raises:
        InputError: one of them is not on record.
    """
    from schemas.recorded import Recorded

    told = {name: system and sys.intern(system) for name, system in read_table(RECORDED, Recorded).select("conversation_id", "system").iter_rows()}
    if missing := sorted(recorded - told.keys()):
        raise InputError(f"{RECORDED} does not know the conversation {missing[0]} of {TRACES}", "dvc repro --force teacher_gen")
    return told


def main() -> None:
    import polars as pl

    # Not above, since a process of `on_all_cores` imports this module and would take twice as long to begin.
    from schemas.recorded import OriginVerifyMetrics
    from schemas.tables import Rejected, Traces, Verified

    params = load_params("verify", VerifyParams)
    data = load_params("data", DataParams)
    recorded, origin, teachers = set[str](), dict[tuple[str, str | None], None](), set[str]()
    for chunk in checked_chunks(TRACES, Traces):
        recorded.update(chunk.filter(pl.col("scenario").is_null())["conversation_id"])
        origin.update(dict.fromkeys(chunk.select("company", "scenario").unique(maintain_order=True).iter_rows()))
        teachers.update(chunk["teacher"])
    companies, held_out = used_companies(data, {company for company, scenario in origin if scenario is None}), set(data.held_out)
    known = {(slug, scenario.id) for slug, company in companies.items() for scenario in company.scenarios}
    for company, name in origin:
        if name is not None and (company, name) not in known:
            raise InputError(f"{TRACES} holds scenario '{name}' of '{company}', which data/companies does not",
                             "the traces are older than the scenarios: dvc repro teacher_gen")
    origins = Origins(companies, held_out, params.calibration_one_in, system_messages(recorded) if recorded else {})
    tally, gate = Tally(), Gate(companies, held_out)
    with TemporaryDirectory() as folder:
        parts = {name: Parts(Path(folder) / name, Verified) for name in PARTS}
        rejected = {held: Parts(Path(folder) / f"rejected_{held}", Rejected, "place") for held in (True, False)}
        for of_held_out, chunk, verdicts in check_all(pl.scan_parquet(TRACES).with_row_index("place"), companies, gate, held_out):
            tally.add(verdicts, origins, companies)
            tables = split_tables(chunk, verdicts, origins)
            rejected[of_held_out].add(tables["rejected"])
            for name, table in parts.items():
                table.add(tables[name])
        worst = ", ".join(f"{reason} {count}" for reason, count in tally.reasons.most_common(3))
        for name, what in (("train", "train"), ("held_out", "measure")):
            if recorded and not tally.count(name):
                raise InputError(f"of {tally.conversations} recorded conversations none is left to {what} on; rejected: {worst or 'none'}",
                                 "more logs, or what the mapping may leave out; README, 'Use your own logs'")
        for path, name in ((TRAIN, "train"), (CALIBRATION, "calibration"), (HELD_OUT, "held_out")):
            publish(path, parts[name].scan())
        publish(REJECTED, rejected[True].scan().merge_sorted(rejected[False].scan(), "place").drop("place"))
    metrics = tally.metrics(min(teachers))
    write_metrics(METRICS, metrics, OriginVerifyMetrics)
    say(f"verify: {metrics['in']} in, {metrics['kept']} kept, {metrics['rejected']} rejected ({worst or 'none'})")
    for company in sorted(held_out - tally.kept_companies()):
        say(f"warning: {company} is held out and none of its conversations was kept: the results have no row for it")


if __name__ == "__main__":
    run(main)
