"""What the closed lists and the figures are called on the page."""

from __future__ import annotations

MODELS = {"base": "base model", "student": "student", "compared": "student before"}
CHOSEN = "student at the threshold"
"""The student under the threshold: what ships. What is said of a model alone is said of it as it decodes."""
SCORERS = {"student": "student", "bag_of_words": "bag of words", "embedding": "sentence embedding"}
"""Whose score is drawn. The base model's is the student's: it comes from a layer that both have."""
RATES = {
    "escalate_recall": ("hand-offs found", "of the turns that should hand off, how many did (escalation recall)"),
    "over_escalation": ("needless hand-offs", "of the turns that should not hand off, how many did (over-escalation)"),
    "action_accuracy": ("same action as gold", "action accuracy"),
    "valid_output": ("valid output", "free-running: exactly one JSON object that is a valid step"),
    "acceptable": ("acceptable to the judge", "a judge lets a needless hand-off pass: read it beside needless hand-offs"),
}
"""Rate -> its name on the page, and what it counts. Recall stands beside over-escalation: neither means anything alone."""

REJECTIONS = {
    "not_one_json_object": "a step is not exactly one JSON object",
    "unknown_action": "a step names an action that does not exist",
    "bad_args": "arguments do not fit the action",
    "bad_message": "a message is missing, or stands where none belongs",
    "tool_result_missing": "a tool call has no result",
    "unfinished": "somebody speaks out of turn, or the last word is not the agent's",
    "after_escalate": "something follows the hand-off",
    "unknown_ticket": "an update names a ticket that does not exist",
    "unsupported_fact": "a message states a fact that nobody gave the agent",
    "repeated_search": "the same search twice",
    "too_long": "too many steps, or too long a message",
    "handoff_needless": "handed off where the agent should have gone on",
    "handoff_missed": "never handed off where it should have",
    "handoff_late": "handed off after the deciding fact was known",
    "handoff_wrong_reason": "handed off for another reason",
    "duplicate": "the same conversation was kept before",
    "held_out_text": "a sentence of it stands in a held-out company",
    "infrastructure": "the endpoint gave up",
}
"""Every RejectReason, in words."""
NOT_APPLICABLE = {"ticket_category": "their ticket categories", "facts": "the facts they state", "outcome": "their outcome"}
"""Every OriginRule, as what a conversation could not be checked for."""
