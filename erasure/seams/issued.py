"""What the prompt seam gave out for the run under way, and the check that the denoiser runs on nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import NotErased
from ..families import Family

Embeds = dict[str, Tensor | None]
"""What ``encode_prompt`` returns, by the names of the family's row."""
Inputs = dict[str, Any]
"""Arguments of a denoiser's call by name."""


@dataclass(frozen=True)
class Rows:
    """Which rows of a denoiser's batch belong to which side of the guidance; a side that the call lacks is None."""

    positives: slice | None
    negatives: slice | None


class StepCounter:
    """Counts sampling steps by the timesteps that pass: solvers that call the denoiser twice a step count once."""

    def __init__(self) -> None:
        self.step = -1
        self._last: float | None = None

    def see(self, timestep: Any) -> int:
        """The index of the step that a call with this timestep belongs to."""
        now = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        if now != self._last:
            self.step, self._last = self.step + 1, now
        return self.step


@dataclass
class Issued:
    """Embeddings of the pipeline's call under way, as the outermost prompt seam gave them out."""

    family: Family
    guided: bool = False
    """The eraser acts through the negative side, so a denoiser call without it is refused."""
    hint: str = ""
    """What else its user can do then; ends the message."""
    positive: Tensor | None = None
    """[prompts, tokens, dim]"""
    negative: Tensor | None = None
    pooled: Tensor | None = None
    """[prompts, dim], in families that have pooled vectors."""
    negative_pooled: Tensor | None = None
    rows: Rows = Rows(None, None)
    """Sides of the denoiser call under way."""
    step: int = -1
    """Sampling step of the denoiser call under way, from 0."""
    encodings: int = 0
    """Calls of ``encode_prompt`` since the pipeline's call began."""
    _steps: StepCounter = field(default_factory=StepCounter)

    def clear(self) -> None:
        """Forget the call: nothing that was issued may run any more."""
        self.positive = self.negative = self.pooled = self.negative_pooled = None
        self.encodings = 0

    def record(self, embeds: Embeds, side: Literal["both", "positive", "negative"]) -> None:
        """Keep what was given out; a new positive prompt is a new run, whose steps count from 0."""
        if side == "negative":
            self.negative, self.negative_pooled = embeds["embeds"], embeds.get("pooled")
            return
        self.positive, self.pooled = embeds["embeds"], embeds.get("pooled")
        self.negative, self.negative_pooled = embeds.get("negative_embeds"), embeds.get("negative_pooled")
        self._steps = StepCounter()

    def check(self, inputs: Inputs) -> None:
        """Raise unless a denoiser call runs on issued embeddings alone; notes its rows and step."""
        context = inputs.get(self.family.context)
        if context is None:
            raise NotErased(f"the denoiser was called without {self.family.context}=, so the attached eraser cannot tell what it runs on")
        if self.positive is None:
            raise NotErased("the denoiser was called before any prompt passed the attached eraser")
        self.rows = self._sides(context, inputs)
        self.step = self._steps.see(inputs.get("timestep"))
        if self.guided and self.negative is None:
            raise NotErased(self._unguided())

    def _unguided(self) -> str:
        separate = ", with a negative_prompt, if only an empty one" if "negative_embeds" not in self.family.returns else ""
        return (
            "the denoiser was called without the negative prompt, by which the attached eraser works; keep guidance on"
            f" ({self.family.scale} > 1{separate}){self.hint}"
        )

    def _sides(self, context: Tensor, inputs: Inputs) -> Rows:
        assert self.positive is not None
        n, pooled = len(self.positive), reach(inputs, self.family.pooled)
        sides = ((self.positive, self.pooled), (self.negative, self.negative_pooled))
        if len(context) == n:
            alone = self.family.cfg == "sequential" or inputs.get("skip_layers") is not None or not self.guided or self.negative is None
            for rows, (known, known_pooled) in zip((Rows(slice(0, n), None), Rows(None, slice(0, n))), sides, strict=True):
                if _equal(context, known) and _equal(pooled, known_pooled):
                    if not alone:
                        raise NotErased(self._unguided())
                    return rows
        elif len(context) == 2 * n and self.family.cfg == "batch" and self.negative is not None:
            halves = zip(context.chunk(2), pooled.chunk(2) if pooled is not None else (None, None), reversed(sides), strict=True)
            if all(_equal(part, known) and _equal(vector, known_pooled) for part, vector, (known, known_pooled) in halves):
                return Rows(slice(n, 2 * n), slice(0, n))
        raise NotErased(
            "the denoiser got prompt embeddings that did not pass the attached eraser (prompt_embeds=, from_pipe, a copied pipeline?); "
            "pass prompts as text to the pipeline that the eraser is attached to"
        )


def reach(inputs: Mapping[str, Any], path: tuple[str, ...]) -> Tensor | None:
    """The tensor at the end of a path of keys; None for an empty path or where it ends early."""
    found: Any = inputs if path else None
    for key in path:
        found = None if found is None else found.get(key)
    return found


def _equal(given: Tensor | None, known: Tensor | None) -> bool:
    if given is None or known is None:
        return given is known
    return given.shape == known.shape and torch.equal(given, known.to(given))
