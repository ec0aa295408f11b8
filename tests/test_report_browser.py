"""The report in a real browser, opened from a file: filters, links, keys, narrow and dark screens, hostile text, 2,000 conversations."""

import json
import os
import re
import shutil
import time

import pytest
from playwright.sync_api import expect, sync_playwright

from stages.report import POINT, REPORT, main
from tests.helpers import inside
from tests.reports import HOSTILE, report_inputs, report_repository

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None and "GITHUB_ACTIONS" not in os.environ, reason="no Chromium here: apt-get install chromium")


def made(folder, copies):
    report_inputs(folder, copies)
    with inside(folder):
        main()
    return folder / REPORT


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return made(tmp_path_factory.mktemp("report"), 1)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The report with the student of another revision beside today's."""
    folder = report_repository(tmp_path_factory.mktemp("compared"))
    with inside(folder):
        main()
    return folder / REPORT


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Open the report at a place, with a screen and a colour scheme; nothing may be said on the console, and nothing fetched."""
    contexts, said = [], []

    def visit(path, place="", width=1280, height=860, scheme="light", **options):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else said.append(request.url))
        page.goto(path.as_uri() + place)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert said == []


def embedded(path):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(encoding="utf-8"))[1])["conversations"]


def listed(page):
    """The number of conversations found, as the page says it."""
    return int(re.match(r"[\d,]+", page.locator("#found").inner_text())[0].replace(",", ""))


def finds(page, count):
    """The page comes to say that it found so many."""
    expect(page.locator("#found")).to_have_text(re.compile(f"^{count:,} conversation"))


def choose(page, **values):
    for name, value in values.items():
        page.locator(f"#filters [name={name}]").select_option(value)


def replies(conversation, model="student"):
    return [(message.get("a"), reply.get("a", "invalid"))
            for message in conversation["messages"] for reply in message.get("p", []) if reply["w"] == model]


def verdicts(conversation, model="student"):
    return {reply.get("v") for message in conversation["messages"] for reply in message.get("p", []) if reply["w"] == model}


@pytest.mark.parametrize("filters, keep", [
    ({}, lambda one: one["set"] == "held_out"),
    ({"company": "travel"}, lambda one: one["company"] == "travel"),
    ({"gold": "escalate"}, lambda one: any(gold == "escalate" for gold, _ in replies(one))),
    ({"gold": "reply", "action": "invalid"}, lambda one: ("reply", "invalid") in replies(one)),
    ({"model": "base", "action": "reply", "right": "other"}, lambda one: any(gold != action == "reply" for gold, action in replies(one, "base"))),
    ({"right": "missed", "company": "streaming"},
     lambda one: one["company"] == "streaming" and any(gold == "escalate" != action for gold, action in replies(one))),
    ({"right": "needless"}, lambda one: any(gold != "escalate" == action for gold, action in replies(one))),
    ({"right": "same", "gold": "search_kb"}, lambda one: ("search_kb", "search_kb") in replies(one)),
    ({"right": "refused"}, lambda one: "not_acceptable" in verdicts(one)),
    ({"set": "rejected"}, lambda one: one["set"] == "rejected"),
    ({"set": "rejected", "reject": "handoff_missed"}, lambda one: one.get("reason") == "handoff_missed"),
    ({"set": "all"}, lambda one: True),
], ids=range(12))
def test_filters_find_the_conversations_that_have_such_a_turn(report, visit, filters, keep):
    wanted = [one["id"] for one in embedded(report) if keep(one) and (filters.get("set") or one["set"] == "held_out")]
    assert wanted or filters == {"right": "needless"}, "there are none in these"
    page = visit(report, "#/conversations")
    choose(page, **filters)
    finds(page, len(wanted))
    assert page.locator("#list a > span:first-child").all_text_contents()[:50] == [" / ".join(name.split("/")) for name in wanted[:50]]
    page.locator("#filters button").click()
    finds(page, sum(one["set"] == "held_out" for one in embedded(report)))


def test_choosing_a_reason_shows_the_rejected_ones_and_leaving_them_drops_it(report, visit):
    page = visit(report, "#/conversations")
    choose(page, gold="escalate")
    choose(page, reject="handoff_missed")
    finds(page, sum(one.get("reason") == "handoff_missed" for one in embedded(report)))
    expect(page.locator("[name=set]")).to_have_value("rejected")
    choose(page, set="held_out")
    finds(page, sum(any(gold == "escalate" for gold, _ in replies(one)) for one in embedded(report)))
    expect(page.locator("[name=reject]")).to_have_value("")


def test_search_finds_words_in_every_part_and_marks_them(report, visit):
    page = visit(report, "#/conversations")
    for text in ("ONERROR=", "hand over?", "router"):
        page.locator("[name=q]").fill(text)
        wanted = sum(text.lower() in json.dumps(one, ensure_ascii=False).lower() for one in embedded(report) if one["set"] == "held_out")
        assert wanted > 0
        finds(page, wanted)
    page.locator("#list a").first.click()
    expect(page.locator("mark", has_text="router").first).to_be_attached()
    page.locator("[name=q]").fill("no such words anywhere")
    finds(page, 0)


def test_a_link_to_one_conversation_and_the_back_button(report, visit):
    name = next(one["id"] for one in embedded(report) if one["company"] == "travel")
    page = visit(report, f"#/conversations?id={name}")
    heading, title = page.locator("#conversation h2"), " / ".join(name.split("/"))
    expect(heading).to_have_text(title)
    link = page.locator("#list a").nth(3)
    other = link.locator("span").first.text_content()
    link.click()
    expect(heading).to_have_text(other)
    assert other != title and "id=" in page.url
    page.go_back()
    expect(heading).to_have_text(title)
    page.go_forward()
    expect(heading).to_have_text(other)
    page.locator("nav a", has_text="Results").click()
    expect(page.locator("#results")).to_be_visible()
    expect(page.locator("#conversations")).to_be_hidden()
    page.go_back()
    expect(heading).to_have_text(other)
    expect(page.locator("#results")).to_be_hidden()


def settled(page):
    """Where the page stands once it has stood there for ten frames: it has heard of the scroll, and the list has grown."""
    return page.evaluate("""new Promise((done) => {
        let place = scrollY, frames = 0;
        requestAnimationFrame(function look() {
            frames = scrollY === place ? frames + 1 : 0;
            place = scrollY;
            if (frames < 10) requestAnimationFrame(look); else done(place);
        });
    })""")


def scrolled(page, to):
    page.evaluate("(to) => scrollTo(0, to)", to)
    assert settled(page) == to


def comes_to(page, height):
    page.wait_for_function("(height) => Math.abs(scrollY - height) <= 2", arg=height, timeout=5000)


def follow(link):
    """Click without Playwright's scrolling the link into full view first."""
    link.evaluate("(link) => link.click()")


def test_back_and_forward_lead_to_where_one_was(report, visit):
    longest = max(embedded(report), key=lambda one: len(one["messages"]) * (one["set"] == "held_out"))
    page = visit(report, height=500)
    cell = page.locator("table.confusion a[href*='gold=escalate&model=student&action=search_kb']")
    cell.scroll_into_view_if_needed()
    high = settled(page)
    assert high > 500
    follow(cell)
    page.locator("#list a").first.wait_for()
    page.goto(report.as_uri() + f"#/conversations?id={longest['id']}")
    expect(page.locator("#conversation h2")).to_be_visible()
    scrolled(page, 130)
    follow(page.locator("#list a").nth(2))
    comes_to(page, 0)
    page.go_back()
    comes_to(page, 130)
    page.go_back()
    page.go_back()
    expect(page.locator("#results")).to_be_visible()
    comes_to(page, high)
    page.go_forward()
    page.go_forward()
    expect(page.locator("#conversation h2")).to_have_text(" / ".join(longest["id"].split("/")))
    comes_to(page, 130)


def test_back_does_not_return_to_the_turn_that_the_link_named(report, visit):
    longest = max(embedded(report), key=lambda one: len(one["messages"]) * (one["set"] == "held_out"))
    last = max(index for index, message in enumerate(longest["messages"]) if "p" in message)
    page = visit(report, f"#/conversations?id={longest['id']}&turn={last}", height=500)
    page.wait_for_function("scrollY > 100")
    scrolled(page, 40)
    follow(page.locator("#list a").nth(2))
    comes_to(page, 0)
    page.go_back()
    comes_to(page, 40)


def test_back_leads_a_phone_to_its_place_in_the_list(report, visit):
    page = visit(report, "#/conversations", width=390, height=740, has_touch=True)
    page.locator("#list a").nth(70).scroll_into_view_if_needed()
    high = settled(page)
    assert high > 2000
    follow(page.locator("#list a").nth(70))
    expect(page.locator("#conversation h2")).to_be_visible()
    comes_to(page, 0)
    page.go_back()
    comes_to(page, high)
    assert page.locator("#list a").nth(70).is_visible()


def test_a_link_to_a_turn_shows_that_turn(report, visit):
    longest = max(embedded(report), key=lambda one: len(one["messages"]))
    last = max(index for index, message in enumerate(longest["messages"]) if "p" in message)
    page = visit(report, f"#/conversations?id={longest['id']}&turn={last}", height=500)
    top = page.locator(f"#turn-{last}").bounding_box()["y"]
    assert 0 <= top < 500 and page.evaluate("scrollY") > 0


@pytest.mark.parametrize("name", ["nobody/0", "constructor", "%3Cimg%20src=x%3E"])
def test_a_link_to_no_conversation_says_so(report, visit, name):
    assert "no such conversation" in visit(report, f"#/conversations?id={name}").locator("#conversation").inner_text()


@pytest.mark.parametrize("place", ["#/conversations?gold=nothing&right=toString&set=x&reject=y&model=z", "#/conversations?right=toString",
                                   "#/conversations?right=foo&gold=escalate", "#%E0%A4%A", "#/conversations?turn=x"])
def test_an_odd_address_breaks_nothing(report, visit, place):
    """Neither as the first one nor coming from the conversations."""
    page = visit(report, place)
    for after in ("#/conversations", place, "#/conversations"):
        page.goto(report.as_uri() + after)
    expect(page.locator("#found")).to_have_text(re.compile(r"^[1-9]\d\d conversations"))


def test_a_count_of_the_confusion_matrix_leads_to_its_turns(report, visit):
    page = visit(report)
    cell = page.locator("table.confusion a[href*='gold=escalate&model=student&action=search_kb']")
    count = int(cell.inner_text())
    cell.click()
    expect(page.locator("#found")).to_have_text(re.compile(f", {count} turns$"))
    page.locator("#list a").first.click()
    expect(page.locator(".turn.hit").first).to_be_visible()


def test_the_list_says_that_it_goes_by_what_the_model_decodes(report, visit):
    """The student's score is at the threshold or above at every hand-off, and it decodes none."""
    page = visit(report, "#/conversations?gold=escalate")
    assert set(re.findall(r": .*", "\n".join(page.locator("#list .words:nth-child(2)").all_inner_texts()))) == {": missed as it decodes"}
    for name in ("its action as it decodes", "as it decodes it is"):
        assert page.get_by_role("combobox", name=name).count() == 1
    page.locator("#list a").first.click()
    assert "handed off" in page.locator(".turn.hit .student .done").inner_text()


def test_the_list_is_one_stop_for_the_tab_key_and_arrows_move_in_it(report, visit):
    page = visit(report, "#/conversations")

    def focused():
        return page.evaluate("(() => { const on = document.activeElement; return [on.tagName, !!on.closest('#list'), on.textContent]; })()")

    page.locator("#filters button").focus()
    page.keyboard.press("Tab")
    if focused()[0] == "OL":
        page.keyboard.press("Tab")
    first = focused()
    assert first[:2] == ["A", True]
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    third = focused()
    assert third[1] and third != first
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle + getComputedStyle(document.activeElement).outlineWidth")
    assert outline == "solid3px"
    page.keyboard.press("Enter")
    expect(page.locator("#conversation")).to_be_focused()
    assert third[2].startswith(page.locator("#conversation h2").inner_text())
    page.keyboard.press("Escape")
    assert focused() == third
    page.keyboard.press("End")
    assert page.locator("#list a").count() == listed(page) and page.locator("#list a").last.evaluate("a => a === document.activeElement")
    page.keyboard.press("Tab")
    assert not page.evaluate("document.activeElement.closest('#list')")


def test_j_and_k_turn_the_pages_and_slash_searches(report, visit):
    page = visit(report, "#/conversations")
    titles = page.locator("#list a > span:first-child").all_text_contents()
    heading = page.locator("#conversation h2")
    for key, at in (("j", 0), ("j", 1), ("j", 2), ("k", 1), ("k", 0), ("k", 0)):
        page.keyboard.press(key)
        assert heading.inner_text() == titles[at]
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.name") == "q"
    page.keyboard.type("jk/")
    assert page.locator("[name=q]").input_value() == "jk/" and heading.inner_text() == titles[0]


@pytest.mark.parametrize("kind", ["held_out", "rejected"])
def test_a_conversation_is_shown_with_nothing_between_its_parts(report, visit, kind):
    for one in [one for one in embedded(report) if one["set"] == kind][:4]:
        page = visit(report, f"#/conversations?set=all&id={one['id']}")
        stray = page.evaluate("[...document.getElementById('conversation').childNodes].filter((one) => one.nodeType !== 1).map((one) => one.data)")
        assert stray == [] and page.locator("#conversation > *").count() == len(one["messages"]) + 2 + (kind == "rejected")
        turns = sum("c" not in message and "t" not in message for message in one["messages"])
        assert page.locator(".where span").last.inner_text() == f"{turns} agent turn{'' if turns == 1 else 's'}"


def test_every_label_of_a_chart_is_inside_it(report, visit):
    page = visit(report)
    page.evaluate("""document.querySelectorAll('svg.chart')[0].querySelectorAll('text.tick.middle').forEach((one) => one.textContent = '100 %')""")
    outside = page.evaluate("""[...document.querySelectorAll('svg.chart')].flatMap((chart) => {
        const frame = chart.getBoundingClientRect();
        return [...chart.querySelectorAll('text')].filter((one) => {
            const box = one.getBoundingClientRect();
            return box.left < frame.left || box.right > frame.right || box.top < frame.top || box.bottom > frame.bottom;
        }).map((one) => one.textContent);
    })""")
    assert outside == []


def test_every_control_has_a_name_and_every_turn_is_labelled(report, visit):
    page = visit(report, "#/conversations?id=streaming/hostile/0")
    assert page.evaluate("[...document.querySelectorAll('select, input')].every((one) => one.labels.length === 1)")
    assert page.evaluate("[...document.querySelectorAll('.turn')].every((one) => one.getAttribute('aria-label'))")
    assert page.locator("#found").evaluate("one => one.tagName") == "OUTPUT"
    assert page.get_by_role("combobox", name="gold action").count() == 1
    assert page.get_by_role("navigation", name="Views").locator("[aria-current=page]").inner_text() == "Conversations"


@pytest.mark.parametrize("place", ["", "#/conversations", "#/conversations?id=streaming/hostile/0", "#/conversations?right=missed", "longest"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_scrolling_sideways(report, visit, place, scheme):
    if place == "longest":
        place = f"#/conversations?id={max(embedded(report), key=lambda one: len(json.dumps(one)))['id']}"
    page = visit(report, place, width=360, height=740, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert float(page.evaluate("getComputedStyle(document.body).fontSize")[:-2]) >= 16


@pytest.mark.parametrize("width", [320, 360, 390, 600])
@pytest.mark.parametrize("which", ["report", "compared"])
def test_a_phone_shows_every_figure_of_a_table_whole(request, visit, which, width):
    """By where the text stands: a box that hides or scrolls what overflows it has the right width whatever is in it."""
    page = visit(request.getfixturevalue(which), width=width, height=740)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    cut, broken = page.evaluate("""(() => {
        const cut = [], broken = [];
        for (const cell of document.querySelectorAll('#results :is(th, td)')) {
            if (!cell.getClientRects().length) continue;
            const words = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
            while (words.nextNode()) {
                const range = document.createRange(), text = words.currentNode.data;
                range.selectNodeContents(words.currentNode);
                const lines = [...range.getClientRects()].filter((line) => line.width);
                const end = Math.min(innerWidth, cell.getBoundingClientRect().right + 1), tops = new Set(lines.map((line) => Math.round(line.top)));
                if (lines.some((line) => line.left < 0 || line.right > end)) cut.push(text);
                if ((/\\d–\\d|^[\\d.]+ %$|^\\w+$/).test(text.trim()) && tops.size > 1) broken.push(text);
            }
        }
        return [cut, broken];
    })()""")
    assert cut == [] and broken == []


def test_the_bars_of_p_escalate_are_of_one_width_in_a_turn(report, visit):
    page = visit(report, "#/conversations?gold=escalate")
    page.locator("#list a").first.click()
    bars = page.locator(".turn.hit .score svg")
    widths = {round(bar.bounding_box()["width"]) for bar in bars.all()}
    assert bars.count() == 2 and len(widths) == 1


def test_a_phone_shows_the_list_or_one_conversation(report, visit):
    page = visit(report, "#/conversations", width=360, height=740, has_touch=True)
    assert page.locator("#list a").first.is_visible() and not page.locator("#conversation").is_visible()
    page.locator("#list a").nth(5).tap()
    expect(page.locator("#conversation h2")).to_be_visible()
    expect(page.locator("#list")).to_be_hidden()
    page.get_by_role("link", name="all conversations").tap()
    expect(page.locator("#list a").first).to_be_visible()
    expect(page.locator("#conversation")).to_be_hidden()


def test_a_dark_screen_gets_a_dark_page(report, visit):
    shades = {scheme: visit(report, scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor") for scheme in ("light", "dark")}
    light, dark = (sum(map(int, re.findall(r"\d+", shades[scheme]))) for scheme in ("light", "dark"))
    assert light > 600 and dark < 150


def test_hostile_text_is_seen_and_not_run(report, visit):
    page = visit(report, "#/conversations?id=streaming/hostile/0&q=%3Cscript%3E")
    assert HOSTILE.replace("\u2028", "") in page.locator(".says").inner_text().replace("\u2028", "")
    assert "So you say: </script><script>" in page.locator(".step.gold").inner_text()
    assert page.title() == "Handoff: what was measured" and page.locator("img").count() == 0 and page.locator("script").count() == 2
    page.goto(report.as_uri() + "#/conversations?set=rejected&reject=unsupported_fact")
    page.locator("#list a", has_text="gym").first.click()
    expect(page.locator(".why")).to_contain_text(HOSTILE[:30])
    assert page.locator("img").count() == 0
    assert page.locator(".turn.fault").count() == 1


def test_a_turn_shows_gold_and_both_models_with_raw_text_where_it_is_no_step(report, visit):
    conversation, index = next((one, index) for one in embedded(report) for index, message in enumerate(one["messages"])
                               for reply in message.get("p", []) if reply["w"] == "student" and "x" in reply)
    page = visit(report, f"#/conversations?id={conversation['id']}")
    turn = page.locator(f"#turn-{index}")
    assert [title.split("\n")[0] for title in turn.locator("h3").all_inner_texts()] == ["gold", "base model", "student"]
    assert "not_one_json_object" in turn.locator(".student").inner_text() and turn.locator(".student pre").inner_text().startswith('{"thought"')
    verdict = next(reply["v"] for reply in conversation["messages"][index]["p"] if reply["w"] == "base")
    assert f"judge: {verdict.replace('_', ' ')}" in turn.locator(".base").inner_text()
    assert not turn.locator(".base details pre").is_visible()
    turn.locator(".base summary").click()
    assert turn.locator(".base details pre").inner_text() == "It is so."


def test_the_steps_of_a_turn_stand_side_by_side(compared, visit):
    """Gold, base, student and the student of the other revision, on a desk; in one column on a phone."""
    page = visit(compared, "#/conversations?gold=escalate")
    page.locator("#list a").first.click()
    for width, columns in ((1280, 4), (390, 1)):
        page.set_viewport_size({"width": width, "height": 860})
        boxes = [step.bounding_box() for step in page.locator(".turn.hit .step").all()]
        assert len(boxes) == 4 and len({round(box["x"]) for box in boxes}) == columns
    assert page.locator(".turn.hit h3").last.inner_text().startswith("student of v1")


def test_tool_results_are_folded_and_open_where_the_search_hits(report, visit):
    conversation, text = next((one, message["t"]) for one in embedded(report) for message in one["messages"] if "t" in message)
    page = visit(report, f"#/conversations?id={conversation['id']}")
    assert page.locator(".tool").count() == sum("t" in message for message in conversation["messages"])
    assert not page.locator(".tool div").first.is_visible()
    page.locator("[name=q]").fill(text[:30])
    expect(page.locator(".tool div").first).to_be_visible()
    expect(page.locator(".tool mark").first).to_have_text(text[:30].strip())


def test_tool_calls_are_folded_and_open_where_the_search_hits(report, visit):
    conversation, query = next((one, message["g"]["query"]) for one in embedded(report) for message in one["messages"]
                               if message.get("a") == "search_kb")
    page = visit(report, f"#/conversations?id={conversation['id']}")
    call = page.locator(".gold details.call").first
    assert call.locator("summary").inner_text() == "search_kb" and not call.locator(".args").is_visible()
    call.locator("summary").click()
    assert query in call.locator(".args").inner_text()
    call.locator("summary").click()
    page.locator("[name=q]").fill(query)
    expect(page.locator(".gold details.call mark").first).to_be_visible()


def test_what_the_base_model_wrote_free_opens_where_the_search_hits(report, visit):
    one = next(one for one in embedded(report) if one["set"] == "held_out")
    page = visit(report, f"#/conversations?id={one['id']}")
    assert not page.locator(".base details pre").first.is_visible()
    page.locator("[name=q]").fill("it is so.")
    expect(page.locator(".base details mark").first).to_be_visible()


def test_a_choice_made_while_words_are_typed_keeps_both(report, visit):
    page = visit(report, "#/conversations")
    page.evaluate("""() => { const form = document.getElementById("filters"), { q, company } = form.elements;
                     for (const [control, value] of [[q, "router"], [company, "streaming"]]) {
                       control.value = value; control.dispatchEvent(new Event("input", { bubbles: true })); } }""")
    page.wait_for_function("location.hash.includes('q=router') && location.hash.includes('company=streaming')")
    assert page.locator("[name=q]").input_value() == "router"


def test_the_judges_filter_is_not_offered_for_a_revision_whose_verdicts_are_not_here(compared, visit):
    page = visit(compared, "#/conversations")
    option = page.locator("#filters [name=right] [value=refused]")
    assert option.is_enabled()
    choose(page, model="compared")
    expect(option).to_be_disabled()


def test_the_score_is_a_bar_with_the_threshold_marked(report, visit):
    limit = json.loads((report.parents[2] / POINT).read_bytes())["threshold"]
    page = visit(report, "#/conversations?gold=escalate")
    page.locator("#list a").first.click()
    bar = page.locator(".turn.hit .student .score svg")
    assert bar.get_attribute("aria-label") == f"P(escalate) 0.60, threshold {limit:.2f}"
    value, threshold, whole = (bar.locator(part).bounding_box() for part in (".value", ".threshold", ".track"))
    assert value["width"] / whole["width"] == pytest.approx(0.6, abs=0.02)
    assert (threshold["x"] + threshold["width"] / 2 - whole["x"]) / whole["width"] == pytest.approx(limit, abs=0.03)
    assert "handed off" in page.locator(".turn.hit .student .done").inner_text()
    assert page.locator(".turn.hit .base .threshold").count() == 0, "the threshold is the student's"


def test_without_scripts_the_results_stand(report, visit):
    page = visit(report, java_script_enabled=False)
    assert page.locator("#answer").is_visible() and page.locator("svg.chart").count() >= 4


def test_two_thousand_conversations_stay_quick(tmp_path, visit):
    """In seconds of the page's own thread, which a busy machine does not lengthen as it does the clock's."""
    path = made(tmp_path, 10)
    count = sum(one["set"] == "held_out" for one in embedded(path))
    assert count >= 2000 and path.stat().st_size < 15_000_000
    start = time.perf_counter()
    page = visit(path, "#/conversations")
    page.locator("#list a").first.wait_for()
    clock = time.perf_counter() - start
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})

    def spent():
        return next(metric["value"] for metric in devtools.send("Performance.getMetrics")["metrics"] if metric["name"] == "TaskDuration")

    assert page.locator("#list a").count() <= 300, "the list is built as far as it is looked at"
    times = {}
    before = spent()
    page.reload()
    page.locator("#list a").first.wait_for()
    times["load"] = spent() - before
    for name, place in {"filters of a turn": "gold=escalate&action=search_kb", "first search": "q=invoice", "next search": "q=refund",
                        "all": "set=all", "one conversation": f"id={embedded(path)[-30]['id']}"}.items():
        before = spent()
        page.evaluate("""(place) => new Promise((done) => {
            addEventListener('hashchange', () => requestAnimationFrame(() => setTimeout(done)), {once: true});
            location.hash = '/conversations?' + place;
        })""", place)
        times[name] = spent() - before
    print(f"{count} conversations, {path.stat().st_size} bytes, {clock:.2f} s by the clock;", {name: round(used, 3) for name, used in times.items()})
    assert all(value > 0 for value in times.values())
    assert times.pop("load") < 4 and max(times.values()) < 1
    page.goto(path.as_uri() + "#/conversations")
    page.locator("#list a").first.focus()
    page.keyboard.press("End")
    assert page.locator("#list a").count() == count
