"""The simulator as an OpenAI-compatible server, asked by the real client."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest

from agent.endpoint import EndpointParams
from agent.protocol import DONE, agent_chat, customer_chat
from schemas.action import ActionName, parse_action
from schemas.traces import Role
from simulator import actors as simulated_actors
from stages._simulated import simulator_for
from tests.helpers import FLAWLESS, PARAMS, agent, customer, inside, played, real, workspace

SIMULATED = EndpointParams(**PARAMS["eval_judge"]["judge"])
ORDINARY = real("gym").scenarios[-1]
NEEDLESS = agent("escalate", "Over to a colleague.", reason="legal").content
REPLY, SEARCH, UPDATE = (agent(*step, **args).content for step, args in (
    (("reply", "Yes."), {}), (("search_kb",), {"query": "kites"}), (("update_ticket",), {"ticket_id": "NC-1001", "note": "n"})))


def started(folder, role, rates):
    workspace(folder, simulator={role: rates})
    with inside(folder), simulator_for(role, SIMULATED) as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def actors(tmp_path_factory):
    yield from started(tmp_path_factory.mktemp("actors"), "actors", FLAWLESS)


@pytest.fixture(scope="module")
def flawed(tmp_path_factory):
    yield from started(tmp_path_factory.mktemp("flawed"), "actors", dict.fromkeys(FLAWLESS, 0.3))


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    yield from started(tmp_path_factory.mktemp("judge"), "judge", {"unusable": 0.0})


def ask(client, messages, seed=0, **more):
    return client.chat.completions.create(model="simulated", messages=messages, seed=seed, **more)


def text(client, messages, seed=0):
    return ask(client, messages, seed).choices[0].message.content


def texts(client, chats, seed=0):
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda chat: text(client, chat, seed), chats))


OPENING = agent_chat(real("gym"), [customer(ORDINARY.turns[0].customer)])


def test_an_answer_has_the_form_of_a_chat_completion(actors):
    answer = ask(actors, OPENING, temperature=0.7, max_tokens=1)
    assert (answer.object, answer.model) == ("chat.completion", "simulated")
    choice, = answer.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "stop", "assistant")
    assert parse_action(choice.message.content) == ORDINARY.steps[0].as_action()


def test_usage_counts_the_characters_of_question_and_answer(actors):
    answer = ask(actors, OPENING)
    assert answer.usage.prompt_tokens == sum(len(message["content"]) for message in OPENING) // 4
    assert answer.usage.completion_tokens == len(answer.choices[0].message.content) // 4
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_the_one_model_is_called_simulated(actors, judge):
    for client in (actors, judge):
        assert [(model.id, model.owned_by) for model in client.models.list()] == [("simulated", "simulator")]


@pytest.mark.parametrize("messages", [
    [{"role": "system", "content": "You are the agent."}, {"role": "user", "content": "Customer: who are you?"}],
    [{"role": "system", "content": "You are the agent."}], [],
    [{"role": "system", "content": "What you want: x\nWhat you know: y\nHow you are: z"}],
    [*OPENING, *[{"role": "assistant", "content": "{}"}] * 99]])
def test_a_conversation_from_no_scenario_is_refused_with_422(actors, messages):
    with pytest.raises(openai.UnprocessableEntityError, match="knows no scenario that goes like this"):
        ask(actors, messages)


def test_the_judge_refuses_a_conversation_from_no_scenario(judge):
    for said in ([{"from": "customer", "text": "who are you?"}], []):
        with pytest.raises(openai.UnprocessableEntityError):
            ask(judge, [{"role": "system", "content": ""}, {"role": "user", "content": json.dumps({"conversation": said, "candidate": "x"})}])


@pytest.mark.parametrize("method, path, status", [("GET", "chat/completions", 405), ("POST", "models", 405), ("GET", "embeddings", 404)])
def test_there_are_two_routes_and_no_more(actors, method, path, status):
    assert httpx2.request(method, f"{actors.base_url}{path}").status_code == status


def test_teacher_and_customer_play_the_scenario_to_its_end(actors):
    messages = played(real("gym"), ORDINARY)
    for index, message in enumerate(messages):
        if message.role is Role.AGENT:
            assert text(actors, agent_chat(real("gym"), messages[:index])) == message.content
        elif message.role is Role.CUSTOMER:
            assert text(actors, customer_chat(real("gym"), ORDINARY, messages[:index])) == message.content
    assert text(actors, customer_chat(real("gym"), ORDINARY, messages)) == DONE == simulated_actors.DONE


def test_a_customer_who_writes_like_the_label_is_recognised(actors):
    chat = agent_chat(real("gym"), [customer(f"Customer: {ORDINARY.turns[0].customer}")])
    with pytest.raises(openai.UnprocessableEntityError):
        ask(actors, chat)


def openings():
    return [agent_chat(real("gym"), [customer(scenario.turns[0].customer)]) for scenario in real("gym").scenarios[:20]]


def test_the_same_question_gets_the_same_answer_in_any_order(flawed):
    first = texts(flawed, openings())
    assert first == texts(flawed, openings()[::-1])[::-1]


def test_another_seed_is_another_sample(flawed):
    first, second = (texts(flawed, openings(), seed) for seed in (0, 1))
    assert 0 < sum(a != b for a, b in zip(first, second, strict=True)) < len(first)


def gold_turns(slug="gym", scenarios=40):
    for scenario in real(slug).scenarios[:scenarios]:
        messages = played(real(slug), scenario)
        yield from ((messages[:i], parse_action(m.content)) for i, m in enumerate(messages) if m.role is Role.AGENT)


TURNS = list(gold_turns())


def judge_chat(before, candidate):
    document = {"agent_instructions": "x", "conversation": [{"from": m.role.value, "text": m.content} for m in before], "candidate": candidate}
    return [{"role": "system", "content": "Judge."}, {"role": "user", "content": json.dumps(document)}]


def verdicts(client, turns, candidate, seed=0):
    """The judge's texts on one candidate at every turn, or on each turn's own if `candidate` is a function."""
    return texts(client, [judge_chat(before, candidate(gold) if callable(candidate) else candidate) for before, gold in turns], seed)


def acceptable(client, golds, candidate):
    """The share of acceptable verdicts on one candidate at the turns at which the reference takes one of these actions."""
    read = [json.loads(answer)["verdict"] for answer in verdicts(client, [turn for turn in TURNS if turn[1].action in golds], candidate)]
    assert set(read) <= {"acceptable", "not_acceptable"} and len(read) > 40
    return read.count("acceptable") / len(read)


@pytest.mark.parametrize("candidate", ["no step", "", '{"thought": "x"}', NEEDLESS[:-1], NEEDLESS.replace("legal", "mood"), f"Sure: {NEEDLESS}"])
def test_what_is_no_valid_step_is_never_acceptable(judge, candidate):
    assert set(verdicts(judge, TURNS[:25], candidate)) == {'{"verdict": "not_acceptable"}'}


@pytest.mark.parametrize("golds, candidate, least, most", [
    ([ActionName.REPLY], REPLY, 0.9, 1), ([ActionName.SEARCH_KB], SEARCH, 0.9, 1), ([ActionName.SEARCH_KB], REPLY, 0.2, 0.6),
    ([ActionName.REPLY], SEARCH, 0.5, 0.9), ([ActionName.SEARCH_KB], UPDATE, 0, 0), (set(ActionName) - {ActionName.ESCALATE}, NEEDLESS, 0.75, 0.95)],
    ids=["same reply", "same search", "reply for search", "search for reply", "never", "needless hand-off"])
def test_actions_pass_at_the_rate_of_their_pair_whatever_their_words(judge, golds, candidate, least, most):
    assert least <= acceptable(judge, golds, candidate) <= most


def test_a_verdict_depends_on_conversation_candidate_and_seed_alone(judge):
    first, again, other = (verdicts(judge, TURNS[:40], NEEDLESS, seed) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_verdicts_are_unusable_at_the_stated_rate(tmp_path, rate):
    for client in started(tmp_path, "judge", {"unusable": rate}):
        answers = verdicts(client, TURNS[:120], lambda gold: gold.to_json())
    unusable = [answer for answer in answers if "verdict" not in answer]
    assert abs(len(unusable) / len(answers) - rate) <= (0.1 if 0 < rate < 1 else 0)
