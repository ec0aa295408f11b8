"""Put the figures of metrics/corpus.json into the data card, between its markers.

    python -m stages.card
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from stages._stage import DataParams, load_params, run, say

CORPUS = Path("metrics/corpus.json")
CARD = Path("data/README.md")
SURFACE = {"last_words": "length", "customer_turns": "turns", "position": "position", "after_tool": "after a tool"}
CUES = ("plain", "number", "understated")


def markdown(header: list[str], rows: list[list[Any]], words: int = 1) -> str:
    """A table whose first `words` columns are text and whose others are numbers."""
    lines = [header, ["---"] * words + ["--:"] * (len(header) - words), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def figures(corpus: dict[str, Any], held_out: list[str]) -> str:
    """The card's tables."""
    companies = corpus["companies"]
    order = [slug for slug in companies if slug not in held_out] + [slug for slug in companies if slug in held_out]
    sections = {
        "Conversations": markdown(
            ["company", "split", "hand-off", "near miss", "ordinary", "articles", "agent steps, mean", "p90", "escalate, of steps",
             "distinct thought trigrams"],
            [[slug, "held out" if slug in held_out else "training", *(of["kinds"].get(kind, 0) for kind in ("handoff", "near_miss", "ordinary")),
              of["articles"], f"{of['steps_mean']:.2f}", f"{of['steps_p90']:.1f}", f"{of['escalate_share']:.1%}",
              f"{of['distinct_thought_trigrams']:.3f}"] for slug, of in ((slug, companies[slug]) for slug in order)], words=2),
        "Hand-offs, by how they show and by the customer message that decides": markdown(
            ["company", *CUES, "1st", "2nd", "3rd", "4th"],
            [[slug, *(companies[slug]["cues"].get(cue, 0) for cue in CUES),
              *(companies[slug]["handoff_at_customer_turn"].get(str(turn), 0) for turn in range(1, 5))] for slug in order]),
        "AUC of one surface feature alone": markdown(
            ["company", *SURFACE.values()],
            [[slug, *(f"{auc[name]:.3f}" for name in SURFACE)] for slug, auc in
             [*((slug, companies[slug]["surface_auc"]) for slug in order), ("training, pooled", corpus["surface_auc"]["training"])]]),
        "The same, only over steps that do not follow a tool result": markdown(
            ["companies", "length", "position"],
            [[name, f"{auc['last_words_same_kind']:.3f}", f"{auc['position_same_kind']:.3f}"] for name, auc in corpus["surface_auc"].items()]),
        "Bag of words on the held-out companies": markdown(
            ["company", "AUC", "recall at 5 % over-escalation"],
            [[name, f"{of['auc']:.3f}", f"{of['recall_at_5_percent']:.1%}"] for name, of in corpus["bag_of_words"].items()]),
        "Blind labels that stand beside the corpus now": markdown(
            ["company", "agree", "labelled steps"], [[name, of["agree"], of["labelled"]] for name, of in corpus["blind_labels"].items()]),
        "Whole corpus": markdown(["figure", "value"], [
            ["conversations", corpus["scenarios"]], ["agent steps", corpus["agent_steps"]],
            ["highest cosine between two openings", f"{corpus['openings']['highest_cosine']:.3f}"],
            ["held-out openings: cosine to the nearest training opening, 95th percentile",
             f"{corpus['openings']['held_out_nearest_training_p95']:.3f}"]]),
    }
    return "\n\n".join(f"{title}:\n\n{table}" for title, table in sections.items())


def main() -> None:
    text = figures(json.loads(CORPUS.read_text(encoding="utf-8")), load_params("data", DataParams).held_out)
    card = CARD.read_text(encoding="utf-8")
    between = re.compile(r"(?<=<!-- corpus:start -->\n).*(?=<!-- corpus:end -->)", re.DOTALL)
    CARD.write_text(between.sub(lambda _: f"\n{text}\n\n", card), encoding="utf-8")
    say(f"card: {CARD} shows {CORPUS}")


if __name__ == "__main__":
    run(main)
