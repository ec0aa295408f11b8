"""Say what the paid stages will send and cost, before anything is sent.

    python -m stages.estimate

Conversations are played from the response cache as far as it goes; that part costs nothing again. For the rest the
written conversations say which calls are left. Characters a token, the share of a prompt that the provider caches and the
length of an answer are measured on the answers found on the way, which tells teacher, customer and judge apart. Without
any, the length of an answer is that of the model's other answers in the cache, whose prompts are not known. Without
those, everything is assumed. Every line says which.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import mean

from agent import endpoint
from agent.endpoint import EndpointParams
from agent.kb import KnowledgeBase
from agent.loop import Transcript
from agent.protocol import DONE, agent_chat, customer_chat, recorded_prompt, system_prompt
from agent.replay import reference_messages
from agent.responses import RESPONSES, Completion, Responses
from agent.spend import FREE, MILLION, Price, Spend, Usage, dollars
from schemas.action import ActionName, parse_action
from schemas.company import Company, Scenario
from schemas.recorded import Source
from schemas.tables import SCORED, Predictions, Verified
from schemas.traces import Message, Role
from stages._conversations import Conversation, conversations
from stages._recorded import Logs, read_logs
from stages._self_agreement import ask_again, draw_turns, kept
from stages._stage import (
    DataParams,
    load_params,
    read_table,
    run,
    say,
    used_companies,
)
from stages.eval_judge import (
    HELD_OUT,
    PREDICTIONS,
    EvalJudgeParams,
    ask_all,
    judge_chat,
)
from stages.teacher_gen import TeacherGenParams, hold_all

USUAL_CHARS_PER_TOKEN = 4.0
"""Of English prose, where nothing was measured. The endpoint takes fewer where a server counts none: it must not fall short."""
VERDICT = '{"verdict": "not_acceptable"}'

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Call:
    """A call that is still to be made: characters of its prompt, of those that a provider may have cached, and of the answer."""

    prompt: int
    cached: int
    answer: int


@dataclass(frozen=True)
class Answered:
    """A call whose answer is in the cache: its prompt, and what the answer took."""

    chat: Chat
    usage: Usage

    @property
    def counted(self) -> bool:
        """Whether the prompt's tokens can be the server's own count, and not what the endpoint puts in its place."""
        return self.usage.prompt_tokens != len(json.dumps(self.chat, ensure_ascii=False)) // endpoint.CHARS_PER_TOKEN


@dataclass
class Forecast:
    """What is left to ask one model in one role, how often at most, the role's answers in the cache, and the model's in whatever role."""

    name: str
    params: EndpointParams
    store: list[Completion]
    attempts: int = 1
    answered: list[Answered] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = [] if self.params.simulated else [c for c in self.store if (c.base_url, c.model) == (self.params.base_url, self.params.model)]

    @property
    def measured(self) -> list[Answered]:
        """The role's answers, if the server counts tokens."""
        return self.answered if any(call.counted for call in self.answered) else []

    @property
    def chars_per_token(self) -> float:
        """Of a prompt."""
        tokens = sum(call.usage.prompt_tokens for call in self.measured)
        return sum(chars(call.chat) for call in self.measured) / tokens if tokens else USUAL_CHARS_PER_TOKEN

    def tokens(self) -> tuple[float, float, float]:
        """Tokens of prompts, of those cached, and of answers."""
        prompt, cached = (sum(getattr(call, part) for call in self.calls) / self.chars_per_token for part in ("prompt", "cached"))
        if self.measured:
            cached = prompt * self._cached_share
        if lengths := [call.usage.completion_tokens for call in self.measured] or [c.completion_tokens for c in self.store]:
            return prompt, cached, len(self.calls) * mean(lengths)
        return prompt, cached, sum(call.answer for call in self.calls) / USUAL_CHARS_PER_TOKEN

    def usd(self) -> float | None:
        """Dollars, None without a price."""
        return price.of(*self.tokens()) if (price := self._price) else None

    def most_usd(self) -> float | None:
        """The same for all attempts, if nothing is cached, every answer is as long as `max_tokens` allows, and an assumed token is a short one."""
        if (price := self._price) is None:
            return None
        shortest = self.chars_per_token if self.measured else endpoint.CHARS_PER_TOKEN
        return self.attempts * price.of(sum(call.prompt for call in self.calls) / shortest, 0, len(self.calls) * self.params.max_tokens)

    @property
    def _price(self) -> Price | None:
        return FREE if self.params.simulated else self.params.price

    @property
    def _cached_share(self) -> float:
        return sum(call.usage.cached_tokens for call in self.measured) / max(1, sum(call.usage.prompt_tokens for call in self.measured))

    def basis(self) -> str:
        """What the figures rest on."""
        if self.measured:
            return (f"measured on {len(self.measured)} of its answers: {self.chars_per_token:.2f} characters a token of prompt, "
                    f"{self._cached_share:.0%} of it cached, {mean(call.usage.completion_tokens for call in self.measured):.0f} tokens an answer")
        length = (f"as long as the mean of the model's {len(self.store)} cached answers in any role, "
                  f"{mean(completion.completion_tokens for completion in self.store):.0f} tokens" if self.store else "as long as the written one")
        return f"assumed: {USUAL_CHARS_PER_TOKEN:g} characters a token, of a prompt what the call before it sent is cached, an answer is {length}"

    def lines(self) -> str:
        """Calls, tokens and dollars, and what they rest on."""
        prompt, cached, answer = self.tokens()
        name = "simulator" if self.params.simulated else self.params.model
        return (f"  {self.name:<9}{name}: {len(self.calls)} calls, {prompt / MILLION:.3f} M tokens in, {cached / MILLION:.3f} M of them at the "
                f"cached price, {answer / MILLION:.3f} M out, {dollars(self.usd())}" + (f"\n           {self.basis()}" if self.calls else ""))


def chars(chat: Chat) -> int:
    """Characters of a prompt."""
    return sum(len(message["content"]) for message in chat)


def written_calls(company: Company, scenario: Scenario, messages: list[Message]) -> Iterator[tuple[Role, Call]]:
    """The calls that one conversation takes if it goes as it is written, in order."""
    said = {Role.AGENT: len(system_prompt(company)), Role.CUSTOMER: 0}
    for index, message in enumerate(messages):
        if message.role is not Role.TOOL:
            chat = agent_chat(company, messages[:index]) if message.role is Role.AGENT else customer_chat(company, scenario, messages[:index])
            yield message.role, Call(chars(chat), said[message.role], len(message.content))
            said[message.role] = chars(chat)
    if parse_action(messages[-1].content).action is not ActionName.ESCALATE:
        yield Role.CUSTOMER, Call(chars(customer_chat(company, scenario, messages)), said[Role.CUSTOMER], len(DONE))


def calls_left(company: Company, scenario: Scenario, written: list[Message], held: list[Transcript]) -> list[tuple[Role, Call]]:
    """The written calls of the attempt that the cache does not hold to its end, less those that it holds; none if it does."""
    last = held[-1]
    if last.failure is None:
        return []
    done, left = dict(last.calls), []
    for role, call in written_calls(company, scenario, written):
        if done[role]:
            done[role] -= 1
        else:
            left.append((role, call))
    return left


def calls_answered(company: Company, scenario: Scenario, held: list[Transcript]) -> Iterator[tuple[Role, Answered]]:
    """The calls of all attempts that the cache holds, but for those whose cost is counted together with another call's."""
    for transcript in held:
        messages = transcript.messages
        silent = sum(transcript.calls.values()) - sum(message.role is not Role.TOOL for message in messages)
        ended = silent == 1 and transcript.failure is None  # the customer's last call, which left no message: its cost is at the last one's
        if silent and not ended:
            continue
        for index, (message, cost) in enumerate(zip(messages[:-1] if ended else messages, transcript.costs, strict=not ended)):
            if message.role is not Role.TOOL:
                chat = agent_chat(company, messages[:index]) if message.role is Role.AGENT else customer_chat(company, scenario, messages[:index])
                yield message.role, Answered(chat, cost)


def show(stage: str, spend: Spend, budget_usd: float | None, forecasts: list[Forecast]) -> None:
    """One stage's lines."""
    total, most = (None if None in costs else sum(cost or 0.0 for cost in costs)
                   for costs in ([forecast.usd() for forecast in forecasts], [forecast.most_usd() for forecast in forecasts]))
    attempts = max(forecast.attempts for forecast in forecasts)
    times = f"every conversation is held {attempts} times, " if attempts > 1 else ""
    cap = "" if budget_usd is None else f"; budget_usd is {dollars(budget_usd)}, paid answers included"
    say("\n".join([
        f"{stage}", *(forecast.lines() for forecast in forecasts),
        f"  in the cache already: {spend.answers} answers, which cost {dollars(spend.data.cost_usd)} and nothing again",
        f"  to pay: {dollars(total)}, or {dollars(most)} if {times}every answer is max_tokens long and nothing is cached by "
        f"the provider{cap}"]))


async def teacher_gen(companies: dict[str, Company], data: DataParams, params: TeacherGenParams, store: list[Completion]) -> None:
    """Show what `teacher_gen` will cost."""
    spend = Spend(None, "teacher_gen")
    held: dict[int, tuple[Company, Scenario, list[Transcript]]] = {}
    await hold_all(companies, params, None, spend, lambda place, *conversation: held.update({place: conversation}), offline=True)
    bases = {slug: KnowledgeBase(company.articles) for slug, company in companies.items()}
    roles = {Role.AGENT: Forecast("teacher", params.teacher, store, params.attempts),
             Role.CUSTOMER: Forecast("customer", params.customer, store, params.attempts)}
    measured_on = []
    for _, (company, scenario, transcripts) in sorted(held.items()):
        written = reference_messages(company, scenario, bases[company.slug])
        for role, call in calls_left(company, scenario, written, transcripts):
            roles[role].calls.append(call)
        for role, answered in calls_answered(company, scenario, transcripts):
            roles[role].answered.append(answered)
        if company.slug in data.held_out:
            measured_on.append((company, scenario, kept(company, scenario, transcripts) or written))
    forecasts = list(roles.values())
    if params.samples > 1:
        again = Forecast("again", params.teacher, store, answered=roles[Role.AGENT].answered)
        turns = draw_turns(measured_on)
        for turn, answers in zip(turns, await ask_again(turns, params.samples, params.teacher, None, spend, offline=True), strict=True):
            prompt = chars(agent_chat(turn.company, turn.history))
            again.calls += [Call(prompt, prompt, len(turn.taken)) for answer in answers if answer is None]
        forecasts.append(again)
    show("teacher_gen", spend, params.budget_usd, forecasts)


def written_conversations(companies: dict[str, Company], data: DataParams, logs: Logs | None) -> list[Conversation]:
    """The held-out companies' conversations before any stage has run: as written, or as logged."""
    if logs is None:
        bases = {slug: KnowledgeBase(companies[slug].articles) for slug in data.held_out}
        return [Conversation(slug, scenario.id, system_prompt(companies[slug]), reference_messages(companies[slug], scenario, bases[slug]))
                for slug in data.held_out for scenario in companies[slug].scenarios]
    told = {line["conversation_id"]: line["system"] for line in logs.lines}
    found: dict[str, Conversation] = {}
    for row in logs.traces:
        if (slug := row["company"]) in data.held_out:
            name = row["conversation_id"]
            system = system_prompt(companies[slug]) if slug in companies else recorded_prompt(slug, told[name])
            found.setdefault(name, Conversation(slug, name, system, [])).messages.append(Message(Role(row["role"]), row["content"]))
    return list(found.values())


async def eval_judge(companies: dict[str, Company], data: DataParams, logs: Logs | None, params: EvalJudgeParams,
                     store: list[Completion]) -> None:
    """Show what `eval_judge` will cost: for the predictions if they are there, else for the written or logged steps, once a model."""
    import polars as pl

    spend = Spend(None, "eval_judge")
    if HELD_OUT.is_file() and PREDICTIONS.is_file():
        held = {conversation.name: conversation for conversation in conversations(read_table(HELD_OUT, Verified))}
        predictions = read_table(PREDICTIONS, Predictions)
        rows = predictions.filter(pl.col("decoding") == pl.col("model").replace_strict(SCORED),
                                  pl.col("conversation_id").is_in(list(held))).to_dicts()
    else:
        held = {conversation.name: conversation for conversation in written_conversations(companies, data, logs)}
        rows = [{"conversation_id": name, "index": index, "raw": message.content} for name, conversation in held.items()
                for index, message in enumerate(conversation.messages) if message.role is Role.AGENT for _ in SCORED]
    answers = await ask_all(rows, held, params.judge, None, spend, offline=True)
    forecast = Forecast("judge", params.judge, store)
    for row, answer in zip(rows, answers, strict=True):
        conversation = held[row["conversation_id"]]
        chat = judge_chat(conversation.system, conversation.messages[: row["index"]], row["raw"])
        if answer is None:
            system = len(chat[0]["content"]) + len(json.dumps({"agent_instructions": conversation.system}, ensure_ascii=False))
            forecast.calls.append(Call(chars(chat), system, len(VERDICT)))
        else:
            forecast.answered.append(Answered(chat, answer.usage))
    show("eval_judge", spend, params.budget_usd, [forecast])


def main() -> None:
    generation, judging = load_params("teacher_gen", TeacherGenParams), load_params("eval_judge", EvalJudgeParams)
    data = load_params("data", DataParams)
    logs = read_logs(generation.recorded, data) if generation.source is Source.RECORDED else None
    companies = used_companies(data, {row["company"] for row in logs.traces} if logs else ())
    responses = Responses(RESPONSES)
    store = [completion for _, completion in responses.entries()]
    responses.close()
    if logs:
        say(f"teacher_gen\n  takes the conversations recorded under {generation.recorded.path}: nobody is asked, nothing to pay")
    else:
        asyncio.run(teacher_gen(companies, data, generation, store))
    asyncio.run(eval_judge(companies, data, logs, judging, store))


if __name__ == "__main__":
    run(main)
