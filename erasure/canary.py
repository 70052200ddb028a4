"""A short run on a target prompt that must come out otherwise than from the base, by as much as was recorded."""

from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from .errors import ArtifactError
from .method import Eraser

SAMPLER = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": False, "timestep_spacing": "trailing", "steps_offset": 1}
"""What else tells one DDIM sampler from another, fixed."""
STEPS, GUIDANCE, SEED = 2, 5.0, 20_24
TOLERANCE = 0.05
FLOOR = 1e-4
"""A relative change under this is numerical noise, not erasure."""


def _reference(scheduler: Any) -> Any:
    """DDIM on the model's own noise schedule and prediction type: the canary must not depend on the sampler that a user prefers."""
    return DDIMScheduler.from_config(scheduler.config, **SAMPLER)


@torch.no_grad()
def _latents(pipe: Any, prompt: str) -> Tensor:
    bar = getattr(pipe, "_progress_bar_config", None)
    scheduler = pipe.scheduler
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = _reference(scheduler)
    try:
        out = pipe(
            prompt,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
        ).images
    finally:
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(**(bar or {}))
    return out.float().cpu()


def change(pipe: Any, eraser: Eraser, prompt: str) -> float:
    """Norm of the difference that ``eraser`` makes to the latents of a short run, relative to the base's."""
    base = _latents(pipe, prompt)
    with eraser.attach(pipe):
        edited = _latents(pipe, prompt)
    return float((edited - base).norm() / base.norm())


def measure(pipe: Any, eraser: Eraser) -> dict[str, Any]:
    """The canary to record when an eraser is saved."""
    prompt = eraser.concepts[0].targets[0]
    delta = change(pipe, eraser, prompt)
    if not delta > FLOOR:
        raise ArtifactError(f"{eraser.method.name} does not change what {prompt!r} gives (relative change {delta:.1e}): nothing was erased")
    return {"prompt": prompt, "seed": SEED, "steps": STEPS, "guidance": GUIDANCE, "delta": round(delta, 6)}


def check(pipe: Any, eraser: Eraser, recorded: dict[str, Any], source: str) -> dict[str, float]:
    """Raise unless the canary moves as recorded, within 5 %."""
    delta = change(pipe, eraser, recorded["prompt"])
    if not delta > FLOOR or abs(delta - recorded["delta"]) > TOLERANCE * recorded["delta"]:
        raise ArtifactError(
            f"{source}: the canary {recorded['prompt']!r} moves by {delta:.4f}, the artefact recorded {recorded['delta']:.4f}: "
            "it does not do here what it did"
        )
    return {"recorded": recorded["delta"], "measured": round(delta, 6)}
