"""One attachment of SAFREE: carries tensors between the seams and the formulas."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from erasure.errors import NotErased
from erasure.families import Family
from erasure.seams import denoiser, prompt
from erasure.seams.issued import Embeds, Inputs, Issued, reach
from erasure.text import encoders, unpadded

from ..negative_prompt import extend_negative
from .filter import Filter
from .formulas import reattend

if TYPE_CHECKING:
    from .eraser import SafreeEraser

HINT = "; without guidance, fit safree with negative_prompt=False"


@dataclass
class Call:
    """What a run of the pipeline has to remember between its prompt and its steps."""

    original: Tensor
    """[prompts, tokens, dim]"""
    pooled: Tensor | None
    """[prompts, dim]"""
    last_step: Tensor
    """int [prompts]"""
    size: int = 0
    """Rows that the pipeline sent into the denoiser call under way."""
    branch: Tensor | None = None
    """Rows of that call which have a third branch, after the pipeline's own."""


class Session:
    """Filters each prompt, puts the original back once its filter is off, and re-attends skip features until then."""

    def __init__(self, eraser: "SafreeEraser", pipe: Any, family: Family) -> None:
        self.method, self.pipe, self.family = eraser.method, pipe, family
        self.filter = Filter(eraser, pipe, family)
        self.issued = Issued(family, guided=self.method.negative_prompt, hint=HINT)
        self.read: dict[str, Tensor] = {}
        self.call: Call | None = None
        blocks = list(family.up_blocks(pipe))
        widths = sorted({hidden for _, hidden in blocks}, reverse=True)
        strengths = dict(zip(widths, (self.method.s1, self.method.s2), strict=False)) if self.method.reattention else {}
        self.scales = {module: (hidden, strengths[hidden]) for module, hidden in blocks if hidden in strengths}

    def before_encode(self, arguments: prompt.Arguments, side: prompt.Side) -> None:
        self.read.clear()
        if self.method.negative_prompt:
            try:
                extend_negative(arguments, self.family, side, self.filter.phrases)
            except NotErased as error:
                raise NotErased(f"{error}{HINT}") from None

    def after_encode(self, arguments: prompt.Arguments, embeds: Embeds) -> Embeds:
        context, pooled = embeds["embeds"], embeds.get("pooled")
        assert context is not None
        prompts = self._prompts(len(context))
        repeats = len(context) // len(prompts)
        made = [
            self.filter(ids, context[i * repeats], None if pooled is None else pooled[i * repeats], arguments.get("clip_skip") or 0)
            for i, ids in enumerate(prompts)
        ]
        last_step = torch.tensor([safe.last_step for safe in made])
        self.call = Call(context, pooled, last_step.repeat_interleave(repeats))
        vectors = [safe.pooled for safe in made if safe.pooled is not None]
        return embeds | {
            "embeds": torch.stack([safe.context for safe in made]).repeat_interleave(repeats, dim=0),
            **({"pooled": torch.stack(vectors).repeat_interleave(repeats, dim=0)} if vectors else {}),
        }

    def _prompts(self, rows: int) -> list[dict[str, Tensor]]:
        """Unpadded ids of each prompt by component, as the encoders read them just now."""
        present = list(encoders(self.pipe, self.family))
        counts = {len(self.read.get(encoder.component, ())) for encoder in present}
        if len(counts) != 1 or 0 in counts or rows % min(counts):
            read = ", ".join(f"{name} {len(ids)}" for name, ids in self.read.items()) or "none"
            raise NotErased(
                f"safree must see every text encoder read every prompt, and for {rows} embeddings they read: {read}; "
                "pass prompts as text, and prompt_2 or prompt_3 in the same number as prompt"
            )
        return [
            {encoder.component: unpadded(self.pipe, encoder, self.read[encoder.component][i]) for encoder in present}
            for i in range(counts.pop())
        ]

    def before_step(self, inputs: Inputs) -> None:
        call, positives = self.call, self.issued.rows.positives
        assert call is not None
        call.size, call.branch = len(inputs[self.family.context]), None
        if positives is None:
            return
        on = call.last_step >= self.issued.step
        if not on.all():
            self._put_back(inputs, positives, ~on)
        if self.scales and on.any():
            rows = on.nonzero()[:, 0]
            call.branch = positives.start + rows
            pooled = None if call.pooled is None else call.pooled[rows.to(call.pooled.device)]
            denoiser.append(inputs, self.family, call.branch, call.original[rows.to(call.original.device)], pooled)

    def _put_back(self, inputs: Inputs, positives: slice, off: Tensor) -> None:
        """Put the original context and pooled vectors into the rows of prompts whose filter is ``off``: bool [prompts]."""
        assert self.call is not None
        context = inputs[self.family.context].clone()
        off = off.to(context.device)
        context[positives] = torch.where(off[:, None, None], self.call.original.to(context), context[positives])
        inputs[self.family.context] = context
        vectors = reach(inputs, self.family.pooled)
        if vectors is not None and self.call.pooled is not None:
            mixed = torch.where(off[:, None], self.call.pooled.to(vectors), vectors[positives])
            denoiser.put_pooled(inputs, self.family, positives, mixed)

    def after_step(self, prediction: Tensor) -> Tensor:
        assert self.call is not None
        return prediction[: self.call.size]

    def reattend(self, module: nn.Module, features: Tensor) -> Tensor:
        call = self.call
        if call is None or call.branch is None:
            return features
        if module not in self.scales:
            raise NotErased("this is a copy of the denoiser that safree is attached to; attach an eraser to the copied pipeline itself")
        hidden, scale = self.scales[module]
        features, own = features.clone(), slice(call.size, call.size + len(call.branch))  # seams opened later have rows after these
        features[call.branch, hidden:] = reattend(features[call.branch, hidden:], features[own, hidden:], scale)
        return features
