"""The bundled companies keep what the data card promises, and the checks that say so can fail."""

import csv
from collections import Counter
from functools import cache
from itertools import combinations

import pytest
import yaml

from schemas.action import HandoffReason
from schemas.company import COMPANIES, Kind, load_company
from schemas.errors import InputError
from stages.corpus import BLIND_LABELS, bag_of_words, blind_agreement, decisions, faults, measure, opening_similarity, repeats, surface_auc
from stages.verify import OneIn, split_of
from tests.layout import ROOT

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
TRAINING = ["breadbox", "broadband", "energy", "furniture", "gym", "invoicing", "neobank", "petfood"]
HELD_OUT = ["streaming", "travel"]
SLUGS = [*TRAINING, *HELD_OUT]
"""By name: a company that somebody adds promises nothing."""
REASONS = {reason.value for reason in HandoffReason}


@cache
def corpus():
    return {slug: load_company(slug, ROOT / COMPANIES) for slug in SLUGS}


@cache
def figures():
    return measure(corpus(), HELD_OUT)


def described(slug):
    return figures()["companies"][slug]


@pytest.mark.parametrize("slug", TRAINING)
def test_a_training_company_has_its_counts(slug):
    assert described(slug)["kinds"] == {"handoff": 16, "near_miss": 18, "ordinary": 26}


@pytest.mark.parametrize("slug", HELD_OUT)
def test_a_held_out_company_has_its_counts(slug):
    kinds = described(slug)["kinds"]
    assert kinds["handoff"] >= 60 and kinds["near_miss"] == 28 and kinds["ordinary"] == 12


@pytest.mark.parametrize("slug", SLUGS)
def test_every_company_has_every_reason_among_handoffs_and_near_misses(slug):
    assert set(described(slug)["handoff_reasons"]) == set(described(slug)["near_miss_reasons"]) == REASONS


@pytest.mark.parametrize("slugs", [TRAINING, *([slug] for slug in HELD_OUT)], ids="+".join)
def test_handoffs_show_in_different_ways_and_at_different_times(slugs):
    """About a third need the policy's numbers, about a third are understated, and more than a third show only in mid-conversation."""
    def summed(figure):
        return sum((Counter(described(slug)[figure]) for slug in slugs), Counter())
    handoffs, cues, turns = (summed(figure) for figure in ("kinds", "cues", "handoff_at_customer_turn"))
    assert min(cues[cue] for cue in ("number", "understated")) >= 0.3 * handoffs["handoff"] and cues.total() == handoffs["handoff"] == turns.total()
    assert turns.total() - turns["1"] >= handoffs["handoff"] / 3 and max(map(int, turns)) <= 4


@pytest.mark.parametrize("slug", SLUGS)
def test_articles_and_policy_have_their_lengths(slug):
    company = corpus()[slug]
    assert len(company.articles) >= 15 and len(company.policy.split()) <= 150
    words = {article.id: sum(len(paragraph.split()) for paragraph in article.paragraphs) for article in company.articles}
    assert not {name: count for name, count in words.items() if not 50 <= count <= 120}


@pytest.mark.parametrize("slug", SLUGS)
def test_no_company_has_faults(slug):
    assert faults(corpus()[slug]) == []


def test_nothing_is_said_twice_in_the_whole_corpus():
    assert repeats(list(corpus().values())) == []


def test_no_two_openings_are_alike():
    assert figures()["openings"]["highest_cosine"] < 0.6


@pytest.mark.parametrize("feature", ["last_words", "customer_turns", "position"])
@pytest.mark.parametrize("where, low, high", [*((where, 0.40, 0.60) for where in ("training", *HELD_OUT)), *((s, 0.35, 0.65) for s in TRAINING)])
def test_length_and_position_do_not_give_the_handoff_away(where, low, high, feature):
    pooled = figures()["surface_auc"]
    auc = pooled[where] if where in pooled else described(where)["surface_auc"]
    assert low <= auc[feature] <= high


@pytest.mark.parametrize("where", [*HELD_OUT, "pooled"])
def test_words_alone_do_not_find_the_handoffs(where):
    assert figures()["bag_of_words"][where]["auc"] < 0.80


@pytest.mark.parametrize("slug", TRAINING)
def test_ordinary_conversations_are_long(slug):
    assert 5 <= described(slug)["steps_by_kind"]["ordinary"] <= 9


def split(slug, part):
    places = split_of(corpus()[slug], OneIn(**PARAMS["verify"]["calibration_one_in"]))
    return [scenario for scenario in corpus()[slug].scenarios if places[scenario.id] == part]


@pytest.mark.parametrize("slug", TRAINING)
def test_the_handoffs_are_halved_between_training_and_calibration(slug):
    train, calibration = split(slug, "train"), split(slug, "calibration")
    assert [sum(s.kind is Kind.HANDOFF for s in part) for part in (train, calibration)] == [8, 8]
    assert len(train) + len(calibration) == 60


def test_a_handoff_is_rare_in_the_training_split():
    steps = [step for slug in TRAINING for scenario in split(slug, "train") for step in scenario.steps]
    assert 0.03 <= sum(step.action == "escalate" for step in steps) / len(steps) <= 0.06


def labels(slug):
    with (ROOT / BLIND_LABELS / f"{slug}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


LABELLED = sorted(path.stem for path in (ROOT / BLIND_LABELS).glob("*.csv"))


def test_a_blind_reader_agrees_on_the_held_out_companies(monkeypatch):
    """Out of all labels in the files: one whose step was edited away since agrees with nothing."""
    monkeypatch.chdir(ROOT)
    assert sum(blind_agreement(corpus()[slug])[0] for slug in HELD_OUT) >= 0.95 * sum(len(labels(slug)) for slug in HELD_OUT)


def test_a_blind_reader_agrees_on_about_a_fifth_of_the_training_companies(monkeypatch):
    """A few of the conversations that were read have been mended since, and their labels went."""
    monkeypatch.chdir(ROOT)
    read = sum(len({row["scenario"] for row in labels(slug)}) for slug in TRAINING)
    assert read >= 0.19 * sum(len(corpus()[slug].scenarios) for slug in TRAINING)
    assert sum(blind_agreement(corpus()[slug])[0] for slug in TRAINING) >= 0.95 * sum(len(labels(slug)) for slug in TRAINING)


@pytest.mark.parametrize("slug", LABELLED)
def test_a_blind_label_is_one_of_two_words_and_given_once(slug):
    assert {row["label"] for row in labels(slug)} == {"handoff", "go_on"}
    assert len({(row["scenario"], row["step"]) for row in labels(slug)}) == len(labels(slug))


def test_a_label_for_a_step_that_is_no_longer_there_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr("stages.corpus.BLIND_LABELS", tmp_path)
    (tmp_path / "travel.csv").write_text("scenario,step,label\nno-such-scenario,1,go_on\n")
    with pytest.raises(InputError, match="no-such-scenario step 1"):
        blind_agreement(corpus()["travel"])


# The checks themselves can fail.

def broken(folder, name, old, new):
    path = folder / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    return faults(load_company("teashop", folder.parent))


OTHERS, HANDOFF, ARTICLE = "scenarios/others.yaml", "scenarios/handoff.yaml", "articles/dented-tins.md"


@pytest.mark.parametrize("name, old, new, fault", [
    ("policy.md", "Hand off:", "word " * 125 + "Hand off:", "policy.md: 163 words, at most 150"),
    (ARTICLE, "A new tin leaves the warehouse on the next Tuesday, and you may keep the old one.", "", "dented-tins.md: 40 words"),
    (ARTICLE, "Write to us", "word " * 70 + "Write to us", "dented-tins.md: 127 words"),
    (OTHERS, "a new tin leaves on Tuesday for", "a new tin leaves at 17:30 for", "message 9: unsupported_fact: the time of day 17:30"),
    (OTHERS, "ticket_id: CK-2001", "ticket_id: CK-9999", "message 7: unknown_ticket: CK-9999"),
    (OTHERS, "message: A link for a", "message: A link for" + " word" * 85, "message 1: too_long: a message of"),
    (HANDOFF, "She sent nothing to Tromsø and lives alone, so a stranger used the account.",
     "Three tins went to Tromsø; whether she sent them as a gift is not known yet.", "thought line also in teashop/order-from-another-town"),
    (OTHERS, "The tea is fine.", "A link for a new password is on its way to your mail.", "sentence line also in teashop/password"),
    (HANDOFF, "no, I live alone and know nobody up north",
     "two weeks at the sea and my password is gone from my head, not stolen, only washed away", "customer line also in teashop/order-from"),
    (OTHERS, "two weeks at the sea and my password is gone", "funny, my account says that 3 green tins went to Tromsø", "cosine 0."),
], ids=range(10))
def test_a_fault_is_found(company_folder, name, old, new, fault):
    found = broken(company_folder, name, old, new)
    assert len([line for line in found if fault in line]) == 1, found


def test_a_line_that_two_companies_share_is_found(company_folder):
    company = load_company("teashop", company_folder.parent)
    found = repeats([company, company.model_copy(update={"slug": "tearoom"})])
    lines = [line for line in found if line.startswith("scenario tearoom/dent-in-the-lid: customer line also in teashop/dent-in-the-lid")]
    assert len(lines) == 2 and any(line.startswith("openings ") for line in found)


def test_equal_openings_have_cosine_one_and_strange_ones_none():
    similar = opening_similarity(["where is my parcel", "Where is my parcel?", "the oven smells odd"])
    assert [round(float(similar[i, j]), 6) for i, j in combinations(range(3), 2)] == [1, 0, 0]


def test_surface_figures_show_a_corpus_that_gives_itself_away():
    rows = [{"escalate": i < 5, "last_words": 3 + i, "customer_turns": 9 - i, "position": 0, "after_tool": False,
             "said": "fire now" if i < 5 else "tea please"} for i in range(10)]
    auc = surface_auc(rows)
    assert auc["last_words"] == 0 and auc["customer_turns"] == 1 and auc["position"] == 0.5
    assert bag_of_words(rows, rows)["auc"] == 1


def test_decisions_see_no_more_than_was_said(company_folder):
    rows = decisions(load_company("teashop", company_folder.parent))
    handoff = [row for row in rows if row["scenario"] == "teashop/order-from-another-town"]
    assert [(row["escalate"], row["customer_turns"], row["last_words"]) for row in handoff] == [(False, 1, 11), (True, 2, 9)]
    assert "nobody up north" not in handoff[0]["said"] and "nobody up north" in handoff[1]["said"]
    assert [row["after_tool"] for row in rows if row["kind"] is Kind.ORDINARY] == [False, True, False, True, True]


def test_blind_agreement_counts_both_labels(company_folder, monkeypatch):
    monkeypatch.chdir(company_folder.parents[2])
    BLIND_LABELS.mkdir(parents=True)
    rows = ["order-from-another-town,1,go_on", "order-from-another-town,2,go_on", "dent-in-the-lid,1,handoff", "dent-in-the-lid,2,go_on"]
    (BLIND_LABELS / "teashop.csv").write_text("\n".join(["scenario,step,label", *rows]))
    assert blind_agreement(load_company("teashop")) == (2, 4)


def test_the_data_card_shows_the_figures_of_the_corpus():
    import json

    import yaml

    from stages.card import figures
    held_out = yaml.safe_load((ROOT / "params.yaml").read_text())["data"]["held_out"]
    assert figures(json.loads((ROOT / "metrics/corpus.json").read_text()), held_out) in (ROOT / "data/README.md").read_text(encoding="utf-8")
