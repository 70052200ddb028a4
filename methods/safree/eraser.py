"""SAFREE as a method, and what its fit gives."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from erasure.concept import Concept
from erasure.errors import Conflict, ErasureError
from erasure.families import NAMES, TABLE, Family
from erasure.method import Eraser, ErasureMethod, Run, RuntimeEraser
from erasure.seams import activation, denoiser, prompt
from erasure.text import encoders, reading

from ..negative_prompt import target_phrases, warn_of_cut
from .filter import encode_phrases, spaces
from .session import Session


@dataclass(frozen=True, kw_only=True)
class SAFREE(ErasureMethod):
    """SAFREE (Yoon et al., ICLR 2025): subspace projection, trigger tokens, self-validating filter, Fourier re-attention.

    Each text encoder has a toxic subspace of its own, in the layer that the pipeline reads, and finds its own triggers in its own words,
    by id 0 in place of each in turn; a text is summed up by CLIP's end token, or by the mean of T5's words. A pooled vector is projected in
    its own space whenever its encoder has a trigger. (Beyond SD 1 the released code filters one of SDXL's encoders by vectors of another
    space, CLIP's rows on SD3 by T5's triggers, no pooled vector, and no FLUX, so no result here can equal its.) The trigger test compares
    a prompt's words with each other, so that in a prompt without the concept words may be projected too; a prompt without triggers passes
    bit by bit.

    The released code always sets the concept phrases as negative prompt as well (``negative_prompt``), and its re-attention is never
    reached; here both do what they say. Prompts longer than the encoder are cut with their end token kept, so that they stay filtered.
    """

    name: ClassVar[str] = "safree"
    paper: ClassVar[str] = "arXiv:2410.12761"
    families: ClassVar[frozenset[str]] = frozenset(NAMES)

    alpha: float = 0.01
    """Tolerance of the trigger test."""
    order: Literal["code", "paper"] = "code"
    """Order of the two projections."""
    scope: Literal["triggers", "sentence"] = "triggers"
    """What is projected: the trigger tokens, as published, or (ours) also the end and padding tokens, which in a causal encoder have
    read the trigger, whenever there is one."""
    self_validating: bool | None = None
    """Choose how many steps to filter from how much the projection changes the prompt (all tokens of all encoders count alike); otherwise
    filter every step. Unset: as released, which is to choose on SD 1 and 2 and to filter every step elsewhere. The steps are absolute and
    made for runs of 50: at most the first 11 are filtered, however long the run."""
    filter_rule: Literal["code", "paper"] = "code"
    """Formula of the self-validating filter."""
    reattention: bool = True
    """Attenuate low frequencies of the UNet's skip features; costs a third branch while the filter is on. Transformers have no such
    features: nothing is done there, at no cost."""
    s1: float = 0.9
    """Attenuation in the deepest up-path stage."""
    s2: float = 0.2
    """Attenuation in the next stage."""
    negative_prompt: bool = True
    """Also put the concept's phrases into the negative prompt, as every published SAFREE figure does. Needs guidance, which FLUX has only
    with true_cfg_scale > 1 and a negative_prompt; without it, set this to False."""

    def fit(self, pipe: Any, concepts: Sequence[Concept], *, run: Run = Run()) -> "SafreeEraser":
        family = self.family(pipe)
        phrases = target_phrases(concepts)
        if not phrases:
            raise ErasureError("safree was given no concept to erase")
        if self.negative_prompt:
            warn_of_cut(pipe, family, phrases)
        found = [encode_phrases(pipe, encoder, phrases) for encoder in encoders(pipe, family)]
        return self.eraser(tuple(concepts), {name: vectors for each in found for name, vectors in each.items()})

    def eraser(self, concepts: tuple[Concept, ...], tensors: Mapping[str, Tensor]) -> "SafreeEraser":
        if tensors.keys() == {"phrases"}:  # as it was saved while there was one encoder
            tensors = {"text_encoder": tensors["phrases"]}
        known = {space for family in TABLE for encoder in family.encoders for space in spaces(encoder)}
        if not tensors or tensors.keys() - known:
            wrong = ", ".join(sorted(tensors.keys() - known)) or "nothing"
            raise ErasureError(f"safree needs phrases of text encoders ({', '.join(sorted(known))}), and got {wrong}")
        return SafreeEraser(self, concepts, dict(tensors))


@dataclass(frozen=True)
class SafreeEraser(RuntimeEraser):
    """Filters the prompt embeddings of each call, and the skip features while the filter is on."""

    method: SAFREE
    phrases: Mapping[str, Tensor] = field(repr=False)
    """Encodings of the concept's phrases [K, D], by space: ``text_encoder``, ``text_encoder.pooled`` and so on."""

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.phrases)

    def check_conflicts(self, attached: Sequence[Eraser]) -> None:
        super().check_conflicts(attached)
        if any(isinstance(other, SafreeEraser) for other in attached):
            raise Conflict("another SAFREE eraser is attached, and each would undo the other's steps; fit one on all concepts instead")

    def edits(self, pipe: Any, family: Family) -> Iterable[AbstractContextManager[int]]:
        session = Session(self, pipe, family)
        yield reading(pipe, family, session.read)
        yield prompt.encoding(pipe, family, session.issued, session.after_encode, session.before_encode)
        yield denoiser.calls(pipe, family, session.before_step, session.after_step)
        if session.scales:
            yield activation.inputs(session.scales, session.reattend)
