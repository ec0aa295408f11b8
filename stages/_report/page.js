// The conversation viewer. Text from conversations reaches the page as text nodes only; the address holds the whole state, so that every
// view has a link: #/conversations?set=…&company=…&q=…&gold=…&model=…&action=…&right=…&reject=…&id=…&turn=…
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = new Map(data.conversations.map((one) => [one.id, one]));
  const results = document.getElementById("results"), viewer = document.getElementById("conversations");
  const panes = viewer.querySelector(".panes"), form = document.getElementById("filters"), list = document.getElementById("list");
  const article = document.getElementById("conversation"), found = document.getElementById("found");
  const DEFAULTS = { q: "", set: "held_out", company: "", gold: "", model: "student", action: "", right: "", reject: "" };
  const MODELS = { base: "base model", student: "student", compared: "student before" };
  const CHUNK = 100;
  let shown = [], rendered = 0, filtered = null, current = null;

  // Elements and text: strings become text nodes, never markup.
  const SVG = "http://www.w3.org/2000/svg";
  function h(tag, attributes, ...children) {
    const svg = ["svg", "rect", "line"].includes(tag);
    const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) if (value != null && value !== false) element.setAttribute(name, value === true ? "" : value);
    element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
    return element;
  }
  const plural = (number, word) => `${number.toLocaleString("en-GB")} ${word}${number === 1 ? "" : "s"}`;
  function marked(text) {
    const wanted = wantedWords(state()), low = text.toLowerCase();
    // Lower-casing may change the length of a text (İ); then nothing is marked rather than the wrong letters.
    if (!wanted || low.length !== text.length) return [text];
    const parts = [];
    let from = 0;
    for (let at = low.indexOf(wanted); at >= 0; at = low.indexOf(wanted, from)) {
      parts.push(text.slice(from, at), h("mark", null, text.slice(at, at + wanted.length)));
      from = at + wanted.length;
    }
    return [...parts, text.slice(from)];
  }

  // The address.
  const open = () => location.hash.startsWith("#/conversations");
  function state() {
    const asked = new URLSearchParams(open() ? location.hash.split("?").slice(1).join("?") : "");
    const found = Object.fromEntries([...Object.entries(DEFAULTS), ["id", ""], ["turn", ""]].map(([name, value]) => [name, asked.get(name) ?? value]));
    return Object.hasOwn(RIGHT, found.right) ? found : { ...found, right: "" };
  }
  function address(changes) {
    const asked = new URLSearchParams();
    for (const [name, value] of Object.entries({ ...state(), turn: "", ...changes })) if (value !== (DEFAULTS[name] ?? "")) asked.set(name, value);
    const query = asked.toString();
    return "#/conversations" + (query && "?" + query);
  }
  function replace(changes) {
    history.replaceState(history.state, "", address(changes));
    route();
  }

  // What a filter finds. Those of a turn hold together for one turn.
  const reply = (message, model) => (message.p || []).find((one) => one.w === model);
  const RIGHT = {
    same: ["the gold action", (gold, action) => action === gold],
    other: ["another action", (gold, action) => action !== gold],
    missed: ["a missed hand-off", (gold, action) => gold === "escalate" && action !== "escalate"],
    needless: ["a needless hand-off", (gold, action) => gold !== "escalate" && action === "escalate"],
    refused: ["not acceptable to the judge", (gold, action, verdict) => verdict === "not_acceptable"],
  };
  const ofTurn = (f) => f.gold || f.action || f.right;
  function hits(message, f) {
    const mine = reply(message, f.model);
    if (!mine) return false;
    const action = mine.a || "invalid";
    return (!f.gold || message.a === f.gold) && (!f.action || action === f.action) && (!f.right || RIGHT[f.right][1](message.a, action, mine.v));
  }
  const words = (m) => [m.c, m.t, m.h, m.m, m.x, ...Object.values(m.g || {})].filter(Boolean).join("\n").toLowerCase();
  const wantedWords = (f) => f.q.trim().toLowerCase();
  function haystack(one) {
    // Made at the first search, kept: 2,000 conversations are searched in a few milliseconds.
    one.words ||= [one.id.toLowerCase(), ...one.messages.flatMap((m) => [m, ...(m.p || [])]).map(words)].join("\n");
    return one.words;
  }
  // What is folded opens where the search found its words.
  function folded(className, title, one, ...inside) {
    const wanted = wantedWords(state());
    return h("details", { class: className, open: wanted !== "" && words(one).includes(wanted) }, h("summary", null, title), inside);
  }
  function select(f) {
    const wanted = wantedWords(f);
    return data.conversations.filter((one) =>
      (!f.set || f.set === "all" || one.set === f.set) && (!f.company || one.company === f.company) &&
      (!f.reject || f.set === "held_out" || one.reason === f.reject) &&
      (!ofTurn(f) || f.set === "rejected" || one.messages.some((message) => hits(message, f))) &&
      (!wanted || haystack(one).includes(wanted)));
  }

  // The filters.
  function options(name, entries) {
    form.elements[name].replaceChildren(...entries.map(([value, text]) => h("option", { value }, text)));
  }
  function fill() {
    const count = (set) => data.conversations.filter((one) => one.set === set).length;
    const seen = (values) => [...new Set(values.filter(Boolean))].sort();
    const turns = data.conversations.flatMap((one) => one.messages);
    const named = (values) => values.map((value) => [value, value]);
    const models = Object.entries(MODELS).filter(([model]) => model !== "compared" || data.compared);
    options("set", [["held_out", `held out (${count("held_out")})`], ["rejected", `rejected (${count("rejected")})`], ["all", `all (${data.conversations.length})`]]);
    options("company", [["", "any"], ...named(seen(data.conversations.map((one) => one.company)))]);
    options("gold", [["", "any"], ...named(seen(turns.filter((m) => m.p).map((m) => m.a)))]);
    options("model", models);
    options("action", [["", "any"], ...named(seen(turns.flatMap((m) => m.p || []).map((m) => m.a))), ["invalid", "invalid"]]);
    options("right", [["", "anything"], ...Object.entries(RIGHT).map(([value, [text]]) => [value, text])]);
    options("reject", [["", "any reason"], ...named(seen(data.conversations.map((one) => one.reason)))]);
  }
  function filter(f) {
    const key = JSON.stringify(Object.keys(DEFAULTS).map((name) => f[name]));
    for (const name of Object.keys(DEFAULTS)) if (form.elements[name].value !== f[name]) form.elements[name].value = f[name];
    for (const name of ["gold", "model", "action", "right"]) form.elements[name].disabled = f.set === "rejected";
    form.elements.right.querySelector('[value="refused"]').disabled = f.model === "compared";  // another revision's verdicts are not in this file
    if (key === filtered) return false;
    filtered = key;
    shown = select(f);
    const turns = ofTurn(f) && f.set !== "rejected" ? shown.reduce((sum, one) => sum + one.messages.filter((m) => hits(m, f)).length, 0) : 0;
    found.textContent = plural(shown.length, "conversation") + (turns ? `, ${plural(turns, "turn")}` : "");
    list.replaceChildren();
    list.scrollTop = rendered = 0;
    more();
    return true;
  }

  // The list, built as far as it is looked at, anew whenever a filter changes; one stop for the Tab key, arrow keys inside.
  function summary(one) {
    if (one.set === "rejected") return `rejected: ${one.reason}`;
    const handoff = one.messages.find((m) => m.a === "escalate");
    const mine = handoff && reply(handoff, state().model);
    const kind = one.kind ? one.kind.replace("_", " ") : handoff ? "handoff" : "";
    return handoff ? `hand-off, ${handoff.g.reason}${mine ? `: ${mine.a === "escalate" ? "found" : "missed"} as it decodes` : ""}` : kind;
  }
  function more() {
    const items = shown.slice(rendered, rendered + CHUNK).map((one, at) => h("li", null,
      h("a", { href: address({ id: one.id }), tabindex: rendered + at ? -1 : 0, "data-at": rendered + at },
        h("span", null, one.id.split("/").join(" / ")), h("span", { class: "words" }, summary(one)),
        h("span", { class: "words" }, (one.messages.find((m) => m.c) || { c: "" }).c.slice(0, 120)))));
    rendered += items.length;
    list.append(...items);
    if (rendered < shown.length) watcher.observe(list.lastElementChild);
  }
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) {
      watcher.unobserve(entry.target);
      if (entry.target === list.lastElementChild) more();
    }
  }, { rootMargin: "600px" });
  function item(at) {
    while (at >= rendered && rendered < shown.length) more();
    return list.children[at]?.firstElementChild;
  }
  function rove(link, focus) {
    if (!link) return;
    list.querySelector('[tabindex="0"]')?.setAttribute("tabindex", "-1");
    link.setAttribute("tabindex", "0");
    link.scrollIntoView({ block: "nearest" });
    if (focus) link.focus();
  }
  const position = () => shown.indexOf(current);
  function step(by) {
    const at = Math.min(Math.max(current && position() >= 0 ? position() + by : 0, 0), shown.length - 1);
    if (shown[at]) {
      replace({ id: shown[at].id });
      if (document.activeElement?.closest("#list")) item(at)?.focus();
    }
  }

  // One conversation.
  function args(one) {
    const values = Object.entries(one.g || {});
    return values.length ? h("span", { class: "args" }, values.map(([name, value]) => [h("br"), `${name}: `, marked(String(value))])) : null;
  }
  const TOOLS = new Set(["search_kb", "create_ticket", "update_ticket"]);
  function body(one) {
    if (one.x != null) return [h("div", { class: "action" }, "no valid step"), h("div", { class: "of" }, one.f), h("pre", { tabindex: 0, "aria-label": "raw text" }, marked(one.x))];
    const action = TOOLS.has(one.a) ? folded("action call", one.a, { g: one.g }, args(one)) : h("div", { class: "action" }, one.a, args(one));
    return [action, one.h && h("p", { class: "thought" }, marked(one.h)), one.m && h("p", null, marked(one.m))];
  }
  function score(one) {
    if (one.e == null) return null;
    const limit = one.w === "student" ? data.threshold : null;
    const done = limit == null ? null : one.e >= limit ? "handed off" : one.o || (one.a === "escalate" ? "no valid step" : null);
    const digits = limit != null && one.e.toFixed(2) === limit.toFixed(2) ? 4 : 2;
    const told = `P(escalate) ${one.e.toFixed(digits)}` + (limit == null ? "" : `, threshold ${limit.toFixed(digits)}`);
    return h("div", { class: "score" },
      h("svg", { viewBox: "0 0 100 12", preserveAspectRatio: "none", role: "img", "aria-label": told },
        h("rect", { class: "track", x: 0, y: 2, width: 100, height: 8 }), h("rect", { class: "value", x: 0, y: 2, width: 100 * one.e, height: 8 }),
        limit != null && h("line", { class: "threshold", x1: 100 * limit, x2: 100 * limit, y1: 0, y2: 12 })),
      h("span", null, told), done && h("span", { class: "done" }, `under the threshold’s rule: ${done}`));
  }
  function card(name, title, one, gold, extra) {
    const action = one.a || "invalid";
    const badge = gold && h("span", { class: "badge " + (action === gold ? "right" : "wrong") }, action === gold ? "✓ as gold" : "✗ not as gold");
    const verdict = one.v && h("p", { class: "verdict" }, `judge: ${one.v.replace("_", " ")}`);
    return h("div", { class: "step " + name }, h("h3", null, title, badge), body(one), score(one), verdict, extra);
  }
  function agent(one, index, number, conversation, f) {
    const free = reply(one, "base_free");
    const aside = free && folded(null, `free-running: ${free.a || "no valid step"}`, free, body(free));
    const at = conversation.id;
    const classes = "turn" + (ofTurn(f) && hits(one, f) ? " hit" : "") + (conversation.at === index ? " fault" : "");
    return h("section", { class: classes, id: `turn-${index}`, "aria-label": `agent turn ${number}` },
      h("span", { class: "role" }, h("a", { href: address({ id: at, turn: index }) }, `agent, turn ${number}`)),
      h("div", { class: "steps" },
        card("gold", conversation.set === "rejected" ? "teacher" : "gold", one),
        Object.keys(MODELS).map((model) => {
          const mine = reply(one, model);
          return mine && card(model, model === "compared" ? `student of ${data.compared}` : MODELS[model], mine, one.a, model === "base" && aside);
        })));
  }
  function draw(one, f) {
    if (!one) {
      const nothing = f.id ? "There is no such conversation in this report." : shown.length ? "Choose a conversation." : "No conversation passes these filters.";
      article.replaceChildren(h("p", { class: "empty" }, nothing, " ", h("a", { class: "back", href: address({ id: "" }) }, "Back to the list")));
      return;
    }
    let number = 0;
    const messages = one.messages.map((message, index) => {
      if (message.c != null) return h("div", { class: "says", id: `turn-${index}` }, h("span", { class: "role" }, "customer"), marked(message.c));
      if (message.t != null) return h("div", { id: `turn-${index}` }, folded("tool", "tool result", message, h("div", null, marked(message.t))));
      return agent(message, index, ++number, one, f);
    });
    article.replaceChildren(
      h("h2", null, one.id.split("/").join(" / ")),
      h("p", { class: "where" }, h("a", { class: "back", href: address({ id: "" }) }, "‹ all conversations"), h("span", null, summary(one)), h("span", null, plural(number, "agent turn"))),
      ...(one.set === "rejected" ? [h("p", { class: "why" }, `Rejected: ${one.reason}`, one.detail ? `, ${one.detail}` : "")] : []),
      ...messages);
  }

  // The address decides what is seen. Where it was scrolled to is kept for each entry of the history, under a key in the entry's state, since
  // what the browser would scroll is only drawn afterwards.
  const places = new Map(), begun = performance.timeOrigin;
  let drawn = null, entry = null, entries = 0;
  function arrive(event) {
    const known = history.state?.key, place = places.get(known);
    entry = places.has(known) ? known : `${begun}/${entries++}`;
    places.set(entry, place ?? scrollY);
    history.replaceState({ key: entry }, "");
    route(event);
    if (place === undefined) return;
    while (document.documentElement.scrollHeight < place + innerHeight && rendered < shown.length) more();
    window.scrollTo(0, place);
  }
  function route(event) {
    const viewing = open();
    const turned = viewer.hidden === viewing;
    viewer.hidden = !viewing;
    results.hidden = viewing;
    for (const link of document.querySelectorAll("[data-view]"))
      if ((link.dataset.view === "conversations") === viewing) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
    if (!viewing) {
      if (turned) document.getElementById(location.hash.slice(1) || "results")?.scrollIntoView();
      return;
    }
    const f = state();
    const changed = filter(f);
    current = byId.get(f.id) || null;
    panes.classList.toggle("open", Boolean(f.id));
    const key = JSON.stringify([f.id, filtered]);
    if (key !== drawn) draw(current, f);
    const arrived = key !== drawn || turned;
    drawn = key;
    list.querySelector("[aria-current]")?.removeAttribute("aria-current");
    const link = current && position() >= 0 ? item(position()) : null;
    link?.setAttribute("aria-current", "true");
    if (link) rove(link, false);
    if (!changed && arrived) window.scrollTo(0, 0);
    if (f.turn) document.getElementById(`turn-${Number(f.turn)}`)?.scrollIntoView({ block: "center" });
    else if (arrived && current && ofTurn(f)) article.querySelector(".hit")?.scrollIntoView({ block: "center" });
    if (event && arrived && f.id) article.focus({ preventScroll: true });
  }

  let waiting = 0;
  form.addEventListener("input", (event) => {
    clearTimeout(waiting);
    // All of them: a choice made while words are being typed is no reason to forget the words.
    const values = () => {
      const chosen = Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, form.elements[name].value]));
      // Only a rejected conversation has a reason: choosing one shows those, and leaving those drops it.
      if (event.target.name === "reject" && chosen.reject) chosen.set = "rejected";
      if (event.target.name === "set" && chosen.set !== "rejected") chosen.reject = "";
      return chosen;
    };
    waiting = setTimeout(() => replace(values()), event.target.name === "q" ? 120 : 0);
  });
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    replace(DEFAULTS);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  list.addEventListener("keydown", (event) => {
    const at = Number((event.target.closest("a") ?? list.querySelector('[tabindex="0"]'))?.dataset.at ?? 0);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: shown.length - 1, PageDown: at + 10, PageUp: at - 10 }[event.key];
    if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    rove(item(Math.min(Math.max(to, 0), shown.length - 1)), true);
  });
  document.addEventListener("keydown", (event) => {
    if (viewer.hidden || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "Escape") return void rove(item(Math.max(position(), 0)), true);
    if (event.target.matches("input, select, textarea")) return;
    if (event.key === "j" || event.key === "k") step(event.key === "j" ? 1 : -1);
    else if (event.key === "/") form.elements.q.focus();
    else return;
    event.preventDefault();
  });
  document.querySelector(".skip").addEventListener("click", (event) => {
    if (viewer.hidden) return;
    event.preventDefault();
    (current ? article : list.querySelector('[tabindex="0"]'))?.focus();
  });
  history.scrollRestoration = "manual";
  // A scroll that the browser reports once another entry is current is not the last one's.
  window.addEventListener("scroll", () => history.state?.key === entry && places.set(entry, scrollY));
  window.addEventListener("hashchange", arrive);
  fill();
  arrive();
})();
