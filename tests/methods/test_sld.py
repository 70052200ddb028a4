"""SLD against its paper written out element by element, against diffusers' own pipeline, and inside every family's sampling loop."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler
from torch import Tensor

from erasure import artifact
from erasure.concept import Concept
from erasure.errors import ErasureError, NotErased
from erasure.method import Run, compose
from erasure.methods import sld
from erasure.methods.perp_neg import PerpNeg
from erasure.methods.perp_neg import guide as perp_guide
from erasure.methods.safree import SAFREE
from erasure.methods.sld import PRESETS, SLD, Preset
from erasure.seams.branches import run_length
from tests.tiny import FAMILIES, flux, latents, sd1, sd3, sdxl

from . import guided
from .guided import encoded, run, worst

CONCEPT = Concept("dagger", targets=("dagger", "knife"))
SAFETY = "dagger, knife"
TARGET = "a photo of a dagger"
PROMPTS = [TARGET, "the night sky with a big red cat on a boat"]
QUICK = {"warmup": 1}
"""Within the few steps of these tests."""

PUBLISHED = {  # δ, s_S, λ, s_m, β_m
    "weak": (15, 20, 0.0, 0.0, 0.0),
    "weak-paper": (15, 200, 0.0, 0.0, 0.0),
    "medium": (10, 1000, 0.01, 0.3, 0.4),
    "strong": (7, 2000, 0.025, 0.5, 0.7),
    "max": (0, 5000, 1.0, 0.5, 0.7),
}


def fitted(pipe: Any, *concepts: Concept, **config: Any) -> Any:
    return SLD.from_config(config).fit(pipe, concepts or [CONCEPT], run=Run(progress=False))


def by_hand(uncond: Tensor, text: Tensor, safety: Tensor, nu: Tensor, step: int, numbers: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Eq. 3 to 8 of the paper, one element at a time in Python floats: (guidance term, momentum)."""
    delta, scale, threshold, momentum_scale, beta = numbers
    guidance, momentum = [], []
    for eps, eps_p, eps_s, old in zip(*(x.flatten().tolist() for x in (uncond, text, safety, nu)), strict=True):
        phi = min(1.0, abs(eps_p - eps_s) * scale)
        mu = phi if eps_p - eps_s < threshold else 0.0
        gamma = mu * (eps_s - eps) + momentum_scale * old
        guidance.append(eps_p - eps - (gamma if step >= delta else 0.0))
        momentum.append(beta * old + (1 - beta) * gamma)
    term, new = (torch.tensor(x, dtype=torch.float64).reshape(text.shape) for x in (guidance, momentum))
    return term, new


# the formula


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_preset_follows_the_paper_over_many_steps(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    momentum: Tensor | None = None
    expected = torch.zeros(2, 4, 4, 8)
    touched = 0
    for step in range(25):
        # Predictions near each other, so that the clamp, the threshold and both signs all occur.
        u, p, s = (torch.randn(2, 4, 4, 8, generator=generator, dtype=torch.float64) * 0.03 for _ in range(3))
        term, momentum = sld.guide(u, p, s, momentum, step, name)  # type: ignore[arg-type]
        wanted, expected = by_hand(u, p, s, expected, step, PUBLISHED[name])
        assert (term - wanted).abs().max() < 1e-12 and (momentum - expected).abs().max() < 1e-12
        touched += int((term != p - u).any())
    assert touched == 25 - PUBLISHED[name][0], "guidance begins at the step after the warm-up, and not before"


def test_a_worked_example() -> None:
    preset = Preset(scale=2, warmup=0, threshold=0.1, momentum_scale=0.5, momentum_beta=0.25)
    uncond, text, safety = torch.zeros(4), torch.tensor([0.25, 0.0, 0.0, 0.1]), torch.tensor([0.0, 0.25, 2.0, 0.0])
    # Text above safety by λ or more: untouched. Below it: 2 * .25 = .5 of it. Far below: all of it. Exactly λ above: untouched.
    term, momentum = sld.guide(uncond, text, safety, None, 0, preset)
    assert torch.allclose(term, torch.tensor([0.25, -0.125, -2.0, 0.1])) and torch.allclose(momentum, torch.tensor([0, 0.09375, 1.5, 0]))
    term, momentum = sld.guide(uncond, text, safety, momentum, 1, preset)
    assert torch.allclose(term, torch.tensor([0.25, -0.171875, -2.75, 0.1]))
    assert torch.allclose(momentum, 0.25 * torch.tensor([0, 0.09375, 1.5, 0]) + 0.75 * torch.tensor([0, 0.171875, 2.75, 0]))


def test_a_threshold_reads_the_sign_and_momentum_grows_while_warming_up() -> None:
    uncond, text, safety = torch.zeros(2), torch.tensor([-1.0, 1.0]), torch.tensor([0.5, -0.5])
    term, momentum = sld.guide(uncond, text, safety, torch.zeros(2), 3, "medium")
    assert torch.equal(term, text), "step 3 of a warm-up of 10"
    assert torch.allclose(momentum, torch.tensor([0.3, 0.0])), "-1.5 is below the threshold however large, 1.5 is above it"


def test_scale_zero_is_plain_guidance() -> None:
    u, p, s = torch.randn(3, 2, 4, 8, 8)
    term, momentum = sld.guide(u, p, s, torch.zeros_like(u), 0, Preset(0, 0, 0.5, 0.5, 0.7))
    assert torch.equal(term, p - u) and not momentum.any()


def test_the_presets_are_the_published_ones_and_each_number_can_be_replaced() -> None:
    for name, (warmup, scale, threshold, momentum_scale, beta) in PUBLISHED.items():
        assert PRESETS[name] == Preset(scale, warmup, threshold, momentum_scale, beta)
        assert SLD.from_config({"preset": name}).settings == PRESETS[name]
    assert SLD().settings == PRESETS["medium"]
    assert SLD(preset="max", scale=0.0, warmup=3).settings == Preset(0.0, 3, 1.0, 0.5, 0.7)
    assert SLD.from_config({"threshold": -0.5}).settings.threshold == -0.5
    for wrong in (
        {"scale": -1},
        {"warmup": -1},
        {"warmup": 10**9},
        {"momentum_beta": 1.5},
        {"momentum_scale": float("nan")},
        {"preset": "x"},
    ):
        with pytest.raises(ErasureError, match=next(iter(wrong))):
            SLD.from_config(wrong)


# inside pipelines


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gets_the_papers_guidance_at_every_step(name: str) -> None:
    images = {"num_videos_per_prompt" if name == "wan" else "num_images_per_prompt": 2}
    pipe, recording = run(name, lambda pipe: fitted(pipe, **QUICK), PROMPTS, seed=[1, 2, 3, 4], **images)
    momentum: Tensor | None = None

    def rule(uncond: Tensor, text: Tensor, extras: list[Tensor], step: int) -> Tensor:
        nonlocal momentum
        old = torch.zeros_like(text) if momentum is None else momentum
        term, momentum = by_hand(uncond, text, extras[0], old, step, (1, *PUBLISHED["medium"][1:]))
        return uncond + term

    assert worst(pipe, recording, 4, [SAFETY], rule) < 1e-9
    assert momentum is not None and momentum.abs().max() > 1e-3


@pytest.mark.parametrize("build", [sdxl, sd3, flux])
def test_the_safety_branch_has_pooled_vectors_of_its_own(build: Any) -> None:
    """With the pooled vector of the prompt instead, the reference must not fit any more."""
    pipe, recording = run(build.__name__, lambda pipe: fitted(pipe, warmup=0), PROMPTS, seed=[1, 2])
    own: Tensor | None = None

    def rule(uncond: Tensor, text: Tensor, extras: list[Tensor], step: int) -> Tensor:
        nonlocal own
        term, own = sld.guide(uncond, text, extras[0], own, step, Preset(1000, 0, 0.01, 0.3, 0.4))
        return uncond + term

    assert worst(pipe, recording, 2, [SAFETY], rule) < 1e-9
    own = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guided, "encoded", lambda pipe, text: (encoded(pipe, text)[0], encoded(pipe, TARGET)[1]))
        assert worst(pipe, recording, 2, [SAFETY], rule) > 1e-4


@torch.no_grad()
def sampled(pipe: Any, prompts: list[str], seeds: list[int], steps: int, scale: float, preset: Preset) -> Tensor:
    """A sampling loop of our own on SD 1, in float64: three separate calls of the UNet a step."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    text, uncond = pipe.encode_prompt(prompts, "cpu", 1, True)
    safety = pipe.encode_prompt([SAFETY] * len(prompts), "cpu", 1, False)[0]
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds])
    momentum = torch.zeros_like(x)
    numbers = (preset.warmup, preset.scale, preset.threshold, preset.momentum_scale, preset.momentum_beta)
    for step, t in enumerate(scheduler.timesteps):
        eps, eps_p, eps_s = (pipe.unet(x, t, encoder_hidden_states=c).sample for c in (uncond, text, safety))
        term, momentum = by_hand(eps, eps_p, eps_s, momentum, step, numbers)
        x = scheduler.step(eps + scale * term, t, x).prev_sample
    return x


@pytest.mark.parametrize("config", [{}, {"warmup": 2}, {"preset": "weak", "warmup": 2}], ids=str)
def test_sd1_equals_a_sampling_loop_by_hand(config: dict[str, Any]) -> None:
    pipe, steps = sd1().to(torch.float64), 12
    expected = sampled(pipe, PROMPTS, [1, 2], steps, 7.5, SLD.from_config(config).settings)
    plain = latents(pipe, PROMPTS, seed=[1, 2], steps=steps)
    with fitted(pipe, **config).attach(pipe):
        ours = latents(pipe, PROMPTS, seed=[1, 2], steps=steps)
    assert (ours - expected).abs().max() < 1e-6, "on latents of size 60"
    assert (ours - plain).abs().max() > 0.1


@pytest.mark.parametrize("name", ["WEAK", "MEDIUM", "STRONG", "MAX"])
def test_it_equals_the_pipeline_that_diffusers_ships(name: str) -> None:
    try:
        from diffusers.pipelines.deprecated.stable_diffusion_safe import SafetyConfig, StableDiffusionPipelineSafe
    except ImportError as error:
        pytest.skip(f"this version of diffusers has no StableDiffusionPipelineSafe any more: {error}")
    pipe, steps, seen = sd1().to(torch.float64), 18, list[Tensor]()
    official = StableDiffusionPipelineSafe(**pipe.components, requires_safety_checker=False)
    official.set_progress_bar_config(disable=True)
    official._safety_text_concept = SAFETY
    official(
        PROMPTS,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        callback=lambda i, t, x: seen.append(x.clone()),
        **getattr(SafetyConfig, name),
    )
    with fitted(pipe, preset=name.lower()).attach(pipe):
        ours = latents(pipe, PROMPTS, seed=[1, 2], steps=steps)
    assert (ours - seen[-1]).abs().max() < 1e-6
    assert (ours - latents(pipe, PROMPTS, seed=[1, 2], steps=steps)).abs().max() > 0.1


def test_an_artefact_of_one_phrase_is_saved_and_checked_past_the_warm_up(tmp_path: Path) -> None:
    """On the phrase alone SLD has nothing to tell apart, and two steps would all be warm-up."""
    pipe = sd1()
    artifact.save(SLD().fit(pipe, [Concept("dagger")]), tmp_path / "out", pipe=pipe, base_id="tiny")
    canary = artifact.read_config(tmp_path / "out")["canary"]
    assert canary["steps"] == 12 and canary["prompt"] == "a picture of dagger" and canary["delta"] > 1e-3
    assert artifact.verify(tmp_path / "out", sd1())["canary"]["measured"] == pytest.approx(canary["delta"], rel=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_scale_zero_leaves_a_run_as_it_was(name: str) -> None:
    pipe = FAMILIES[name]()
    plain = latents(pipe, TARGET)
    with fitted(pipe, scale=0.0, **QUICK).attach(pipe):
        assert (latents(pipe, TARGET) - plain).abs().max() < 1e-5 * plain.abs().max().clamp(min=1)


def test_momentum_ends_with_its_run() -> None:
    pipe = sd1()
    with fitted(pipe, preset="max").attach(pipe):
        first = latents(pipe, TARGET)
        latents(pipe, PROMPTS[1], seed=9, steps=7)
        assert torch.equal(latents(pipe, TARGET), first)
        with pytest.raises(ZeroDivisionError):
            latents(pipe, TARGET, callback_on_step_end=lambda *args: 1 // 0)
        assert torch.equal(latents(pipe, TARGET), first), "a run that broke off leaves no momentum behind"


def test_the_users_negative_prompt_stays_the_unconditional_side() -> None:
    pipe = sd1()
    with fitted(pipe, preset="max").attach(pipe):
        without, written = latents(pipe, TARGET), latents(pipe, TARGET, negative_prompt="red")
    with fitted(pipe, preset="max", scale=0.0).attach(pipe):
        plain = latents(pipe, TARGET, negative_prompt="red")
    assert (written - without).abs().max() > 0.05 and (written - plain).abs().max() > 0.05


def test_skip_layer_guidance_of_sd3_is_left_alone() -> None:
    pipe, recording = run(
        "sd3", lambda pipe: fitted(pipe, **QUICK), PROMPTS, seed=[1, 2], steps=8, skip_guidance_layers=[0], skip_layer_guidance_stop=0.6
    )
    apart = [call for call in recording.calls if call.inputs.get("skip_layers") is not None]
    assert len(apart) == 4 and all(len(call.output) == 2 for call in apart)
    own: Tensor | None = None

    def rule(uncond: Tensor, text: Tensor, extras: list[Tensor], step: int) -> Tensor:
        nonlocal own
        term, own = sld.guide(uncond, text, extras[0], own, step, SLD.from_config(QUICK).settings)
        return uncond + term

    assert worst(pipe, recording, 2, [SAFETY], rule) < 1e-9


@pytest.mark.parametrize("name", FAMILIES)
def test_guidance_off_raises(name: str) -> None:
    pipe = FAMILIES[name]()
    off: dict[str, Any] = {"true_cfg_scale": 1.0} if name == "flux" else {"guidance_scale": 1.0}
    with fitted(pipe, **QUICK).attach(pipe), pytest.raises(NotErased, match="true_cfg_scale" if name == "flux" else "guidance_scale"):
        latents(pipe, TARGET, **off)


def test_a_run_that_ends_within_the_warm_up_raises() -> None:
    pipe = sd1()
    with fitted(pipe).attach(pipe):
        with pytest.raises(NotErased, match="10 steps of warm-up and this run has 10"):
            latents(pipe, TARGET, steps=10)
        latents(pipe, TARGET, steps=11)
    base = latents(pipe, TARGET, steps=11)
    with fitted(pipe).attach(pipe):
        assert (latents(pipe, TARGET, steps=11) - base).abs().max() > 0.01


@pytest.mark.parametrize(("solver", "calls"), [(HeunDiscreteScheduler, 11), (DPMSolverMultistepScheduler, 6)])
def test_warm_up_counts_steps_also_where_a_solver_calls_twice(solver: Any, calls: int) -> None:
    pipe, seen = sd1(), list[int]()
    pipe.scheduler = solver.from_config(pipe.scheduler.config)
    hook = pipe.unet.register_forward_hook(lambda *args: seen.append(1))
    with fitted(pipe, warmup=5).attach(pipe):
        acting = latents(pipe, TARGET, steps=6)
        assert len(seen) == calls and run_length(pipe) == 6
        with pytest.raises(NotErased, match="this run has 5"):
            latents(pipe, TARGET, steps=5)
    hook.remove()
    assert (acting - latents(pipe, TARGET, steps=6)).abs().max() > 1e-3


def test_it_stacks_with_another_guidance_and_each_gets_its_own_branches() -> None:
    """What attaches last rides outermost: its rows are added last, and its rule sees the text prediction first."""

    class Both:
        def __init__(self, pipe: Any) -> None:
            self.first = fitted(pipe, **QUICK)
            self.second = PerpNeg(negatives="each").fit(pipe, [Concept("boat", targets=("boat", "sky"))])

        def attach(self, pipe: Any) -> Any:
            return compose(self.first, self.second).attach(pipe)

    own: Tensor | None = None

    def rule(uncond: Tensor, text: Tensor, extras: list[Tensor], step: int) -> Tensor:
        nonlocal own
        text = perp_guide(uncond, text, extras[1:], 1.5, 1.0)
        term, own = sld.guide(uncond, text, extras[0], own, step, SLD.from_config(QUICK).settings)
        return uncond + term

    for name in ("sd1", "flux"):
        own = None
        pipe, recording = run(name, Both, PROMPTS, seed=[1, 2])
        assert worst(pipe, recording, 2, [SAFETY, "boat", "sky"], rule) < 1e-9


@pytest.mark.parametrize("name", ["sd1", "flux"])
def test_it_stacks_with_safree_in_either_order(name: str) -> None:
    """SAFREE's third branch and SLD's are kept apart; what each does to the text prediction does not depend on the order."""
    pipe = FAMILIES[name]()
    filtered = SAFREE(self_validating=False, alpha=-1.0, negative_prompt=False).fit(pipe, [CONCEPT])
    guided_away = fitted(pipe, **QUICK)
    found = []
    for order in ([filtered], [guided_away], [filtered, guided_away], [guided_away, filtered]):
        with compose(*order).attach(pipe):
            found.append(latents(pipe, PROMPTS, seed=[1, 2]))
    alone, other, both, reversed_ = found
    assert (both - reversed_).norm() < 1e-4 * both.norm()
    assert min((both - alone).norm(), (both - other).norm()) > 0.05 * both.norm()


def test_a_negative_prompt_that_says_what_the_safety_text_says_leaves_nothing_to_guide_away_from() -> None:
    """Eq. 4 pushes from the unconditional towards the safety prediction; where they are one, γ is zero."""
    pipe = sd1().to(torch.float64)
    plain = latents(pipe, TARGET, negative_prompt=SAFETY)
    with fitted(pipe, preset="max").attach(pipe):
        assert (latents(pipe, TARGET, negative_prompt=SAFETY) - plain).abs().max() < 1e-6
