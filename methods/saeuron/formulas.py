"""The formulas of SAeUron, as functions of tensors."""

from typing import Literal

import torch
from torch import Tensor

Rule = Literal["paper", "scale", "mean"]


def score(target: Tensor, others: Tensor) -> Tensor:
    """score(i, t, c) = μ_i(D_c, t) / Σ_j μ_j(D_c, t) - μ_i(D_¬c, t) / Σ_j μ_j(D_¬c, t), of mean activations [..., n] -> [..., n].

    Where nothing fires a share is 0. Source: Cywiński and Deja, ICML 2025.
    """
    ours, theirs = (means / means.sum(-1, keepdim=True).clamp_min(torch.finfo(means.dtype).tiny) for means in (target, others))
    return ours - theirs


def choose(scores: Tensor, percentile: float) -> Tensor:
    """Which features [..., n] score above that percentile of all n, and above 0; numpy's linear interpolation. At 100 none does."""
    return (scores > scores.quantile(percentile / 100, dim=-1, keepdim=True)) & (scores > 0)


def ablate(codes: Tensor, chosen: Tensor, threshold: Tensor, mean: Tensor, factor: float, rule: Rule = "paper") -> Tensor:
    """Codes [..., m] in which every chosen feature that fires above its threshold has another value, patch by patch.

    ``chosen``, ``threshold`` and ``mean``, the concept's μ_i(D_c, t), are [m]. The value is z factor mean (paper), z factor (scale), or
    factor mean (mean). The paper's is no plain multiple: scale activations by a, and the edit grows by a².
    """
    replaced = {"paper": codes * factor * mean, "scale": codes * factor, "mean": (factor * mean).expand_as(codes)}[rule]
    return torch.where(chosen & (codes > threshold), replaced, codes)


def deactivate(x: Tensor, codes: Tensor, ablated: Tensor, decoder: Tensor) -> Tensor:
    """x + (z' - z) W_dec: activations x [..., d] whose codes [..., m] were ablated, with the rows [m, d] of the decoder.

    What the autoencoder cannot say of x stays in it. The released code adds x̂ - x in place of x - x̂, and so gives 2x̂ - x if nothing is
    ablated.
    """
    return x + (ablated - codes) @ decoder
