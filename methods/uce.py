"""Unified Concept Editing: keys and values of cross-attention, changed in closed form."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from erasure.concept import Concept
from erasure.errors import ErasureError, NothingAttached
from erasure.method import ErasureMethod, Run, WeightEraser
from erasure.text import encode

TEMPLATES: dict[str, tuple[str, ...]] = {
    "style": ("{}", "in the style of {}", "a picture in {} style", "{} art", "an image, {}"),
    "other": ("{}", "a {}", "a picture of {}", "an image with a {}", "a drawing with {}"),
}


def edit_map(targets: Tensor, anchors: Tensor, retain: Tensor, erase_scale: float, retain_scale: float, ridge: float) -> Tensor:
    """The map M [d, d] with W_new = W M of UCE's eq. 7: it depends on the text side only, so one factorisation serves all matrices.

    M = (λI + η_e Σ a cᵀ + η_p Σ r rᵀ) (λI + η_e Σ c cᵀ + η_p Σ r rᵀ)⁻¹, for targets c [n, d], anchors a [n, d], retained r [m, d],
    in float64. ``ridge`` is the paper's λ: the pull of W towards its old value.
    """
    c, a, r = (x.double() for x in (targets, anchors, retain))
    kept = ridge * torch.eye(c.shape[1], dtype=torch.float64, device=c.device) + retain_scale * r.T @ r
    right = kept + erase_scale * c.T @ c
    left = kept + erase_scale * a.T @ c
    return torch.linalg.solve(right, left, left=False)


def solve(
    weight: Tensor,
    targets: Tensor,
    anchors: Tensor,
    retain: Tensor,
    erase_scale: float = 1.0,
    retain_scale: float = 1.0,
    ridge: float = 0.5,
) -> Tensor:
    """UCE's closed form, eq. 7, for one matrix: weight [o, d], targets and anchors [n, d], retain [m, d] -> [o, d].

    Errors: targets and anchors of different counts raise. Source: Gandikota et al., WACV 2024.
    """
    if targets.shape != anchors.shape:
        raise ValueError(f"each target needs one anchor: {tuple(targets.shape)} against {tuple(anchors.shape)}")
    mapped = weight.double() @ edit_map(targets, anchors, retain, erase_scale, retain_scale, ridge)
    return mapped.to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class UCE(ErasureMethod):
    """Unified Concept Editing (Gandikota et al., WACV 2024), eq. 7.

    The paper's code took every row from the last subject token through the padding (``tokens="tail"``); the authors' current code
    takes the last subject token alone (``tokens="last"``). The default is the one that erased more on the canvas.
    """

    name: ClassVar[str] = "uce"
    paper: ClassVar[str] = "arXiv:2308.14761"
    families: ClassVar[frozenset[str]] = frozenset({"sd1"})

    erase_scale: float = 1.0
    """Weight of the erased concepts, η_e."""
    retain_scale: float = 1.0
    """Weight of the retained concepts, η_p, as in the authors' current code; the paper's code took max(0.1, 1 / number of them)."""
    ridge: float = 0.5
    """Pull towards the old weights, λ."""
    tokens: Literal["tail", "last"] = "tail"
    """Rows of the text encoding that stand for a phrase: from its last token to the end of the padding, or its last token."""
    expand: bool = True
    """Edit each phrase in five short templates as well as alone."""

    def fit(self, pipe: Any, concepts: Sequence[Concept], *, run: Run = Run()) -> WeightEraser:
        family = self.family(pipe)
        encoder, tokenizer = (getattr(pipe, name) for name in family.encoders[0])
        pairs = [self._aligned(encoder, tokenizer, target, anchor) for target, anchor in self._phrases(concepts)]
        if not pairs:
            raise ErasureError("uce was given no concept to erase")
        targets, anchors = (torch.cat(side) for side in zip(*pairs, strict=True))
        retain = [
            rows for concept in concepts for phrase in concept.retain for rows in self._rows(encoder, tokenizer, phrase, concept.kind)
        ]
        if self.tokens == "tail":  # as in the paper's code: end and padding rows are what the unconditional branch is made of
            retain.append(encode(encoder, tokenizer, "")[0])
        mapping = edit_map(targets, anchors, torch.cat([targets[:0], *retain]), self.erase_scale, self.retain_scale, self.ridge)
        changed = {
            f"{name}.weight": (layer.weight.double() @ mapping.to(layer.weight.device)).to(layer.weight.dtype)
            for name, layer in family.cross_attention(pipe)
            if layer.in_features == mapping.shape[0]
        }
        if not changed:
            raise NothingAttached(f"{type(pipe).__name__} has no cross-attention over {mapping.shape[0]} text channels")
        return self.eraser(tuple(concepts), {k: v.detach().cpu() for k, v in changed.items()})

    def eraser(self, concepts: tuple[Concept, ...], tensors: Mapping[str, Tensor]) -> WeightEraser:
        return WeightEraser(self, concepts, tensors)

    def _templates(self, kind: str) -> tuple[str, ...]:
        templates = TEMPLATES.get(kind, TEMPLATES["other"])
        return templates if self.expand else templates[:1]

    def _phrases(self, concepts: Sequence[Concept]) -> Iterator[tuple[str, str]]:
        for concept in concepts:
            for target, anchor in concept.pairs():
                for template in self._templates(concept.kind):
                    yield template.format(target), template.format(anchor).strip()

    def _aligned(self, encoder: Any, tokenizer: Any, target: str, anchor: str) -> tuple[Tensor, Tensor]:
        """Rows of a target and of its anchor, cut to one length."""
        ours, theirs = self._select(*encode(encoder, tokenizer, target)), self._select(*encode(encoder, tokenizer, anchor))
        n = min(len(ours), len(theirs))
        return ours[:n], theirs[:n]

    def _rows(self, encoder: Any, tokenizer: Any, phrase: str, kind: str) -> Iterator[Tensor]:
        for template in self._templates(kind):
            yield self._select(*encode(encoder, tokenizer, template.format(phrase)))

    def _select(self, states: Tensor, length: int) -> Tensor:
        """The rows of one encoding [tokens, d] that stand for its phrase; ``length`` counts BOS, words and EOS."""
        last = max(length - 2, 0)  # index 0, the BOS vector, for an empty phrase, as in the authors' code
        return states[last : last + 1] if self.tokens == "last" else states[last:]
