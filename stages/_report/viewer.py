"""The conversations as the page embeds them: compact JSON that its script unfolds.

One object a conversation, `{id, company, set, kind?, reason?, detail?, at?, messages}`; `set` is `held_out` or `rejected`, the last three say
why verification rejected it and at which message. A message is `{c: text}` (customer), `{t: text}` (tool) or a step (agent); a message of a
held-out conversation whose turn was predicted carries the models' steps under `p`.

A step is `{a: action, g: args, h: thought, m: message}`, or `{x: raw, f: fault}` where the text is no valid step; empty fields are left out.
A predicted step also has `w` (whose: base, base_free, student, compared), and where known `v` (the judge's verdict), `e` (p_escalate, all
digits, since a threshold is held against it) and `o` (the best action other than escalate).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from schemas.action import ActionError, parse_action

if TYPE_CHECKING:
    import polars as pl

_Turn = tuple[str, int]


def step(text: str) -> dict[str, Any]:
    """An agent's text as a step of the page: its fields, or the raw text and the fault that makes it none."""
    try:
        action = parse_action(text)
    except ActionError as error:
        return {"x": text, "f": error.fault.value}
    fields = {"a": action.action.value, "g": action.args, "h": action.thought, "m": action.message}
    return {key: value for key, value in fields.items() if value}


def predicted(predictions: pl.DataFrame, judgements: pl.DataFrame, compared: pl.DataFrame | None) -> dict[_Turn, list[dict[str, Any]]]:
    """(conversation_id, index) -> the models' steps, base before student before the student compared with.

    Args:
        predictions: eval_exact's table; `p_escalate` and `other_action` are used where it has them.
        judgements: eval_judge's table.
        compared: the predictions of another revision, or None.
    """
    verdicts = {(row["conversation_id"], row["index"], row["model"]): row["verdict"] for row in judgements.iter_rows(named=True)}
    turns: dict[_Turn, list[dict[str, Any]]] = {}
    for row in predictions.iter_rows(named=True):
        free_base = row["model"] == "base" and row["decoding"] == "free"
        reply = {"w": "base_free" if free_base else row["model"], **step(row["raw"])}
        if not free_base and (verdict := verdicts.get((row["conversation_id"], row["index"], row["model"]))):
            reply["v"] = verdict
        if row.get("p_escalate") is not None:
            reply["e"] = row["p_escalate"]
        if row.get("other_action"):
            reply["o"] = row["other_action"]
        turns.setdefault((row["conversation_id"], row["index"]), []).append(reply)
    if compared is not None:
        for name, index, raw in compared.filter(model="student").select("conversation_id", "index", "raw").iter_rows():
            if (name, index) in turns:
                turns[name, index].append({"w": "compared", **step(raw)})
    return turns


def conversations(held_out: pl.DataFrame, rejected: pl.DataFrame, turns: dict[_Turn, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Every conversation of both tables, in their order, with the models' steps at its agent turns."""
    found = []
    for table, name in ((held_out, "held_out"), (rejected, "rejected")):
        for part in table.partition_by("conversation_id", maintain_order=True):
            first = part.row(0, named=True)
            fields = {"id": first["conversation_id"], "company": first["company"], "set": name, "kind": first.get("kind"),
                      "reason": first.get("reject_reason"), "detail": first.get("reject_detail"), "at": first.get("reject_index")}
            found.append({key: value for key, value in fields.items() if value is not None}
                         | {"messages": [_message(row, turns) for row in part.iter_rows(named=True)]})
    return found


def _message(row: dict[str, Any], turns: dict[_Turn, list[dict[str, Any]]]) -> dict[str, Any]:
    if row["role"] != "agent":
        return {row["role"][0]: row["content"]}
    replies = turns.get((row["conversation_id"], row["index"]))
    return step(row["content"]) | ({"p": replies} if replies else {})


def embed(data: Any) -> str:
    """JSON that may stand inside a `<script>` element: no `<`, so that nothing in it closes or opens an element."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
