"""Concept Ablation: on images of an anchor, the model learns to predict for the concept's prompt what it predicts for the anchor's."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from erasure.denoising import Denoising
from erasure.trained import FROM_PRESET, LowRankMethod, OfPreset, Session
from erasure.training import Loss


def loss(pred: Tensor, anchor_pred: Tensor) -> Tensor:
    """Mean squared distance of the prediction for the concept's prompt to that for the anchor's, both [batch, ...].

    No gradient flows into ``anchor_pred``: a prediction (model-based) or what the image's noise asks for (noise-based). The mean is over
    all elements, in float32 at least; both of the authors' codes divide a sum over channels by a mask of one channel, and so have this
    times the number of channels. Source: Kumari et al., ICCV 2023.
    """
    wide = torch.promote_types(pred.dtype, torch.float32)
    return (pred.to(wide) - anchor_pred.detach().to(wide)).square().mean()


@dataclass(frozen=True, kw_only=True)
class ConceptAblation(LowRankMethod):
    """Concept Ablation (Kumari et al., ICCV 2023), model-based and noise-based, with its prior preservation.

    Anchor prompts are the concept's anchors in templates, and images of them are made by the base; the same template with the target is
    the prompt that is ablated. (The authors take 200 sentences of a language model, append a style to them as they are, and mirror,
    enlarge or shrink images at random, which is left out.) An empty anchor is the empty prompt: give one of the same kind, such as "cat"
    for a cat of a name, or "painting" for a style. A retain list adds its own images to those of the prior.
    """

    name: ClassVar[str] = "concept_ablation"
    paper: ClassVar[str] = "arXiv:2303.13516"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {  # lr: 2e-6 for each image of a step, four on each of two GPUs. Styles and characters had no prior; where there was one
            # it weighed 0.25 (diffusers) or 0.2 (CompVis) of the mean that is the loss here
            "part": "kv", "steps": 100, "lr": 1.6e-5, "batch": 8, "guidance": 6.0, "sampling_steps": 25, "images": 1000,
            "variant": "model", "anchor_model": "current", "retain_scale": 0.0, "expand": True, "cut_start": True,
        },
        "canvas": {
            "part": "kv", "steps": 300, "lr": 1e-3, "batch": 8, "guidance": 4.0, "sampling_steps": 10, "images": 192,
            "variant": "model", "anchor_model": "base", "retain_scale": 2.0, "expand": True, "cut_start": False,
        },
    }  # fmt: skip

    images: OfPreset[int] = FROM_PRESET
    """Images of anchors, and as many of the retain list if there is one, that the base makes first."""
    variant: OfPreset[Literal["model", "noise"]] = FROM_PRESET
    """What the concept's prompt should give: what the anchor's prompt gives (model), or the noise in the anchor's image (noise)."""
    anchor_model: OfPreset[Literal["current", "base"]] = FROM_PRESET
    """Which model predicts for the anchor: the one in training, as in the authors' code, or the base, which cannot drift."""
    cut_start: OfPreset[bool] = FROM_PRESET
    """Pass no gradient through keys and values of the start token, which all prompts share, as in the authors' code; for UNets alone, since
    joint attention has no such token of its own place."""

    def optimiser(self) -> dict[str, Any]:
        return {"weight_decay": 1e-2, "clip": 1.0} if self.preset == "paper" else {"clip": 1.0}

    def objective(self, session: Session) -> Loss:
        pairs, kept = self.phrases(session.concepts), self.retained(session.concepts)
        making: dict[str, Any] = {"steps": self.sampling_steps, "guidance": self.guidance, "batch": max(self.batch, 8)}
        pool = session.pool([anchor for _, anchor in pairs], self.images, **making)
        priors = [pool, *([session.pool(kept, self.images, **making)] if kept and self.retain_scale else [])]
        of = session.denoising
        if self.cut_start:
            for layer in _keys_and_values(of):
                session.stack.callback(layer.register_forward_hook(_without_start).remove)

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


def _keys_and_values(of: Denoising) -> Iterator[nn.Module]:
    """Layers that make keys and values of the prompt in a UNet; none in other denoisers."""
    for _, denoiser in of.family.parts(of.pipe):
        if hasattr(denoiser, "up_blocks"):
            yield from (module for name, module in denoiser.named_modules() if name.endswith(of.family.cross_kv))


def _without_start(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Keys or values [batch, tokens, dim] as they are, the first without a gradient."""
    return torch.cat((output[:, :1].detach(), output[:, 1:]), 1)
