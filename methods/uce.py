"""Unified Concept Editing: the linear layers that read the prompt, changed in closed form."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from erasure.concept import Concept
from erasure.errors import ErasureError, NothingAttached
from erasure.families import NAMES, Family
from erasure.method import ErasureMethod, Run, WeightEraser
from erasure.seams.weights import editable
from erasure.text import Encoded, Place, encode, places

log = logging.getLogger("erasure")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "style": ("{}", "in the style of {}", "a picture in {} style", "{} art", "an image, {}"),
    "other": ("{}", "a {}", "a picture of {}", "an image with a {}", "a drawing with {}"),
}
BATCH = 16
"""Pairs that are encoded at once."""


class Sums:
    """Σ c cᵀ, Σ a cᵀ and Σ r rᵀ [d, d] in float64: all that eq. 7 needs of targets c, anchors a and retained r, however many there are."""

    def __init__(self, width: int, device: Any = None) -> None:
        self.erased, self.moved, self.kept = (torch.zeros(width, width, dtype=torch.float64, device=device) for _ in range(3))

    def add_pairs(self, targets: Tensor, anchors: Tensor) -> None:
        """Rows [n, d] that each target and its anchor are made of."""
        c, a = targets.to(self.erased), anchors.to(self.erased)
        self.erased += c.T @ c
        self.moved += a.T @ c

    def add_retained(self, retain: Tensor) -> None:
        """Rows [m, d] that must stay."""
        r = retain.to(self.kept)
        self.kept += r.T @ r

    def edit_map(self, erase_scale: float, retain_scale: float, ridge: float) -> Tensor:
        """M [d, d] = (λI + η_e Σ a cᵀ + η_p Σ r rᵀ) (λI + η_e Σ c cᵀ + η_p Σ r rᵀ)⁻¹."""
        kept = ridge * torch.eye(len(self.kept)).to(self.kept) + retain_scale * self.kept
        return torch.linalg.solve(kept + erase_scale * self.erased, kept + erase_scale * self.moved, left=False)


def edit_map(targets: Tensor, anchors: Tensor, retain: Tensor, erase_scale: float, retain_scale: float, ridge: float) -> Tensor:
    """The map M [d, d] with W_new = W M of UCE's eq. 7: it depends on the text side only, so one factorisation serves all matrices.

    Targets c and anchors a [n, d], retained r [m, d]; float64 inside. ``ridge`` is the paper's λ: the pull of W towards its old value.
    """
    sums = Sums(targets.shape[1], targets.device)
    sums.add_pairs(targets, anchors)
    sums.add_retained(retain)
    return sums.edit_map(erase_scale, retain_scale, ridge)


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

    Edits keys and values of cross-attention in UNets; in transformers, which have none, the layers that take in the prompt: tokens and
    pooled vector (SD3, FLUX.1), or tokens (Wan). A bias stays as it is: the authors' FLUX code adds it twice on erased directions.
    The paper's code took every row from the last subject token through the padding (``tokens="tail"``); the authors' current code
    takes the last subject token alone (``tokens="last"``). The default is the one that erased more on the canvas.
    """

    name: ClassVar[str] = "uce"
    paper: ClassVar[str] = "arXiv:2308.14761"
    families: ClassVar[frozenset[str]] = frozenset(NAMES)

    erase_scale: float = 1.0
    """Weight of the erased concepts, η_e."""
    retain_scale: float = 1.0
    """Weight of the retained concepts, η_p, as in the authors' current code; the paper's code took max(0.1, 1 / number of them)."""
    ridge: float = 0.5
    """Pull towards the old weights, λ."""
    tokens: Literal["tail", "last"] = "tail"
    """Rows of a text encoder that stand for a phrase: from its last token to the end of the padding, or its last token."""
    expand: bool = True
    """Edit each phrase in five short templates as well as alone."""

    def __post_init__(self) -> None:
        if not self.ridge > 0 or min(self.erase_scale, self.retain_scale) < 0:
            raise ErasureError(
                f"uce: ridge is {self.ridge}, erase_scale {self.erase_scale}, retain_scale {self.retain_scale}; "
                "the system has one solution with a ridge above 0, such as 0.5, and scales of at least 0"
            )

    def fit(self, pipe: Any, concepts: Sequence[Concept], *, run: Run = Run()) -> WeightEraser:
        family = self.family(pipe)
        pairs, retain = self._pairs(concepts), self._retained(concepts)
        if not pairs:
            raise ErasureError("uce was given no concept to erase")
        layers = [(name, editable(f"{name}.weight", layer.weight), reads) for name, layer, reads in family.text_linears(pipe)]
        sums = self._sums(pipe, family, pairs, retain, {reads for _, _, reads in layers}, run)
        maps = {reads: each.edit_map(self.erase_scale, self.retain_scale, self.ridge) for reads, each in sums.items()}
        changed = {
            f"{name}.weight": (weight.double() @ maps[reads].to(weight.device)).to(weight.dtype).detach().cpu()
            for name, weight, reads in layers
            if weight.shape[1] == len(maps[reads])
        }
        if not changed:
            raise NothingAttached(f"{type(pipe).__name__} has no cross-attention or other layer over its text encoders' channels")
        return self.eraser(tuple(concepts), changed)

    def eraser(self, concepts: tuple[Concept, ...], tensors: Mapping[str, Tensor]) -> WeightEraser:
        return WeightEraser(self, concepts, tensors)

    def _templates(self, kind: str) -> tuple[str, ...]:
        templates = TEMPLATES.get(kind, TEMPLATES["other"])
        return templates if self.expand else templates[:1]

    def _pairs(self, concepts: Sequence[Concept]) -> list[tuple[str, str]]:
        """Target and anchor in every template; those with one anchor stand together, so that it is encoded once."""
        found = {
            (template.format(target), template.format(anchor).strip()): None
            for concept in concepts
            for template in self._templates(concept.kind)
            for target, anchor in concept.pairs()
        }
        return sorted(found, key=lambda pair: pair[1])

    def _retained(self, concepts: Sequence[Concept]) -> list[str]:
        """Retained phrases in every template, without those that another of the concepts erases."""
        erased = {target.casefold() for concept in concepts for target in concept.targets}
        if clash := sorted({phrase for concept in concepts for phrase in concept.retain if phrase.casefold() in erased}):
            log.warning("erased by one concept and retained by another, so erased: %s", ", ".join(clash))
        return list(
            dict.fromkeys(
                template.format(phrase)
                for concept in concepts
                for template in self._templates(concept.kind)
                for phrase in concept.retain
                if phrase.casefold() not in erased
            )
        )

    def _sums(
        self, pipe: Any, family: Family, pairs: Sequence[tuple[str, str]], retain: Sequence[str], kinds: set[str], run: Run
    ) -> dict[str, Sums]:
        sums: dict[str, Sums] = {}

        def add(rows: dict[str, list[Tensor]], others: dict[str, list[Tensor]] | None = None) -> None:
            for kind in kinds & rows.keys():
                own = torch.cat(rows[kind])
                into = sums.setdefault(kind, Sums(own.shape[1], own.device))
                if others is None:
                    into.add_retained(own)
                else:
                    into.add_pairs(own, torch.cat(others[kind]))

        with tqdm(total=len(pairs) + len(retain), desc="uce", disable=not run.progress or len(pairs) + len(retain) <= BATCH) as bar:
            for start in range(0, len(pairs), BATCH):
                part = pairs[start : start + BATCH]
                known = _Phrases(pipe, family, [text for pair in part for text in pair])
                for target, anchor in part:
                    add(*known.aligned(target, anchor, self.tokens))
                bar.update(len(part))
            for start in range(0, len(retain), BATCH):
                texts = retain[start : start + BATCH]
                known = _Phrases(pipe, family, texts)
                for text in texts:
                    add(known.rows(text, self.tokens))
                bar.update(len(texts))
        if self.tokens == "tail":  # as in the paper's code: end and padding rows are what the unconditional branch is made of
            add(_Phrases(pipe, family, [""]).rows("", "tail"))
        return sums


class _Phrases:
    """Encodings of some phrases, and the rows of each that stand for it."""

    def __init__(self, pipe: Any, family: Family, texts: Sequence[str]) -> None:
        unique = list(dict.fromkeys(texts))
        (self.encoded,) = encode(pipe, family, unique, batch=len(unique))
        self.index = {text: i for i, text in enumerate(unique)}
        self.places = places(pipe, family, self.encoded.context.shape[1])

    def rows(self, text: str, tokens: Literal["tail", "last"]) -> dict[str, list[Tensor]]:
        """Rows [n, d] of the context for each encoder that has tokens there, and the pooled vector [1, d]."""
        i = self.index[text]
        found = {"context": [self.encoded.context[i, span] for span in _spans(self.encoded, self.places, i, tokens)]}
        return found if self.encoded.pooled is None else found | {"pooled": [self.encoded.pooled[i : i + 1]]}

    def aligned(self, target: str, anchor: str, tokens: Literal["tail", "last"]) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
        """Rows of a target and of its anchor, cut to one length encoder by encoder."""
        ours, theirs = self.rows(target, tokens), self.rows(anchor, tokens)
        for kind in ours:
            cut = [min(len(a), len(b)) for a, b in zip(ours[kind], theirs[kind], strict=True)]
            ours[kind], theirs[kind] = ([rows[:n] for rows, n in zip(side[kind], cut, strict=True)] for side in (ours, theirs))
        return ours, theirs


def _spans(encoded: Encoded, where: Sequence[Place], i: int, tokens: Literal["tail", "last"]) -> Iterator[slice]:
    """Context rows of phrase ``i``, encoder by encoder; those in further channels of the same rows are in them already."""
    for place, lengths in zip(where, encoded.lengths, strict=True):
        if place.encoder.place == "tokens" and place.tokens is not None:
            # The last word stands before the end token; the first row, of BOS, serves an empty phrase, as in the authors' code.
            last = place.tokens.start + max(int(lengths[i]) - 2, 0)
            yield slice(last, last + 1 if tokens == "last" else place.tokens.stop)
