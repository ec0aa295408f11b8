"""Every rule rejects the conversation that breaks it and nothing else; what is kept goes where it belongs."""

import json
import re
from collections import Counter

import polars as pl
import pytest

from schemas.action import make_action, parse_action
from schemas.company import Kind, load_company
from schemas.tables import Rejected, Traces, Verified
from schemas.traces import Message, RejectReason, Role
from stages import verify
from stages._chunks import ROWS
from stages._examine import Examiner, _is_canonical
from stages._rules import MAX_MESSAGE_WORDS, MAX_STEPS, RULES, Case, examine
from stages._stage import load_params, read_table, write_table
from stages.verify import Gate, Origins, VerifyParams, check_all, split_of, split_tables
from tests.helpers import HELD_OUT, ROOT, SLUGS, agent, customer, inside, played, real, scenario_of, tool, traces, workspace

R = RejectReason
TRAINING = [slug for slug in SLUGS if slug not in HELD_OUT]
ONE_IN = load_params("verify", VerifyParams, ROOT / "params.yaml").calibration_one_in
TRAVEL_LINE = "Where do I leave a note about the hotel in Madeira?"
FERRY = "Yes, ferry and cabin both are, on every crossing."
TEA, STRANGER, PASSWORD = "dent-in-the-lid", "order-from-another-town", "password-after-holiday"
CHAT = [customer("and how are you?"), agent("reply", "Fine, thank you.")]


def at(index, *messages):
    """Replace the message at an index by these."""
    return lambda old: [*old[:index], *messages, *old[index + 1 or len(old):]]


def reworded(index, change):
    """The text of one message, changed."""
    return lambda old: at(index, Message(old[index].role, change(old[index].content)))(old)


BROKEN = {
    R.NOT_ONE_JSON_OBJECT: (TEA, reworded(9, lambda text: f"Sure! {text}")),
    R.UNKNOWN_ACTION: (TEA, reworded(9, lambda text: text.replace('"reply"', '"refund"'))),
    R.BAD_ARGS: (TEA, reworded(5, lambda text: text.replace('"delivery"', '"refunds"'))),
    R.BAD_MESSAGE: (TEA, reworded(9, lambda text: json.dumps({**json.loads(text), "message": ""}))),
    R.TOOL_RESULT_MISSING: (TEA, at(2)),
    R.UNFINISHED: (TEA, at(9)),
    R.AFTER_ESCALATE: (STRANGER, lambda old: old + CHAT),
    R.UNKNOWN_TICKET: (TEA, lambda old: [*old[:7], agent("update_ticket", ticket_id="CK-9999", note="dented tin"),
                                         tool("error: no ticket CK-9999"), *old[9:]]),
    R.UNSUPPORTED_FACT: (TEA, reworded(9, lambda text: text.replace("on Tuesday", "in 17 hours"))),
    R.REPEATED_SEARCH: (TEA, at(3, agent("search_kb", query="TIN dented"), tool("no article matches"), agent("reply", "Which number?"))),
    R.TOO_LONG: (TEA, at(9, agent("reply", "tea " * (MAX_MESSAGE_WORDS + 1)))),
    R.HANDOFF_NEEDLESS: (PASSWORD, at(1, agent("escalate", "Over to a colleague.", reason="security"))),
    R.HANDOFF_MISSED: (STRANGER, at(3, agent("reply", "Do keep an eye on it."))),
    R.HANDOFF_LATE: (STRANGER, lambda old: [*old[:3], agent("clarify", "Are you sure?"), customer("I am"), old[3]]),
    R.HANDOFF_WRONG_REASON: (STRANGER, at(3, agent("escalate", "Over to a colleague.", reason="safety"))),
    R.HELD_OUT_TEXT: (TEA, at(0, customer(TRAVEL_LINE.upper()))),
}


class Both(Gate):
    """A gate that examines what it checks."""

    def __init__(self, companies, held_out):
        super().__init__(companies, held_out)
        self.companies = companies

    def verdict(self, company, scenario, failure, messages):
        return self.check(Examiner(self.companies).conversation("c", company, scenario, failure, messages), messages.__getitem__)


def checked(table, companies, held_out, rows=ROWS, gate=None):
    """conversation id -> its verdict."""
    gate = gate or Gate(companies, held_out)
    return {one.name: rejection for _, _, verdicts in check_all(table.lazy(), companies, gate, set(held_out), rows) for one, rejection in verdicts}


@pytest.fixture
def teashop(company_folder):
    return load_company("teashop", company_folder.parent)


@pytest.fixture
def gate(teashop):
    travel = real("travel")
    first, *others = travel.scenarios
    turn = first.turns[0].model_copy(update={"customer": TRAVEL_LINE})
    first = first.model_copy(update={"turns": [turn, *first.turns[1:]]})
    return Both({"teashop": teashop, "travel": travel.model_copy(update={"scenarios": [first, *others]})}, ["travel"])


def all_reasons(messages, company, scenario):
    """What every rule says, not only the first that is broken."""
    case = Case(messages, {i: parse_action(m.content) for i, m in enumerate(messages) if m.role is Role.AGENT}, company, scenario)
    return {rejection.reason for rule in RULES for rejection in rule(case)}


@pytest.mark.parametrize("name", [TEA, STRANGER, PASSWORD])
def test_the_unchanged_conversation_is_kept(gate, teashop, name):
    assert gate.verdict("teashop", name, None, played(teashop, scenario_of(teashop, name))) is None


@pytest.mark.parametrize("reason", BROKEN, ids=str)
def test_one_change_breaks_one_rule(gate, teashop, reason):
    name, change = BROKEN[reason]
    scenario = scenario_of(teashop, name)
    messages = change(played(teashop, scenario))
    assert messages != played(teashop, scenario)
    assert gate.verdict("teashop", name, None, messages).reason is reason
    if reason not in (R.NOT_ONE_JSON_OBJECT, R.UNKNOWN_ACTION, R.BAD_MESSAGE):
        assert all_reasons(messages, teashop, scenario) == ({reason} - {R.HELD_OUT_TEXT})


@pytest.mark.parametrize("reason, index, change", [
    (R.BAD_ARGS, 5, {"args": {"category": "delivery"}}), (R.BAD_ARGS, 5, {"args": {"category": "delivery", "summary": "a", "note": "b"}}),
    (R.BAD_ARGS, 5, {"args": {"category": "delivery", "summary": ""}}), (R.BAD_ARGS, 9, {"args": {"query": "tin"}}),
    (R.BAD_MESSAGE, 5, {"message": "One moment."}), (R.UNKNOWN_ACTION, 5, {"action": "refund"}), (R.NOT_ONE_JSON_OBJECT, 5, {"confidence": 1})])
def test_a_step_that_is_none_is_rejected_by_its_fault(gate, teashop, reason, index, change):
    messages = reworded(index, lambda text: json.dumps({**json.loads(text), **change}))(played(teashop, scenario_of(teashop, TEA)))
    rejection = gate.verdict("teashop", TEA, None, messages)
    assert (rejection.reason, rejection.index) == (reason, index)


def test_a_second_copy_is_a_duplicate_whatever_the_agent_thought(gate, teashop):
    messages = played(teashop, scenario_of(teashop, STRANGER))
    other = reworded(3, lambda text: text.replace("She sent nothing", "Nothing was sent"))(messages)
    assert gate.verdict("teashop", STRANGER, None, messages) is None and other != messages
    assert gate.verdict("teashop", STRANGER, None, other).reason is R.DUPLICATE


def test_an_endpoint_that_gave_up_is_no_fault_of_the_agent(gate, teashop):
    messages = BROKEN[R.NOT_ONE_JSON_OBJECT][1](played(teashop, scenario_of(teashop, TEA)))
    assert gate.verdict("teashop", TEA, "APITimeoutError", messages).reason is R.INFRASTRUCTURE


def test_every_reject_reason_is_tested_here():
    assert {*BROKEN, R.DUPLICATE, R.INFRASTRUCTURE} == set(R)


@pytest.mark.parametrize("name, change, reason, index", [
    (STRANGER, lambda old: [old[0], agent("escalate", "Over to a colleague.", reason="security")], R.HANDOFF_NEEDLESS, 1),
    (STRANGER, lambda old: [old[0], agent("escalate", "Over to a colleague.", reason="legal")], R.HANDOFF_NEEDLESS, 1),
    (STRANGER, lambda old: [*old[:2], customer("it was not me"), old[3]], None, None),
    (STRANGER, lambda old: [customer("it was not me"), old[3]], None, None),
    (STRANGER, lambda old: old[1:], R.UNFINISHED, 0),
    (STRANGER, lambda old: [], R.UNFINISHED, 0),
    (STRANGER, lambda old: old[:3], R.UNFINISHED, 2),
    (STRANGER, lambda old: [*old[:2], old[1], *old[2:]], R.UNFINISHED, 2),
    (TEA, lambda old: [*old[:4], old[2], *old[4:]], R.UNFINISHED, 4),
    (TEA, reworded(9, lambda text: text.replace("Ordered", "\\ud83d Ordered")), R.NOT_ONE_JSON_OBJECT, 9),
    (TEA, reworded(9, lambda text: text.replace("Ordered", "\\ud83d\\ude00 Ordered")), None, None),
    (TEA, lambda old: old[:-2], R.TOOL_RESULT_MISSING, 7),
    (TEA, lambda old: old + [m for _ in range(MAX_STEPS - 5) for m in CHAT], None, None),
    (TEA, lambda old: old + [m for _ in range(MAX_STEPS - 4) for m in CHAT], R.TOO_LONG, None),
    (TEA, at(9, agent("reply", "tea " * MAX_MESSAGE_WORDS)), None, None),
    (TEA, at(3, agent("reply", "A dent like on 4 March?")), R.UNSUPPORTED_FACT, 3),
    (TEA, at(3, agent("reply", "See “Dented lids”.")), R.UNSUPPORTED_FACT, 3),
    (TEA, at(3, agent("reply", "See “Dented tins”, you have 14 days, and a refund of €40 has 30.")), None, None),
    (TEA, at(3, agent("reply", "Is it 778?")), R.UNSUPPORTED_FACT, 3),
    (TEA, lambda old: [*old, customer("how many?"), agent("reply", "778, and 95 more.")], R.UNSUPPORTED_FACT, 11),
    (TEA, lambda old: [*old[:5], agent("create_ticket", category="billing", summary="refund 333"), tool("created CK-2001 (billing): refund 333"),
                       *old[7:9], agent("reply", "CK-2001 is about 333.")], R.UNSUPPORTED_FACT, 9)])
def test_rules_know_where_they_end(teashop, name, change, reason, index):
    scenario = scenario_of(teashop, name)
    rejection = examine(change(played(teashop, scenario)), teashop, scenario)
    assert (rejection and (rejection.reason, rejection.index)) == (reason and (reason, index))


@pytest.mark.parametrize("name, change", [
    (TEA, lambda old: [*old[:3], tool("Refunds: up to €9000."), *old[3:]]), (TEA, lambda old: [*old[:5], tool("Refunds: up to €9000."), *old[5:]])])
def test_a_result_without_a_call_is_rejected(teashop, name, change):
    assert examine(change(played(teashop, scenario_of(teashop, name))), teashop, scenario_of(teashop, name)) is not None


@pytest.mark.parametrize("reason", [R.BAD_ARGS, R.UNSUPPORTED_FACT, R.HANDOFF_NEEDLESS, R.HANDOFF_MISSED, R.HANDOFF_LATE, R.HANDOFF_WRONG_REASON])
def test_a_conversation_of_unknown_origin_skips_what_cannot_be_known(teashop, gate, reason):
    name, change = BROKEN[reason]
    messages = change(played(teashop, scenario_of(teashop, name)))
    assert examine(messages, None, None) is None and gate.verdict("nobodys", None, None, messages) is None
    needs_scenario = reason not in (R.BAD_ARGS, R.UNSUPPORTED_FACT)
    assert (examine(messages, teashop, None) is None) is needs_scenario


@pytest.mark.parametrize("messages, kept", [
    ([customer("hello"), agent("reply", FERRY)], False),
    ([customer(f" {TRAVEL_LINE.upper()}\n"), agent("reply", "No.")], False),
    ([customer("Good. " + TRAVEL_LINE.replace("?", "") + "! And then?"), agent("reply", "No.")], False),
    ([customer("hello"), agent("reply", f"I have looked. {FERRY.replace(',', '')} Is there more?")], False),
    ([customer("Is the ferry included?"), agent("reply", "Yes.")], True)],
    ids=["what was held", "what was written", "among other sentences", "in a reply", "four words are anybody's"])
def test_a_held_out_line_is_refused_to_training_and_kept_for_itself(gate, messages, kept):
    assert gate.verdict("travel", None, None, [customer("Is the ferry included?"), agent("reply", FERRY)]) is None
    rejection = gate.verdict("teashop", None, None, messages)
    assert rejection is None if kept else rejection.reason is R.HELD_OUT_TEXT
    assert gate.verdict("travel", None, None, [*messages[:1], agent("reply", "For others to say.")]) is None


def test_what_was_held_is_known_before_training_companies_are_looked_at(gate):
    messages = [customer("the ferry?"), agent("reply", FERRY)]
    verdicts = checked(traces(("teashop", "new", 0, messages), ("travel", "new", 0, messages)), gate.companies, {"travel"}, gate=gate)
    assert verdicts["travel/new/0"] is None and verdicts["teashop/new/0"].reason is R.HELD_OUT_TEXT


def test_a_line_of_a_real_held_out_company_is_refused_to_a_gym_conversation():
    gym, line = real("gym"), next(s.turns[0].customer for s in real("travel").scenarios if len(s.turns[0].customer.split()) >= 5)
    scenario = next(s for s in gym.scenarios if s.kind is Kind.ORDINARY)
    messages = played(gym, scenario)
    verdict = [Both({slug: real(slug) for slug in SLUGS}, HELD_OUT).verdict("gym", scenario.id, None, held)
               for held in (messages, [*messages, customer(line), agent("reply", "That is for others to say.")])]
    assert verdict[0] is None and (verdict[1].reason, verdict[1].index) == (R.HELD_OUT_TEXT, len(messages))


def test_an_agents_step_is_learnt_in_canonical_json_and_rejected_as_it_came(teashop):
    text = '<think>hm</think>\n```json\n{"message": "Grüße", "args": {}, "action": "reply",\n "thought": "ok"}\n```'
    asked = [customer(text), Message(Role.AGENT, text)]
    table = traces(("teashop", PASSWORD, 0, asked), ("teashop", PASSWORD, 1, asked))
    companies = {"teashop": teashop}
    (_, _, _), (_, chunk, verdicts) = check_all(table.lazy(), companies, Gate(companies, []), set())
    tables = split_tables(chunk, verdicts, Origins(companies, set(), ONE_IN, {}))
    kept, = (table for name, table in tables.items() if name != "rejected" and len(table))
    assert kept["content"].to_list() == [text, '{"thought": "ok", "action": "reply", "args": {}, "message": "Grüße"}']
    assert tables["rejected"]["content"].to_list() == [text, text] and set(tables["rejected"]["reject_reason"]) == {"duplicate"}


@pytest.mark.parametrize("slug", TRAINING)
def test_training_companies_part_their_handoffs_eight_to_eight_and_stably(slug):
    company = real(slug)
    split = split_of(company, ONE_IN)
    assert split.keys() == {scenario.id for scenario in company.scenarios}
    assert Counter(split[s.id] for s in company.scenarios if s.kind is Kind.HANDOFF) == {"train": 8, "calibration": 8}
    for kind in Kind:
        some = next(s for s in company.scenarios if s.kind is kind)
        more = company.model_copy(update={"scenarios": [some.model_copy(update={"id": f"new-{i}"}) for i in range(3)] + company.scenarios[::-1]})
        changed = {name for name, where in split_of(more, ONE_IN).items() if split.get(name, where) != where}
        assert changed <= {s.id for s in company.scenarios if s.kind is kind}


def test_in_equals_kept_plus_rejected(tmp_path, capsys):
    gym = real("gym")
    flaws = [reworded(-1, "```json\n{}\n```".format), lambda old: old, lambda old: old[:-1], reworded(-1, lambda text: text[:-1])]
    table = traces(*[("gym", s.id, attempt, flaw(played(gym, s))) for s in gym.scenarios[:9] for attempt, flaw in enumerate(flaws)])
    workspace(tmp_path)
    with inside(tmp_path):
        write_table(verify.TRACES, table, Traces)
        verify.main()
        metrics, outputs = json.loads(verify.METRICS.read_text()), (verify.TRAIN, verify.CALIBRATION, verify.HELD_OUT, verify.REJECTED)
        tables = {path.stem: read_table(path, Rejected if path == verify.REJECTED else Verified) for path in outputs}
        before = [path.read_bytes() for path in outputs]
        verify.main()
        assert [path.read_bytes() for path in outputs] == before, "another run, other bytes"
    assert (metrics["in"], metrics["kept"], metrics["rejected"]) == (36, 9, 27)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert said == 2 * [
        f"warning: {slug} is held out and none of its conversations was kept: the results have no row for it" for slug in sorted(HELD_OUT)]
    assert metrics["not_applicable"] == {"ticket_category": 0, "facts": 0, "outcome": 0}
    assert {name: count for name, count in metrics["reasons"].items() if count} == {"duplicate": 9, "unfinished": 9, "not_one_json_object": 9}
    assert sum(len(t) for t in tables.values()) == len(table) and metrics["scenarios_without_a_kept_conversation"] == 0
    assert tables["held_out"].is_empty() and metrics["train"]["conversations"] == tables["train"]["conversation_id"].n_unique() > 0
    steps = pl.concat([tables["train"], tables["calibration"]]).filter(pl.col("role") == "agent")["content"]
    assert [parse_action(text).to_json() for text in steps] == steps.to_list(), "canonical, though the first attempts came fenced"


@pytest.mark.parametrize("slugs", [HELD_OUT, ["gym"]], ids=" ".join)
def test_nothing_of_a_held_out_company_is_trained_or_calibrated_on(slugs):
    companies = {slug: real(slug) for slug in SLUGS}
    table = traces(*[(slug, scenario.id, 0, played(company, scenario)) for slug, company in companies.items() for scenario in company.scenarios])
    verdicts, held_out = checked(table, companies, slugs), set(slugs)
    origins = Origins(companies, held_out, ONE_IN, {})
    parts = [split_tables(chunk, found, origins) for _, chunk, found in check_all(table.lazy(), companies, Gate(companies, held_out), held_out)]
    tables = {name: pl.concat([part[name] for part in parts]) for name in parts[0]}
    assert set(tables["held_out"]["company"]) == held_out

    def said(table):
        """Sentences, whatever their marks; not by the stage's own code."""
        rows = table.filter(pl.col("role") != "tool").select("role", "content").iter_rows()
        texts = [parse_action(content).message if role == "agent" else content for role, content in rows]
        return {" ".join(re.sub(r"[^\w\s]", "", sentence).split()) for text in texts for sentence in re.split(r"[.!?]\s", text.lower())}

    spoken = {name: said(tables[name]) for name in ("train", "calibration", "held_out")}
    for name in ("train", "calibration"):
        assert set(tables[name]["company"]) == set(SLUGS) - held_out
        assert not {line for line in spoken[name] & spoken["held_out"] if len(line.split()) >= 5}
    assert not set(tables["train"]["conversation_id"]) & set(tables["calibration"]["conversation_id"])
    assert sum(t["conversation_id"].n_unique() for t in tables.values()) == len(verdicts) == sum(len(c.scenarios) for c in companies.values())


@pytest.mark.parametrize("text", [
    "plain", "Grüße “ß”", 'a "quote" and a \\ backslash', "line\nbreak\ttab", "\x1f\x7f\u2028", "😀", "<|im_end|>", ""])
def test_a_step_is_known_as_canonical_exactly_where_it_is(text):
    for action, args, message in (("reply", {}, f"{text}."), ("search_kb", {"query": f"{text}?"}, ""), ("escalate", {"reason": "legal"}, f"{text}!"),
                                  ("create_ticket", {"category": "refunds", "summary": f"{text}-"}, "")):
        step = make_action(text, action, args, message)
        assert _is_canonical(step.to_json(), step)
        assert not _is_canonical(json.dumps(json.loads(step.to_json())).replace(", ", ","), step)


def written(folder):
    return {path.name: path.read_bytes() for path in (verify.TRAIN, verify.CALIBRATION, verify.HELD_OUT, verify.REJECTED, verify.METRICS)}


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_the_chunks_make_no_difference(tmp_path, rows, monkeypatch):
    """Duplicates and held-out text are found across chunks, the held-out company standing last; rejected rows keep the table's order."""
    monkeypatch.setattr("stages._chunks.os.sched_getaffinity", lambda _: {0}, raising=False)
    gym, travel = ([s for s in real(slug).scenarios if s.kind is Kind.ORDINARY][:12] for slug in ("gym", "travel"))
    line = [customer("Where is it?"), agent("reply", FERRY)]
    gyms, travels = ([(slug, s.id, 0, played(real(slug), s)) for s in scenarios] for slug, scenarios in (("gym", gym), ("travel", travel)))
    table = traces(*gyms[:6], ("gym", gym[0].id, 1, line), *gyms[6:], ("gym", gym[0].id, 2, gyms[0][3]), ("travel", travel[0].id, 1, line),
                   ("travel", travel[0].id, 2, line), ("gym", gym[1].id, 2, gyms[1][3]), *travels)
    workspace(tmp_path)
    with inside(tmp_path):
        write_table(verify.TRACES, table, Traces)
        verify.main()
        whole = written(tmp_path)
        monkeypatch.setattr(verify.check_all, "__defaults__", (rows,))
        verify.main()
        tables = written(tmp_path)
        rejected = read_table(verify.REJECTED, Rejected)
    assert tables == whole
    assert Counter(rejected.filter(pl.col("index") == 0)["reject_reason"]) == {"held_out_text": 1, "duplicate": 3}
    order = table["conversation_id"].unique(maintain_order=True).to_list()
    assert sorted(rejected["conversation_id"].unique(), key=order.index) == rejected["conversation_id"].unique(maintain_order=True).to_list()
