"""What the closed lists and the figures are called on the page."""

from __future__ import annotations

from schemas.traces import RejectReason

MODELS = {"base": "base model", "student": "student", "compared": "student before"}
SCORERS = {"base": "base model", "student": "student", "bag_of_words": "bag of words", "embedding": "sentence embedding"}
RATES = {
    "escalate_recall": ("hand-offs found", "of the turns that should hand off, how many did (escalation recall)"),
    "over_escalation": ("needless hand-offs", "of the turns that should not hand off, how many did (over-escalation)"),
    "action_accuracy": ("same action as gold", "action accuracy"),
    "valid_output": ("valid output", "free-running: exactly one JSON object that is a valid step"),
    "acceptable": ("acceptable to the judge", "a judge lets a needless hand-off pass: read it beside needless hand-offs"),
}
"""Rate -> its name on the page, and what it counts. Recall stands beside over-escalation: neither means anything alone."""

REJECTIONS = {
    RejectReason.NOT_ONE_JSON_OBJECT: "a step is not exactly one JSON object",
    RejectReason.UNKNOWN_ACTION: "a step names an action that does not exist",
    RejectReason.BAD_ARGS: "arguments do not fit the action",
    RejectReason.BAD_MESSAGE: "a message is missing, or stands where none belongs",
    RejectReason.TOOL_RESULT_MISSING: "a tool call has no result",
    RejectReason.UNFINISHED: "somebody speaks out of turn, or the last word is not the agent's",
    RejectReason.AFTER_ESCALATE: "something follows the hand-off",
    RejectReason.UNKNOWN_TICKET: "an update names a ticket that does not exist",
    RejectReason.UNSUPPORTED_FACT: "a message states a fact that nobody gave the agent",
    RejectReason.REPEATED_SEARCH: "the same search twice",
    RejectReason.TOO_LONG: "too many steps, or too long a message",
    RejectReason.HANDOFF_NEEDLESS: "handed off where the agent should have gone on",
    RejectReason.HANDOFF_MISSED: "never handed off where it should have",
    RejectReason.HANDOFF_LATE: "handed off after the deciding fact was known",
    RejectReason.HANDOFF_WRONG_REASON: "handed off for another reason",
    RejectReason.DUPLICATE: "the same conversation was kept before",
    RejectReason.HELD_OUT_TEXT: "a line of it stands in a held-out company",
    RejectReason.INFRASTRUCTURE: "the endpoint gave up",
}
