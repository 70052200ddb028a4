from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, mannwhitneyu, norm
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from erasure.eval import stats


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 200), (11, 200), (12, 200), (37, 100), (200, 200)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_wilson_agrees_with_statsmodels(k: int, n: int, level: float) -> None:
    assert stats.wilson(k, n, level) == pytest.approx(proportion_confint(k, n, 1 - level, "wilson"), abs=1e-12)


def test_the_bar_of_ten_per_cent_is_met_by_eleven_of_two_hundred_and_no_more() -> None:
    assert stats.wilson(11, 200)[1] <= 0.10 < stats.wilson(12, 200)[1]


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_a_rate_of_nothing_is_an_error(k: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} of n={n}"):
        stats.wilson(k, n)


@pytest.mark.parametrize(("b", "c"), [(1, 9), (10, 10), (0, 5), (30, 12)])
def test_mcnemar_agrees_with_statsmodels(b: int, c: int) -> None:
    assert stats.mcnemar(b, c) == pytest.approx(reference_mcnemar([[0, b], [c, 0]], exact=True).pvalue)


def test_mcnemar_without_discordant_pairs_finds_no_difference() -> None:
    assert stats.mcnemar(0, 0) == 1.0


def test_holm_agrees_with_statsmodels_in_any_order() -> None:
    p = [0.04, 0.001, 0.9, 0.012, 0.013]
    assert stats.holm(p) == pytest.approx(multipletests(p, method="holm")[1])


def pairs(both: int, gained: int, lost: int, neither: int) -> tuple[list[int], list[int]]:
    base = [1] * both + [0] * gained + [1] * lost + [0] * neither
    return base, [1] * both + [1] * gained + [0] * lost + [0] * neither


def score_statistic(gained: int, lost: int, n: int, delta: float) -> float:
    """(d - delta) / SE with p21 fitted by numerical maximum likelihood under p12 - p21 = delta."""

    def loss(p21: float) -> float:
        p12, rest = p21 + delta, 1 - 2 * p21 - delta
        return -sum(k * np.log(max(p, 1e-300)) for k, p in ((gained, p12), (lost, p21), (n - gained - lost, rest)))

    p21 = minimize_scalar(loss, bounds=(max(0, -delta), (1 - delta) / 2), method="bounded", options={"xatol": 1e-12}).x
    return (gained - lost - n * delta) / np.sqrt(n * (2 * p21 + delta * (1 - delta)))


@pytest.mark.parametrize("table", [(20, 12, 3, 15), (70, 1, 9, 20), (5, 4, 4, 5), (140, 2, 6, 2)])
def test_the_paired_interval_ends_where_the_score_test_rejects(table: Any) -> None:
    diff, lo, hi = stats.paired_difference(*pairs(*table))
    _, gained, lost, _ = table
    n = sum(table)
    assert diff == pytest.approx((gained - lost) / n) and lo < diff < hi
    assert score_statistic(gained, lost, n, hi) == pytest.approx(-1.959964, abs=1e-4)
    assert score_statistic(gained, lost, n, lo) == pytest.approx(1.959964, abs=1e-4)


def test_the_paired_interval_does_not_collapse_without_a_change() -> None:
    z2 = 1.959964**2
    assert stats.paired_difference(*pairs(60, 0, 0, 40)) == pytest.approx((0, -z2 / (100 + z2), z2 / (100 + z2)), abs=1e-6)


@pytest.mark.parametrize(("table", "expected"), [((0, 9, 0, 0), 1.0), ((0, 0, 9, 0), -1.0)])
def test_the_paired_interval_of_a_complete_change_ends_at_it(table: Any, expected: float) -> None:
    diff, lo, hi = stats.paired_difference(*pairs(*table))
    assert diff == expected and expected in (lo, hi) and -1 <= lo < hi <= 1


def test_the_paired_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        calls = rng.multinomial(1, [0.7, 0.03, 0.12, 0.15], size=75)
        base, edited = calls[:, 0] + calls[:, 2], calls[:, 0] + calls[:, 1]
        _, lo, hi = stats.paired_difference(base, edited)
        hits += lo <= -0.09 <= hi
    assert binomtest(hits, 400, 0.95).pvalue > 0.001


def test_a_paired_difference_refuses_no_rows_and_unequal_ones() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        stats.paired_difference([], [])
    with pytest.raises(ValueError, match="same rows"):
        stats.paired_difference([True], [True, False])


def test_the_cluster_bootstrap_is_wider_than_images_alone_where_prompts_agree_with_themselves() -> None:
    values = np.repeat([1, 0, 1, 1, 0, 1, 0, 1, 1, 1], 20)
    clusters = np.repeat(np.arange(10), 20).tolist()
    lo, hi = stats.cluster_bootstrap(values, clusters)
    alone = stats.wilson(140, 200)
    assert lo < alone[0] - 0.15 and hi > alone[1] + 0.1
    assert (lo, hi) == stats.cluster_bootstrap(values, clusters)


def test_the_cluster_bootstrap_of_one_value_a_cluster_has_the_binomial_spread() -> None:
    values = np.arange(400) < 100
    lo, hi = stats.cluster_bootstrap(values, list(range(400)))
    assert hi - lo == pytest.approx(2 * 1.96 * np.sqrt(0.25 * 0.75 / 400), rel=0.08)


def test_a_bootstrap_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        stats.cluster_bootstrap([], [])


def hanley_mcneil(area: float, m: int, n: int) -> float:
    """Variance with both sides of the mean size (m + n) / 2 in the numerator, as Newcombe's method 5 has it."""
    q1, q2, mean = area / (2 - area), 2 * area**2 / (1 + area), (m + n) / 2
    return (area * (1 - area) + (mean - 1) * (q1 + q2 - 2 * area**2)) / (m * n)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (7, 7), (40, 60), (200, 150)])
def test_auc_is_the_mann_whitney_share_with_ties_as_halves(m: int, n: int) -> None:
    rng = np.random.default_rng(m)
    positive, negative = rng.integers(0, 6, m) + 1, rng.integers(0, 6, n)  # many ties
    area, low, high = stats.auc(positive, negative)
    wins = (positive[:, None] > negative).sum() + 0.5 * (positive[:, None] == negative).sum()
    assert area == pytest.approx(wins / (m * n)) == pytest.approx(mannwhitneyu(positive, negative).statistic / (m * n))
    for limit in (low, high):
        if 0 < limit < 1:
            assert abs(limit - area) == pytest.approx(norm.ppf(0.975) * np.sqrt(hanley_mcneil(limit, m, n)), abs=1e-6)


def test_auc_changes_sides_with_its_interval() -> None:
    rng = np.random.default_rng(0)
    positive, negative = rng.normal(1, 1, 30), rng.normal(0, 1, 50)
    area, low, high = stats.auc(positive, negative)
    assert stats.auc(negative, positive) == pytest.approx((1 - area, 1 - high, 1 - low), abs=1e-9)


def test_auc_of_sides_that_are_apart_keeps_an_interval() -> None:
    area, low, high = stats.auc([2, 3, 4] * 10, [0, 1] * 15)
    assert (area, high) == (1, 1) and 0.85 < low < 0.95
    assert low < stats.auc([2, 3, 4] * 100, [0, 1] * 150)[1] < 1, "and it narrows"
    assert stats.auc([0], [1])[:2] == (0, 0)


def test_auc_covers_what_it_claims() -> None:
    """Binormal scores whose true area is 0.9, 40 against 60: the 95 % interval holds it in 93 to 98 of 100."""
    rng, truth = np.random.default_rng(1), norm.ppf(0.9) * np.sqrt(2)
    limits = [stats.auc(rng.normal(truth, 1, 40), rng.normal(0, 1, 60))[1:] for _ in range(600)]
    assert 0.93 < np.mean([low <= 0.9 <= high for low, high in limits]) < 0.98


@pytest.mark.parametrize(("positive", "negative", "message"), [([], [1], "got 0 and 1"), ([1], [], "1 and 0"), ([np.nan], [1], "finite")])
def test_auc_refuses_to_speak_of_nothing(positive: list[float], negative: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stats.auc(positive, negative)
