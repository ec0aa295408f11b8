"""What is a step of the agent, and what is not."""

import json
from itertools import product

import pytest
from llguidance import LLMatcher, LLTokenizer

from schemas.action import ARGS, TOOLS, ActionError, ActionFault, ActionName, HandoffReason, action_json_schema, make_action, parse_action

ARGS_OF = {
    "search_kb": {"query": "dented tin"}, "reply": {}, "clarify": {}, "escalate": {"reason": "security"},
    "create_ticket": {"category": "delivery", "summary": "new tin"}, "update_ticket": {"ticket_id": "CK-2001", "note": "neighbour"}}


def message_of(action):
    return "" if action in TOOLS else "Größe “M”,\n£5 \\ 茶"


def text(action="reply", /, **changes):
    """A step as JSON, with some keys changed; a key changed to `...` is left out."""
    step = {"thought": "so it is", "action": action, "args": ARGS_OF.get(action, {}), "message": message_of(action)} | changes
    return json.dumps({key: value for key, value in step.items() if value is not ...}, ensure_ascii=False)


def fault(raw):
    with pytest.raises(ActionError) as caught:
        parse_action(raw)
    assert caught.value.detail and str(caught.value).startswith(f"{caught.value.fault}: ")
    return caught.value.fault


@pytest.mark.parametrize("action", ActionName)
def test_a_step_survives_its_own_text(action):
    step = make_action("so it is", action, ARGS_OF[action], message_of(action))
    assert parse_action(step.to_json()) == step
    assert step.to_json() == text(action), "canonical: the four keys in order, non-ASCII kept"
    assert "\n" not in step.to_json()


@pytest.mark.parametrize("reason", HandoffReason)
def test_every_reason_is_a_reason(reason):
    assert parse_action(text("escalate", args={"reason": reason.value})).args == {"reason": reason.value}


def test_key_order_and_spaces_do_not_matter():
    loose = '\n {"message": "Yes.",\n  "args": {}, "thought": "", "action": "reply"} \n'
    assert parse_action(loose).to_json() == '{"thought": "", "action": "reply", "args": {}, "message": "Yes."}'


@pytest.mark.parametrize("raw", [
    "", " \n", "I will hand this off.", "null", "7", '"reply"', "[]", f"[{text()}]", "NaN", "-Infinity",
    f"Here it is: {text()}", f"{text()} Done.", f"{text()}\n{text()}", f"{text()},{text()}", text()[:-1], text()[1:], text().replace('"', "'"),
    text().replace('"thought"', '"action": "clarify", "thought"'), text("escalate").replace('"reason"', '"reason": "legal", "reason"'),
    text().replace("so it is", "so\nit is"), "\ufeff" + text(),
    text(thought=...), text(thought=None), text(thought=["x"]), text(mood="calm"), text(Action="reply"), "{}",
], ids=range(27))
def test_a_text_that_is_not_one_object_with_the_four_keys(raw):
    assert fault(raw) is ActionFault.NOT_ONE_JSON_OBJECT


@pytest.mark.parametrize("action", ["transfer_call", "Escalate", "ESCALATE", "reply ", "", None, 1, ["reply"], {"name": "reply"}, ...], ids=repr)
def test_an_unknown_action(action):
    assert fault(text(action=action)) is ActionFault.UNKNOWN_ACTION


@pytest.mark.parametrize("action, args", [
    *(("reply", args) for args in (..., None, [], "", {"x": 1}, {"message": "Yes."})),
    *(("search_kb", args) for args in ({}, {"query": ""}, {"query": None}, {"query": 7}, {"query": ["tin"]}, {"q": "tin"}, {"query": "a", "n": 1})),
    *(("create_ticket", args) for args in ({"category": "billing"}, {"category": "billing", "summary": ""}, {"category": 3, "summary": "x"})),
    *(("update_ticket", args) for args in ({"ticket_id": "CK-2001"}, {"ticket_id": 2001, "note": "x"}, {"id": "CK-2001", "note": "x"})),
    *(("escalate", args) for args in ({}, {"reason": "boredom"}, {"reason": "Security"}, {"reason": None}, {"reason": "legal", "note": "x"})),
    ("search_kb", json.loads('{"query": NaN}')),
], ids=repr)
def test_arguments_that_do_not_fit_the_action(action, args):
    assert fault(text(action, args=args)) is ActionFault.BAD_ARGS


@pytest.mark.parametrize("action, message", [
    *((name.value, wrong) for name in ActionName for wrong in (..., None, 5, ["Yes."])),
    *((name.value, "One moment.") for name in sorted(TOOLS)),
    *((name.value, empty) for name in sorted(set(ActionName) - TOOLS) for empty in ("", " \n"))], ids=repr)
def test_a_message_missing_or_out_of_place(action, message):
    assert fault(text(action, message=message)) is ActionFault.BAD_MESSAGE


def test_the_first_fault_in_the_stated_order_counts():
    assert fault(text("fly", args={"x": 1}, message="", thought=None)) is ActionFault.NOT_ONE_JSON_OBJECT
    assert fault(text("fly", args={"x": 1}, message="")) is ActionFault.UNKNOWN_ACTION
    assert fault(text("search_kb", args={}, message="One moment.")) is ActionFault.BAD_ARGS


def test_the_stated_order_holds_for_wrong_types_too():
    assert fault(text("fly", args=None)) is ActionFault.UNKNOWN_ACTION


@pytest.mark.parametrize("key", ["thought", "message"])
def test_every_valid_step_can_be_written_as_utf8(key):
    raw = text(**{key: "half a smile \ud83d"}).replace("\ud83d", "\\ud83d")
    try:
        step = parse_action(raw)
    except ActionError:
        return
    step.to_json().encode()


@pytest.mark.parametrize("wrapping", [
    "```json\n{}\n```", "```\n{}\n```", "  ```json\n\n{}\n\n```  \n", "<think>hm</think>{}", "\n<think>\na {{\n</think>\n\n{}",
    "<think>hm</think>\n```json\n{}\n```", "<think></think>{}"])
def test_one_think_block_and_one_fence_are_taken_off(wrapping):
    assert parse_action(wrapping.format(text("escalate"))) == parse_action(text("escalate"))


@pytest.mark.parametrize("wrapping", [
    "Sure:\n```json\n{}\n```", "```json\n{}\n```\nDone.", "```json\n{}", "```python\n{}\n```", "```json\n{}\n```\n```json\n{}\n```",
    "<think>hm{}", "<think>a</think><think>b</think>{}", "{}<think>hm</think>", "so <think>hm</think>{}", "```json\n<think>hm</think>{}\n```"])
def test_any_other_wrapping_is_a_fault(wrapping):
    step = text("escalate")
    assert fault(wrapping.format(step, step)) is ActionFault.NOT_ONE_JSON_OBJECT


def test_a_fence_inside_the_message_stays():
    assert parse_action(text(message="```json\nx\n``` <think>no</think>")).message == "```json\nx\n``` <think>no</think>"


DEEP = "[" * 100_000


@pytest.mark.parametrize("raw", [DEEP, '{"thought": ' * 100_000, text(args=0).replace("0", DEEP + DEEP.replace("[", "]")), "9" * 5000], ids=range(4))
def test_hostile_depth_and_length_are_faults_not_crashes(raw):
    assert fault(raw) is ActionFault.NOT_ONE_JSON_OBJECT


def accepted(step, **options):
    """Whether the engine that constrains the student's decoding lets the step through."""
    compact = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(action_json_schema(**options), defaults=compact))
    tokens = tokenizer.tokenize_str(json.dumps(step, ensure_ascii=False))
    return matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens) and matcher.is_accepting()


def valid(step):
    try:
        make_action(**step)
    except ActionError:
        return False
    return True


STEPS = [{"thought": "t", "action": action, "args": args, "message": message} for action, args, message in product(
    [*ARGS_OF, "fly"],
    [{}, *filter(None, ARGS_OF.values()), {"query": ""}, {"reason": "boredom"}, {"query": "a", "n": 1}, {"category": "billing"}],
    ["", "Grüß dich."])]


def test_the_schema_accepts_exactly_the_valid_steps():
    assert [step for step in STEPS if accepted(step)] == [step for step in STEPS if valid(step)]
    assert sum(map(valid, STEPS)) == 6, "one valid step an action among many that are not"


def test_the_schema_with_categories_accepts_only_those():
    step = {"thought": "t", "action": "create_ticket", "args": {"category": "billing", "summary": "x"}, "message": ""}
    assert accepted(step) and accepted(step, ticket_categories=["billing"]) and not accepted(step, ticket_categories=["delivery"])


TEXTS = [("reply", "thought"), ("reply", "message"), *((action, key) for action, args in ARGS_OF.items() if action != "escalate" for key in args)]


@pytest.mark.parametrize("action, key", TEXTS)
def test_the_bounded_schema_limits_every_text(action, key):
    def step(value):
        whole = {"thought": "t", "action": action, "args": ARGS_OF[action], "message": message_of(action)}
        return whole | ({key: value} if key in whole else {"args": ARGS_OF[action] | {key: value}})

    assert accepted(step("é" * 40), bounded=True) and not accepted(step("é" * 1000), bounded=True)
    assert accepted(step("é" * 1000))


def test_every_action_has_one_variant_with_its_own_arguments():
    variants = {v["properties"]["action"]["const"]: v for v in action_json_schema()["anyOf"]}
    assert set(variants) == set(ActionName) == set(ARGS)
    for name, variant in variants.items():
        assert set(variant["properties"]["args"]["properties"]) == set(ARGS[ActionName(name)].model_fields)
