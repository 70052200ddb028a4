"""CMMD's formula (Jayasumana et al., CVPR 2024): squared MMD of normalised CLIP embeddings under a Gaussian kernel, times 1000."""

from typing import Literal, get_args

import torch
from torch import Tensor

Estimator = Literal["biased", "unbiased"]
SIGMA, SCALE = 10.0, 1000.0
"""The paper's bandwidth, and the factor that makes its numbers readable."""
ROWS = 1024
"""Rows of the kernel that are held at a time."""


def mmd(x: Tensor, y: Tensor, *, estimator: Estimator = "biased", sigma: float = SIGMA, scale: float = SCALE) -> float:
    """scale · MMD² of embeddings x [n, d] and y [m, d] under k(a, b) = exp(-|a - b|² / 2σ²), in float64 and row blocks.

    biased: means over all pairs, as the authors' released code computes. unbiased: without the pairs of a row with itself; the two
    differ by order scale / n σ². Raises ValueError for fewer than two rows, unequal widths or NaN.
    """
    if estimator not in get_args(Estimator):
        raise ValueError(f"no estimator {estimator!r} of MMD; there are: {', '.join(get_args(Estimator))}")
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"CMMD compares embeddings [n, d] and [m, d] with n, m >= 2, got {tuple(x.shape)} and {tuple(y.shape)}")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("embeddings hold NaN or infinity: look at the images that they came from")
    x, y, gamma = x.double(), y.double(), 1 / (2 * sigma**2)
    own = _within(x, gamma, estimator) + _within(y, gamma, estimator)
    return scale * (own - 2 * _total(x, y, gamma) / (len(x) * len(y)))


def _within(x: Tensor, gamma: float, estimator: Estimator) -> float:
    n, total = len(x), _total(x, x, gamma)
    return total / n**2 if estimator == "biased" else (total - n) / (n * (n - 1))  # k(a, a) = 1


def _total(x: Tensor, y: Tensor, gamma: float) -> float:
    """Sum of the kernel over all pairs."""
    return sum(float(torch.exp(-gamma * _squared(block, y)).sum()) for block in x.split(ROWS))


def _squared(x: Tensor, y: Tensor) -> Tensor:
    squared = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
    return squared.clamp(min=0)
