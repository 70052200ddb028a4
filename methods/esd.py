"""Erased Stable Diffusion: the model learns to predict, for the concept, what the base predicts guided away from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from erasure.denoising import Denoising
from erasure.errors import ErasureError
from erasure.trained import FROM_PRESET, LowRankMethod, OfPreset, Session
from erasure.training import Loss


def target(null: Tensor, concept: Tensor, eta: float, start: Tensor | None = None) -> Tensor:
    """What the edited model should predict for the concept, start - η (concept - null), all [batch, ...].

    ``null`` and ``concept`` are the base's predictions for the empty prompt and the concept. Without ``start`` it is null: the paper's
    rule and original code, where η = 1. The authors' newer code starts from the concept itself (or from a prompt that the concept is
    erased from): ``start=concept`` with η + 1 is the original with η, and η = 1 there gives null itself. Linear in the predictions, so
    the same rule holds for noise, velocities and flows at one state. Source: Gandikota et al., ICCV 2023.
    """
    return (null if start is None else start) - eta * (concept - null)


@dataclass(frozen=True, kw_only=True)
class ESD(LowRankMethod):
    """Erased Stable Diffusion (Gandikota et al., ICCV 2023), with its sets of weights x, u, full and selfattn.

    States are partial samples of the concept's prompt at the timestep that the sampler itself would take next, as in the authors' newer
    code (the original tells the model a timestep 39 to 58 above the noise that is in its state). The empty prompt is what the pipeline
    itself guides from, zeros on SDXL, where the authors encode "". ``part`` is the paper's ESD-x by default, for styles and names; it
    takes ESD-u for objects and nudity. The official code's later version has other semantics of η: see ``start``. A retain list, which the
    paper has not, adds the squared distance to the base's predictions on retained phrases.
    """

    name: ClassVar[str] = "esd"
    paper: ClassVar[str] = "arXiv:2303.07345"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "part": "x", "steps": 1000, "lr": 1e-5, "batch": 1, "guidance": 3.0, "sampling_steps": 50, "eta": 1.0, "start": "null",
            "states": "edited", "images": 100, "retain_scale": 0.0, "expand": False,
        },
        "canvas": {
            "part": "full", "steps": 200, "lr": 3e-4, "batch": 8, "guidance": 4.0, "sampling_steps": 10, "eta": 1.0, "start": "anchor",
            "states": "base", "images": 192, "retain_scale": 3.0, "expand": True,
        },
    }  # fmt: skip

    eta: OfPreset[float] = FROM_PRESET
    """Strength of the negative guidance, η."""
    start: OfPreset[Literal["null", "concept", "anchor", "from"]] = FROM_PRESET
    """Where the guidance away starts: null (paper: η = 1), concept (the authors' newer code: η = 2 for the same), or the anchor. from (that
    code's erase_from): the anchor, whose prompt is then sampled and trained instead of the concept's, so that the anchor loses it."""
    states: OfPreset[Literal["edited", "base"]] = FROM_PRESET
    """Which model samples the states that it trains on: the one in training, as in the original code, or the base."""
    images: OfPreset[int] = FROM_PRESET
    """Samples of the base, and as many of the retain list, on whose ways the states of ``base`` and of what is kept lie."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -100 <= self.eta <= 100:
            raise ErasureError(f"esd: eta is {self.eta}; the paper's is 1, and more than 100 is no guidance")

    def ceiling(self) -> float:
        return super().ceiling() * max(1.0, self.eta**2)

    def objective(self, session: Session) -> Loss:
        pairs, kept = self.phrases(session.concepts), self.retained(session.concepts)
        if self.start == "from" and not all(anchor for _, anchor in pairs):
            raise ErasureError("esd: start=from erases the concept from its anchor: give the concept an anchor that is not empty")
        making: dict[str, Any] = {"steps": self.sampling_steps, "guidance": self.guidance, "batch": max(self.batch, 8), "whole": True}
        asked = [anchor if self.start == "from" else word for word, anchor in pairs]
        base = session.pool(asked, self.images, **making) if self.states == "base" else None
        others = session.pool(kept, self.images, **making) if kept and self.retain_scale else None
        of = session.denoising

        def loss(step: int, generator: torch.Generator) -> Tensor:
            if base is None:
                x_t, t, some = self._edited(of, asked, generator)
            else:
                x_t, t, samples = base.state(self.batch, generator)
                some = [base.sources[i] for i in samples]
            words, anchors = zip(*(pairs[i] for i in some), strict=True)
            wanted = self._targets(session, x_t, t, words, anchors)
            total = (of.predict(x_t, t, [asked[i] for i in some]) - wanted).square().mean()
            if others is not None:
                x_t, t, some = others.state(self.batch, generator)
                words = tuple(others.prompts[i] for i in some)
                with session.tuned.reference():
                    wanted = of.predict(x_t, t, words)
                total = total + self.retain_scale * (of.predict(x_t, t, words) - wanted).square().mean()
            return total

        return loss

    def _edited(self, of: Denoising, prompts: list[str], generator: torch.Generator) -> tuple[Tensor, Tensor, list[int]]:
        """States of the model as it is by now, after a random number of steps, and which prompts they are of."""
        some = torch.randint(len(prompts), (self.batch,), generator=generator).tolist()
        seeds = torch.randint(2**31, (self.batch,), generator=generator).tolist()
        stop = int(torch.randint(self.sampling_steps, (), generator=generator))
        x_t, t = of.states([prompts[i] for i in some], seeds, steps=self.sampling_steps, stop=stop, guidance=self.guidance)
        return x_t, t, some

    def _targets(self, session: Session, x_t: Tensor, t: Tensor, words: Sequence[str], anchors: Sequence[str]) -> Tensor:
        with session.tuned.reference():
            null, concept = (session.denoising.predict(x_t, t, texts) for texts in ([""] * len(words), words))
            match self.start:
                case "null":
                    return target(null, concept, self.eta)
                case "concept":
                    return target(null, concept, self.eta, concept)
                case "anchor" | "from":
                    return target(null, concept, self.eta, session.denoising.predict(x_t, t, anchors))
