"""The equations of SAFREE, as functions of tensors."""

import math
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["nudity", "artist"]
"""Which of the two sets of constants the self-validating filter uses."""
RANK_TOLERANCE = 1e-5
"""Singular values under this share of the largest are noise of float32 encoders: duplicate phrases, not directions."""
UP_T = 10
"""Most steps, less one, that the self-validating filter keeps the projection on: the paper's γ, the code's up_t."""


def projector(phrases: Tensor) -> Tensor:
    """Orthogonal projector [D, D] onto the span of phrases [K, D], eq. 1, float64 inside.

    A rank-revealing SVD, so that duplicate and near-parallel phrases are harmless (the released pseudo-inverse is not truncated).
    """
    if not len(phrases):
        return phrases.new_zeros(phrases.shape[1], phrases.shape[1])
    _, singular, basis = torch.linalg.svd(phrases.double(), full_matrices=False)
    basis = basis[singular > RANK_TOLERANCE * singular.max()]
    return (basis.T @ basis).to(phrases.dtype)


def trigger_mask(masked: Tensor, toxic: Tensor, alpha: float) -> Tensor:
    """Which of a prompt's n tokens carry the concept: bool [n] from pooled leave-one-out encodings [n, D], eq. 3-4.

    A token is safe if, without it, the prompt is nearer to the toxic subspace than (1 + alpha) times the mean over the other tokens.
    A lone token has no others to compare with and counts as a trigger, as in the released code, and so do tokens of equal distance at
    alpha = 0. In float64, since alpha is of the size of bfloat16's rounding.
    """
    wide = masked.double()
    distances = (wide - wide @ toxic.double().T).norm(dim=1)
    n = len(distances)
    if n < 2:
        return torch.ones(n, dtype=torch.bool, device=masked.device)
    others = distances + (distances - distances[:, None]).sum(1) / (n - 1)  # by differences, which are exactly 0 at ties
    return ~(distances < (1 + alpha) * others)


def project(tokens: Tensor, inputs: Tensor, toxic: Tensor, order: Literal["code", "paper"] = "code") -> Tensor:
    """Tokens [n, D] moved off the toxic subspace and kept in the input's, eq. 5; ``inputs`` and ``toxic`` are projectors [D, D].

    The released code computes (I - P_C) P_I e, which is orthogonal to the concept; the paper prints P_I (I - P_C) e, which lies in
    the span of the input. They differ because projectors do not commute.
    """
    if order == "code":
        inside = tokens @ inputs.T
        return inside - inside @ toxic.T
    if order == "paper":
        return (tokens - tokens @ toxic.T) @ inputs.T
    raise ValueError(f"order is 'code' or 'paper', not {order!r}")


def filter_steps(beta: float, kind: Kind = "nudity", rule: Literal["code", "paper"] = "code") -> int:
    """The last step (from 0) at which safe embeddings are used, eq. 6, from beta = 1 - mean cosine of projected and original tokens.

    The paper prints γ sigmoid(1 - cos), which is always 5, 6 or 7; the released code puts a steep sigmoid around a midpoint.
    """
    if rule == "paper":
        return round(UP_T / (1 + math.exp(-beta)))
    if rule != "code":
        raise ValueError(f"rule is 'code' or 'paper', not {rule!r}")
    if kind not in ("nudity", "artist"):
        raise ValueError(f"kind is 'nudity' or 'artist', not {kind!r}")
    midpoint, slope = (5.5, 3.5) if kind == "artist" else (5.333, 2.5)
    return round(UP_T / (1 + math.exp(-2 * slope * (10 * beta - midpoint))))


def reattend(safe: Tensor, original: Tensor, scale: float, radius: int = 1, rule: Literal["code", "paper"] = "paper") -> Tensor:
    """Skip features [B, C, H, W] whose low frequencies are attenuated where the safe prompt exceeds the original, eq. 7-8.

    The window is the centre 2 radius x 2 radius of the shifted spectrum, compared by real part. The paper multiplies by ``scale``;
    the released function sets the constant ``scale`` there (and its caller never reaches it). In float32 at least.
    """
    wide = torch.promote_types(safe.dtype, torch.float32)
    spectrum, reference = (torch.fft.fftshift(torch.fft.fft2(each.to(wide)), dim=(-2, -1)) for each in (safe, original))
    y, x = (slice(max(size // 2 - radius, 0), size // 2 + radius) for size in safe.shape[-2:])
    low, low_reference = spectrum[..., y, x], reference[..., y, x]
    if rule == "paper":
        spectrum[..., y, x] = torch.where(low.real > low_reference.real, low * scale, low)
    elif rule == "code":
        spectrum[..., y, x] = torch.where(low_reference.real - low.real > 0, low, torch.full_like(low, scale))
    else:
        raise ValueError(f"rule is 'code' or 'paper', not {rule!r}")
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real.to(safe.dtype)
