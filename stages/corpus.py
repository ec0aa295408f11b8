"""Check the companies as written, and measure what a surface reader could learn from them.

Reads   data/companies/, data/blind_labels/
Writes  metrics/corpus.json

`python -m stages.corpus SLUG` prints one company's faults and figures while it is being written;
`--search "words"` shows what its knowledge base returns.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from pathlib import Path
from typing import Any

from agent.kb import KnowledgeBase
from agent.protocol import system_prompt
from agent.replay import reference_messages
from schemas.action import TOOLS, ActionName
from schemas.company import Company, Kind, load_company
from schemas.corpus import CorpusMetrics
from schemas.errors import InputError
from stages._bag_of_words import bag_of_words_model
from stages._logistic import ranking
from stages._rules import examine
from stages._sentences import plain, sentences
from stages._stage import DataParams, load_params, run, say, used_companies, write_metrics

BLIND_LABELS = Path("data/blind_labels")
METRICS = Path("metrics/corpus.json")
POLICY_WORDS = 150
ARTICLE_WORDS = (50, 120)
OPENING_COSINE = 0.6


def faults(company: Company) -> list[str]:
    """What a person must mend: each a line with the place and the fault."""
    kb = KnowledgeBase(company.articles)
    found = []
    if (words := len(company.policy.split())) > POLICY_WORDS:
        found.append(f"policy.md: {words} words, at most {POLICY_WORDS}")
    for article in company.articles:
        words = sum(len(paragraph.split()) for paragraph in article.paragraphs)
        if not ARTICLE_WORDS[0] <= words <= ARTICLE_WORDS[1]:
            found.append(f"articles/{article.id}.md: {words} words, should be {ARTICLE_WORDS[0]} to {ARTICLE_WORDS[1]}")
    for scenario in company.scenarios:
        if rejection := examine(reference_messages(company, scenario, kb), company, scenario):
            found.append(f"scenario {scenario.id}: message {rejection.index}: {rejection.reason}: {rejection.detail}")
    return found + repeats([company])


def repeats(companies: list[Company]) -> list[str]:
    """Lines, sentences (of five words or more), thoughts or customers' aims that occur twice, and openings too alike."""
    where: dict[tuple[str, str], str] = {}
    found = []
    for company in companies:
        for scenario in company.scenarios:
            name = f"{company.slug}/{scenario.id}"
            texts = [("customer", turn.customer) for turn in scenario.turns]
            texts += [("agent", step.message) for step in scenario.steps if step.message]
            pieces = [(who, text) for who, text in texts]
            pieces += [("sentence", part) for _, text in texts for part in sentences(text)]
            pieces += [("thought", step.thought) for step in scenario.steps]
            pieces += [("aim and facts", f"{scenario.customer.aim} {scenario.customer.facts}")]
            for who, text in pieces:
                key = (who, plain(text))
                if key in where:
                    found.append(f"scenario {name}: {who} line also in {where[key]}: {text[:70]!r}")
                where[key] = name
    openings = [(f"{company.slug}/{scenario.id}", scenario.turns[0].customer) for company in companies for scenario in company.scenarios]
    similar = opening_similarity([text for _, text in openings])
    for i, j in zip(*(similar > OPENING_COSINE).nonzero(), strict=True):
        if i < j:
            found.append(f"openings {openings[i][0]} and {openings[j][0]}: cosine {similar[i, j]:.2f}, must be below {OPENING_COSINE}")
    return found


def opening_similarity(openings: list[str]) -> Any:
    """Cosine of word 1-2-gram TF-IDF between all openings: array (n, n)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(ngram_range=(1, 2)).fit_transform(openings)
    return (vectors @ vectors.T).toarray()


def decisions(company: Company) -> list[dict[str, Any]]:
    """One row an agent step of the reference conversations: the gold hand-off, and surface features known before it."""
    rows = []
    for scenario in company.scenarios:
        said: list[str] = []
        position, after_tool = 0, False
        for turn in scenario.turns:
            said.append(turn.customer)
            for step in turn.agent:
                rows.append({
                    "scenario": f"{company.slug}/{scenario.id}", "kind": scenario.kind, "escalate": step.action is ActionName.ESCALATE,
                    "last_words": len(turn.customer.split()), "customer_turns": len(said), "position": position,
                    "after_tool": after_tool, "said": "\n".join(said)})
                position += 1
                after_tool = step.action in TOOLS
            after_tool = False
    return rows


def surface_auc(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How well each surface feature alone separates hand-off steps from all others: AUC, .5 is nothing."""
    from sklearn.metrics import roc_auc_score

    gold = [row["escalate"] for row in rows]
    if len(set(gold)) < 2:
        return {}
    first = [row for row in rows if not row["after_tool"]]
    result = {name: float(roc_auc_score(gold, [float(row[name]) for row in rows]))
              for name in ("last_words", "customer_turns", "position", "after_tool")}
    gold = [row["escalate"] for row in first]
    if len(set(gold)) == 2:
        result |= {f"{name}_same_kind": float(roc_auc_score(gold, [row[name] for row in first])) for name in ("last_words", "position")}
    return {name: round(value, 3) for name, value in result.items()}


def describe(company: Company) -> dict[str, Any]:
    """Counts and lengths of one company."""
    import numpy as np

    scenarios = company.scenarios
    rows = decisions(company)
    handoffs = [s for s in scenarios if s.kind is Kind.HANDOFF]
    thoughts = [step.thought for s in scenarios for step in s.steps]
    trigrams = [gram for text in thoughts for gram in zip(*(plain(text).split()[i:] for i in range(3)), strict=False)]
    steps = [len(s.steps) for s in scenarios]
    return {
        "articles": len(company.articles), "policy_words": len(company.policy.split()),
        "prompt_words": len(system_prompt(company).split()),
        "kinds": dict(Counter(s.kind.value for s in scenarios)),
        "handoff_reasons": dict(Counter(s.reason.value for s in handoffs if s.reason)),
        "near_miss_reasons": dict(Counter(s.reason.value for s in scenarios if s.kind is Kind.NEAR_MISS and s.reason)),
        "cues": dict(Counter(s.cue.value for s in handoffs if s.cue)),
        "handoff_at_customer_turn": dict(sorted(Counter(len(s.turns) for s in handoffs).items())),
        "steps_by_kind": {k.value: round(float(np.mean([len(s.steps) for s in scenarios if s.kind is k] or [0])), 2) for k in Kind},
        "steps_mean": round(float(np.mean(steps)), 2), "steps_p90": float(np.percentile(steps, 90)),
        "escalate_share": round(sum(row["escalate"] for row in rows) / len(rows), 4),
        "distinct_thought_trigrams": round(len(set(trigrams)) / max(1, len(trigrams)), 3),
        "median_last_words": {
            "deciding": float(np.median([row["last_words"] for row in rows if row["escalate"]] or [0])),
            "other": float(np.median([row["last_words"] for row in rows if not row["escalate"]] or [0]))},
        "surface_auc": surface_auc(rows),
    }


def bag_of_words(train: list[dict[str, Any]], test: list[dict[str, Any]]) -> dict[str, float]:
    """What words alone find: TF-IDF with logistic regression on the customer's words so far, fitted on `train`.

    Returns:
        AUC over the steps of `test`, and the recall at the threshold where at most 5 % of the others are over-escalated.
    """
    if any(len({row["escalate"] for row in rows}) < 2 for rows in (train, test)):
        return {}
    model = bag_of_words_model().fit([row["said"] for row in train], [row["escalate"] for row in train])
    return ranking(model.predict_proba([row["said"] for row in test])[:, 1], [row["escalate"] for row in test])


def blind_agreement(company: Company) -> tuple[int, int]:
    """(agreeing, labelled) agent steps: a second reader's blind labels, where the company has some, against the reference.

    Raises:
        InputError: a label for a step that does not exist.
    """
    path = BLIND_LABELS / f"{company.slug}.csv"
    if not path.is_file():
        return 0, 0
    gold = {(scenario.id, number): step.action is ActionName.ESCALATE
            for scenario in company.scenarios for number, step in enumerate(scenario.steps, 1)}
    with path.open(encoding="utf-8", newline="") as file:
        labels = [((row["scenario"], int(row["step"])), row["label"] == "handoff") for row in csv.DictReader(file)]
    for step, _ in labels:
        if step not in gold:
            raise InputError(f"{path} has a label for {step[0]} step {step[1]}, which the company does not have",
                             "the scenario was edited after labelling: have it labelled again, or take its rows out")
    return sum(gold[step] == given for step, given in labels), len(labels)


def measure(companies: dict[str, Company], held_out: list[str]) -> dict[str, Any]:
    """Every figure of the data card."""
    import numpy as np

    training = [slug for slug in companies if slug not in held_out]
    rows = {slug: decisions(company) for slug, company in companies.items()}
    train_rows = [row for slug in training for row in rows[slug]]
    openings = [(slug, scenario.turns[0].customer) for slug, company in companies.items() for scenario in company.scenarios]
    similar = opening_similarity([text for _, text in openings])
    of_held_out = np.array([slug in held_out for slug, _ in openings])
    nearest = similar[of_held_out][:, ~of_held_out].max(axis=1)
    np.fill_diagonal(similar, 0)
    labels = {slug: blind_agreement(company) for slug, company in companies.items()}
    return {
        "companies": {slug: describe(company) for slug, company in companies.items()},
        "scenarios": len(openings), "agent_steps": sum(map(len, rows.values())),
        "openings": {
            "highest_cosine": float(similar.max()),
            "held_out_nearest_training_p95": float(np.percentile(nearest, 95)) if len(nearest) else 0.0},
        "surface_auc": {"training": surface_auc(train_rows), **{slug: surface_auc(rows[slug]) for slug in held_out}},
        "bag_of_words": {
            **{slug: bag_of_words(train_rows, rows[slug]) for slug in held_out},
            "pooled": bag_of_words(train_rows, [row for slug in held_out for row in rows[slug]])},
        "blind_labels": {slug: {"agree": agree, "labelled": n} for slug, (agree, n) in labels.items() if n},
    }


def check_one(slug: str, query: str | None) -> None:
    """What somebody who is writing a company wants to know.

    Raises:
        InputError: something must be mended.
    """
    company = load_company(slug)
    if query:
        print(KnowledgeBase(company.articles).search(query))
        return
    for name, value in describe(company).items():
        print(f"{name:26} {value}")
    if found := faults(company):
        raise InputError(f"{slug} has {len(found)} faults:\n" + "\n".join(found), "mend them in data/companies/" + slug)
    print("no faults")


def main() -> None:
    parser = argparse.ArgumentParser(description="Check and measure the companies.")
    parser.add_argument("slug", nargs="?", help="one company, printed; without it all, written to metrics/corpus.json")
    parser.add_argument("--search", metavar="WORDS", help="what the company's knowledge base returns")
    options = parser.parse_args()
    if options.slug:
        check_one(options.slug, options.search)
        return
    data = load_params("data", DataParams)
    # Checked whole, also where a slice is used. A held-out company without a folder is one of which there are only logs;
    # teacher_gen and verify refuse a name that nobody knows.
    companies = used_companies(data.model_copy(update={"scenarios_per_company": 0}), logged=data.held_out)
    held_out = [slug for slug in data.held_out if slug in companies]
    found = [f"{slug}: {fault}" for slug, company in companies.items() for fault in faults(company)] + repeats(list(companies.values()))
    if found:
        raise InputError(f"the corpus has {len(found)} faults, the first: {found[0]}", "python -m stages.corpus SLUG lists a company's")
    metrics = measure(companies, held_out)
    write_metrics(METRICS, metrics, CorpusMetrics)
    bag = metrics['bag_of_words']['pooled'].get('auc', float('nan'))
    say(f"corpus: {len(companies)} companies, {metrics['scenarios']} scenarios, {metrics['agent_steps']} agent steps, no faults; "
        f"bag of words on held-out: AUC {bag:.2f}")


if __name__ == "__main__":
    run(main)
