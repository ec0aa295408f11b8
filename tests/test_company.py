"""A company folder is read whole or refused with the file, the field and a hint."""

import json

import pytest

from schemas.action import ActionName
from schemas.company import RESERVED, Cue, Kind, company_files, company_slugs, load_companies, load_company
from schemas.errors import InputError
from stages.corpus import faults
from tests.helpers import SLUGS
from tests.layout import ROOT

HANDOFF, OTHERS, COMPANY = "scenarios/handoff.yaml", "scenarios/others.yaml", "company.yaml"


def refusal(folder):
    """The error that loading the folder raises; every one has a hint and stays on one line."""
    with pytest.raises(InputError) as caught:
        load_company(folder.name, folder.parent)
    assert caught.value.hint.strip() and "\n" not in caught.value.hint
    assert "\n" not in str(caught.value)
    return caught.value


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_the_small_company_loads_and_has_no_faults(company_folder):
    company = load_company("teashop", company_folder.parent)
    assert faults(company) == []
    assert [article.id for article in company.articles] == ["brewing-oolong", "dented-tins"]
    assert [len(article.paragraphs) for article in company.articles] == [2, 2]
    assert company.articles[0].paragraphs[0].startswith("Oolong likes") and "\n" not in company.articles[0].paragraphs[0]
    assert [(s.kind, s.reason, s.cue) for s in company.scenarios] == [
        (Kind.HANDOFF, "security", Cue.UNDERSTATED), (Kind.NEAR_MISS, "security", None), (Kind.ORDINARY, None, None)]
    assert [step.action for step in company.scenarios[2].steps] == [
        ActionName.SEARCH_KB, ActionName.REPLY, ActionName.CREATE_TICKET, ActionName.UPDATE_TICKET, ActionName.REPLY]
    assert company.policy.startswith("The agent refunds") and company.profile.refund.currency == "€"


def test_only_folders_with_a_company_yaml_are_companies(company_folder):
    (company_folder.parent / "draft").mkdir()
    (company_folder.parent / "README.md").write_text("notes")
    assert company_slugs(company_folder.parent) == list(load_companies(company_folder.parent)) == ["teashop"]


@pytest.mark.parametrize("name", ["scenarios/more.yml", "articles/more.markdown", "articles/deep/more.md", "notes.txt", "README.md"])
def test_a_file_that_would_not_be_read_is_refused(company_folder, name):
    path = company_folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
    error = refusal(company_folder)
    assert str(path) in str(error) and "scenarios/<name>.yaml" in error.hint


@pytest.mark.parametrize("name", [".DS_Store", "scenarios/.others.yaml.swp", ".git/config"])
def test_a_hidden_file_disturbs_nobody(company_folder, name):
    path = company_folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
    assert len(load_company("teashop", company_folder.parent).scenarios) == 3


@pytest.mark.parametrize("name", ["company.yml", "policy.md", "articles", "scenarios"])
def test_a_folder_with_parts_of_a_company_and_no_company_yaml_is_refused(company_folder, name):
    half = company_folder.with_name("tearoom")
    half.mkdir()
    (half / name).mkdir() if "." not in name else (half / name).write_text("x")
    with pytest.raises(InputError, match=r"tearoom/company\.yaml does not exist") as caught:
        load_companies(company_folder.parent)
    assert str(half / name) in str(caught.value) and caught.value.hint


@pytest.mark.parametrize("name", ["Teashop", "tea_shop", "tea shop", "teashöp", "-teashop", "tea--shop"])
def test_a_folder_whose_name_is_no_slug_is_refused(company_folder, name):
    assert "is no slug: small letters, digits, hyphens" in str(refusal(company_folder.rename(company_folder.with_name(name))))


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_a_company_is_not_called_as_a_key_of_the_metrics_files(company_folder, name):
    assert f"'{name}' is a key of metrics files" in str(refusal(company_folder.rename(company_folder.with_name(name))))


def test_the_keys_beside_the_companies_in_the_metrics_files_are_reserved():
    """As the committed files have them, wherever a company's figures stand beside other keys."""
    beside = set()

    def walk(value):
        if isinstance(value, dict):
            if set(value) & set(SLUGS):
                beside.update(set(value) - set(SLUGS))
            for inner in value.values():
                walk(inner)

    for path in (ROOT / "metrics").glob("*.json"):
        walk(json.loads(path.read_text(encoding="utf-8")))
    assert beside == RESERVED


def test_the_files_of_a_company_are_all_that_are_in_it(company_folder):
    assert set(company_files("teashop", company_folder.parent)) == {path for path in company_folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [COMPANY, "policy.md"])
def test_a_missing_file_is_named(company_folder, name):
    (company_folder / name).unlink()
    assert f"teashop/{name}" in str(refusal(company_folder))


@pytest.mark.parametrize("name", ["articles", "scenarios"])
def test_a_folder_with_nothing_in_it_is_named(company_folder, name):
    for path in (company_folder / name).iterdir():
        path.unlink()
    assert f"teashop/{name} holds no {name[:-1]}" in str(refusal(company_folder))


def test_no_company_at_all_says_where_companies_go(tmp_path):
    with pytest.raises(InputError, match=r"no company\.yaml under"):
        load_companies(tmp_path)


def test_an_unknown_company_shows_the_known_ones(company_folder):
    with pytest.raises(InputError, match="unknown company 'tearoom'") as caught:
        load_company("tearoom", company_folder.parent)
    assert "teashop" in caught.value.hint


@pytest.mark.parametrize("name", [COMPANY, "policy.md", "articles/dented-tins.md", OTHERS])
def test_a_file_that_is_not_utf8_is_named(company_folder, name):
    path = company_folder / name
    path.write_bytes(path.read_bytes() + "Größe".encode("latin-1"))
    error = refusal(company_folder)
    assert str(path) in str(error) and "UTF-8" in error.hint


@pytest.mark.parametrize("name, old, new, line", [
    (COMPANY, "sector: teas by post", "sector: teas: by post", 2),
    (COMPANY, "[delivery, billing]", "[delivery, billing", 6),
    (HANDOFF, "customer: no, I live", "customer: no: I live", 12),
    (OTHERS, "message: The tea is fine.", 'message: "The tea" is fine.', 24),
])
def test_bad_yaml_is_named_with_its_line(company_folder, name, old, new, line):
    edit(company_folder / name, old, new)
    error = refusal(company_folder)
    assert str(company_folder / name) in str(error) and "is not YAML" in str(error)
    assert f"line {line} " in str(error)


@pytest.mark.parametrize("new", [
    "sector: 2024-13-45",
    'sector: "a\x07b"',
    "sector: teas\nsector: shoes",
    "sector: *nope", "sector: !!python/name:os.system x", "sector: teas\n\tvoice: x", "sector: teas\n? [a]\n: b"])
def test_odd_yaml_is_refused_in_one_line(company_folder, new):
    edit(company_folder / COMPANY, "sector: teas by post", new)
    assert str(refusal(company_folder)).startswith(str(company_folder / COMPANY))


@pytest.mark.parametrize("old, new, field", [
    ("sector: teas by post\n", "", "sector: Field required"),
    ("sector:", "sektor:", "sector: Field required"),
    ("company_rule:", "note: x\ncompany_rule:", "note: Extra inputs"),
    ("limit: 40", "limt: 40", "refund.limit: Field required"),
    ("limit: 40", "limit: forty", "refund.limit"), ("limit: 40", "limit: -1", "refund.limit"),
    ("window_days: 30", "window_days: 0", "refund.window_days"),
    ("ticket_prefix: CK", "ticket_prefix: ck", "ticket_prefix"), ("ticket_prefix: CK", "ticket_prefix: 12", "ticket_prefix"),
    ("[delivery, billing]", "[]", "ticket_categories"), ("[delivery, billing]", "[delivery, Big Bills]", "ticket_categories.1"),
    ('price: "€14.00"', "price: 14.00", "products.1.price"), ("name: Copper Kettle", "name: ' '", "name: "),
    ("name: Copper Kettle", "- Copper Kettle", "is not YAML"),
])
def test_a_faulty_field_of_the_company_is_named(company_folder, old, new, field):
    edit(company_folder / COMPANY, old, new)
    error = refusal(company_folder)
    assert str(error).startswith(str(company_folder / COMPANY)) and field in str(error)


@pytest.mark.parametrize("content", ["", "just words", "- a list", "7"])
def test_a_company_yaml_that_holds_something_else_is_named(company_folder, content):
    (company_folder / COMPANY).write_text(content)
    assert f"{company_folder / COMPANY}: as a whole" in str(refusal(company_folder))


SCENARIO_FAULTS = [
    (HANDOFF, "order-from-another-town", "kind: handoff", "kind: hand-off", "kind"),
    (HANDOFF, "order-from-another-town", "cue: understated", "cue: hidden", "cue"),
    (HANDOFF, "order-from-another-town", "  cue: understated\n", "", "cue belongs to handoff"),
    (HANDOFF, "order-from-another-town", "  reason: security\n", "", "reason belongs to handoff"),
    (HANDOFF, "order-from-another-town", "  reason: security\n", "  reason: theft\n", "reason"),
    (HANDOFF, "order-from-another-town", "{reason: security}", "{reason: legal}", "the escalate step's reason"),
    (HANDOFF, "order-from-another-town", "{reason: security}", "{reason: theft}", "turns.1.agent.0"),
    (HANDOFF, "order-from-another-town", "args: {reason: security}\n          ", "", "turns.1.agent.0"),
    (HANDOFF, "order-from-another-town", "action: clarify", "action: ask", "turns.0.agent.0.action"),
    (HANDOFF, "order-from-another-town", "action: clarify", "action: search_kb\n          args: {query: a}", "search_kb carries no message"),
    (HANDOFF, "order-from-another-town", "message: Did", "msg: Did", "turns.0.agent.0.msg"),
    (HANDOFF, "order-from-another-town", "temperament: Puzzled.", "mood: Puzzled.", "customer.temperament"),
    (OTHERS, "password-after-holiday", "  reason: security\n", "", "reason belongs to handoff and near_miss"),
    (OTHERS, "dent-in-the-lid", "kind: ordinary", "kind: ordinary\n  reason: legal", "reason belongs"),
    (OTHERS, "dent-in-the-lid", "kind: ordinary", "kind: ordinary\n  cue: plain", "cue belongs"),
    (OTHERS, "dent-in-the-lid", "ticket_start: 2001", "ticket_start: 20010", "ticket_start"),
    (OTHERS, "dent-in-the-lid", "ticket_start: 2001", "tickets: [{id: 2001, category: billing, summary: x}]", "tickets.0.id"),
    (OTHERS, "dent-in-the-lid", "args: {query: dented tin}", "args: {words: dented tin}", "turns.0.agent.0"),
    (OTHERS, "dent-in-the-lid", '- customer: "778, and please leave it with the neighbour"', "- customer: 778", "turns.1.customer"),
    (OTHERS, "Dent in the lid", "id: dent-in-the-lid", "id: Dent in the lid", "id"),
    (OTHERS, "dent-in-the-lid", "category: delivery", "category: tins", "category 'tins' is unknown"),
    (OTHERS, "dent-in-the-lid", "ticket_start: 2001", "tickets: [{id: CK-2000, category: tins, summary: x}]", "tickets: CK-2000 (tins)"),
    (OTHERS, "dent-in-the-lid", "ticket_start: 2001", "tickets: [{id: XY-2000, category: billing, summary: x}]", "tickets: XY-2000 (billing)"),
]


@pytest.mark.parametrize("name, scenario, old, new, field", SCENARIO_FAULTS, ids=range(len(SCENARIO_FAULTS)))
def test_a_faulty_field_of_a_scenario_is_named(company_folder, name, scenario, old, new, field):
    edit(company_folder / name, old, new)
    error = refusal(company_folder)
    assert str(error).startswith(f"{company_folder / name}: scenario '{scenario}' ") and field in str(error)


ESCALATE = "action: escalate\n          args: {reason: security}"


def test_only_a_handoff_may_escalate(company_folder):
    edit(company_folder / OTHERS, "action: reply", ESCALATE)
    assert "a near_miss conversation must not escalate" in str(refusal(company_folder))


@pytest.mark.parametrize("change", ["goes on", "twice", "never"])
def test_a_handoff_ends_with_its_only_escalate(company_folder, change):
    path = company_folder / HANDOFF
    if change == "goes on":
        path.write_text(path.read_text() + "    - customer: thanks\n      agent:\n        - {thought: t, action: reply, message: Gladly.}\n")
    else:
        edit(path, *(("action: clarify", ESCALATE) if change == "twice" else (ESCALATE, "action: reply")))
    assert "must end with its only escalate" in str(refusal(company_folder))


@pytest.mark.parametrize("old, new, fault", [
    ("        - thought: Ordered and noted; the tin leaves on Tuesday.\n          action: reply\n"
     "          message: CK-2001 is open, and a new tin leaves on Tuesday for your neighbour.\n", "", "must end in reply"),
    ("action: search_kb\n          args: {query: dented tin}", "action: reply\n          message: One moment.", "only tool calls may come before"),
])
def test_tool_calls_come_before_the_last_step_of_a_turn(company_folder, old, new, fault):
    edit(company_folder / OTHERS, old, new)
    error = refusal(company_folder)
    assert "scenario 'dent-in-the-lid' turns." in str(error) and fault in str(error)


@pytest.mark.parametrize("content", ["", "id: alone", "just words"])
def test_a_scenario_file_that_is_no_list_is_named(company_folder, content):
    (company_folder / OTHERS).write_text(content)
    assert str(refusal(company_folder)).startswith(f"{company_folder / OTHERS} is not a list")


def test_a_scenario_without_an_id_is_counted(company_folder):
    edit(company_folder / OTHERS, "- id: dent-in-the-lid\n  kind", "- kind")
    assert "others.yaml: scenario '2' id: Field required" in str(refusal(company_folder))


def test_an_id_that_occurs_twice_is_named(company_folder):
    edit(company_folder / OTHERS, "password-after-holiday", "order-from-another-town")
    assert "id 'order-from-another-town' occurs twice" in str(refusal(company_folder))


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_policy_is_named(company_folder, content):
    (company_folder / "policy.md").write_text(content)
    assert f"{company_folder / 'policy.md'} is empty" in str(refusal(company_folder))


@pytest.mark.parametrize("content, fault", [
    ("", "line 1: no '# Title'"), ("Oolong likes water.", "line 1: no '# Title'"), ("## Brewing\n\nx", "line 1: no '# Title'"),
    ("#Brewing\n\nx", "line 1: no '# Title'"), ("# \n\nOolong likes water.", "title"), ("# Brewing\n", "paragraphs"),
])
def test_an_article_without_title_or_text_is_named(company_folder, content, fault):
    path = company_folder / "articles/brewing-oolong.md"
    path.write_text(content)
    assert str(path) in str(refusal(company_folder)) and fault in str(refusal(company_folder))


def test_an_article_name_that_is_no_slug_is_named(company_folder):
    (company_folder / "articles/brewing-oolong.md").rename(company_folder / "articles/Brewing Oolong.md")
    assert "Brewing Oolong.md: id: " in str(refusal(company_folder))
