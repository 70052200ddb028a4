"""Hard-concrete gates: the formulas of Minimalist Concept Erasure (ICML 2025) and EcoDiff, as functions of tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor

TEMPERATURE = 0.83
STRETCH = (-0.1, 1.1)


def stretched(logits: Tensor, noise: Tensor, temperature: float = TEMPERATURE, stretch: tuple[float, float] = STRETCH) -> Tensor:
    """σ((log u - log(1 - u) + λ) / τ) (ζ - γ) + γ, all [...]: `hard_concrete` before its clamp."""
    low, high = stretch
    return torch.sigmoid((torch.logit(noise) + logits) / temperature) * (high - low) + low


def hard_concrete(logits: Tensor, noise: Tensor, temperature: float = TEMPERATURE, stretch: tuple[float, float] = STRETCH) -> Tensor:
    """Gates in 0..1 [...] of logits λ [...]: a binary concrete variable, stretched to (γ, ζ) and clamped.

    ``noise``: u in (0, 1) [...], 0.5 for no noise; ``temperature``: τ; ``stretch``: (γ, ζ) with γ < 0 and ζ > 1. The clamp passes no
    gradient where the gate is 0 or 1. The released code's ε, in log(u + ε) - log(1 - u + ε), is noise (u + ε) / (1 + 2 ε): its ε = 0.5
    is u between 0.25 and 0.75. Source: Louizos et al., ICLR 2018; τ = 0.83 and (-0.1, 1.1) are the released values.
    """
    return stretched(logits, noise, temperature, stretch).clamp(0, 1)


def through(logits: Tensor, noise: Tensor, temperature: float = TEMPERATURE, stretch: tuple[float, float] = STRETCH) -> Tensor:
    """Values of `hard_concrete` with the gradient of `stretched`: a gate that is fully open or closed can still move (ours)."""
    free = stretched(logits, noise, temperature, stretch)
    return free + (free.clamp(0, 1) - free).detach()


def binary(logits: Tensor, noise: Tensor, temperature: float = TEMPERATURE, stretch: tuple[float, float] = STRETCH) -> Tensor:
    """Gates that are 0 or 1, by whether `stretched` is under one half, with its gradient: what is trained is what is folded (ours).

    Gates half closed cost no budget and are gone once folded; with those of `hard_concrete` a model learns to lean on them.
    """
    free = stretched(logits, noise, temperature, stretch)
    return free + ((free > 0.5).to(free) - free).detach()


def ranked(logits: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Gates [...] by name that are 0 for the ``count`` lowest logits of all together and 1 for the others; of equal ones the first are 0.

    The gradient is that of the logits themselves, closed or not, so that a closed gate that would rather be open climbs back (ours; the
    estimator of Ramanujan et al., CVPR 2020, "What's hidden in a randomly weighted neural network?").
    """
    off = within({name: each.detach() for name, each in logits.items()}, count, exactly=True)
    return {name: each + ((~off[name]).to(each) - each).detach() for name, each in logits.items()}


def closed(logits: Tensor) -> Tensor:
    """Which gates are off once trained [...], bool: λ <= 0, where a gate without noise is under one half."""
    return logits <= 0


def share_closed(logits: Tensor) -> Tensor:
    """Share of closed gates, a scalar: exact in value, and with the gradient of the mean of σ(-λ), which is largest at the threshold."""
    soft = torch.sigmoid(-logits).mean()
    return soft + (closed(logits).to(soft).mean() - soft).detach()


def overspent(shares: Mapping[str, Tensor], budget: float, *, exactly: bool = False) -> Tensor:
    """By how much the closed share of each kind of units is over the budget, relative to it, summed; ``exactly``: over or under."""
    over = [share / budget - 1 for share in shares.values()]
    return torch.stack([each.abs() if exactly else each.clamp(min=0) for each in over]).sum()


def within(logits: Mapping[str, Tensor], count: int, *, exactly: bool = False) -> dict[str, Tensor]:
    """Closed gates by name, bool, but of all together at most ``count``, those of the lowest logits; of equal ones the first.

    ``exactly``: as many as that, whether closed or not.
    """
    flat = torch.cat([each.flatten() for each in logits.values()])
    keep = torch.zeros_like(flat, dtype=torch.bool)
    keep[flat.argsort(stable=True)[:count]] = True
    parts = (keep if exactly else keep & closed(flat)).split([each.numel() for each in logits.values()])
    return {name: part.clone() for name, part in zip(logits, parts, strict=True)}
