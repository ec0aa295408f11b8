"""Say what the paid stages will send and cost, before anything is sent.

    python -m stages.estimate

Conversations are played from the response cache as far as it goes; that part costs nothing again. For the rest the
written conversations say which calls are left. Tokens a character, the length of an answer and the share of the prompt
that the provider caches are measured on the model's responses in the cache; where there are none, a token is taken as
four characters, an answer as long as the written one, and the cached part of a prompt as what the call before it sent.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import mean

from agent.endpoint import EndpointParams
from agent.kb import KnowledgeBase
from agent.loop import Transcript
from agent.protocol import DONE, agent_chat, customer_chat, system_prompt
from agent.replay import reference_messages
from agent.responses import RESPONSES, Completion, Responses
from agent.spend import FREE, MILLION, Price, Spend, dollars
from schemas.action import ActionName, parse_action
from schemas.company import Company, Scenario
from schemas.tables import SCORED, Predictions, Verified
from schemas.traces import Message, Role
from stages._conversations import Conversation, conversations
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

CHARS_PER_TOKEN = 4.0
VERDICT = '{"verdict": "not_acceptable"}'


@dataclass(frozen=True)
class Call:
    """A call that is still to be made: characters of its prompt, of those that a provider may have cached, and of the answer."""

    prompt: int
    cached: int
    answer: int


@dataclass
class Forecast:
    """What is left to ask one model, and what its responses in the cache say about it."""

    name: str
    params: EndpointParams
    calls: list[Call] = field(default_factory=list)
    measured: list[Completion] = field(default_factory=list)

    def tokens(self) -> tuple[float, float, float]:
        """Tokens of prompts, of those cached, and of answers."""
        prompt, cached, answer = (sum(getattr(call, part) for call in self.calls) / CHARS_PER_TOKEN for part in ("prompt", "cached", "answer"))
        if self.measured:
            share = sum(c.cached_tokens for c in self.measured) / max(1, sum(c.prompt_tokens for c in self.measured))
            cached, answer = prompt * share, len(self.calls) * mean(c.completion_tokens for c in self.measured)
        return prompt, cached, answer

    def usd(self) -> float | None:
        """Dollars, None without a price."""
        return price.of(*self.tokens()) if (price := self._price) else None

    def most_usd(self) -> float | None:
        """The same, if the provider caches nothing and every answer is as long as `max_tokens` allows."""
        return price.of(self.tokens()[0], 0, len(self.calls) * self.params.max_tokens) if (price := self._price) else None

    @property
    def _price(self) -> Price | None:
        return FREE if self.params.simulated else self.params.price

    def line(self) -> str:
        """Calls, tokens and dollars."""
        prompt, cached, answer = self.tokens()
        basis = f"measured on {len(self.measured)} answers" if self.measured else "assumed from the written ones"
        name = "simulator" if self.params.simulated else self.params.model
        return (f"  {self.name:<9}{name}: {len(self.calls)} calls, {prompt / MILLION:.3f} M tokens in, {cached / MILLION:.3f} M of them at the "
                f"cached price, {answer / MILLION:.3f} M out ({basis}), {dollars(self.usd())}")


def chars(chat: list[dict[str, str]]) -> int:
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


def calls_left(company: Company, scenario: Scenario, kb: KnowledgeBase, held: list[Transcript]) -> list[tuple[Role, Call]]:
    """The written calls of the attempt that the cache does not hold to its end, less those that it holds; none if it does."""
    last = held[-1]
    if last.failure is None:
        return []
    done, left = dict(last.calls), []
    for role, call in written_calls(company, scenario, reference_messages(company, scenario, kb)):
        if done[role]:
            done[role] -= 1
        else:
            left.append((role, call))
    return left


def measured(params: EndpointParams, store: list[Completion]) -> list[Completion]:
    """A model's responses in the cache."""
    return [] if params.simulated else [c for c in store if (c.base_url, c.model) == (params.base_url, params.model)]


def show(stage: str, spend: Spend, budget_usd: float | None, forecasts: list[Forecast], attempts: int = 1) -> None:
    """One stage's lines."""
    total, most = (None if None in costs else sum(cost or 0.0 for cost in costs)
                   for costs in ([forecast.usd() for forecast in forecasts], [forecast.most_usd() for forecast in forecasts]))
    times = f"every conversation is held {attempts} times, " if attempts > 1 else ""
    cap = "" if budget_usd is None else f"; budget_usd is {dollars(budget_usd)}, paid answers included"
    say("\n".join([
        f"{stage}", *(forecast.line() for forecast in forecasts),
        f"  in the cache already: {spend.answers} answers, which cost {dollars(spend.data.cost_usd)} and nothing again",
        f"  to pay: {dollars(total)}, or {dollars(most and most * attempts)} if {times}every answer is max_tokens long and nothing is cached by "
        f"the provider{cap}"]))


async def teacher_gen(companies: dict[str, Company], params: TeacherGenParams, store: list[Completion]) -> None:
    """Show what `teacher_gen` will cost."""
    spend = Spend(None, "teacher_gen")
    held = await hold_all(companies, params, None, spend, offline=True)
    bases = {slug: KnowledgeBase(company.articles) for slug, company in companies.items()}
    roles = {Role.AGENT: Forecast("teacher", params.teacher, measured=measured(params.teacher, store)),
             Role.CUSTOMER: Forecast("customer", params.customer, measured=measured(params.customer, store))}
    for company, scenario, transcripts in held:
        for role, call in calls_left(company, scenario, bases[company.slug], transcripts):
            roles[role].calls.append(call)
    show("teacher_gen", spend, params.budget_usd, list(roles.values()), params.attempts)


async def eval_judge(companies: dict[str, Company], data: DataParams, params: EvalJudgeParams, store: list[Completion]) -> None:
    """Show what `eval_judge` will cost: for the predictions if they are there, else for the written steps, once a model."""
    import polars as pl

    spend = Spend(None, "eval_judge")
    if HELD_OUT.is_file() and PREDICTIONS.is_file():
        held = {conversation.name: conversation for conversation in conversations(read_table(HELD_OUT, Verified))}
        predictions = read_table(PREDICTIONS, Predictions)
        rows = predictions.filter(pl.col("decoding") == pl.col("model").replace_strict(SCORED),
                                  pl.col("conversation_id").is_in(list(held))).to_dicts()
    else:
        bases = {slug: KnowledgeBase(companies[slug].articles) for slug in data.held_out}
        written = [(company, scenario, reference_messages(company, scenario, bases[company.slug]))
                   for company in (companies[slug] for slug in data.held_out) for scenario in company.scenarios]
        held = {s.id: Conversation(c.slug, s.id, system_prompt(c), messages) for c, s, messages in written}
        rows = [{"conversation_id": s.id, "index": index, "raw": message.content} for _, s, messages in written
                for index, message in enumerate(messages) if message.role is Role.AGENT for _ in SCORED]
    answers = await ask_all(rows, held, params.judge, None, spend, offline=True)
    forecast = Forecast("judge", params.judge, measured=measured(params.judge, store))
    for row, answer in zip(rows, answers, strict=True):
        if answer is None:
            conversation = held[row["conversation_id"]]
            chat = judge_chat(conversation.system, conversation.messages[: row["index"]], row["raw"])
            system = len(chat[0]["content"]) + len(json.dumps({"agent_instructions": conversation.system}, ensure_ascii=False))
            forecast.calls.append(Call(chars(chat), system, len(VERDICT)))
    show("eval_judge", spend, params.budget_usd, [forecast])


def main() -> None:
    generation, judging = load_params("teacher_gen", TeacherGenParams), load_params("eval_judge", EvalJudgeParams)
    data = load_params("data", DataParams)
    companies = used_companies(data)
    responses = Responses(RESPONSES)
    store = [completion for _, completion in responses.entries()]
    responses.close()
    asyncio.run(teacher_gen(companies, generation, store))
    asyncio.run(eval_judge(companies, data, judging, store))


if __name__ == "__main__":
    run(main)
