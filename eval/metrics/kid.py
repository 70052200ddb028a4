"""Kernel Inception Distance's formula (Bińkowski et al., ICLR 2018) on any features; name the features with the number."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Estimate:
    """A distance with the spread that other draws of as many images would give."""

    value: float
    lo: float
    hi: float
    n: int
    subsets: int
    size: int


def polynomial_mmd(x: ArrayLike, y: ArrayLike, *, paired: bool = False) -> float:
    """Unbiased squared MMD of features x [n, d] and y [m, d] under k(a, b) = (a·b/d + 1)³, in float64.

    paired: row i of both comes from one seed, so the terms k(x_i, y_i) are left out as Gretton et al. (JMLR 2012, Lemma 6)
    do; with them, matched images would pull the distance under zero. Raises ValueError for fewer than two rows.
    """
    x, y = _features(x, y, paired)
    across = _kernel(x, y)
    cross = _off_diagonal_mean(across) if paired else across.mean()
    return float(_off_diagonal_mean(_kernel(x, x)) + _off_diagonal_mean(_kernel(y, y)) - 2 * cross)


def half_samples(x: ArrayLike, y: ArrayLike, *, paired: bool = False, subsets: int = 200, seed: int = 0, level: float = 0.95) -> Estimate:
    """The distance on all rows, with percentiles over seeded subsets of half of them.

    Half of the rows, drawn without return, spread as much as fresh samples of full size do (Politis and Romano, Ann. Stat. 1994).
    """
    x, y = _features(x, y, paired)
    rng, n = np.random.default_rng(seed), min(len(x), len(y))
    size = max(n // 2, 2)
    draws = []
    for _ in range(subsets):
        first = rng.choice(len(x), size, replace=False)
        second = first if paired else rng.choice(len(y), size, replace=False)
        draws.append(polynomial_mmd(x[first], y[second], paired=paired))
    lo, hi = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(polynomial_mmd(x, y, paired=paired), float(lo), float(hi), n, subsets, size)


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _off_diagonal_mean(k: np.ndarray) -> float:
    n = len(k)
    return float((k.sum() - np.trace(k)) / (n * (n - 1)))


def _features(x: ArrayLike, y: ArrayLike, paired: bool) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"KID compares features [n, d] and [m, d] with n, m >= 2, got {a.shape} and {b.shape}")
    if paired and len(a) != len(b):
        raise ValueError(f"matched seeds need as many features on both sides, got {len(a)} and {len(b)}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features hold NaN or infinity: look at the images that they came from")
    return a, b
