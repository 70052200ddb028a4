"""Perp-Neg: a negative prompt that leaves alone what the prompt itself asks for."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from erasure.concept import Concept
from erasure.errors import ErasureError
from erasure.families import NAMES, Family
from erasure.method import ErasureMethod, Run, RuntimeEraser
from erasure.seams import branches

from .negative_prompt import target_phrases, warn_of_cut


def perpendicular(x: Tensor, y: Tensor) -> Tensor:
    """The part of x [batch, ...] at right angles to y, sample by sample over all elements; all of x where y is zero.

    In float32 at least: squares of a 1024 px latent add up to more than float16 holds.
    """
    dims, wide = tuple(range(1, x.ndim)), torch.promote_types(x.dtype, torch.float32)
    a, b = x.to(wide), y.to(wide)
    square = (b * b).sum(dims, keepdim=True).clamp_min(torch.finfo(wide).tiny)
    return (a - (a * b).sum(dims, keepdim=True) / square * b).to(x.dtype)


def guide(
    uncond: Tensor,
    text: Tensor,
    negatives: Tensor | Sequence[Tensor],
    weights: float | Tensor | Sequence[float],
    scale: float,
) -> Tensor:
    """The guided prediction [batch, ...]: uncond + scale (D_p - Σ |w_i| perp(D_i; D_p)), with D the predictions less uncond.

    ``negatives``: K predictions [batch, ...], as a list or stacked [K, batch, ...]. ``weights``: one for all or K; the paper writes
    them negative, so their sign does not count. Source: Armandpour et al. 2023. Errors: other than 1 or K weights raise ValueError.
    """
    each = [negatives] if isinstance(negatives, Tensor) and negatives.ndim == text.ndim else list(negatives)
    sizes = torch.as_tensor(weights, dtype=text.dtype, device=text.device).abs().flatten()
    if len(sizes) not in (1, len(each)):
        raise ValueError(f"{len(sizes)} weights for {len(each)} negatives; give one, or one each")
    positive = text - uncond
    guided = positive.clone()
    for negative, size in zip(each, sizes.expand(len(each)), strict=True):
        guided -= size * perpendicular(negative - uncond, positive)
    return uncond + scale * guided


@dataclass(frozen=True, kw_only=True)
class PerpNeg(ErasureMethod):
    """Perp-Neg (Armandpour et al. 2023), with the concept's target phrases as negatives.

    What the negative shares with the prompt is not taken away, so the requested picture survives: it keeps fidelity, and does not erase
    a concept that the prompt itself names. Needs classifier-free guidance: for FLUX.1 ``true_cfg_scale`` > 1 and a ``negative_prompt``,
    if only an empty one. Costs a branch for each negative at every step, and one more where guidance runs in two calls.
    """

    name: ClassVar[str] = "perp_neg"
    paper: ClassVar[str] = "arXiv:2304.04968"
    families: ClassVar[frozenset[str]] = frozenset(NAMES)

    weight: float = 1.5
    """Weight of each negative, |w|; the paper's example has 1.5."""
    negatives: Literal["joined", "each"] = "joined"
    """One branch for all phrases, joined by commas, or a branch for each phrase."""

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ErasureError(f"perp_neg: weight is {self.weight}; it has to be 0 or more, and is subtracted")

    def fit(self, pipe: Any, concepts: Sequence[Concept], *, run: Run = Run()) -> "PerpNegEraser":
        family = self.family(pipe)
        for phrases in self.branches(concepts):
            warn_of_cut(pipe, family, phrases)
        return self.eraser(tuple(concepts), {})

    def branches(self, concepts: Sequence[Concept]) -> list[list[str]]:
        """The phrases of each negative branch."""
        phrases = target_phrases(concepts)
        return [[phrase] for phrase in phrases] if self.negatives == "each" else [phrases]

    def eraser(self, concepts: tuple[Concept, ...], tensors: Mapping[str, Tensor]) -> "PerpNegEraser":
        return PerpNegEraser(self, concepts)


@dataclass(frozen=True)
class PerpNegEraser(RuntimeEraser):
    """Guides each call away from what of the concepts' phrases is at right angles to the prompt."""

    probe: ClassVar[str] = "a picture of {}"
    method: PerpNeg

    def edits(self, pipe: Any, family: Family) -> Iterable[AbstractContextManager[int]]:
        def rule(uncond: Tensor, text: Tensor, extras: list[Tensor], step: int) -> Tensor:
            return guide(uncond, text, extras, self.method.weight, scale=1.0)

        texts = [", ".join(phrases) for phrases in self.method.branches(self.concepts)]
        yield branches.guided(pipe, family, texts, rule)

    def tensors(self) -> dict[str, Tensor]:
        return {}
