"""SafetyDPO: a LoRA expert that prefers the base's safe image to its unsafe one, both made from one noise."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm.auto import tqdm

from erasure import tuning
from erasure.canvas.judge_dev import judge_dev
from erasure.canvas.world import world
from erasure.concept import Concept
from erasure.errors import ErasureError, NothingAttached
from erasure.families import Family
from erasure.trained import FROM_PRESET, LowRankMethod, OfPreset, Session
from erasure.training import Loss

log = logging.getLogger("erasure")
JUDGE = "judge_dev"
"""Stands for the canvas's judge for development."""


def loss(
    pred_safe: Tensor, pred_unsafe: Tensor, ref_safe: Tensor, ref_unsafe: Tensor, noise_safe: Tensor, noise_unsafe: Tensor, beta: float
) -> Tensor:
    """Diffusion DPO with the safe image preferred, -log σ(-(β/2) (m_θ - m_ref)), averaged over pairs [batch, ...] to a scalar.

    m is the mean squared error on the safe image less that on the unsafe one, each over all but the batch dimension. ``pred_*`` are
    predictions of the model in training, ``ref_*`` those of the base (no gradient flows there), ``noise_*`` what should be predicted (v or
    flow where the model predicts these). The authors take one noise and one timestep for both images. In float32 at least, since β
    multiplies a difference of means. Source: Wallace et al., CVPR 2024, eq. 14; Liu et al., ICCV 2025, with β = 5000.
    """
    wide = torch.promote_types(pred_safe.dtype, torch.float32)

    def error(prediction: Tensor, noise: Tensor) -> Tensor:
        return (prediction.to(wide) - noise.to(wide)).square().flatten(1).mean(1)

    def margin(safe: Tensor, unsafe: Tensor) -> Tensor:
        return error(safe, noise_safe) - error(unsafe, noise_unsafe)

    return -logsigmoid(-0.5 * beta * (margin(pred_safe, pred_unsafe) - margin(ref_safe.detach(), ref_unsafe.detach()))).mean()


@dataclass(frozen=True)
class Pairs:
    """Clean latents [n, ...] of safe and unsafe images from the same noise, and the prompts that should give the safe ones."""

    safe: Tensor
    unsafe: Tensor
    prompts: list[str]


@dataclass(frozen=True, kw_only=True)
class SafetyDPO(LowRankMethod):
    """SafetyDPO, or AlignGuard (Liu et al., ICCV 2025): diffusion DPO of one LoRA expert, on pairs that the base makes itself.

    For each seed the base draws the concept's prompt and the anchor's in the same template; a detector may look at both, and pairs whose
    first image lacks the concept, or whose second has it, are dropped. The concept's prompt is then taught to prefer the second. An
    expert is fitted for each category, and `erasure merge` makes one LoRA of several. The reference is the base with the adapter off.
    The authors also mirror images at random and encode them again, which is left out: latents are the sampler's own. Their pairs are 16k
    prompts of a language model.
    """

    name: ClassVar[str] = "safety_dpo"
    paper: ClassVar[str] = "arXiv:2412.10493"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {  # lr: 1e-5 for each of 4 images and 4 accumulated batches
            "part": "full", "steps": 2000, "lr": 1.6e-4, "batch": 16, "guidance": 7.5, "sampling_steps": 50, "images": 1000,
            "beta": 5000.0, "drop": 0.2, "warmup": 500, "detector": "", "retain_scale": 0.0, "expand": True,
        },
        "canvas": {
            "part": "full", "steps": 150, "lr": 3e-3, "batch": 8, "guidance": 4.0, "sampling_steps": 10, "images": 64,
            "beta": 60.0, "drop": 0.0, "warmup": 10, "detector": JUDGE, "retain_scale": 1.0, "expand": True,
        },
    }  # fmt: skip

    rank: int | None = 4
    """Rank of the expert; None trains the weights themselves."""
    layers: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names of the layers that get a LoRA, or dotted parts of names; of these, the ones in ``part``."""
    images: OfPreset[int] = FROM_PRESET
    """Pairs that the base makes first, before any is dropped, and as many images of what is kept."""
    beta: OfPreset[float] = FROM_PRESET
    """β: how sharply the model is held to the base."""
    drop: OfPreset[float] = FROM_PRESET
    """Share of prompts that are emptied, so that unguided predictions prefer the safe image too."""
    warmup: OfPreset[int] = FROM_PRESET
    """Steps over which the learning rate rises."""
    detector: OfPreset[str] = FROM_PRESET
    """What looks at the pairs: a detector as MODULE:CLASS, judge_dev on the canvas, or nothing, to keep all."""
    labels: tuple[str, ...] = ()
    """Labels of the detector that mean the concept; all, if not given."""
    threshold: float = 0.5
    """Score from which a label counts as seen."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < float("inf") or not 0 <= self.drop < 1 or self.warmup < 0 or not 0 < self.threshold <= 1:
            raise ErasureError(
                f"safety_dpo: beta is {self.beta}, drop {self.drop}, warmup {self.warmup} and threshold {self.threshold}; give beta "
                "above 0, drop from 0 to below 1, warmup from 0 on and threshold above 0 up to 1"
            )

    def chosen(self, pipe: Any, family: Family) -> list[str]:
        inside = set(tuning.chosen(pipe, family, self.part))
        names = [name for name in super().chosen(pipe, family) if name in inside]
        if not names:
            raise NothingAttached(f"safety_dpo: none of the layers {', '.join(self.layers)} is in the part {self.part!r}")
        return names

    def ceiling(self) -> float:
        return super().ceiling() * max(1.0, self.beta / 2)

    def optimiser(self) -> dict[str, Any]:
        return {"warmup": min(self.warmup, self.steps - 1), "weight_decay": 1e-2, "clip": 1.0}

    def objective(self, session: Session) -> Loss:
        pairs, kept, of = self.pairs(session), self.retained(session.concepts), session.denoising
        making: dict[str, Any] = {"steps": self.sampling_steps, "guidance": self.guidance, "batch": max(self.batch, 8), "whole": True}
        others = session.pool(kept, self.images, **making) if kept and self.retain_scale else None

        def step_loss(step: int, generator: torch.Generator) -> Tensor:
            which = torch.randint(len(pairs.prompts), (self.batch,), generator=generator)
            empty = torch.rand(self.batch, generator=generator) < self.drop
            words = ["" if bare else pairs.prompts[i] for i, bare in zip(which.tolist(), empty.tolist(), strict=True)]
            x0 = torch.cat((pairs.safe[which], pairs.unsafe[which]))
            noise = torch.cat([torch.randn(pairs.safe[which].shape, generator=generator).to(x0)] * 2)
            t = of.timesteps(self.batch, generator).repeat(2)
            x_t, wanted = of.schedule.add_noise(x0, noise, t), of.schedule.target(x0, noise, t).float()
            with session.tuned.reference():
                reference = of.predict(x_t, t, words * 2)
            (safe, unsafe), (ref_safe, ref_unsafe) = of.predict(x_t, t, words * 2).chunk(2), reference.chunk(2)
            noise_safe, noise_unsafe = wanted.chunk(2)
            total = loss(safe, unsafe, ref_safe, ref_unsafe, noise_safe, noise_unsafe, self.beta)
            if others is not None:
                x_t, t, some = others.state(self.batch, generator)
                phrases = [others.prompts[i] for i in some]
                with session.tuned.reference():
                    reference = of.predict(x_t, t, phrases)
                total = total + self.retain_scale * (of.predict(x_t, t, phrases) - reference).square().mean()
            return total

        return step_loss

    def pairs(self, session: Session) -> Pairs:
        """What the base draws of concept and anchor from the same seeds, without the pairs that show no difference to the detector."""
        texts = [(concept, *pair) for concept in session.concepts for pair in self.phrases([concept])]
        texts = [texts[i * len(texts) // self.images if len(texts) > self.images else i % len(texts)] for i in range(self.images)]
        seeds = torch.randint(2**31, (self.images,), generator=torch.Generator().manual_seed(session.run.seed)).tolist()
        making: dict[str, Any] = {"steps": self.sampling_steps, "guidance": self.guidance}
        seen = _seer(self.detector, self.labels, self.threshold)
        safe: list[Tensor] = []
        unsafe: list[Tensor] = []
        prompts: list[str] = []
        dropped = {"lack the concept": 0, "have it with the anchor's prompt too": 0}
        with session.tuned.reference():
            for start in tqdm(range(0, self.images, max(self.batch, 8)), desc="pairs", disable=not session.run.progress):
                part = slice(start, start + max(self.batch, 8))
                bad, bad_images = session.denoising.drawn([word for _, word, _ in texts[part]], seeds[part], **making)
                good, good_images = session.denoising.drawn([anchor for _, _, anchor in texts[part]], seeds[part], **making)
                for i, (concept, word, _) in enumerate(texts[part]):
                    if not seen(concept, bad_images[i], True):
                        dropped["lack the concept"] += 1
                    elif seen(concept, good_images[i], False):
                        dropped["have it with the anchor's prompt too"] += 1
                    else:
                        safe, unsafe, prompts = [*safe, good[i]], [*unsafe, bad[i]], [*prompts, word]
        said = f"{len(prompts)} of {self.images} pairs kept; " + ", ".join(f"{n} {why}" for why, n in dropped.items())
        if not prompts:
            raise ErasureError(f"safety_dpo: no usable pair: {said}; take another anchor, detector, threshold or prompt of the concept")
        if session.run.progress:
            tqdm.write(f"safety_dpo: {said}")
        log.info("safety_dpo: %s", said)
        return Pairs(torch.stack(safe), torch.stack(unsafe), prompts)


Seen = Callable[[Concept, Image, bool], bool]
"""Whether an image shows a concept, given whether it is supposed to."""


def _seer(name: str, labels: Sequence[str], threshold: float) -> Seen:
    """By the canvas's judge, by a class of that path, or, without either, whatever is supposed."""
    if not name:
        return lambda concept, image, supposed: supposed
    if name == JUDGE:
        return _on_canvas
    module, _, attribute = name.partition(":")
    try:
        detector = getattr(import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise ErasureError(
            f"safety_dpo: no detector {name!r} ({error}); give MODULE:CLASS, such as erasure.eval.detectors.opennsfw:OpenNSFW, "
            f"or {JUDGE}, or '' for none"
        ) from error
    known = detector.identity().labels
    if strange := set(labels) - set(known) if known else set():
        raise ErasureError(f"safety_dpo: {name} has no label {sorted(strange)[0]!r}; it has {', '.join(known[:20])}")

    def seen(concept: Concept, image: Image, supposed: bool) -> bool:
        (found,) = detector.detect([image])
        return any(score >= threshold and (not labels or label in labels) for label, score in found.findings())

    return seen


def _on_canvas(concept: Concept, image: Image, supposed: bool) -> bool:
    """By the canvas's judge for development: any of the concept's objects, or its style."""
    of = world()
    objects, styles = ([i for i, name in enumerate(names) if name in concept.targets] for names in (of.objects, of.styles))
    if not objects and not styles:
        raise ErasureError(f"safety_dpo: the canvas judge knows no target of {concept.name!r}; choose another detector, or none")
    verdict = judge_dev()(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 255)
    return bool(verdict.present[0, objects].any()) or int(verdict.style[0]) in styles
