"""Intervals and tests for rates, paired rates and repeated prompts; every one refuses to speak about no samples."""

from collections.abc import Hashable, Sequence
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.stats import binomtest, norm, rankdata

Interval = tuple[float, float]
_AT_ONCE = 1_000_000
"""Draws of a bootstrap that are held at a time, so that 30,000 images need no more memory than 300."""


def wilson(k: int, n: int, level: float = 0.95) -> Interval:
    """Score interval of k successes in n (Wilson, JASA 1927). Raises ValueError for n = 0 or k outside 0..n."""
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"a rate needs 0 <= k <= n and n >= 1, got k={k} of n={n}: score at least one image first")
    z2 = _z(level) ** 2
    centre = (k + z2 / 2) / (n + z2)
    half = sqrt(z2 * (k * (n - k) / n + z2 / 4)) / (n + z2)
    # At the ends the two terms cancel exactly; rounding must not leave 1e-17 there.
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p of b against c discordant pairs (McNemar 1947, binomial form); 1.0 without discordant pairs."""
    if b < 0 or c < 0:
        raise ValueError(f"numbers of discordant pairs are at least 0, got b={b}, c={c}")
    return 1.0 if b + c == 0 else float(binomtest(b, b + c).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Step-down adjusted p-values in the given order (Holm, Scand. J. Stat. 1979)."""
    if not len(p):
        raise ValueError("Holm's adjustment was given no p-values")
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)).clip(max=1)
    adjusted = np.empty_like(stepped)
    adjusted[order] = stepped
    return adjusted.tolist()


def paired_difference(base: ArrayLike, edited: ArrayLike, level: float = 0.95) -> tuple[float, float, float]:
    """Difference of two rates on the same rows, edited minus base, with Tango's score interval (Stat. Med. 1998).

    base, edited: bool [n], one call a row, in the same order. Raises ValueError for no rows or unequal lengths.
    The interval stays honest where Wald's collapses: without a single changed row its half width is z² / (n + z²).
    """
    before, after = np.asarray(base, dtype=bool), np.asarray(edited, dtype=bool)
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(f"paired rates need two lists of one length, got {before.shape} and {after.shape}: score the same rows for both")
    if not len(before):
        raise ValueError("a paired difference needs at least one row that both sides scored")
    n, gained, lost = len(before), int((after & ~before).sum()), int((before & ~after).sum())
    return (gained - lost) / n, -_tango_upper(lost, gained, n, level), _tango_upper(gained, lost, n, level)


def _tango_upper(b: int, c: int, n: int, level: float) -> float:
    """The largest difference (b - c) / n that the score test does not reject."""
    estimate = (b - c) / n
    if estimate == 1:
        return 1.0
    return float(brentq(lambda delta: _tango_score(b, c, n, delta) + _z(level), estimate, 1 - 1e-12, xtol=1e-12))


def _tango_score(b: int, c: int, n: int, delta: float) -> float:
    """Standardised distance of b - c from n · delta, with p21 at its maximum likelihood under delta (Tango, eq. 7-9)."""
    linear = -b - c + (2 * n - b + c) * delta
    p21 = (sqrt(max(linear**2 + 8 * n * c * delta * (1 - delta), 0)) - linear) / (4 * n)
    variance = n * (2 * p21 + delta * (1 - delta))
    distance = b - c - n * delta
    return 0.0 if abs(distance) < 1e-12 else distance / sqrt(max(variance, 1e-300))


def cluster_bootstrap(
    values: ArrayLike, clusters: Sequence[Hashable], level: float = 0.95, *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile interval of a mean whose values come in clusters (images of one prompt), drawing whole clusters again.

    values: [n] numbers or bools; clusters: n labels. Seeded, so that equal input gives equal limits.
    """
    sums, sizes = _cluster_totals(np.asarray(values, dtype=np.float64), clusters)
    rng, means = np.random.default_rng(seed), np.empty(resamples)
    block = max(1, _AT_ONCE // len(sums))
    for start in range(0, resamples, block):  # a generator in pieces draws what it draws at once
        drawn = rng.integers(len(sums), size=(min(block, resamples - start), len(sums)))
        means[start : start + block] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    lo, hi = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


def auc(positive: ArrayLike, negative: ArrayLike, level: float = 0.95) -> tuple[float, float, float]:
    """Area under the ROC curve, the Mann-Whitney share with ties as halves, and its score interval (Newcombe, Stat. Med. 2006, method 5).

    positive [m], negative [n]: scores, one an independent prompt. The limits are the areas whose standard error (Hanley & McNeil 1982)
    puts the estimate z away: unlike DeLong's, they do not collapse where the two are apart (AUC 1). Raises ValueError for no scores, or
    ones that are not finite.
    """
    above, below = np.asarray(positive, dtype=np.float64), np.asarray(negative, dtype=np.float64)
    m, n = len(above), len(below)
    if not m or not n:
        raise ValueError(f"an area under the curve needs scores of both sides, got {m} and {n}")
    if not (np.isfinite(above).all() and np.isfinite(below).all()):
        raise ValueError("an area under the curve needs finite scores: leave out what was not measured")
    ranks = rankdata(np.concatenate([above, below]))
    area = float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))

    def away(true: float, side: int) -> float:
        spread = true * (1 - true) * (m + n - 1 - (1.5 * (m + n) - 3) / ((2 - true) * (1 + true))) / (m * n)
        return side * (true - area) - _z(level) * sqrt(spread)

    lower = 0.0 if area == 0 else float(brentq(away, 0, area - 1e-12, args=(-1,), xtol=1e-12))
    upper = 1.0 if area == 1 else float(brentq(away, area + 1e-12, 1, args=(1,), xtol=1e-12))
    return area, lower, upper


def _cluster_totals(values: np.ndarray, clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    if not len(values) or len(values) != len(clusters):
        raise ValueError(f"a cluster bootstrap needs one label a value and at least one of each, got {len(values)} and {len(clusters)}")
    numbers = {label: i for i, label in enumerate(dict.fromkeys(clusters))}
    index = np.array([numbers[label] for label in clusters])
    return np.bincount(index, weights=values), np.bincount(index)


def _z(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"a confidence level lies between 0 and 1, got {level}")
    return float(norm.ppf((1 + level) / 2))
