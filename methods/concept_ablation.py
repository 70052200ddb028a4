"""Concept Ablation: on images of an anchor, the model learns to predict for the concept's prompt what it predicts for the anchor's."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from erasure.trained import FROM_PRESET, LowRankMethod, OfPreset, Session
from erasure.training import Loss


def loss(pred: Tensor, anchor_pred: Tensor) -> Tensor:
    """Mean squared distance of the prediction for the concept's prompt to that for the anchor's, both [batch, ...].

    No gradient flows into ``anchor_pred``: a prediction (model-based) or what the image's noise asks for (noise-based). The mean is over
    all elements; the authors' diffusers code divides a sum over four channels by a mask of one, and so has four times this.
    Source: Kumari et al., ICCV 2023.
    """
    return (pred - anchor_pred.detach()).square().mean()


@dataclass(frozen=True, kw_only=True)
class ConceptAblation(LowRankMethod):
    """Concept Ablation (Kumari et al., ICCV 2023), model-based and noise-based, with its prior preservation.

    Anchor prompts are the concept's anchors in templates, and images of them are made by the base; the same template with the target is
    the prompt that is ablated. (The authors take 200 sentences of a language model, and enlarge or shrink images at random, which is left
    out.) An empty anchor is the empty prompt: give one of the same kind, such as "cat" for a cat of a name, or "painting" for a style.
    A retain list adds its own images to those of the prior.
    """

    name: ClassVar[str] = "concept_ablation"
    paper: ClassVar[str] = "arXiv:2303.13516"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {  # lr: 2e-6 for each image of a step, four on each of two GPUs
            "part": "kv", "steps": 100, "lr": 1.6e-5, "batch": 8, "guidance": 6.0, "sampling_steps": 25, "images": 1000,
            "variant": "model", "anchor_model": "current", "retain_scale": 1.0, "expand": True,
        },
        "canvas": {
            "part": "kv", "steps": 300, "lr": 1e-3, "batch": 8, "guidance": 4.0, "sampling_steps": 10, "images": 192,
            "variant": "model", "anchor_model": "base", "retain_scale": 2.0, "expand": True,
        },
    }  # fmt: skip

    images: OfPreset[int] = FROM_PRESET
    """Images of anchors, and as many of the retain list if there is one, that the base makes first."""
    variant: OfPreset[Literal["model", "noise"]] = FROM_PRESET
    """What the concept's prompt should give: what the anchor's prompt gives (model), or the noise in the anchor's image (noise)."""
    anchor_model: OfPreset[Literal["current", "base"]] = FROM_PRESET
    """Which model predicts for the anchor: the one in training, as in the authors' code, or the base, which cannot drift."""

    def optimiser(self) -> dict[str, Any]:
        return {"weight_decay": 1e-2, "clip": 1.0} if self.preset == "paper" else {"clip": 1.0}

    def objective(self, session: Session) -> Loss:
        pairs, kept = self.phrases(session.concepts), self.retained(session.concepts)
        making: dict[str, Any] = {"steps": self.sampling_steps, "guidance": self.guidance, "batch": max(self.batch, 8)}
        pool = session.pool([anchor for _, anchor in pairs], self.images, **making)
        priors = [pool, *([session.pool(kept, self.images, **making)] if kept and self.retain_scale else [])]
        of = session.denoising

        def step_loss(step: int, generator: torch.Generator) -> Tensor:
            some = pool.noised(of, self.batch, generator)
            words = [pairs[i][0] for i in some.sources]
            wanted = some.target if self.variant == "noise" else self._anchored(session, some.x_t, some.t, some.prompts)
            total = loss(of.predict(some.x_t, some.t, words), wanted)
            if self.retain_scale:
                prior = priors[step % len(priors)].noised(of, self.batch, generator)
                total = total + self.retain_scale * (of.predict(prior.x_t, prior.t, prior.prompts) - prior.target).square().mean()
            return total

        return step_loss

    def _anchored(self, session: Session, x_t: Tensor, t: Tensor, prompts: list[str]) -> Tensor:
        if self.anchor_model == "base":
            with session.tuned.reference():
                return session.denoising.predict(x_t, t, prompts)
        with torch.no_grad():
            return session.denoising.predict(x_t, t, prompts)
