"""The whole sampler as one differentiable function, in the memory of one of its steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from erasure.denoising import Denoising
from erasure.seams.denoiser import Branch


@dataclass
class Chain:
    """Deterministic sampling (DDIM for UNets, Euler for flows) from noise to the final latents, as the pipeline's own loop does it.

    Both samplers are one rule: x' = signal' x0 + sigma' noise, with x0 and noise as the prediction says. ``recompute``: each step keeps its
    input alone and is run again in the backward pass, so that memory does not grow with the steps; whatever random numbers the model is
    given (gates) must stay the same until then. Source: Minimalist Concept Erasure, ICML 2025, whose code draws them anew.
    """

    denoising: Denoising
    steps: int
    guidance: float = 1.0
    recompute: bool = True
    times: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)
    """Each step's timestep, and that of the state which it leads to."""

    def start(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """The noise [n, ...] that the pipeline would start from; sets the timesteps, which in FLUX depend on the size of the image."""
        noise, _ = self.denoising.states(prompts, seeds, steps=self.steps, stop=0, guidance=self.guidance)
        scheduler = self.denoising.pipe.scheduler
        now = scheduler.timesteps.cpu()
        if self.denoising.schedule.prediction == "flow":
            after = torch.cat((now[1:], now.new_zeros(1)))
        else:
            after = (now - scheduler.config.num_train_timesteps // self.steps).clamp(min=0)
        self.times = list(zip(now, after, strict=True))
        return noise

    def final(self, noise: Tensor, prompts: Sequence[str]) -> Tensor:
        """Final latents [n, ...] of prompts from noise [n, ...]."""
        branch = self._branches(prompts)
        x = noise
        for now, after in self.times:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(self._step, x, now, after, branch, use_reentrant=False)
            else:
                x = self._step(x, now, after, branch)
        return x

    def _branches(self, prompts: Sequence[str]) -> Branch:
        """Encodings of the prompts, behind those of the empty prompt where guidance runs."""
        return self.denoising.encode([*[""] * len(prompts), *prompts] if self.guidance > 1 else prompts)

    def _step(self, x: Tensor, now: Tensor, after: Tensor, branch: Any) -> Tensor:
        schedule = self.denoising.schedule
        if self.guidance > 1:
            null, text = self.denoising.predict(torch.cat((x, x)), now, branch).chunk(2)
            prediction = null + self.guidance * (text - null)
        else:
            prediction = self.denoising.predict(x, now, branch)
        signal, sigma = schedule.at(after, x)
        return signal * schedule.x0(prediction, x, now) + sigma * schedule.noise(prediction, x, now)
