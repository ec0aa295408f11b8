"""Intervals and paired tests against published values, and against what they promise over simulated data."""

from fractions import Fraction
from itertools import product
from math import comb

import numpy as np
import polars as pl
import pytest

from stages._intervals import clopper_pearson_upper, cluster_auc, cluster_ratio, turns_needed, wilson
from stages._paired import compare_pairs, mcnemar_p, sign_flip_p
from stages._rates import clustered_rate, outcomes


@pytest.mark.parametrize("k, n, low, high", [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718), (0, 10, 0.0, 0.2775),
    (10, 10, 0.7225, 1.0)])
def test_wilson_interval_against_published_values(k, n, low, high):
    """The first four: Newcombe 1998, Statistics in Medicine 17:857, table I, method 3."""
    assert wilson(k, n) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@pytest.mark.parametrize("k, n", [(0, 30), (0, 59), (3, 62), (40, 62), (61, 62)])
def test_the_exact_limit_is_where_so_few_misses_have_a_chance_of_five_percent(k, n):
    p = Fraction(clopper_pearson_upper(k, n))
    assert float(sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))) == pytest.approx(0.05, abs=1e-9)
    assert clopper_pearson_upper(0, n) == pytest.approx(1 - 0.05 ** (1 / n))


def test_limits_of_nothing_and_of_everything_say_nothing():
    assert (wilson(0, 0), clopper_pearson_upper(0, 0), clopper_pearson_upper(5, 5)) == ((0.0, 1.0), 1.0, 1.0)
    assert cluster_ratio([], [], []) is None and cluster_auc(["a", "b"], [0.1, 0.2], [True, True]) is None


@pytest.mark.parametrize("table, p", [((121, 59), 4.434e-6), ((5, 1), 0.21875), ((0, 6), 0.03125), ((0, 0), 1.0), ((7, 7), 1.0)])
def test_mcnemar_against_published_values_and_by_counting(table, p):
    """121 and 59: the example of statsmodels' `mcnemar`; all of them: binomial coefficients counted in whole numbers."""
    b, c = table
    counted = min(1, Fraction(2 * sum(comb(b + c, i) for i in range(min(b, c) + 1)), 2 ** (b + c)))
    assert mcnemar_p(b, c) == pytest.approx(p, rel=1e-3) == pytest.approx(float(counted), rel=1e-3)


@pytest.mark.parametrize("differences", [[1], [3, -1, 2], [1, 1, 1, -1, 0], [2, 2, -3, 1, 1, 4], [], [0, 0]])
def test_the_permutation_test_counts_every_pattern_of_signs(differences):
    seen = abs(sum(differences))
    patterns = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in product((1, -1), repeat=len(differences))]
    assert sign_flip_p(differences) == pytest.approx(sum(value >= seen for value in patterns) / len(patterns))


def test_with_one_changed_turn_a_conversation_both_tests_agree():
    assert sign_flip_p([1] * 9 + [-1] * 2) == pytest.approx(mcnemar_p(9, 2))


def test_changes_that_sit_in_one_conversation_prove_little():
    pair = compare_pairs(["a"] * 8 + [f"c{i}" for i in range(20)], [0] * 28, [1] * 8 + [0] * 20)
    assert pair.mcnemar_p < 0.01 and pair.cluster_p == 1.0 and (pair.gained, pair.lost, pair.k_b) == (8, 0, 8)


def simulated(rng, conversations=60, length=4):
    """Hits of two sides without a true difference; turns of a conversation, and the two sides, go together."""
    hard = rng.normal(size=(conversations, 1))
    sides = [(hard + 0.7 * rng.normal(size=(conversations, 1)) + rng.normal(size=(conversations, length)) > 0.3).ravel() for _ in range(2)]
    return np.repeat([str(i) for i in range(conversations)], length), *sides


def test_over_500_pairs_without_a_difference_the_interval_covers_and_the_tests_reject_as_stated():
    """95 % and 5 %, each within three standard errors over 500; a discrete exact test may reject less often.

    McNemar's test, which takes turns as independent, rejects too often on the same data: the reason for the other one.
    """
    rng = np.random.default_rng(11)
    pairs = [compare_pairs(*simulated(rng)) for _ in range(500)]
    error = 3 * (0.05 * 0.95 / 500) ** 0.5
    assert abs(np.mean([pair.low <= 0 <= pair.high for pair in pairs]) - 0.95) <= error
    assert 0.05 - error <= np.mean([pair.cluster_p <= 0.05 for pair in pairs]) <= 0.05 + error
    assert np.mean([pair.mcnemar_p <= 0.05 for pair in pairs]) > 0.05 + error


def test_over_500_pairs_of_independent_turns_mcnemar_rejects_no_more_than_stated():
    """One turn a conversation, which is what the test assumes; exact and discrete, it may reject less often."""
    rng = np.random.default_rng(12)
    pairs = [compare_pairs(*simulated(rng, conversations=124, length=1)) for _ in range(500)]
    error = 3 * (0.05 * 0.95 / 500) ** 0.5
    assert 0 < np.mean([pair.mcnemar_p <= 0.05 for pair in pairs]) <= 0.05 + error
    assert abs(np.mean([pair.low <= 0 <= pair.high for pair in pairs]) - 0.95) <= error


def test_a_true_difference_is_found():
    rng = np.random.default_rng(3)
    names, a, b = simulated(rng, conversations=200)
    better = b | (rng.random(len(b)) < 0.3)
    pair = compare_pairs(names, a, better)
    assert pair.low > 0 and pair.cluster_p < 0.001 and pair.difference == pytest.approx(better.mean() - a.mean())


def test_the_interval_of_a_rate_draws_conversations_and_not_turns():
    """All turns of a conversation alike: ten turns each tell no more than one."""
    hits = np.random.default_rng(0).random(50) < 0.4
    names = [str(i) for i in range(50)]
    one = cluster_ratio(names, hits, np.ones(50))
    assert cluster_ratio(np.repeat(names, 10), np.repeat(hits, 10), np.ones(500)) == pytest.approx(one)
    assert one == pytest.approx(wilson(int(hits.sum()), 50), abs=0.03)


def test_the_auc_in_a_drawn_sample_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(5)
    names = np.repeat([str(i) for i in range(40)], 3)
    gold, score = rng.random(120) < 0.3, rng.integers(0, 8, 120) / 8
    clusters = [np.flatnonzero(names == name) for name in np.unique(names)]
    drawn = np.random.default_rng(1).multinomial(40, np.full(40, 1 / 40), size=2000)
    areas = [roc_auc_score(gold[rows], score[rows]) for rows in
             (np.concatenate([np.tile(part, n) for part, n in zip(clusters, times, strict=True)]) for times in drawn)]
    assert cluster_auc(names, score, gold) == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])))


def test_the_number_of_turns_that_a_change_takes_gives_its_power():
    change, discordant = 0.10, 0.20
    n = turns_needed(change, discordant)
    rng = np.random.default_rng(2)
    gained, lost, _ = rng.multinomial(n, [(discordant + change) / 2, (discordant - change) / 2, 1 - discordant], size=4000).T
    assert np.mean(np.abs(gained - lost) / np.sqrt(np.maximum(gained + lost, 1)) > 1.96) == pytest.approx(0.8, abs=0.04)
    assert turns_needed(0.02, 0.2) > n > turns_needed(0.3, 0.2)


def test_a_text_that_is_no_step_counts_as_wrong_and_as_no_handoff():
    rows = pl.DataFrame({"conversation_id": ["a", "a", "b"], "gold_action": ["reply", "escalate", "escalate"], "action": [None, None, "escalate"]})
    found = {name: (outcome["hit"].sum(), len(outcome)) for name, outcome in outcomes(rows).items()}
    assert found == {"action_accuracy": (1, 3), "escalate_recall": (1, 2), "over_escalation": (0, 1)}
    assert clustered_rate(outcomes(rows.clear())["escalate_recall"]) == {
        "k": 0, "n": 0, "low": 0.0, "high": 1.0, "cluster_low": None, "cluster_high": None}
