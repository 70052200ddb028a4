"""The algebra of eps, v, x0 and flow models against diffusers' schedulers, in float64."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from erasure.diffusion import Schedule, generators, partial, prediction_of
from erasure.errors import ErasureError
from erasure.testing.tiny import FAMILIES, SCHEDULE, latents, size_of

T = torch.tensor([1, 250, 500, 998])
KINDS = ("epsilon", "v_prediction", "sample")


def rand(seed: int) -> Tensor:
    return torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X0, NOISE = rand(0), rand(1)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def schedulers() -> list[Any]:
    return [*(DDIMScheduler(**{**SCHEDULE, "prediction_type": kind}) for kind in KINDS), FlowMatchEulerDiscreteScheduler()]


@pytest.mark.parametrize("scheduler", schedulers(), ids=lambda s: prediction_of(s))
def test_a_perfect_prediction_gives_back_sample_and_noise(scheduler: Any) -> None:
    schedule = Schedule.of(scheduler)
    x_t, target = schedule.add_noise(X0, NOISE, T), schedule.target(X0, NOISE, T)
    close(schedule.x0(target, x_t, T), X0)
    close(schedule.noise(target, x_t, T), NOISE)


@pytest.mark.parametrize("kind", KINDS)
def test_noising_and_targets_are_those_of_ddpm(kind: str) -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind, clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    schedule = Schedule.of(scheduler)
    close(schedule.add_noise(X0, NOISE, T), scheduler.add_noise(X0, NOISE, T))
    if kind == "v_prediction":
        close(schedule.target(X0, NOISE, T), scheduler.get_velocity(X0, NOISE, T))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [1, 501, 981])
def test_the_clean_sample_is_the_one_that_ddim_predicts(kind: str, t: int) -> None:
    scheduler = DDIMScheduler(**{**SCHEDULE, "prediction_type": kind})
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(50)
    prediction = rand(2)
    theirs = scheduler.step(prediction, t, X0).pred_original_sample
    close(Schedule.of(scheduler).x0(prediction, X0, t), theirs)


def test_a_flows_velocity_moves_along_the_line_from_noise_to_sample() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    schedule = Schedule.of(scheduler)
    for i, t in enumerate(scheduler.timesteps[:-1]):
        x_t = schedule.add_noise(X0, NOISE, t)
        scheduler._step_index = None
        stepped = scheduler.step(schedule.target(X0, NOISE, t), t, x_t).prev_sample
        close(stepped, schedule.add_noise(X0, NOISE, scheduler.timesteps[i + 1]), 1e-5)  # the scheduler's timesteps are float32
        close(scheduler.scale_noise(X0, t[None], NOISE), x_t, 1e-6)


def test_fractional_timesteps_of_a_shifted_flow_are_noise_shares() -> None:
    schedule = Schedule.of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    signal, sigma = schedule.at(torch.tensor([0.0, 0.25, 999.5, 1000.0], dtype=torch.float64), X0)
    close(sigma.flatten(), torch.tensor([0, 0.00025, 0.9995, 1], dtype=torch.float64))
    close(signal + sigma, torch.ones_like(sigma))


def test_coefficients_take_the_dtype_and_the_shape_of_the_sample() -> None:
    schedule = Schedule.of(DDPMScheduler())
    video = torch.zeros(2, 16, 3, 4, 4, dtype=torch.bfloat16)
    signal, sigma = schedule.at(torch.tensor([3, 7]), video)
    assert signal.shape == sigma.shape == (2, 1, 1, 1, 1) and signal.dtype == torch.bfloat16
    assert schedule.at(5, video)[0].shape == ()


def test_prediction_types() -> None:
    assert prediction_of(UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)) == "flow"
    assert {name: prediction_of(build().scheduler) for name, build in FAMILIES.items()} == {
        "sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon", "sd3": "flow", "flux": "flow", "wan": "flow",
    }  # fmt: skip
    odd = DDPMScheduler()
    odd.register_to_config(prediction_type="score")
    with pytest.raises(ErasureError, match="score"):
        prediction_of(odd)


def test_each_image_has_its_own_generator() -> None:
    draws = [torch.randn(3, generator=g) for g in generators([5, 6, 5])]
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_partial_run_stops_where_the_whole_run_passes(name: str) -> None:
    pipe = FAMILIES[name]()
    prompt, passed = "a photo of a dagger", {}

    def note(running: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        passed[step] = values["latents"].clone()
        return values

    whole = latents(pipe, prompt, seed=[3], callback_on_step_end=note)
    stopped, timestep = partial(pipe, prompt, steps=4, stop=2, seeds=[3], **size_of(pipe, prompt))
    assert torch.equal(stopped, passed[1]) and float(timestep) == float(pipe.scheduler.timesteps[2])
    assert torch.equal(latents(pipe, prompt, seed=[3]), whole), "the next run is whole again"
    with pytest.raises(ErasureError, match="0 < stop < steps"):
        partial(pipe, prompt, steps=4, stop=4, seeds=[3])
