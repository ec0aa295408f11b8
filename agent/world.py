"""What the agent's tools act on: the help centre and the ticket store of one conversation."""

from __future__ import annotations

from agent.kb import KnowledgeBase
from schemas.action import Action, ActionName
from schemas.company import Company, Ticket


class World:
    """Runs the three tools of one conversation.

    Args:
        company: whose articles and ticket numbering.
        kb: the company's knowledge base, shared between conversations.
        tickets: tickets that exist before the conversation starts.
        ticket_start: number of the first ticket that this conversation creates.
    """

    def __init__(self, company: Company, kb: KnowledgeBase, tickets: list[Ticket], ticket_start: int) -> None:
        self._prefix = company.profile.ticket_prefix
        self._kb = kb
        self._next = ticket_start
        self.tickets = {ticket.id: ticket for ticket in tickets}

    def run(self, action: Action) -> str:
        """Carry out a tool call and return the result's text.

        Raises:
            ValueError: the action is not a tool call.
        """
        match action.action:
            case ActionName.SEARCH_KB:
                return self._kb.search(action.args["query"])
            case ActionName.CREATE_TICKET:
                while f"{self._prefix}-{self._next}" in self.tickets:
                    self._next += 1
                # Unchecked: whatever a model writes into a ticket, the store takes.
                ticket = Ticket.model_construct(id=f"{self._prefix}-{self._next}", **action.args)
                self.tickets[ticket.id] = ticket
                return f"created {ticket.id} ({ticket.category}): {ticket.summary}"
            case ActionName.UPDATE_TICKET:
                known = self.tickets.get(action.args["ticket_id"])
                if known is None:
                    return f"error: no ticket {action.args['ticket_id']}"
                return f"updated {known.id} ({known.category}): {known.summary}"
        raise ValueError(f"{action.action} is not a tool call")
