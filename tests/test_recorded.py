"""Recorded logs become traces, line by line: what the mapping says and nothing else, and no conversation is lost in silence."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import polars as pl
import pytest
import yaml

from schemas.action import parse_action
from schemas.errors import InputError
from schemas.mapping import Mapping, load_mapping
from schemas.recorded import OriginRule, Recorded, RecordedCounts, UnmappedReason
from schemas.tables import Oversampled, Rejected, Traces, Verified
from schemas.traces import Message, Role
from stages import corpus, oversample, teacher_gen, verify
from stages._chat_log import LoggedMessage, Unmapped, map_conversation
from stages._conversations import conversations
from stages._encoded import encode_table
from stages._recorded import RecordedParams, read_logs
from stages._stage import DataParams, read_table
from stages.qlora_train import Example, make_batches
from stages.verify import OneIn, recorded_split
from tests.helpers import PARAMS, customer, documented, inside, tool, workspace
from tests.layout import ROOT
from tests.students import encoder, tokenizer
from tests.test_bad_input import edit, refused

U = UnmappedReason
EXAMPLES = ROOT / "data/examples"
MAPPING = load_mapping(EXAMPLES / "mapping.yaml")
HELD = {"held_out": ["quayside-parking"]}
OVERSAMPLED = f"oversample: 5 conversations become {4 + PARAMS['oversample']['escalation_factor']}"
"""One of the example's training conversations is handed off."""
UNMAPPED = {
    ("hollin-optics.jsonl", 6): U.CALL_IN_TEXT, ("hollin-optics.jsonl", 7): U.UNKNOWN_TOOL, ("hollin-optics.jsonl", 8): U.TEXT_BESIDE_CALL,
    ("hollin-optics.jsonl", 13): U.DUPLICATE_ID, ("hollin-optics.jsonl", 15): U.BROKEN_LINE,
    ("quayside-parking.jsonl", 3): U.HANDOFF_WITHOUT_REASON, ("quayside-parking.jsonl", 4): U.NOT_TEXT, ("quayside-parking.jsonl", 7): U.NO_COMPANY}


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def user(content):
    return said("user", content)


def bot(content, **more):
    return said("assistant", content, **more)


def call(name, id="c", **args):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": json.dumps(args)}}


def calling(*calls, content=None, **more):
    return bot(content, tool_calls=list(calls), **more)


def result(content, id="c"):
    return said("tool", content, tool_call_id=id)


HI, LOOK, FOUND, BYE = user("hi"), call("kb_lookup", q="lenses"), result("Lenses: two."), bot("There are two.")
PERSON = call("transfer_to_human", why="eye_trouble")


def step(action, message="", thought="", **args):
    return Message(Role.AGENT, json.dumps({"thought": thought, "action": action, "args": args, "message": message}, ensure_ascii=False))


SEARCH, TWO = step("search_kb", query="lenses"), step("reply", "There are two.")


def mapped(log, **changes):
    """The conversation's messages under the example's mapping, with changes."""
    mapping = Mapping.model_validate({**yaml.safe_load((EXAMPLES / "mapping.yaml").read_text(encoding="utf-8")), **changes})
    return map_conversation([LoggedMessage.model_validate(message) for message in log], mapping)


def jsonl(folder, *conversations, name="a.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in conversations), encoding="utf-8")


def conversation(company, *messages, name="1", **metadata):
    return {"conversation_id": name, "company": company, "messages": list(messages), **metadata}


def read(folder, *others):
    """The logs of a folder, read with the example's mapping; an open and a held-out company are added, so that they can be parted."""
    jsonl(folder / "z", conversation("open", HI, BYE), conversation("kept-back", user("hello"), bot("Good day.")), *others)
    params = RecordedParams(path=str(folder), mapping=str(EXAMPLES / "mapping.yaml"))
    return read_logs(params, DataParams(held_out=["kept-back"], scenarios_per_company=0))


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The worked example, through the three stages: the folder in which they ran, and what each said."""
    folder = tmp_path_factory.mktemp("example")
    workspace(folder, data=HELD, teacher_gen={"source": "recorded"})
    shutil.copytree(EXAMPLES, folder / "data/examples")
    with inside(folder):
        lines = [subprocess.run([sys.executable, "-m", f"stages.{stage}"], capture_output=True, text=True, check=True).stdout
                 for stage in ("teacher_gen", "verify", "oversample")]
    return folder, lines


def test_the_example_gives_the_counts_that_readme_states(example):
    folder, lines = example
    generated, checked = (json.loads((folder / f"metrics/{stage}.json").read_text()) for stage in ("teacher_gen", "verify"))
    reasons = {name: count for name, count in generated["recorded"].pop("reasons").items() if count}
    assert generated["recorded"] == {"in": 22, "mapped": 14, "unmapped": 8, "left_out": 10} and reasons == Counter(UNMAPPED.values())
    assert (generated["teacher"], generated["conversations"], generated["agent_turns"], generated["scenarios"]) == ("recorded", 14, 25, 0)
    assert (checked["in"], checked["kept"], checked["rejected"], checked["reasons"]["unfinished"]) == (14, 13, 1, 1)
    assert checked["scenarios_without_a_kept_conversation"] == 0 and checked["not_applicable"] == dict.fromkeys(OriginRule, 14)
    assert [checked[name]["conversations"] for name in ("train", "calibration", "held_out")] == [5, 4, 4]
    assert [checked[name]["handoff_turns"] for name in ("train", "calibration", "held_out")] == [1, 2, 2]
    assert lines[0].startswith("teacher_gen: 22 recorded conversations, 14 mapped, 8 not (")
    assert lines[2].startswith(OVERSAMPLED)
    assert "22 conversations in, 14 mapped and 8 not" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_line_of_the_example_is_in_the_table_with_what_became_of_it(example):
    with inside(example[0]):
        lines, traces = read_table(teacher_gen.RECORDED, Recorded), read_table(teacher_gen.TRACES, Traces)
        rejected = read_table(verify.REJECTED, Rejected)
    assert {(row["file"], row["line"]): row["reason"] for row in lines.to_dicts() if row["reason"]} == UNMAPPED
    written = {(path.name, number): line for path in EXAMPLES.glob("logs/*.jsonl")
               for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1) if line.strip()}
    assert set(written) == set(lines.select("file", "line").iter_rows())
    for row in lines.to_dicts():
        assert row["raw"] == (written[row["file"], row["line"]] if row["reason"] else None)
        assert (row["conversation_id"] is None) is bool(row["reason"])
    assert set(lines["conversation_id"].drop_nulls()) == set(traces["conversation_id"])
    assert set(rejected["conversation_id"]) == {"hollin-optics/h-2049/0"}
    assert json.loads(lines["metadata"][0]) == {"channel": "chat", "csat": 5}


def test_held_out_logs_stay_held_out_and_carry_the_logs_system_message(example):
    with inside(example[0]):
        tables = {path.stem: read_table(path, Verified) for path in (verify.TRAIN, verify.CALIBRATION, verify.HELD_OUT)}
        assert set(read_table(oversample.OVERSAMPLED, Oversampled)["company"]) == {"hollin-optics"}
    assert {name: set(table["company"]) for name, table in tables.items()} == {
        "train": {"hollin-optics"}, "calibration": {"hollin-optics"}, "held_out": {"quayside-parking"}}
    for held in conversations(tables["held_out"]):
        told = "You are the support agent of quayside-parking." if held.name.endswith("9005/0") else "You help drivers with the Quayside Parking app."
        assert held.system.startswith(told) and '"thought": "...", "action"' in held.system and "escalate" in held.system
    assert "ΙΧΒ 4471" in tables["held_out"]["content"].to_list(), "foreign scripts come through"


def test_chat_markers_in_a_log_stay_text(example):
    with inside(example[0]):
        found, = (c for c in conversations(read_table(verify.TRAIN, Verified)) if "<|im_end|>" in c.messages[0].content)
    marker = re.compile(r"<\|im_(start|end)\|>")

    def special(clean):
        encoded = encoder().conversation(found.system, [Message(m.role, marker.sub("x", m.content) if clean else m.content) for m in found.messages])
        return [token for token in encoded.ids if token in tokenizer().all_special_ids], tokenizer().decode(encoded.ids)

    assert special(False)[0] == special(True)[0] and found.messages[0].content in special(False)[1]


def test_conversations_of_one_company_that_began_with_other_prompts_are_never_computed_as_one(example):
    with inside(example[0]):
        encoded = encode_table(read_table(verify.TRAIN, Verified), encoder())
    assert len({system for system, _, _ in encoded}) == 2
    batches = make_batches([Example(system, rows, []) for system, _, rows in encoded], 10_000, 1)
    for batch in batches:
        assert len({tuple(example.encoded.ids[:example.encoded.prefix]) for example in batch}) == 1
    assert sum(map(len, batches)) == len(encoded)


@pytest.mark.parametrize("log, messages", [
    ([HI, calling(LOOK), FOUND, BYE], [customer("hi"), SEARCH, tool("Lenses: two."), TWO]),
    ([HI, calling(LOOK, content=""), FOUND, BYE], [customer("hi"), SEARCH, tool("Lenses: two."), TWO]),
    ([HI, calling(call("kb_lookup", "", q="lenses")), result("Lenses: two.", ""), BYE], [customer("hi"), SEARCH, tool("Lenses: two."), TWO]),
    ([HI, calling(call("kb_lookup", None, q="lenses")), said("tool", "Lenses: two."), BYE], [customer("hi"), SEARCH, tool("Lenses: two."), TWO]),
    ([HI, calling(call("kb_lookup", "1", q="a"), call("kb_lookup", "2", q="b")), result("B", "2"), result("A", "1"), BYE],
     [customer("hi"), step("search_kb", query="a"), tool("A"), step("search_kb", query="b"), tool("B"), TWO]),
    ([HI, calling(call("add_to_case", case=7, text="red")), result(None), BYE],
     [customer("hi"), step("update_ticket", ticket_id="7", note="red"), tool(""), TWO]),
    ([HI, {**calling(LOOK), "tool_calls": [{"function": {"name": "kb_lookup", "arguments": {"q": "lenses"}}}]}, FOUND, BYE],
     [customer("hi"), SEARCH, tool("Lenses: two."), TWO]),
    ([HI, calling(LOOK), BYE], [customer("hi"), SEARCH, TWO]),
    ([HI, bot('```json\n{"name": "kb_lookup", "parameters": {"q": "lenses"}}\n```'), FOUND, BYE],
     [customer("hi"), SEARCH, tool("Lenses: two."), TWO]),
    ([HI, bot('<tool_call>{"name": "kb_lookup", "arguments": "{\\"q\\": \\"lenses\\"}"}</tool_call>'), FOUND, BYE],
     [customer("hi"), SEARCH, tool("Lenses: two."), TWO]),
    ([HI, bot(TWO.content)], [customer("hi"), TWO]),
    ([HI, bot(SEARCH.content), said("tool", "Lenses: two."), BYE], [customer("hi"), SEARCH, tool("Lenses: two."), TWO]),
    ([HI, bot("And yours? ")], [customer("hi"), step("clarify", "And yours?")]),
    ([HI, bot("什么镜片？")], [customer("hi"), step("clarify", "什么镜片？")]),
    ([HI, bot("There are two.", reasoning_content=" Two of them. ")], [customer("hi"), step("reply", "There are two.", "Two of them.")]),
    ([HI, bot("There are two.", reasoning_content=None)], [customer("hi"), TWO]),
    ([HI, bot("<think>Two.</think>\nThere are two.")], [customer("hi"), step("reply", "There are two.", "Two.")]),
    ([user([{"type": "text", "text": "hi"}, {"type": "text", "text": "there"}]), BYE], [customer("hi\nthere"), TWO]),
    ([HI, user("anybody?"), BYE], [customer("hi"), customer("anybody?"), TWO]),
    ([HI, calling(PERSON, content="Over to Ines.")], [customer("hi"), step("escalate", "Over to Ines.", reason="safety")]),
    ([HI, calling(PERSON), result("ok"), bot("Over to Ines.")], [customer("hi"), step("escalate", "Over to Ines.", reason="safety")]),
    ([HI, calling(call("transfer_to_human", why="legal")), bot("Over to Ines.")],
     [customer("hi"), step("escalate", "Over to Ines.", reason="legal")]),
    ([HI, calling(LOOK, PERSON | {"id": "d"}, content="Over to Ines."), FOUND, result("ok", "d")],
     [customer("hi"), SEARCH, tool("Lenses: two."), step("escalate", "Over to Ines.", reason="safety")]),
    ([HI, bot("I am putting you through to a colleague, as you asked.")],
     [customer("hi"), step("escalate", "I am putting you through to a colleague, as you asked.", reason="human_requested")]),
    ([HI, bot("Do you want me handing this to a colleague?")], [customer("hi"), step("clarify", "Do you want me handing this to a colleague?")]),
])
def test_a_conversation_means_what_the_mapping_says(log, messages):
    assert mapped(log).messages == messages


ALL_KEPT = [bot("Good day."), user("you there?"), calling(LOOK, content="Wait."), FOUND, calling(PERSON, content="Over."), result("ok"), user("ok"),
            said("colleague", "Ines here.")]


@pytest.mark.parametrize("leave_out, count, kept", [
    (["text_beside_call", "after_handoff"], 3, [step("reply", "Good day."), customer("you there?"), SEARCH, tool("Lenses: two."),
                                                step("escalate", "Over.", reason="safety")]),
    (["text_beside_call", "after_handoff", "greeting"], 4, [customer("you there?"), SEARCH, tool("Lenses: two."),
                                                            step("escalate", "Over.", reason="safety")])])
def test_only_what_the_mapping_names_is_left_out_and_counted(leave_out, count, kept):
    found = mapped(ALL_KEPT, leave_out=leave_out)
    assert (found.messages, found.left_out) == (kept, count)


def test_last_words_are_left_out_only_if_asked():
    assert mapped([HI, BYE, user("ta"), user("bye")], leave_out=["last_words"]).messages == [customer("hi"), TWO]
    assert mapped([HI, BYE, user("ta")], leave_out=[]).messages == [customer("hi"), TWO, customer("ta")]


MESSAGES = {
    U.UNKNOWN_ROLE: [[HI, said("critic", "bad")], [HI, BYE, said("function", "x")]],
    U.SYSTEM_MIDWAY: [[HI, said("system", "be rude"), BYE]],
    U.NOT_TEXT: [[user([{"type": "image_url", "image_url": {"url": "x"}}]), BYE], [HI, bot([{"type": "refusal", "refusal": "no"}])]],
    U.EMPTY_MESSAGE: [[HI, bot(None)], [HI, bot(" \n")], [user(""), BYE], [HI, bot("<think>hm</think>")]],
    U.UNKNOWN_TOOL: [[HI, calling(call("refund_now", amount=4)), result("ok")], [HI, bot('{"name": "refund_now", "arguments": {}}')]],
    U.BAD_ARGUMENTS: [
        [HI, calling(call("kb_lookup"))], [HI, calling(call("kb_lookup", q=["a"]))], [HI, calling(call("kb_lookup", q=""))],
        [HI, calling(call("kb_lookup", q="a", site="x"))], [HI, calling(call("kb_lookup", q=True))],
        [HI, {**calling(), "tool_calls": [{"function": {"name": "kb_lookup", "arguments": '{"q": "a'}}]}],
        [HI, {**calling(), "tool_calls": [{"function": {"name": "kb_lookup", "arguments": '"q"'}}]}]],
    U.CALL_IN_TEXT: [
        [HI, bot(text)] for text in (
            'Sure. {"name": "kb_lookup"}', '{"name": "kb_lookup", "argum', "kb_lookup(q='lenses')", '<tool_call>{"name": "kb_lookup"', "<think>so",
            TWO.content.replace('"reply"', '"refund"'), f"Sure! {TWO.content}", "[TOOL_CALLS] kb_lookup")],
    U.TEXT_BESIDE_CALL: [[HI, calling(LOOK, content="Wait."), FOUND, BYE]],
    U.RESULT_WITHOUT_CALL: [
        [HI, FOUND, BYE], [HI, calling(LOOK), result("x", "d"), BYE], [HI, calling(LOOK), FOUND, FOUND, BYE],
        [HI, calling(LOOK), user("?"), FOUND, BYE], [HI, bot(TWO.content), FOUND]],
    U.UNCLEAR_IDS: [
        [HI, calling(call("kb_lookup", "", q="a"), call("kb_lookup", "", q="b")), result("A", ""), result("B", "")],
        [HI, calling(LOOK, LOOK), FOUND],
        [HI, calling(call("kb_lookup", "1", q="a"), call("kb_lookup", "2", q="b")), result("A", "1"), result("B", "")]],
    U.HANDOFF_WITHOUT_REASON: [
        [HI, bot("I am passing you on to a colleague.")], [HI, calling(call("transfer_to_human", why="bored"), content="Over.")],
        [HI, calling(call("transfer_to_human"), content="Over.")]],
    U.HANDOFF_WITHOUT_MESSAGE: [[HI, calling(PERSON)], [HI, calling(PERSON), result("ok"), user("?")], [HI, calling(PERSON), calling(LOOK), FOUND]],
    U.NO_AGENT_STEP: [[], [HI], [said("system", "x")], [bot("Good day."), HI]],
}


@pytest.mark.parametrize("reason, log", [(reason, log) for reason, logs in MESSAGES.items() for log in logs])
def test_what_the_mapping_does_not_cover_is_refused_by_name_and_never_guessed(reason, log):
    with pytest.raises(Unmapped) as refusal:
        mapped(log)
    assert refusal.value.reason is reason and refusal.value.detail


def test_a_stated_default_reason_is_used():
    log = [HI, calling(call("transfer_to_human", why="bored"), content="Over.")]
    handoff = {"reasons": {"eye_trouble": "safety"}, "default_reason": "company_rule"}
    assert parse_action(mapped(log, handoff=handoff).messages[1].content).args == {"reason": "company_rule"}


def test_a_tool_may_speak_and_have_fixed_arguments():
    tools = {"send": {"action": "clarify", "message": "body"},
             "flag": {"action": "create_ticket", "args": {"summary": "s"}, "values": {"category": "other"}}}
    log = [HI, calling(call("flag", s="broken")), result("7"), calling(call("send", "d", body="Which one?")), result("sent", "d")]
    assert mapped(log, tools=tools).messages == [
        customer("hi"), step("create_ticket", category="other", summary="broken"), tool("7"), step("clarify", "Which one?")]


GOOD = json.dumps(conversation("open", HI, BYE, name="2"))
LINES = {
    U.BROKEN_LINE: [b"{", b"[1]", b"\xff\xfe{", GOOD[:-9].encode(), b'{"company": "open", "company": "kept-back"}', b"[" * 100_000,
                    GOOD.replace("hi", "\\ud83d").encode()],
    U.BROKEN_CONVERSATION: [b"{}", b'{"messages": [7]}', b'{"messages": "hi"}', GOOD.replace('"role": "user", ', "").encode(),
                            GOOD.replace('"company": "open"', '"company": ["open"]').encode(), GOOD.replace('"hi"', "7").encode()],
    U.NO_COMPANY: [GOOD.replace(*change).encode() for change in (
        ('"open"', "null"), ('"open"', '""'), ('"open"', '"Open Ltd"'), ('"open"', '"a/b"'), ('"open"', '"judge"'), ("company", "firm"))],
    U.DUPLICATE_ID: [json.dumps(conversation("open", HI, bot("Other words."))).encode()],
}


@pytest.mark.parametrize("reason, line", [(reason, line) for reason, lines in LINES.items() for line in lines], ids=lambda value: str(value)[:40])
def test_a_line_that_cannot_be_read_is_kept_with_its_reason_and_the_rest_goes_on(tmp_path, reason, line):
    jsonl(tmp_path, conversation("open", HI, BYE))
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf\r\n" + line + b"\n  \n" + GOOD.replace('"2"', '"3"').encode())
    logs = read(tmp_path)
    table, counts = Recorded.validate(logs.table()), logs.metrics()["recorded"]
    broken = table.filter(pl.col("file") == "b.jsonl").row(0, named=True)
    assert (broken["line"], broken["reason"], broken["raw"]) == (2, reason, line.decode("utf-8", "replace"))
    assert counts["in"] == 5 and counts["mapped"] + counts["unmapped"] == 5 and counts["reasons"][reason] >= 1
    assert "open/3/0" in table["conversation_id"]


def test_every_reason_is_tested_here():
    assert {*MESSAGES, *LINES} == set(U)


def test_a_conversation_without_an_id_keeps_its_name_when_lines_move(tmp_path):
    nameless = [conversation("open", user(text), BYE, name=name) for text, name in (("one", ""), ("two", None), ("three", " "))]
    jsonl(tmp_path / "a", *nameless)
    jsonl(tmp_path / "b", *nameless[::-1])
    names = [{name for name in read(tmp_path / part).table()["conversation_id"] if "unnamed" in name} for part in "ab"]
    assert names[0] == names[1] and len(names[0]) == 3


def test_counts_that_lose_a_conversation_are_refused():
    with pytest.raises(ValueError, match="in must equal mapped"):
        RecordedCounts.model_validate({"in": 3, "mapped": 1, "unmapped": 1, "reasons": {"not_text": 1}, "left_out": 0})


def test_the_split_of_logs_hangs_on_their_name_alone():
    one_in = OneIn(handoff=2, near_miss=3, ordinary=3)
    shares = {hands_off: Counter(recorded_split(f"open/{i}/0", hands_off, one_in) for i in range(3000)) for hands_off in (True, False)}
    assert abs(shares[True]["calibration"] - 1500) < 150 and abs(shares[False]["calibration"] - 1000) < 150


def test_a_company_with_a_folder_is_held_to_its_policy_and_prompted_with_it(company_folder, tmp_path):
    chats = [conversation("teashop", said("system", "Sell."), user(f"{name}, how long may I wait with a dent?"), bot(text), name=name)
             for name, text in {"in-time": "You have 30 days for it.", "wrong": "You have 45 days for it."}.items()]
    made = calling(call("open_case", topic="refunds", text="dent")), result("made")
    chats.append(conversation("teashop", HI, *made, BYE, name="other"))
    jsonl(tmp_path / "logs", *chats, conversation("elsewhere", user("is it 45?"), bot("It is, or 46.")))
    params = {**PARAMS, "data": {"held_out": ["elsewhere"], "scenarios_per_company": 0},
              "teacher_gen": {**PARAMS["teacher_gen"], "source": "recorded", "recorded": {"path": "logs", "mapping": str(EXAMPLES / "mapping.yaml")}}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    with inside(tmp_path):
        teacher_gen.main()
        verify.main()
        kept = pl.concat([read_table(path, Verified) for path in (verify.TRAIN, verify.CALIBRATION, verify.HELD_OUT)])
        rejected, metrics = read_table(verify.REJECTED, Rejected), json.loads(verify.METRICS.read_text())
    assert set(kept["conversation_id"]) == {"teashop/in-time/0", "elsewhere/1/0"}
    assert dict(rejected.select("conversation_id", "reject_reason").iter_rows()) == {
        "teashop/wrong/0": "unsupported_fact", "teashop/other/0": "bad_args"}
    assert kept.filter(pl.col("company") == "teashop")["system"][0].startswith("You are the support agent of Copper Kettle")
    assert metrics["not_applicable"] == {"ticket_category": 1, "facts": 1, "outcome": 4}


@pytest.fixture
def work(tmp_path):
    """A workspace that the example runs in, for tests to break."""
    workspace(tmp_path, data=HELD, teacher_gen={"source": "recorded"})
    shutil.copytree(EXAMPLES, tmp_path / "data/examples")
    return tmp_path


def without_logs(work):
    shutil.rmtree(work / "data/examples/logs")


def emptied(work):
    for path in (work / "data/examples/logs").glob("*"):
        path.write_text("\n \n")


def renamed(work):
    for path in (work / "data/examples/logs").glob("*"):
        path.rename(path.with_suffix(".json"))


def unreadable(work):
    for path in (work / "data/examples/logs").glob("*"):
        path.write_bytes(b"\xff\xfe\x00\n" * 3)


def mapping_with(old, new):
    return lambda work: edit(work / "data/examples/mapping.yaml", old, new)


def params_with(old, new):
    return lambda work: edit(work / "params.yaml", old, new)


@pytest.mark.parametrize("spoil, error, hint", [
    (without_logs, "the folder of logs data/examples/logs does not exist", "teacher_gen.recorded.path"),
    (renamed, "data/examples/logs holds no .jsonl file", "README"),
    (emptied, "are empty", "README"),
    (unreadable, "none of the 6 conversations under data/examples/logs could be mapped, 6 of them for broken_line; "
                 "the first: hollin-optics.jsonl line 1", "mapping.yaml"),
    (lambda work: (work / "data/examples/mapping.yaml").unlink(), "data/examples/mapping.yaml cannot be read", "UTF-8"),
    (mapping_with("tools:", "tools: ["), "mapping.yaml line", ""),
    (mapping_with("thought:", "thoughts:"), "mapping.yaml: thoughts: Extra inputs are not permitted", "data/examples/mapping.yaml"),
    (mapping_with("action: search_kb", "action: serach_kb"), "mapping.yaml: tools.kb_lookup.action: Input should be 'search_kb'", "README"),
    (mapping_with("query: q", "text: q"), "tools.kb_lookup: search_kb has no argument 'text'; it has: query", ""),
    (mapping_with("{category: topic, summary: text}", "{category: topic}"), "tools.open_case: create_ticket needs 'summary'", ""),
    (mapping_with("ignore: [top_k]", "message: words"), "tools.kb_lookup: search_kb carries no message", ""),
    (mapping_with("eye_trouble: safety", "eye_trouble: health"), "handoff.reasons.eye_trouble: Input should be 'security'", ""),
    (mapping_with("[?？؟;]", "[?"), "mapping.yaml: clarify: Input should be a valid regular expression", ""),
    (mapping_with("clarify: ", "question: "), "mapping.yaml: clarify: Field required", ""),
    (mapping_with("[greeting,", "[hello,"), "leave_out.0: Input should be 'greeting'", ""),
    (mapping_with("open_case:", "kb_lookup:"), "the key 'kb_lookup' occurs twice", ""),
    (lambda work: (work / "data/examples/mapping.yaml").write_text("- 1"), "mapping.yaml: as a whole", ""),
    (params_with("source: recorded", "source: logs"), "teacher_gen.source: Input should be 'endpoint' or 'recorded'", ""),
    (params_with("    path:", "    format: csv\n    path:"), "unknown parameter 'teacher_gen.recorded.format'", "path, mapping"),
    (params_with("- quayside-parking", "- quay"), "data.held_out names 'quay'", "quayside-parking"),
    (params_with("- quayside-parking", "- travel"), "none is held out, so there is nothing to measure on", "data.held_out"),
    (params_with("- quayside-parking", "- quayside-parking\n  - hollin-optics"), "all are held out, so there is nothing to train on", "held_out"),
])
def test_a_mistake_is_one_sentence_and_costs_nothing(work, spoil, error, hint):
    spoil(work)
    told = refused(work, "teacher_gen")
    assert error in told[0] and hint in told[1]


def test_traces_whose_logs_are_not_on_record_are_refused(work):
    with inside(work):
        teacher_gen.main()
        read_table(teacher_gen.RECORDED, Recorded)[:0].write_parquet(teacher_gen.RECORDED)
        with pytest.raises(InputError, match="does not know the conversation"):
            verify.main()


def test_logs_of_which_nothing_is_left_after_verification_are_refused(work):
    logs = work / "data/examples/logs"
    shutil.rmtree(logs)
    jsonl(logs, conversation("quayside-parking", HI, calling(LOOK), FOUND), conversation("hollin-optics", user("hello"), BYE))
    with inside(work):
        teacher_gen.main()
    error, hint = refused(work, "verify")
    assert "of 2 recorded conversations none is left to measure on; rejected: unfinished 1" in error and "leave out" in hint


def test_a_held_out_company_without_a_folder_does_not_stop_the_corpus_stage(company_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["corpus"])
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({**PARAMS, "data": {**HELD, "scenarios_per_company": 0}}))
    with inside(tmp_path):
        corpus.main()
        measured = json.loads(corpus.METRICS.read_text())
    assert list(measured["companies"]) == ["teashop"] and measured["bag_of_words"] == {"pooled": {}}


def test_the_documented_commands_work_and_dvc_sees_an_edited_log(tmp_path):
    """In a clone of its own: README's parameters and commands, an edit in the logs, and what it costs when an endpoint is the source."""
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        if name and not name.startswith((".dvc/", "metrics/qlora_train", "models/")) and (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")} | {"DVC_NO_ANALYTICS": "1"}

    def shell(line):
        return subprocess.run(line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout

    def set_params(changes):
        params = yaml.safe_load((tmp_path / "params.yaml").read_text())
        for name, values in changes.items():
            params[name] |= values
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

    shell("git init -q && dvc init -q")
    told = documented("Use your own logs")
    params, commands = re.search(r"```yaml\n(data:.*?)```", told, re.DOTALL)[1], re.search(r"```\n(dvc repro.*?)```", told, re.DOTALL)[1]
    set_params(yaml.safe_load(params))
    shown = [shell(line.split("  #")[0]) for line in commands.strip().split("\n")]
    assert OVERSAMPLED in shown[0] and "handoff_without_reason" in shown[1]
    assert "didn't change" in shell("dvc repro oversample")

    logs = tmp_path / "data/examples/logs/hollin-optics.jsonl"
    logs.write_text(logs.read_text(encoding="utf-8").replace("h-2047", "h-2047b"), encoding="utf-8")
    again = shell("dvc repro oversample")
    assert "Running stage 'teacher_gen'" in again and "Running stage 'verify'" in again and "Stage 'oversample' didn't change" in again

    set_params({"teacher_gen": {"source": "endpoint"}, "data": {"held_out": ["travel"], "scenarios_per_company": 1}})
    assert "by simulator" in shell("dvc repro verify")
    logs.write_text(logs.read_text(encoding="utf-8").replace("h-2047b", "h-2047"), encoding="utf-8")
    asked_again = shell("dvc repro verify")
    assert "Running stage 'teacher_gen'" in asked_again and "Stage 'verify' didn't change" in asked_again
