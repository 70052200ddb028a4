"""Formulas of Interpret-then-Deactivate: which features are a concept's own, what switching them does, and the gate."""

import torch
from torch import Tensor


def select_features(target_codes: Tensor, retain_codes: Tensor, k: int) -> Tensor:
    """Features among the k strongest of any target prompt and of no retained prompt, int [f], in rising order.

    Codes [prompts, n] are each prompt's largest over its tokens without the start token; [prompts, tokens, n] are reduced to that here,
    and their first token is taken for the start. A feature that is off (0) is nobody's, whatever k.
    """
    own, kept = strongest(target_codes, k), strongest(retain_codes, k)
    return (own & ~kept).nonzero().flatten()


def strongest(codes: Tensor, k: int) -> Tensor:
    """S, joined over prompts: bool [n], the k features of largest size of any prompt; codes as in ``select_features``."""
    size = codes.abs()
    if size.dim() == 3:
        size = size[:, 1:].amax(1)
    found = torch.zeros(size.shape[-1], dtype=torch.bool, device=size.device)
    if len(size):
        values, indices = size.topk(min(k, size.shape[-1]), dim=-1)
        found[indices[values > 0]] = True
    return found


def deactivate(codes: Tensor, features: Tensor, factor: float, first: int = 1) -> Tensor:
    """Codes [..., tokens, n] with ``features`` times ``factor``, from token ``first`` on: CLIP's start token is left alone.

    Features are int [f], the same for all, or bool [..., n], each prompt's own. None at all is the identity.
    """
    out = codes.clone()
    if features.dtype == torch.bool:
        out[..., first:, :] = torch.where(features.unsqueeze(-2), factor * out[..., first:, :], out[..., first:, :])
    else:
        out[..., first:, features] = factor * out[..., first:, features]
    return out


def distance(x: Tensor, reconstruction: Tensor) -> Tensor:
    """m: mean over tokens and channels of (reconstruction - x)², [...] for [..., tokens, d]."""
    return (reconstruction - x).square().mean((-2, -1))


def gate(x: Tensor, reconstruction: Tensor, threshold: float | Tensor) -> Tensor:
    """Whether a prompt has the concept: bool [...] for x [..., tokens, d], where the mean distance reaches the threshold.

    The threshold is a mean like m itself; the released code sets it, for celebrities, from the largest token of each prompt, which the
    mean over tokens cannot reach.
    """
    return distance(x, reconstruction) >= threshold
