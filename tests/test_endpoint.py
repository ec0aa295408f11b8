"""The paid path over real HTTP, against a server that misbehaves: what is sent, what is kept, when it stops."""

import asyncio
import email.utils
import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
from contextlib import asynccontextmanager

import pytest

from agent import endpoint
from agent.endpoint import EndpointParams, open_endpoints
from agent.protocol import DONE, system_prompt
from agent.responses import Completion, Responses
from agent.spend import EndpointFailure, Spend, Stopped
from agent.wire import ignores_schema, retry_after
from schemas.action import TOOLS, action_json_schema, parse_action
from schemas.errors import InputError
from simulator.actors import Player, Rates
from stages import teacher_gen
from stages._conversations import Conversation
from stages.eval_judge import EvalJudgeParams, judge_all, read_verdict
from stages.teacher_gen import TeacherGenParams, hold_conversations
from tests.helpers import FLAWLESS, PARAMS, agent, closed_port, customer, real, workspace
from tests.hostile import FAULTS, OK, completion, hostile
from tests.layout import ROOT

GYM = {"gym": real("gym").model_copy(update={"scenarios": real("gym").scenarios[-4:]})}
PLAYER = Player(GYM, Rates(**FLAWLESS)).answer
PRICE = {"input": 1000.0, "cached_input": 100.0, "output": 5000.0}
HELLO = [{"role": "user", "content": "hello"}]
STEP = agent("reply", "Yes.").content


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "RESPONSES", tmp_path / "responses")
    monkeypatch.setattr(endpoint, "BACKOFF_S", 0.01)
    monkeypatch.setenv("TEACHER_KEY", "a-long-and-secret-key")


def elsewhere(url, **changes):
    ours = {"base_url": url, "model": "paid", "api_key_env": "TEACHER_KEY", "timeout_s": 60.0, "price": PRICE}
    return {**PARAMS["teacher_gen"]["teacher"], **ours, **changes}


def params(url, attempts=1, budget_usd=None, **changes):
    return TeacherGenParams(**{**PARAMS["teacher_gen"], "attempts": attempts, "budget_usd": budget_usd,
                               "teacher": elsewhere(url, **changes), "customer": elsewhere(url, **changes)})


def held(url, companies=GYM, **changes):
    return asyncio.run(hold_conversations(companies, params(url, **changes), None))[0].to_dicts()


@asynccontextmanager
async def opened(url, **changes):
    spend = Spend(None, "teacher_gen")
    async with open_endpoints(spend, None, EndpointParams(**elsewhere(url, **changes))) as (one,):
        one.spend = spend
        yield one


def ask(url, chats=(HELLO,), schema=None, **changes):
    """The answers to some chats, or the failures, asked at once."""
    async def together():
        async with opened(url, **changes) as one:
            return await asyncio.gather(*(one.chat(chat, schema=schema) for chat in chats), return_exceptions=True)
    return asyncio.run(together())


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """What a server without faults yields: the rows, and how many requests they take."""
    with pytest.MonkeyPatch.context() as patch, hostile(PLAYER) as server:
        patch.setattr(endpoint, "RESPONSES", tmp_path_factory.mktemp("clean"))
        patch.setenv("TEACHER_KEY", "a-long-and-secret-key")
        return held(server.url), len(server.log)


@pytest.mark.parametrize("fault", [*FAULTS, "reset", "half"])
def test_a_fault_that_passes_changes_nothing(clean, fault):
    with hostile(PLAYER, lambda _, nth: fault if nth == 0 else OK) as server:
        assert held(server.url) == clean[0]
        assert set(server.arrived.values()) == {2} and len(server.arrived) == clean[1], "every request once more, and no more"


@pytest.mark.parametrize("fault", ["hang", "trickle"])
def test_an_answer_that_does_not_end_is_cut_off_and_asked_for_again(clean, fault):
    with hostile(PLAYER, lambda request, nth: fault if nth == 0 and len(request["messages"]) == 2 else OK) as server:
        began = time.monotonic()
        assert held(server.url, timeout_s=6.0) == clean[0] and time.monotonic() - began < 60
        assert server.count(fault) == 8, "once for teacher and customer of each conversation"


def test_a_slow_start_is_waited_for(clean):
    with pytest.MonkeyPatch.context() as patch, hostile(PLAYER) as server:
        server.fault = lambda *_: "503" if not server.log or time.monotonic() < server.log[0][0] + 0.5 else OK
        patch.setattr(endpoint, "BACKOFF_S", 0.1)
        assert held(server.url) == clean[0] and server.count("503") > 1


BAD = GYM["gym"].scenarios[-1]
OPENING = BAD.turns[0].customer


@pytest.mark.parametrize("fault, failure", [
    ("500", "HTTP 500"), ((400, {}, "{}"), "HTTP 400"), ("reset", "the connection broke"), ("half", "the connection broke"),
    ("hang", "no answer within 4 s"), ("html", "the answer is no JSON"), ("no choices", "the answer is no chat completion"),
    ("no text", "the answer holds no text")])
def test_a_conversation_that_cannot_be_held_is_a_failure_of_the_endpoint_and_is_tried_again_by_the_next_run(clean, monkeypatch, fault, failure):
    monkeypatch.setattr(endpoint, "TRIES", 2)
    timeout_s = 4.0 if fault == "hang" else 30.0
    bad = lambda request, _: fault if any(OPENING in message["content"] for message in request["messages"][:2]) else OK  # noqa: E731
    with hostile(PLAYER, bad) as server:
        rows = held(server.url, timeout_s=timeout_s)
        failed = [row for row in rows if row["failure"]]
        assert {row["scenario"] for row in failed} == {BAD.id} and {row["failure"] for row in failed} == {failure}
        others = [row for row in rows if not row["failure"]]
        assert others == [row for row in clean[0] if row["scenario"] != BAD.id], "the others went on"
        answered = {server.digest(request) for _, found, request, _ in server.log if found == OK}
        before, server.fault = len(server.log), lambda *_: OK
        assert held(server.url, timeout_s=timeout_s) == clean[0]
        again = [request for _, _, request, _ in server.log[before:]]
        assert 0 < len(again) < clean[1] / 2 and all(server.digest(request) not in answered for request in again)


def test_an_answer_that_is_cut_at_max_tokens_is_the_models_own(capsys):
    cut = lambda messages, seed: completion(STEP[:20], "length") if "support agent of" in messages[0]["content"] else PLAYER(messages, seed)  # noqa: E731
    with hostile(cut) as server:
        rows = held(server.url)
        assert {row["failure"] for row in rows} == {None} and set(server.arrived.values()) == {1}
        assert "4 answers were cut at max_tokens" in capsys.readouterr().err
        sent = len(server.log)
        assert held(server.url) == rows and len(server.log) == sent, "it is paid for, so it is kept"


@pytest.mark.parametrize("fault, message, hint, most", [
    ((401, {}, "{}"), "refuses the key", "TEACHER_KEY", 16), ((403, {}, "{}"), "refuses the key", "TEACHER_KEY", 16),
    ((404, {}, "{}"), "does not serve the model 'paid'", "params.yaml", 16), ((402, {}, "{}"), "wants to be paid", "top up", 16),
    ((429, {"retry-after": "3600"}, "{}"), "asks to wait 3600 s", "run again", 16),
    ("500", "no usable answer to 3 calls in a row, the last time: HTTP 500", "run again", 80),
    ((400, {}, '{"error": {"message": "temperature must be 1"}}'), r"HTTP 400 \(temperature must be 1\)", "run again", 16),
    ("hang", "gave no answer within 2 s to 2 tries", "timeout_s", 2)])
def test_an_endpoint_that_cannot_work_stops_the_run_with_one_sentence(tmp_path, fault, message, hint, most):
    (tmp_path / "data/teacher_gen").mkdir(parents=True)
    with hostile(PLAYER, lambda *_: fault) as server, pytest.raises(InputError, match=message) as error:
        held(server.url, timeout_s=2.0 if fault == "hang" else 60.0)
    assert hint in error.value.hint and 0 < len(server.log) <= most


def test_a_server_that_is_not_there_stops_the_run(monkeypatch):
    monkeypatch.setattr(endpoint, "TRIES", 2)
    with pytest.raises(InputError, match="cannot be reached"):
        held(closed_port())


@pytest.mark.parametrize("fault, message, again", [
    ("500", "no usable answer to 8 calls in a row", "no usable answer to 3 calls in a row"), ((403, {}, "{}"), *["refuses the key"] * 2)])
def test_a_server_that_goes_down_stops_the_run_and_what_came_before_is_kept(monkeypatch, fault, message, again):
    monkeypatch.setattr(endpoint, "TRIES", 2)
    companies = {"gym": real("gym").model_copy(update={"scenarios": real("gym").scenarios[-20:]})}
    player, served = Player(companies, Rates(**FLAWLESS)).answer, []
    with hostile(player, lambda *_: OK if len(served) < 30 and not served.append(0) else fault) as server:
        for stops in (message, again):  # the second time, all that was answered comes from the cache
            with pytest.raises(InputError, match=stops):
                held(server.url, companies)
        assert server.count(fault) <= 2 * 2 * (8 + 32)
        server.fault = lambda *_: OK
        held(server.url, companies)
        answered = [server.digest(request) for _, fault, request, _ in server.log if fault == OK]
        assert len(set(answered)) == len(answered), "nothing that was answered is asked again"


def test_conversations_that_the_server_refuses_do_not_stop_a_run_that_has_others(monkeypatch):
    chats = [[{"role": "user", "content": f"bad {number}"}] for number in range(20)]
    with hostile(lambda *_: "fine", lambda request, _: (400, {}, "{}") if "bad" in request["messages"][0]["content"] else OK) as server:
        for answers in (ask(server.url, [HELLO, *chats]), ask(server.url, [HELLO, *chats])):
            assert answers[0].text == "fine" and all(type(answer) is EndpointFailure for answer in answers[1:]), "none was stopped"


def test_the_limit_follows_what_the_server_can_take():
    chats = [[{"role": "user", "content": f"question {number}"}] for number in range(100)]
    with hostile(lambda *_: "fine", delay_s=0.05) as server:
        server.fault = lambda *_: "429" if server.open > 3 else OK
        answers = ask(server.url, chats, max_concurrency=64)
        refused = [at for at, fault, *_ in server.log if fault == "429"]
    assert all(isinstance(answer, Completion) for answer in answers) and len(server.log) - len(refused) == 100
    assert 0 < len(refused) < 50, "64 at once would be refused far more often than they are answered"


def test_conversations_run_side_by_side_and_no_more_calls_than_stated(clean):
    chats = [[{"role": "user", "content": f"question {number}"}] for number in range(12)]
    with hostile(lambda *_: "fine", delay_s=0.05) as server:
        ask(server.url, chats, max_concurrency=3)
        assert server.most_open == 3
    with hostile(PLAYER, delay_s=0.05) as server:
        assert held(server.url, max_concurrency=2) == clean[0]
        assert 1 < server.most_open <= 4, "two for the teacher, two for the customer"


def test_the_longest_conversations_are_begun_first_and_the_rows_keep_the_order_of_the_corpus():
    gym = real("gym").model_copy(update={"scenarios": real("gym").scenarios[::7]})
    with hostile(Player({"gym": gym}, Rates(**FLAWLESS)).answer) as server:
        rows = held(server.url, {"gym": gym}, max_concurrency=1)
    asked = [request["messages"] for *_, request, _ in server.log]
    openings = [chat[0]["content"] for chat in asked if chat[-1]["content"].startswith("(The chat opens")]
    begun = [scenario for opening in openings for scenario in gym.scenarios if scenario.customer.facts in opening]
    lengths = [sum(1 + len(turn.agent) for turn in scenario.turns) for scenario in begun]
    assert len(begun) == len(gym.scenarios) and lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]
    assert list(dict.fromkeys(row["scenario"] for row in rows)) == [scenario.id for scenario in gym.scenarios]


def test_who_plays_gets_what_a_live_model_needs_and_no_more():
    """The customer aim, facts, temperament and what was said; the teacher the system prompt and what was said and found."""
    scenario = next(each for each in GYM["gym"].scenarios if any(step.action in TOOLS for step in each.steps))
    company = GYM["gym"].model_copy(update={"scenarios": [scenario]})
    with hostile(PLAYER) as server:
        rows = held(server.url, {"gym": company})
    asked = [request["messages"] for *_, request, _ in server.log]
    customers, teachers = ([chat for chat in asked if ("You are a customer" in chat[0]["content"]) is who] for who in (True, False))
    assert all(told in chat[0]["content"] for chat in customers for told in
               (scenario.customer.aim, scenario.customer.facts, scenario.customer.temperament))
    assert {chat[0]["content"] for chat in teachers} == {system_prompt(company)} and company.policy in system_prompt(company)
    told = [row["content"] for row in rows]
    assert all(any(said["content"].endswith(content) for said in teachers[-1][1:]) for content in told[: len(teachers[-1]) - 1])
    thoughts = [parse_action(row["content"]).thought for row in rows if row["role"] == "agent"]
    found = [row["content"] for row in rows if row["role"] == "tool"]
    assert found and not any(secret in message["content"] for chat in customers for message in chat for secret in thoughts + found)


def test_the_live_line_projects_by_length_since_long_conversations_come_first():
    """By conversations, the first lines would promise more than twice of what the whole costs."""
    gym = real("gym")
    lengths = {scenario.id: sum(1 + len(turn.agent) for turn in scenario.turns) for scenario in gym.scenarios}
    ranked = sorted(gym.scenarios, key=lambda scenario: lengths[scenario.id])
    gym = gym.model_copy(update={"scenarios": ranked[:6] + ranked[-2:]})
    projected = []

    class Told(Spend):
        def progress(self, projected_usd):
            projected.append(projected_usd)
            return super().progress(projected_usd)

    with hostile(Player({"gym": gym}, Rates(**FLAWLESS)).answer) as server:
        asyncio.run(teacher_gen.hold_all({"gym": gym}, params(server.url, max_concurrency=1), None, Told(None, "teacher_gen"), lambda *_: None))
        cost = worth(server)
    assert projected[-1] == pytest.approx(cost) and len(projected) == 8
    assert all(0.7 * cost < each < 1.5 * cost for each in projected), [each / cost for each in projected]


@pytest.mark.parametrize("header", [lambda: "1", lambda: email.utils.formatdate(time.time() + 2, usegmt=True)], ids=["seconds", "date"])
def test_retry_after_is_kept_by_all_calls(header):
    with hostile(lambda *_: "fine", lambda _, nth: OK) as server:
        server.fault = lambda *_: (429, {"retry-after": header()}, "{}") if len(server.log) == 1 else OK
        ask(server.url, [[{"role": "user", "content": str(number)}] for number in range(6)], max_concurrency=1)
    arrivals = [at for at, *_ in server.log]
    assert arrivals[2] - arrivals[1] > 0.9 and len(server.log) == 7


def test_a_stage_that_is_stopped_does_not_wait_first():
    chats = [[{"role": "user", "content": text}] for text in ("hello", "wait", "key")]
    faults = {"wait": (429, {"retry-after": "250"}, "{}"), "key": (401, {}, "{}")}
    began = time.monotonic()
    with hostile(lambda *_: "fine", lambda request, _: faults.get(request["messages"][0]["content"], OK), delay_s=0.3) as server:
        answers = ask(server.url, chats)
        assert answers[0].text == "fine" and [type(answer) for answer in answers[1:]] == [Stopped] * 2 and len(server.log) == 3
    assert time.monotonic() - began < 100


@pytest.mark.parametrize("header, wait_s", [(None, None), ("", None), ("soon", None), ("nan", None), ("-3", 0.0), ("2.5", 2.5), ("inf", None)])
def test_a_retry_after_that_says_nothing_is_not_kept(header, wait_s):
    assert retry_after(header) == wait_s


@pytest.mark.parametrize("text, ignored", [
    (STEP, False), (STEP.replace("Yes.", "Yes.\n\tIndeed."), False), (STEP.replace('"Yes."', "null"), False), (STEP.replace("{", "{\n", 1), False),
    ("Yes.\n", True), (f"Sure!\n{STEP}", True), (STEP.replace('"reply"', '"refund"'), True), (STEP[:-1], True), ("", True)])
def test_only_a_text_of_another_form_shows_that_a_schema_is_ignored(text, ignored):
    """Not one with a line break in a string, which a server's grammar may let pass."""
    assert ignores_schema(text) is ignored


# Cache


def test_a_change_pays_for_the_difference_only():
    companies = {"gym": real("gym").model_copy(update={"scenarios": real("gym").scenarios[-8:]})}
    player = Player(companies, Rates(**{**FLAWLESS, "broken_json": 0.1})).answer
    with hostile(player) as server:
        rows, asked = [], []
        for scenarios, attempts, temperature in ((-4, 1, 0.7), (-4, 1, 0.7), (-8, 1, 0.7), (-8, 3, 0.7), (-8, 3, 0.1)):
            used = {"gym": companies["gym"].model_copy(update={"scenarios": companies["gym"].scenarios[scenarios:]})}
            rows.append(held(server.url, used, attempts=attempts, temperature=temperature))
            asked.append(len(server.log))
    calls = [len(server.arrived)]
    assert asked[0] == asked[1] < asked[2] < asked[3] < asked[4] == calls[0], "each run sends what is new, each request once"
    assert rows[0] == rows[1] and rows[0] == [row for row in rows[2] if row["scenario"] in {r["scenario"] for r in rows[0]}]
    assert {row["attempt"] for row in rows[3]} > {0}


def revised(company, name):
    """The company, with more to say at the end of an article."""
    more = lambda article: article.model_copy(update={"paragraphs": [*article.paragraphs[:-1], article.paragraphs[-1] + " Revised."]})  # noqa: E731
    return company.model_copy(update={"articles": [more(article) if article.id == name else article for article in company.articles]})


def test_an_article_that_changes_and_a_company_that_is_added_pay_for_the_difference_only():
    gym, travel = (real(slug).model_copy(update={"scenarios": real(slug).scenarios[-6:]}) for slug in ("gym", "travel"))
    with hostile(Player({"gym": gym, "travel": travel}, Rates(**FLAWLESS)).answer) as server:
        rows, sent = [], []
        first = held(server.url, {"gym": gym})
        read = [{row["scenario"] for row in first if row["role"] == "tool" and article.paragraphs[-1] in row["content"]} for article in gym.articles]
        name = next(article.id for article, readers in zip(gym.articles, read, strict=True) if 0 < len(readers) < len(gym.scenarios))
        sent.append(len(server.log))
        for companies in ({"gym": revised(gym, name)}, {"gym": revised(gym, name), "travel": travel}):
            rows.append(held(server.url, companies))
            sent.append(len(server.log))
        asked = [[request["messages"] for *_, request, _ in server.log[begin:end]] for begin, end in itertools.pairwise(sent)]
    assert set(server.arrived.values()) == {1} and 0 < len(asked[0]) < sent[0]
    assert all(any("Revised." in message["content"] for message in messages) for messages in asked[0]), "only who read it"
    assert asked[1] and all(travel.profile.name in messages[0]["content"] for messages in asked[1]), "only the new company"
    assert rows[1][: len(rows[0])] == rows[0]


def test_a_scenario_that_is_edited_pays_for_itself_alone():
    gym = real("gym").model_copy(update={"scenarios": real("gym").scenarios[-4:]})
    first, *others = gym.scenarios
    opening, *rest = first.turns
    edited = first.model_copy(update={"customer": first.customer.model_copy(update={"facts": f"{first.customer.facts} Edited."}),
                                      "turns": [opening.model_copy(update={"customer": f"{opening.customer} Edited."}), *rest]})
    before, after = gym, gym.model_copy(update={"scenarios": [edited, *others]})
    both = gym.model_copy(update={"scenarios": [*before.scenarios, edited.model_copy(update={"id": "edited"})]})
    with hostile(Player({"gym": both}, Rates(**FLAWLESS)).answer) as server:
        rows = [held(server.url, {"gym": before})]
        sent = len(server.log)
        rows.append(held(server.url, {"gym": after}))
        asked = [request["messages"] for *_, request, _ in server.log[sent:]]
    assert asked and all(any("Edited." in message["content"] for message in messages) for messages in asked)
    untouched = [[row for row in each if row["scenario"] != first.id] for each in rows]
    assert untouched[0] == untouched[1] and rows[0] != rows[1]


@pytest.mark.parametrize("spoil", [
    "UPDATE Cache SET value = substr(value, 1, 20)", "UPDATE Cache SET value = x'00'", "UPDATE Cache SET value = x''",
    "UPDATE Cache SET filename = 'aa/bb/gone.val', mode = 2, value = NULL"])
def test_an_entry_that_is_damaged_is_dropped_and_asked_for_again(tmp_path, spoil):
    import sqlite3
    with hostile(lambda *_: "fine") as server:
        ask(server.url)
        with sqlite3.connect(tmp_path / "responses/cache.db") as database:
            assert database.execute(spoil + " WHERE rowid IN (SELECT min(rowid) FROM Cache)").rowcount == 1
        database.close()
        assert ask(server.url)[0].text == ask(server.url)[0].text == "fine"
        assert len(server.log) == 2


@pytest.mark.parametrize("change, sent", [({"of_a_later_version": 1}, 1), ({"prompt_tokens": "many"}, 2)])
def test_an_entry_of_another_shape_is_read_if_it_can_be_and_is_not_deleted(tmp_path, change, sent):
    import diskcache
    with hostile(lambda *_: "fine") as server:
        ask(server.url)
        with diskcache.Cache(str(tmp_path / "responses"), disk=diskcache.JSONDisk) as cache:
            key, = (key for key in cache if not key.startswith("note:"))
            cache[key] = other = {**cache[key], **change}
            list((responses := Responses(tmp_path / "responses")).entries())
            responses.close()
            assert cache[key] == other
        assert ask(server.url)[0].text == "fine" and len(server.log) == sent


def test_of_several_keys_the_first_that_has_a_readable_answer_counts(tmp_path):
    answers = [Completion(base_url="http://x", model="m", stored=1.0, content=text, reasoning="", finish_reason="stop", prompt_tokens=1,
                          cached_tokens=0, completion_tokens=1, cost_usd=None) for text in ("one", "two")]
    responses, other = (Responses(tmp_path / "responses") for _ in range(2))
    assert responses.first(["a", "b", "c", "d"]) is None
    other._cache["a"] = {"of another": "shape"}
    for key, answer in zip("cd", answers, strict=True):
        other.put(key, answer)  # by another process, after the first look
    assert responses.first(["a", "b", "c", "d"]) == ("c", answers[0]) and responses.first("dc") == ("d", answers[1])
    responses.close()
    other.close()


def test_what_was_noted_about_an_endpoint_goes_with_its_last_answer(tmp_path):
    with hostile(lambda *_: "fine") as server:
        ask(server.url + "/")
    responses = Responses(tmp_path / "responses")
    assert len(responses.prune(lambda _: True)) == 1 and not list(responses._cache)
    responses.close()


def test_a_database_that_is_damaged_is_one_sentence_and_nothing_is_thrown_away(tmp_path):
    (tmp_path / "responses").mkdir()
    (tmp_path / "responses/cache.db").write_bytes(b"no database" * 500)
    with hostile(PLAYER) as server, pytest.raises(InputError, match="cannot be used"):
        held(server.url)
    assert not server.log and (tmp_path / "responses/cache.db").read_bytes() == b"no database" * 500


@pytest.mark.parametrize("schema", [None, action_json_schema(["delivery"])], ids=["plain", "schema"])
def test_an_answer_lies_under_the_hash_of_the_request_as_it_was_sent(tmp_path, schema):
    """However its parts are put together, or what was paid for would not be found again by a later version."""
    question = [{"role": "user", "content": "\u201eWo?\u201c \U0001f4e6 \\ \"\n<|im_end|>"}]
    with hostile(lambda *_: STEP) as server:
        ask(server.url, [question], schema, extra={"top_p": 0.9, "a": {"z": None, "b": [1, True]}})
        (_, _, request, _), = server.log
    whole = json.dumps([server.url, request, request["seed"]], sort_keys=True)
    responses = Responses(tmp_path / "responses")
    assert [key for key, _ in responses.entries()] == [hashlib.sha256(whole.encode()).hexdigest()]
    responses.close()


def test_the_same_request_at_the_same_time_is_sent_once():
    with hostile(lambda *_: "fine", delay_s=0.1) as server:
        assert {answer.text for answer in ask(server.url, [HELLO] * 5)} == {"fine"}
        assert len(server.log) == 1


QUICK = "import runpy, agent.endpoint as e; e.BACKOFF_S = 0.01; runpy.run_module('stages.teacher_gen', run_name='__main__', alter_sys=True)"


def process(folder, **environment):
    env = os.environ | {"PYTHONPATH": str(ROOT), "HANDOFF_CACHE": str(folder / ".cache"), "TEACHER_KEY": "a-long-and-secret-key"} | environment
    return subprocess.Popen([sys.executable, "-c", QUICK], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_at_once_share_one_cache(tmp_path):
    slugs = ("gym", "travel", "streaming")
    player = Player({slug: real(slug) for slug in PARAMS["data"]["held_out"] + list(slugs)} | {s: real(s) for s in
                    ("breadbox", "broadband", "energy", "furniture", "invoicing", "neobank", "petfood")}, Rates(**FLAWLESS)).answer
    with hostile(player, delay_s=0.02) as server:
        for name in ("one", "two"):
            workspace(tmp_path / name, data={"scenarios_per_company": 2},
                      teacher_gen={"attempts": 1, "teacher": elsewhere(server.url), "customer": elsewhere(server.url)})
        running = [process(tmp_path / name, HANDOFF_CACHE=str(tmp_path / "shared")) for name in ("one", "two")]
        assert [(p.communicate()[1], p.returncode)[1] for p in running] == [0, 0]
        assert set(server.arrived.values()) == {1} and len(server.log) > 50
    one, two = ((tmp_path / name / teacher_gen.TRACES).read_bytes() for name in ("one", "two"))
    assert one == two


# Structured output and reasoning models

SCHEMA = action_json_schema(["delivery"])
CHATS = [[{"role": "user", "content": str(number)}] for number in range(6)]


def formats(server):
    return [request.get("response_format", {}).get("type") for *_, request, _ in server.log]


def refusing(*fields, status=400):
    def fault(request, _):
        for name, words in fields:
            if name == request.get("response_format", {}).get("type") or name in request:
                return status, {}, json.dumps({"error": {"message": words}})
        return OK
    return fault


def strict_faults(part, root=False):
    """What OpenAI's strict mode refuses in a schema."""
    if root and part.get("type") != "object":
        yield "root objects must not be 'anyOf' and must be an object"
    if not part.keys() & {"type", "anyOf"}:
        yield "schema must have a 'type' key"
    taken = {"type", "anyOf", "properties", "required", "additionalProperties", "const", "enum"}
    yield from (f"'{name}' is not permitted" for name in part.keys() - taken)
    if part.get("type") == "object" and (part["required"] != list(part["properties"]) or part["additionalProperties"] is not False):
        yield "all properties are required, and no others"
    for inner in (*part.get("anyOf", ()), *part.get("properties", {}).values()):
        yield from strict_faults(inner)


@pytest.mark.parametrize("text", [STEP, f'{{"step": {STEP}}}', f'{{\n  "step" : {STEP}\n}}\n', f'<think>hm</think>{{"step":{STEP}}}'])
def test_a_server_that_takes_a_strict_schema_gets_it_with_every_request(text):
    def openai(request, _):
        faults = list(strict_faults(request["response_format"]["json_schema"]["schema"], root=True))
        return (400, {}, json.dumps({"error": {"message": f"Invalid schema for response_format 'step': {faults[0]}"}})) if faults else OK
    with hostile(lambda *_: text, openai) as server:
        assert [answer.text for answer in ask(server.url, CHATS, SCHEMA)] == [STEP] * 6
        assert formats(server) == ["json_schema"] * 6 and server.log[0][2]["response_format"]["json_schema"]["strict"] is True


@pytest.mark.parametrize("at, odd", [("0", completion(None, refusal="I will not.")), ("3", "Sure!"), ("3", completion(None, refusal="I will not."))])
def test_a_refusal_or_an_odd_step_does_not_end_structured_output(at, odd):
    with hostile(lambda messages, _: odd if messages[0]["content"] == at else STEP) as server:
        ask(server.url, CHATS, SCHEMA)
        ask(server.url, [HELLO], SCHEMA)
        assert formats(server) == ["json_schema"] * 7


@pytest.mark.parametrize("status", [400, 422, 500])
@pytest.mark.parametrize("refused, found", [
    ([("json_schema", "response_format: no")], ["json_schema", *["json_object"] * 7]),
    ([("json_schema", "response_format: no"), ("json_object", "response_format: no")], ["json_schema", "json_object", *[None] * 7])])
def test_a_server_that_refuses_a_schema_is_asked_once_and_that_is_remembered(status, refused, found):
    with hostile(lambda *_: STEP, refusing(*refused, status=status)) as server:
        assert [answer.text for answer in ask(server.url, CHATS, SCHEMA)] == [STEP] * 6
        ask(server.url, [*CHATS, HELLO], SCHEMA)
        assert formats(server) == found, "the second run knows, and asks only what is new"


def test_a_server_that_ignores_a_schema_is_found_out_once():
    with hostile(lambda *_: "Sure, I can help with that!") as server:
        answers = ask(server.url, CHATS, SCHEMA)
        assert {answer.text for answer in answers} == {"Sure, I can help with that!"}, "it is the model's own answer, and paid for"
        assert formats(server) == ["json_schema", *[None] * 5]
        ask(server.url, CHATS, SCHEMA)
        assert len(server.log) == 6, "what was sent before it was known is found as well"


def test_a_refusal_for_another_reason_does_not_end_structured_output():
    with hostile(lambda *_: STEP, lambda request, _: (400, {}, "{}") if "3" in request["messages"][0]["content"] else OK) as server:
        answers = ask(server.url, CHATS, SCHEMA)
        assert [type(answer) for answer in answers].count(EndpointFailure) == 1 and set(formats(server)) == {"json_schema"} and len(server.log) == 6


def test_fields_that_a_server_does_not_know_are_left_out():
    fields = ("seed", "Extra inputs are not permitted: seed"), ("max_tokens", "Use 'max_completion_tokens' instead.")
    with hostile(lambda *_: "fine", refusing(*fields, status=422)) as server:
        ask(server.url, CHATS)
        assert len(server.log) == 8 and server.log[-1][2].keys() == {"model", "messages", "temperature", "max_completion_tokens"}


@pytest.mark.parametrize("schema", [None, SCHEMA], ids=["plain", "schema"])
def test_what_was_paid_is_found_when_the_server_no_longer_takes_what_it_was_sent(schema):
    with hostile(lambda *_: STEP) as server:
        ask(server.url, CHATS, schema)
        server.fault = refusing(("seed", "unknown field: seed"), ("max_tokens", "Use 'max_completion_tokens' instead."))
        ask(server.url, [HELLO], schema)
        assert len(server.log) == 6 + 3
        assert [answer.text for answer in ask(server.url, CHATS, schema)] == [STEP] * 6 and len(server.log) == 6 + 3


def test_extra_fields_are_sent_and_are_part_of_the_question():
    with hostile(lambda *_: "fine") as server:
        ask(server.url, extra={"top_p": 0.9, "thinking": {"type": "disabled"}})
        ask(server.url, temperature=None)
        assert server.log[0][2]["thinking"] == {"type": "disabled"} and "temperature" not in server.log[1][2] and len(server.log) == 2


@pytest.mark.parametrize("message, finish, text", [
    ({"content": f"<think>{{ hm }}</think>\n{STEP}"}, "stop", STEP), ({"content": f"hm, so\n</think>\n\n{STEP}"}, "stop", STEP),
    ({"content": STEP, "reasoning_content": "hm"}, "stop", STEP), ({"content": None, "reasoning_content": f"hm</think>{STEP}"}, "stop", STEP),
    ({"content": "", "reasoning_content": STEP}, "stop", STEP), ({"content": None, "reasoning": STEP}, "stop", STEP),
    ({"content": None, "reasoning_content": "still thinki"}, "length", ""), ({"content": "<think>still thinki"}, "length", ""),
    ({"content": STEP.replace("Yes.", "a </think> b")}, "stop", STEP.replace("Yes.", "a </think> b")),
    ({"content": "\ud83d half"}, "stop", "\ufffd half"),
    ({"content": None, "refusal": "I will not."}, "stop", "I will not.")])
def test_what_a_reasoning_model_thinks_is_not_what_it_says(message, finish, text):
    with hostile(lambda *_: completion(None, finish, **message)) as server:
        assert [answer.text for answer in ask(server.url) + ask(server.url)] == [text, text] and len(server.log) == 1


def test_a_customer_who_thinks_of_the_end_goes_on():
    def thinking(messages, seed):
        text = PLAYER([{**m, "content": m["content"]} for m in messages], seed)
        return f"<think>Not {DONE} yet?</think>{text}"
    with hostile(thinking) as server:
        rows = held(server.url)
    assert {row["failure"] for row in rows} == {None} and not any("think" in row["content"] for row in rows)


# Money


def test_the_rows_say_what_was_paid_and_say_it_again_from_the_cache():
    with hostile(PLAYER) as server:
        first, second = held(server.url), held(server.url)
    assert first == second and sum(row["cost_usd"] for row in first) == pytest.approx(worth(server)) and worth(server) > 1
    assert sum(row["cached_tokens"] for row in first) == sum(use["prompt_tokens_details"]["cached_tokens"] for use in server.paid) > 0


@pytest.mark.parametrize("seeds, failures", [
    ({0}, {None}), (range(3_000_000), {"the customer's answers were cut at max_tokens before they said anything"})])
def test_a_customer_who_only_thinks_is_paid_for_and_asked_again(seeds, failures):
    def thinking(messages, seed):
        cut = seed in seeds and "support agent of" not in messages[0]["content"]
        return completion(None, "length", reasoning_content="hm") if cut else PLAYER(messages, seed)
    with hostile(thinking) as server:
        rows = held(server.url)
        assert {row["failure"] for row in rows} == failures
        assert sum(row["cost_usd"] for row in rows) == pytest.approx(worth(server)) and worth(server) > 0
        sent = len(server.log)
        assert held(server.url) == rows and len(server.log) == sent and set(server.arrived.values()) == {1}


def worth(server):
    """Dollars for what the server answered, by its own count."""
    return sum((use["prompt_tokens"] - (cached := use["prompt_tokens_details"]["cached_tokens"])) * PRICE["input"] + cached * PRICE["cached_input"]
               + use["completion_tokens"] * PRICE["output"] for use in server.paid) / 1e6


def test_the_cap_is_never_passed_and_raising_it_goes_on(clean):
    with hostile(PLAYER, delay_s=0.01) as server:
        whole = sum(row["cost_usd"] for row in clean[0])
        spent = []
        for share in (0.4, 0.4, 0.8):
            with pytest.raises(InputError, match=r"teacher_gen.budget_usd of \$[\d.]+ is used up") as error:
                held(server.url, budget_usd=whole * share)
            assert "raise teacher_gen.budget_usd" in error.value.hint
            spent.append(worth(server))
            assert spent[-1] <= whole * share
        assert 0.15 * whole < spent[0] < spent[2], "it is used"
        assert spent[1] - spent[0] < 0.2 * whole, "what was paid before counts"
        assert held(server.url, budget_usd=whole * 3) == clean[0]
        assert set(server.arrived.values()) == {1}, "no answer was lost at the cap"


def test_answers_that_never_come_count_against_the_cap(monkeypatch):
    monkeypatch.setattr(endpoint, "TRIES", 50)
    monkeypatch.setattr(endpoint, "BACKOFF_S", 0.0001)
    with hostile(PLAYER, lambda *_: "half") as server, pytest.raises(InputError, match="for answers that cannot be used or never came"):
        held(server.url, budget_usd=40.0)
    assert 10 < len(server.log) < 41, "a call is at least the answer's 400 tokens, two dollars"


def test_a_judge_stops_at_its_cap():
    conversation = {"c": Conversation("travel", "c", "policy", [customer("hi")])}
    rows = [{"conversation_id": "c", "index": 1, "raw": f"candidate {number}"} for number in range(60)]
    with hostile(lambda *_: '{"verdict": "acceptable"}', delay_s=0.01) as server:
        judge = EvalJudgeParams(budget_usd=6.0, judge=elsewhere(server.url))
        with pytest.raises(InputError, match=r"eval_judge.budget_usd of \$6 is used up"):
            asyncio.run(judge_all(rows, conversation, judge, None))
        assert 0 < worth(server) <= 6 and 0 < len(server.log) < 60
        answers, cost = asyncio.run(judge_all(rows, conversation, judge.model_copy(update={"budget_usd": None}), None))
    assert {read_verdict(answer) for answer in answers} == {"acceptable"} and cost["cost_usd"] == pytest.approx(worth(server))
    assert set(server.arrived.values()) == {1}


def test_a_judge_that_gives_no_usable_answer_leaves_the_turn_unscored(monkeypatch):
    monkeypatch.setattr(endpoint, "TRIES", 2)
    conversation = {"c": Conversation("travel", "c", "policy", [customer("hi")])}
    rows = [{"conversation_id": "c", "index": 1, "raw": raw} for raw in ("good", "bad")]
    with hostile(lambda *_: '{"verdict": "acceptable"}', lambda request, _: "500" if "bad" in request["messages"][1]["content"] else OK) as server:
        answers, _ = asyncio.run(judge_all(rows, conversation, EvalJudgeParams(budget_usd=None, judge=elsewhere(server.url)), None))
    assert [read_verdict(answer) for answer in answers] == ["acceptable", "unscored"]


def test_a_budget_without_a_price_is_refused():
    with hostile(PLAYER) as server, pytest.raises(InputError, match="'paid' has no price"):
        held(server.url, budget_usd=5.0, price=None)
    assert not server.log


def test_a_budget_that_could_never_be_reached_is_refused():
    free = dict.fromkeys(PRICE, 0.0)
    with hostile(PLAYER) as server, pytest.raises(InputError, match="every price is zero"):
        held(server.url, budget_usd=5.0, price=free)
    assert not server.log


def test_without_a_price_tokens_are_counted_and_dollars_are_not_known_until_there_is_one():
    with hostile(PLAYER) as server:
        rows = held(server.url, price=None)
        assert all((row["cost_usd"] is None) is (row["role"] != "tool") for row in rows) and sum(row["prompt_tokens"] for row in rows) > 0
        assert sum(row["cost_usd"] for row in held(server.url)) == pytest.approx(worth(server))


NULL = {"prompt_tokens": None, "completion_tokens": None}
FLOATS = {"prompt_tokens": 7.0, "completion_tokens": 5.0, "prompt_tokens_details": {"cached_tokens": 2.0}}


@pytest.mark.parametrize("counted, tokens", [
    (None, (12, 0, 40)), ({}, (12, 0, 40)), (NULL, (12, 0, 40)), ("many", (12, 0, 40)), ({"prompt_tokens": -1}, (12, 0, 40)), (FLOATS, (7, 2, 5))])
def test_a_server_that_reports_no_usage_is_counted_by_characters(counted, tokens):
    body = json.dumps({**completion("fine" * 30), "usage": counted})
    with hostile(PLAYER, lambda *_: (200, {}, body)) as server:
        answer, = ask(server.url)
        assert len(server.log) == 1, "it is good, and paid for"
    assert (answer.prompt_tokens, answer.cached_tokens, answer.completion_tokens) == tokens and answer.cost_usd > 0


# Secrets


@pytest.mark.parametrize("changes, message", [
    ({"base_url": "https://me:SECRET@host/v1"}, "credentials or a query"), ({"base_url": "https://host/v1?api_key=SECRET"}, "credentials or a query"),
    ({"base_url": "https://host/v1#SECRET"}, "credentials or a query"), ({"base_url": "ftp://SECRET"}, "neither a URL"),
    ({"base_url": "http://[SECRET"}, "neither a URL"), ({"base_url": "http://host:80SECRET/v1"}, "neither a URL"),
    ({"base_url": "http://host:99999/v1"}, "neither a URL"), ({"api_key_env": "sk-SECRET"}, "not the name of an environment variable"),
    ({"api_key_env": "0a1b2c3d.SECRET"}, "not the name"), ({"extra": {"stream": True}}, "may not hold 'stream'")])
def test_a_secret_in_the_wrong_place_is_refused_and_not_repeated(changes, message):
    with pytest.raises(InputError, match=message) as error:
        held("https://host/v1", **changes)
    assert "SECRET" not in f"{error.value} {error.value.hint}"


@pytest.mark.parametrize("value, message", [
    (None, "is not set"), ("  ", "is not set"), ("a\nb", "characters that no key has"), ("schlüssel", "characters that no key has")])
def test_a_key_that_cannot_be_sent_is_refused_before_any_request(monkeypatch, value, message):
    if value is None:
        monkeypatch.delenv("TEACHER_KEY")
    else:
        monkeypatch.setenv("TEACHER_KEY", value)
    with hostile(PLAYER) as server, pytest.raises(InputError, match=message):
        held(server.url)
    assert not server.log


KEY = "sk-marked-7f3a9c-KEY"


def written(folder):
    """All that a run left: the bytes of its files, and the entries of the cache as text."""
    yield from (path.read_bytes() for path in folder.rglob("*") if path.is_file() and "companies" not in path.parts)
    responses = Responses(folder / ".cache/responses")
    yield from (repr((key, responses._cache[key])).encode() for key in responses._cache)
    responses.close()


@pytest.mark.parametrize("fault, returncode", [
    ("echo", 0), ((401, {}, json.dumps({"error": {"message": f"no such key {KEY}"}})), 1),
    ((400, {}, json.dumps({"error": {"message": f"key {KEY[:12]}…"}})), 1), ((500, {}, f"<pre>Authorization: Bearer {KEY}</pre>"), 1)],
    ids=["echo", "401", "400", "500"])
def test_the_key_is_sent_and_is_nowhere_else(tmp_path, fault, returncode):
    slug = PARAMS["data"]["held_out"]
    answer = lambda messages, seed: completion(f"you sent {KEY}") if "support agent of" in messages[0]["content"] else "hi"  # noqa: E731
    with hostile(answer, lambda *_: OK if fault == "echo" else fault) as server:
        once = elsewhere(server.url)
        workspace(tmp_path, data={"scenarios_per_company": 1, "held_out": slug}, teacher_gen={"attempts": 1, "teacher": once, "customer": once})
        running = process(tmp_path, TEACHER_KEY=KEY, OPENAI_LOG="debug")
        out, err = running.communicate(timeout=120)
    assert running.returncode == returncode, err
    assert f"authorization: bearer {KEY}".lower() in server.log[0][3], "it was sent"
    assert "Traceback" not in err
    for text in (out.encode(), err.encode(), *written(tmp_path)):
        assert KEY[:12].encode() not in text
