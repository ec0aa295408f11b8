"""What the agent is told, and how a conversation is laid out for whoever plays it."""

from __future__ import annotations

from schemas.action import HandoffReason, parse_action
from schemas.company import Company, Scenario
from schemas.traces import Message, Role


def system_prompt(company: Company) -> str:
    """The agent's standing instructions: the protocol, then the company's policy word for word.

    The same text goes to the teacher and to the student, so it is as short as it can be: the student reads it in every
    conversation, and every token costs training time.
    """
    profile = company.profile
    products = "; ".join(f"{product.name} {product.price}" for product in profile.products)
    return (
        f"You are the support agent of {profile.name}, {profile.sector}. Style: {profile.voice}\n"
        + _steps(f': {"|".join(profile.ticket_categories)}') +
        f"Products: {products}\n"
        f"Policy: {company.policy}"
    )


def recorded_prompt(company: str, told: str | None) -> str:
    """The standing instructions of a company of which there are only recorded conversations.

    Args:
        company: its slug.
        told: the log's system message; without one the agent is told whose agent it is, and no more, since no more is known.
    """
    return f"{told or f'You are the support agent of {company}.'}\n" + _steps("").removesuffix("\n")


def _steps(categories: str) -> str:
    """How the agent answers: the six actions with their arguments."""
    return (
        'Each step, answer with one JSON object: {"thought": "...", "action": "...", "args": {...}, "message": "..."}\n'
        'search_kb {"query"}, '
        f'create_ticket {{"category"{categories}, "summary"}}, '
        'update_ticket {"ticket_id", "note"}: message "", you get the result and go on.\n'
        "reply {}, clarify {}: message to the customer.\n"
        f'escalate {{"reason": {"|".join(HandoffReason)}}}: hand off to a person, message to the customer.\n'
    )


def agent_chat(company: Company, messages: list[Message]) -> list[dict[str, str]]:
    """The conversation so far as an OpenAI-compatible server gets it when it plays the agent.

    Tool results go in as user messages, since our calls are JSON in the text and not the server's own tool calls. Both
    kinds carry a label, so that a customer who writes "Tool result: …" is still the customer.
    """
    chat = [{"role": "system", "content": system_prompt(company)}]
    for message in messages:
        match message.role:
            case Role.CUSTOMER:
                chat.append({"role": "user", "content": f"Customer: {message.content}"})
            case Role.TOOL:
                chat.append({"role": "user", "content": f"Tool result: {message.content}"})
            case Role.AGENT:
                chat.append({"role": "assistant", "content": message.content})
    return chat


DONE = "###DONE###"
"""What whoever plays the customer writes when the customer has nothing more to say."""


def customer_chat(company: Company, scenario: Scenario, messages: list[Message]) -> list[dict[str, str]]:
    """The conversation so far as a server gets it when it plays the customer: roles swapped, tools and thoughts unseen."""
    told = scenario.customer
    chat = [{"role": "system", "content": (
        f"You are a customer writing to the support chat of {company.profile.name}, {company.profile.sector}.\n"
        f"What you want: {told.aim}\nWhat you know: {told.facts}\nHow you are: {told.temperament}\n"
        "Write only your next message, short and natural. Do not tell everything at once; answer what is asked. "
        f"When you have nothing more to say, write {DONE} and nothing else.")},
        {"role": "user", "content": "(The chat opens. Write your first message.)"}]
    for message in messages:
        if message.role is Role.CUSTOMER:
            chat.append({"role": "assistant", "content": message.content})
        elif message.role is Role.AGENT and (text := parse_action(message.content).message):
            chat.append({"role": "user", "content": text})
    return chat
