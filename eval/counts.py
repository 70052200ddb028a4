"""Shares of images and numbers of findings, with intervals that stay honest where prompts repeat and where nothing was found."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import chi2

from . import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Rate:
    """A share with its 95 % interval."""

    k: int
    n: int
    rate: float
    lo: float
    hi: float


@dataclass(frozen=True)
class Parts:
    """Findings counted over all images, the number that papers print, and per image with a 95 % interval."""

    total: int
    per_image: float
    lo: float
    hi: float
    by_label: dict[str, int]


def rate(values: Sequence[bool], clusters: Sequence[str]) -> Rate:
    """Wilson's interval; where clusters (prompts) repeat, widened to their bootstrap if that reaches further."""
    k, n = sum(values), len(values)
    lo, hi = stats.wilson(k, n, LEVEL)
    if len(set(clusters)) < n and 0 < k < n:
        low, high = bootstrap(values, clusters)
        lo, hi = min(lo, low), max(hi, high)
    return Rate(k, n, k / n, lo, hi)


def parts(found: Mapping[str, Sequence[str]], clusters: Sequence[str], labels: Sequence[str]) -> Parts:
    """Row -> labels found, counted; every one of ``labels`` is in ``by_label``.

    The exact Poisson interval (Garwood 1936), widened to the bootstrap, since the parts of one image come together.
    """
    counts, n = [len(own) for own in found.values()], len(found)
    total = sum(counts)
    lo = float(chi2.ppf((1 - LEVEL) / 2, 2 * total)) / 2 / n if total else 0.0
    hi = float(chi2.ppf((1 + LEVEL) / 2, 2 * total + 2)) / 2 / n
    low, high = bootstrap(counts, clusters)
    by_label = dict.fromkeys(labels, 0) | Counter(label for own in found.values() for label in own)
    return Parts(total, total / n, min(lo, low), max(hi, high), by_label)


def difference(before: Sequence[bool], after: Sequence[bool], prompts: Sequence[str] = ()) -> dict[str, Any]:
    """after - before of paired calls: Tango's interval, widened to the bootstrap over prompts where given ones repeat; exact McNemar."""
    value, lo, hi = stats.paired_difference(before, after)
    gained = sum(a and not b for b, a in zip(before, after, strict=True))
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    interval = "Tango"
    if len(set(prompts)) < len(prompts) and gained + lost:
        changes = np.asarray(after, dtype=np.int64) - np.asarray(before, dtype=np.int64)
        low, high = bootstrap(changes.tolist(), prompts)
        lo, hi, interval = min(lo, low), max(hi, high), "Tango, widened to the cluster bootstrap over prompts"
    p = stats.mcnemar(gained, lost)
    return {"value": value, "lo": lo, "hi": hi, "n": len(before), "gained": gained, "lost": lost, "p": p, "interval": interval}


def bootstrap(values: Sequence[float], clusters: Sequence[str], *, resamples: int = 2000, seed: int = 0) -> stats.Interval:
    """Percentile interval of a mean under a bootstrap of whole clusters, as ``stats.cluster_bootstrap``.

    Clusters of equal sum and size are drawn together by a multinomial, so that 30,000 images cost milliseconds and no memory.
    """
    totals: dict[str, tuple[float, int]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        total, size = totals.get(cluster, (0.0, 0))
        totals[cluster] = (total + value, size + 1)
    kinds = Counter(totals.values())
    sums, sizes = np.array(list(kinds), dtype=np.float64).T
    drawn = np.random.default_rng(seed).multinomial(len(totals), np.array(list(kinds.values())) / len(totals), size=resamples)
    lo, hi = np.quantile((drawn @ sums) / (drawn @ sizes), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(lo), float(hi)
