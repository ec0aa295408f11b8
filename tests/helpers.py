"""Real companies and conversations, tables of them, a folder in which stages run, and servers on loopback."""

import re
import socket
import threading
import time
from contextlib import contextmanager
from functools import cache

import polars as pl
import pytest
import uvicorn
import yaml

from agent.kb import KnowledgeBase
from agent.replay import reference_messages
from schemas.action import make_action
from schemas.company import company_slugs, load_company
from schemas.traces import Message, Role
from tests.layout import ROOT

COMPANIES = ROOT / "data/companies"
SLUGS = company_slugs(COMPANIES)
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
HELD_OUT = PARAMS["data"]["held_out"]
FLAWLESS = dict.fromkeys(PARAMS["simulator"]["actors"], 0.0)


def documented(heading):
    """A section of README."""
    return re.search(rf"^## {heading}\n(.*?)(?=^## )", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)[1]


@cache
def real(slug):
    return load_company(slug, COMPANIES)


@cache
def help_centre(slug):
    return KnowledgeBase(real(slug).articles)


def scenario_of(company, name):
    return next(scenario for scenario in company.scenarios if scenario.id == name)


def played(company, scenario):
    """The reference conversation; a company that is no real one gets a knowledge base of its own."""
    kb = help_centre(company.slug) if company.slug in SLUGS else KnowledgeBase(company.articles)
    return reference_messages(company, scenario, kb)


def agent(action, message="", **args):
    return Message(Role.AGENT, make_action("It is so.", action, args, message).to_json())


def customer(text):
    return Message(Role.CUSTOMER, text)


def tool(text):
    return Message(Role.TOOL, text)


def traces(*conversations):
    """A Traces table of (company, scenario, attempt, messages)."""
    return pl.DataFrame([
        {"conversation_id": f"{company}/{scenario}/{attempt}", "company": company, "scenario": scenario, "attempt": attempt, "teacher": "nobody",
         "failure": None, "index": index, "role": message.role.value, "content": message.content, "prompt_tokens": 0,
         "cached_tokens": 0, "completion_tokens": 0, "cost_usd": 0.0}
        for company, scenario, attempt, messages in conversations for index, message in enumerate(messages)],
        schema_overrides={"failure": pl.String})


def verified(conversations):
    """A Verified table of conversation id -> messages."""
    return pl.DataFrame([
        {"conversation_id": name, "company": "teashop", "index": index, "role": message.role.value, "content": message.content,
         "system": "You are the agent of a tea shop.", "scenario": name, "kind": "ordinary"}
        for name, messages in conversations.items() for index, message in enumerate(messages)])


def workspace(folder, **sections):
    """Make `folder` one in which stages and simulator run on the real companies; `sections` are laid over those of params.yaml."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    if not (folder / "data/companies").exists():
        (folder / "data/companies").symlink_to(COMPANIES)
    params = {name: {**PARAMS[name], **sections.get(name, {})} for name in PARAMS}
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


@contextmanager
def inside(folder):
    """Run what follows, and the processes it starts, in `folder` with our packages in reach."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(ROOT))
        yield


@contextmanager
def serving(app):
    """An ASGI app on a free loopback port: its base URL."""
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:  # else asyncio leaves Nagle's delay on, 40 ms an answer
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()


def closed_port():
    """A base URL at which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
