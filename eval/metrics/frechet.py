"""Fréchet distance of two Gaussians (Heusel et al., NeurIPS 2017, eq. 6) in float64, and the statistics that it compares."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from erasure.errors import ErasureError

FEW = 10_000
"""Under so many images FID's bias is of the size of the differences that papers report (Chong and Forsyth, CVPR 2020)."""


def distance(mu1: ArrayLike, cov1: ArrayLike, mu2: ArrayLike, cov2: ArrayLike) -> float:
    """|μ1 - μ2|² + tr(Σ1 + Σ2 - 2 (Σ1 Σ2)^½) of means [d] and covariances [d, d], in float64.

    The trace of the root is the sum of the singular values of Σ1^½ Σ2^½: never a complex or a singular square root, and exact where
    n images of fewer than d leave the covariances without rank. Raises ValueError for other shapes, NaN, or covariances that are
    not symmetric.

    >>> distance([0.0], [[1.0]], [3.0], [[4.0]])
    10.0
    """
    m1, c1 = _gaussian(mu1, cov1)
    m2, c2 = _gaussian(mu2, cov2)
    if m1.shape != m2.shape:
        raise ValueError(f"a Fréchet distance compares Gaussians of one dimension, got {len(m1)} and {len(m2)}: use the same features")
    overlap = np.linalg.svd(_root(c1) @ _root(c2), compute_uv=False).sum()
    return max(float(((m1 - m2) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * overlap), 0.0)  # rounding of equal Gaussians: -1e-13


def _root(cov: np.ndarray) -> np.ndarray:
    """The symmetric square root; eigenvalues under the rounding error of the largest are zero, as those of missing rank are."""
    values, vectors = np.linalg.eigh(cov)
    noise = len(cov) * np.finfo(np.float64).eps * values[-1]
    return (vectors * np.sqrt(np.where(values > noise, values, 0))) @ vectors.T


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean [d] and covariance [d, d] of n images' features, and the extractor's identity."""

    mu: np.ndarray
    cov: np.ndarray
    n: int
    extractor: dict[str, Any]

    @classmethod
    def of_sums(cls, n: int, total: ArrayLike, outer: ArrayLike, extractor: dict[str, Any]) -> "Statistics":
        """From the sums of features [d] and of their outer products [d, d]; raises ErasureError for fewer than two images."""
        if n < 2:
            raise ErasureError(f"a covariance needs at least two images, got {n}")
        mu = np.asarray(total, dtype=np.float64) / n
        cov = (np.asarray(outer, dtype=np.float64) - n * np.outer(mu, mu)) / (n - 1)
        return cls(mu, (cov + cov.T) / 2, n, extractor)

    @classmethod
    def of_features(cls, batches: Iterable[Tensor], extractor: dict[str, Any]) -> "Statistics":
        """From batches of features [n, d]; one pass, memory of one batch."""
        n, total, outer = 0, np.float64(0), np.float64(0)
        for batch in batches:
            features = batch.double().cpu().numpy()
            n, total, outer = n + len(features), total + features.sum(0), outer + features.T @ features
        return cls.of_sums(n, total, outer, extractor)

    def save(self, path: str | Path) -> None:
        """An .npz file: mu, cov, n, and the extractor's identity as JSON."""
        with Path(path).open("wb") as file:
            np.savez(file, mu=self.mu, cov=self.cov, n=self.n, extractor=json.dumps(self.extractor, sort_keys=True))

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """What ``save`` wrote; files of other tools, which do not say what made them, raise ErasureError."""
        try:
            with np.load(path, allow_pickle=False) as data:
                return cls(data["mu"], data["cov"], int(data["n"]), json.loads(str(data["extractor"])))
        except (KeyError, ValueError, OSError) as error:
            raise ErasureError(
                f"{path} holds no statistics of ours ({error}): they say how many images, by which network and resizing. "
                "Make them from the folder of images"
            ) from error


def small_sample(n: int, dim: int) -> list[str]:
    """What a FID of n images on features of a width cannot say; empty from 10 000 images on."""
    warnings = []
    if n < FEW:
        warnings.append(f"n = {n} < {FEW}: FID is biased upwards at small n; compare it only with FIDs of as many images")
    if n <= dim:
        warnings.append(f"n = {n} <= {dim} features: the covariance has rank {n - 1} at most, and most of FID is this shortage")
    return warnings


def _gaussian(mu: ArrayLike, cov: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    m, c = np.asarray(mu, dtype=np.float64), np.asarray(cov, dtype=np.float64)
    if m.ndim != 1 or c.shape != (len(m), len(m)) or not len(m):
        raise ValueError(f"a Gaussian has a mean [d] and a covariance [d, d], got {m.shape} and {c.shape}")
    if not (np.isfinite(m).all() and np.isfinite(c).all()):
        raise ValueError("mean or covariance holds NaN or infinity: look at the features that they came from")
    if not np.allclose(c, c.T, rtol=1e-6, atol=1e-8 * np.abs(c).max()):
        raise ValueError("a covariance is symmetric, and this one is not")
    return m, c
