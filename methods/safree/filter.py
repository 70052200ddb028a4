"""Prompts moved off the concept: in each text encoder's own space, and at the places where its tokens lie."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from erasure.errors import ErasureError
from erasure.families import Encoder, Family
from erasure.text import Place, places, states, summary, token_ids

from ..negative_prompt import target_phrases
from .formulas import Kind, filter_steps, project, projector, trigger_mask

if TYPE_CHECKING:
    from .eraser import SafreeEraser

MASK = 0
"""The token that stands in for a left-out one: "!" in CLIP, as released, and padding in T5, which SD3 and FLUX read as well."""
TOKENS_AT_ONCE = 4096
"""Most tokens that an encoder reads in one batch of leave-one-out prompts, each as long as the prompt."""
ALWAYS = sys.maxsize


def spaces(encoder: Encoder) -> tuple[str, ...]:
    """Names of the spaces in which an encoder's output has a toxic subspace: that of its tokens, and that of its pooled vectors."""
    tokens = () if encoder.place == "none" else (encoder.component,)
    return (*tokens, f"{encoder.component}.pooled") if encoder.pooled else tokens


@torch.no_grad()
def summaries(pipe: Any, encoder: Encoder, ids: Tensor, skip: int = 0) -> dict[str, Tensor]:
    """Vectors [n, D] of unpadded texts [n, tokens] in each space of an encoder; ``skip`` is the pipeline's ``clip_skip``."""
    found: dict[str, list[Tensor]] = {space: [] for space in spaces(encoder)}
    for part in ids.split(max(1, TOKENS_AT_ONCE // ids.shape[1])):
        rows, pooled = states(pipe, encoder, part, skip=skip)
        vectors = [summary(encoder, rows)] if encoder.place != "none" else []
        for space, vector in zip(found, [*vectors, *([pooled] if pooled is not None else [])], strict=True):
            found[space].append(vector)
    return {space: torch.cat(parts) for space, parts in found.items()}


def encode_phrases(pipe: Any, encoder: Encoder, phrases: Sequence[str], skip: int = 0) -> dict[str, Tensor]:
    """Vectors [K, D] of phrases in each space of an encoder, on the CPU."""
    each = [summaries(pipe, encoder, token_ids(pipe, encoder, phrase)[None], skip) for phrase in phrases]
    return {space: torch.cat([vectors[space] for vectors in each]).cpu() for space in spaces(encoder)}


@dataclass
class Safe:
    """A prompt off the concept."""

    context: Tensor
    """[tokens, dim]"""
    pooled: Tensor | None
    """[dim], in families that have pooled vectors."""
    last_step: int = -1
    """The last sampling step (from 0) that uses it; -1 where it is the prompt as it was."""


class Filter:
    """SAFREE's part before the first step, for the prompts of one pipeline."""

    def __init__(self, eraser: "SafreeEraser", pipe: Any, family: Family) -> None:
        self.method, self.pipe, self.family = eraser.method, pipe, family
        self.phrases = target_phrases(eraser.concepts)
        self.kind: Kind = "artist" if all(c.kind in ("style", "identity") for c in eraser.concepts) else "nudity"
        wanted = self.method.self_validating
        self.self_validating = family.name in ("sd1", "sd2") if wanted is None else wanted
        for place in places(pipe, family, 1):
            for space in spaces(place.encoder):
                here = place.channels if space == place.encoder.component else place.pooled
                if here is None or space not in eraser.phrases or eraser.phrases[space].shape[1] != here.stop - here.start:
                    raise ErasureError(
                        f"this safree eraser has no phrases in the space of this {space}: fit it on a pipeline like this one"
                    )
        self.toxic = {(space, 0): projector(vectors) for space, vectors in eraser.phrases.items()}

    def __call__(self, ids: Mapping[str, Tensor], context: Tensor, pooled: Tensor | None, clip_skip: int) -> Safe:
        """One prompt, as unpadded ids [tokens] of each encoder by component, context [tokens, dim] and pooled vector [dim], made safe."""
        safe = Safe(context.clone(), None if pooled is None else pooled.clone())
        cosines: list[Tensor] = []
        triggered = False
        for place in places(self.pipe, self.family, len(context)):
            read = ids[place.encoder.component]
            words = slice(1 if place.encoder.kind == "clip" else 0, len(read) - 1)  # between BOS, which T5 has not, and EOS
            if words.start >= words.stop:
                continue
            skip = clip_skip if place.encoder.kind == "clip" else 0
            masked = summaries(self.pipe, place.encoder, leave_one_out(read, words), skip)
            first = spaces(place.encoder)[0]
            triggers = trigger_mask(masked[first], self._toxic(place.encoder, first, skip), self.method.alpha)
            triggered |= bool(triggers.any())
            for space, vectors in masked.items():
                toxic = self._toxic(place.encoder, space, skip)
                if space == place.encoder.component:
                    cosines.append(self._move_tokens(safe, place, words, triggers, vectors, toxic))
                elif triggers.any():
                    self._move_pooled(safe, place, vectors, toxic)
        if triggered:
            safe.last_step = self._last_step(cosines)
        return safe

    def _move_tokens(self, safe: Safe, place: Place, words: slice, triggers: Tensor, masked: Tensor, toxic: Tensor) -> Tensor:
        """Project the trigger tokens, in place. Gives the cosines [tokens] between all real tokens and what they would become."""
        here = safe.context[place.tokens, place.channels]
        original = here.to(masked)
        moved = project(original, projector(masked), toxic, self.method.order)
        real = words.stop + 1
        cosines = F.cosine_similarity(moved[:real], original[:real], dim=1)  # before the write: ``original`` may be ``here``
        hit = torch.zeros(len(here), dtype=torch.bool, device=here.device)
        hit[words] = triggers.to(hit.device)
        if self.method.scope == "sentence" and triggers.any():
            hit[words.stop :] = True
        here[hit] = moved.to(here)[hit]
        return cosines

    def _move_pooled(self, safe: Safe, place: Place, masked: Tensor, toxic: Tensor) -> None:
        assert safe.pooled is not None
        vector = safe.pooled[place.pooled]
        vector.copy_(project(vector[None].to(masked), projector(masked), toxic, self.method.order)[0])

    def _last_step(self, cosines: Sequence[Tensor]) -> int:
        if not self.self_validating or not cosines:
            return ALWAYS
        return filter_steps(1 - torch.cat([c.cpu() for c in cosines]).mean().item(), self.kind, self.method.filter_rule)

    def _toxic(self, encoder: Encoder, space: str, skip: int) -> Tensor:
        """The toxic projector [D, D] of a space; where a call skips layers, that of the phrases at the layer which it reads."""
        if space != encoder.component:
            skip = 0  # pooled vectors come from the last layer in any case
        if (space, skip) not in self.toxic:
            self.toxic[space, skip] = projector(encode_phrases(self.pipe, encoder, self.phrases, skip)[space])
        self.toxic[space, skip] = self.toxic[space, skip].to(self.pipe._execution_device)
        return self.toxic[space, skip]


def leave_one_out(ids: Tensor, words: slice) -> Tensor:
    """Copies [n, tokens] of a text, each with another one of its words masked."""
    positions = torch.arange(words.start, words.stop, device=ids.device)
    copies = ids.repeat(len(positions), 1)
    copies[torch.arange(len(positions)), positions] = MASK
    return copies
