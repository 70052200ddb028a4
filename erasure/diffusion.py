"""Noise, clean samples and predictions: the algebra that eps, v, x0 and flow models share, so that a loss is written once.

Source: Ho et al. 2020 (eps), Salimans and Ho 2022 (v), Lipman et al. 2023 and Liu et al. 2023 (flow: velocity = noise - x0).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import ErasureError

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]


def prediction_of(scheduler: Any) -> Prediction:
    """What a model on this scheduler predicts; flow-matching schedulers have no ``prediction_type``, or say flow_prediction."""
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if kind == "flow_prediction":
        return "flow"
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise ErasureError(f"{type(scheduler).__name__} predicts {kind!r}, which no formula here knows")
    prediction: Prediction = kind
    return prediction


@dataclass(frozen=True)
class Schedule:
    """x_t = signal x0 + sigma noise for every training timestep, and what the model predicts of it."""

    signal: Tensor
    """[timesteps], in float64."""
    sigma: Tensor
    """[timesteps], in float64."""
    prediction: Prediction

    @classmethod
    def of(cls, scheduler: Any) -> "Schedule":
        """The training schedule of a diffusers scheduler; a flow's timestep t of 1000 is the noise share t / 1000 before any shift."""
        prediction = prediction_of(scheduler)
        if hasattr(scheduler, "alphas_cumprod"):
            alphas = scheduler.alphas_cumprod.double()
            return cls(alphas.sqrt(), (1 - alphas).sqrt(), prediction)
        n = scheduler.config.num_train_timesteps
        sigma = torch.arange(n + 1, dtype=torch.float64) / n
        return cls(1 - sigma, sigma, prediction)

    def at(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and sigma at timesteps [n] or one for all, shaped to multiply ``like`` [n, ...]. Fractional flow timesteps interpolate."""
        t = torch.as_tensor(t, device=self.signal.device)
        low, share = t.long(), (t.double() - t.long())
        high = (low + 1).clamp(max=len(self.signal) - 1)
        shape = (-1, *[1] * (like.ndim - 1)) if t.ndim else ()
        both = ((table[low] + share * (table[high] - table[low])).reshape(shape).to(like) for table in (self.signal, self.sigma))
        signal, sigma = both
        return signal, sigma

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """x_t [n, ...] of clean samples and noise."""
        a, s = self.at(t, x0)
        return a * x0 + s * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """What the model should predict at x_t [n, ...]."""
        a, s = self.at(t, x0)
        match self.prediction:
            case "epsilon":
                return noise
            case "sample":
                return x0
            case "v_prediction":
                return a * noise - s * x0
            case "flow":
                return noise - x0

    def x0(self, prediction: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """The clean sample that a prediction at x_t [n, ...] stands for; eps models divide by the signal, which ends near zero."""
        a, s = self.at(t, x_t)
        match self.prediction:
            case "epsilon":
                return (x_t - s * prediction) / a
            case "sample":
                return prediction
            case "v_prediction":
                return a * x_t - s * prediction
            case "flow":
                return x_t - s * prediction

    def noise(self, prediction: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """The noise that a prediction at x_t [n, ...] stands for; not defined for x0 predictions where there is no noise."""
        a, s = self.at(t, x_t)
        match self.prediction:
            case "epsilon":
                return prediction
            case "sample":
                return (x_t - a * prediction) / s
            case "v_prediction":
                return s * x_t + a * prediction
            case "flow":
                return x_t + a * prediction


def generators(seeds: Sequence[int], device: str | torch.device = "cpu") -> list[torch.Generator]:
    """A generator for each image, so that an image does not depend on its batch."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


@torch.no_grad()
def partial(pipe: Any, prompt: str | list[str], *, steps: int, stop: int, seeds: Sequence[int], **options: Any) -> tuple[Tensor, Tensor]:
    """Latents after ``stop`` of ``steps`` sampling steps, and the timestep that would come next; the pipeline's own loop makes them.

    Source: ESD samples its training states x_t so (Gandikota et al., ICCV 2023).
    """
    if not 0 < stop < steps:
        raise ErasureError(f"cannot stop after {stop} of {steps} steps: give 0 < stop < steps")
    kept: list[Tensor] = []

    def take(running: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step + 1 == stop:
            kept.extend((values["latents"].detach().clone(), torch.as_tensor(running.scheduler.timesteps[step + 1])))
            running._interrupt = True
        return values

    pipe(
        prompt, num_inference_steps=steps, generator=generators(seeds), output_type="latent", callback_on_step_end=take,
        callback_on_step_end_tensor_inputs=["latents"], **options,
    )  # fmt: skip
    latents, timestep = kept
    return latents, timestep
