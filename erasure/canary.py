"""A short run on a target prompt that must come out otherwise than from the base, by as much as was recorded."""

import math
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from .denoising import twin
from .diffusion import prediction_of
from .errors import ArtifactError
from .families import Family, call_options, family_of
from .method import Eraser
from .seams import adapters

SAMPLER = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": False, "timestep_spacing": "trailing", "steps_offset": 1}
"""What else tells one DDIM sampler from another, fixed."""
STEPS, GUIDANCE, SEED = 2, 5.0, 20_24
SIZE, FRAMES = 32, 5
"""Latent pixels a side for transformers, and frames for video."""
CONCEPTS = 4
"""Of how many concepts the first target is tried."""
TOLERANCE, QUANTISED_TOLERANCE = 0.05, 0.5
FLOOR = 1e-4
"""A relative change under this is numerical noise, not erasure."""


def _reference(scheduler: Any) -> Any:
    """DDIM on the model's own noise schedule, Euler on an unshifted flow: the canary must not depend on the sampler that a user prefers."""
    if prediction_of(scheduler) == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=scheduler.config.num_train_timesteps)
    return DDIMScheduler.from_config(scheduler.config, **SAMPLER)


def _options(pipe: Any, family: Family) -> dict[str, Any]:
    """Guidance for every family, and a small size for those whose default is large: UNets run at their own."""
    options: dict[str, Any] = {family.scale: GUIDANCE, **call_options(pipe)}
    if family.scale == "true_cfg_scale":
        options["negative_prompt"] = ""
    if family.denoisers != ("unet",):
        factor = getattr(pipe, "vae_scale_factor", None) or pipe.vae_scale_factor_spatial
        options["height"] = options["width"] = min(SIZE, getattr(pipe, "default_sample_size", SIZE)) * factor
    if family.name == "wan":
        options["num_frames"] = FRAMES
    return options


@torch.no_grad()
def latents(pipe: Any, prompt: str, steps: int = STEPS) -> Tensor:
    """Latents of a short guided run at a fixed seed, by a fixed sampler."""
    bar = getattr(pipe, "_progress_bar_config", None)
    scheduler = pipe.scheduler
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = _reference(scheduler)
    try:
        out = pipe(
            prompt,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
            **_options(pipe, family_of(pipe)),
        )
    finally:
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(**(bar or {}))
    made: Tensor = out.frames if hasattr(out, "frames") else out.images
    return made.float().cpu()


def change(pipe: Any, eraser: Eraser, prompt: str) -> float:
    """Norm of the difference that ``eraser`` makes to the latents of a short run, relative to the base's.

    A pipeline that wants an image, too, is run as the text-to-image one with its parts, and so moves as that does.
    """
    pipe, steps = _from_text(pipe), steps_of(eraser)
    base = latents(pipe, prompt, steps)
    with eraser.attach(pipe):
        edited = latents(pipe, prompt, steps)
    return float((edited - base).norm() / base.norm())


def _from_text(pipe: Any) -> Any:
    family = family_of(pipe)
    return pipe if any(cls.__name__ == family.pipelines[0] for cls in type(pipe).__mro__) else twin(pipe, family)


def steps_of(eraser: Eraser) -> int:
    """A short run, past the step at which the eraser begins."""
    return eraser.first_step + STEPS


def prompts(eraser: Eraser) -> list[str]:
    """The first target of each of the first concepts."""
    return list(dict.fromkeys(eraser.probe.format(concept.targets[0]) for concept in eraser.concepts))[:CONCEPTS]


def measure(pipe: Any, eraser: Eraser) -> dict[str, Any]:
    """The canary to record when an eraser is saved: how far it moves the first concept's prompt, and others' ``also``."""
    moves: list[dict[str, Any]] = []
    for prompt in prompts(eraser):
        with adapters.muted(pipe):
            delta = change(pipe, eraser, prompt)
        if not FLOOR < delta < math.inf:
            raise ArtifactError(
                f"{eraser.method.name} does not change what {prompt!r} gives (relative change {delta:.1e}): nothing was erased"
            )
        moves.append({"prompt": prompt, "delta": round(delta, 6)})
    first, *also = moves
    return {**first, "also": also, "seed": SEED, "steps": steps_of(eraser), "guidance": GUIDANCE}


def check(pipe: Any, eraser: Eraser, recorded: dict[str, Any], source: str, *, quantised: bool = False) -> dict[str, Any]:
    """Raise unless each recorded prompt moves as it did, within 5 %, on a quantised base within half.

    Artefacts of older versions recorded the first concept alone.
    """
    tolerance = QUANTISED_TOLERANCE if quantised else TOLERANCE
    moves = [recorded, *recorded.get("also", [])]
    if (found := [move["prompt"] for move in moves]) != (wanted := prompts(eraser)[: len(moves)]):
        raise ArtifactError(f"{source}: the canary was recorded for {found}, the concepts ask for {wanted}: the configuration was edited")
    with adapters.muted(pipe):
        measured = [_checked(pipe, eraser, move, source, tolerance) for move in moves]
    report: dict[str, Any] = {"recorded": recorded["delta"], "measured": measured[0]}
    return report | ({"also": dict(zip(found[1:], measured[1:], strict=True))} if len(moves) > 1 else {})


def _checked(pipe: Any, eraser: Eraser, move: dict[str, Any], source: str, tolerance: float) -> float:
    prompt, wanted = move["prompt"], move["delta"]
    try:
        delta = change(pipe, eraser, prompt)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(f"{source}: the canary {prompt!r} does not run with this eraser: {error}") from error
    if not (FLOOR < delta < math.inf and abs(delta - wanted) <= tolerance * wanted):
        raise ArtifactError(
            f"{source}: the canary {prompt!r} moves by {delta:.4f}, the artefact recorded {wanted:.4f}: it does not do here what it did"
        )
    return round(delta, 6)
