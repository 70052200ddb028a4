"""The contract on every method and family, and what several erasers on one pipeline owe each other."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from torch import Tensor

import erasure
from erasure import artifact, compose
from erasure.concept import Concept
from erasure.errors import Conflict, ErasureError, NotErased, NothingAttached
from erasure.families import NAMES, family_of
from erasure.method import Run, RuntimeEraser, WeightEraser
from erasure.registry import methods
from erasure.testing import CHECKS, Subject, check_method
from erasure.testing.subject import CONCEPT, TARGET, VISIBLE, change, edited_or_raises, hooks, same_state, state
from erasure.testing.tiny import FAMILIES, latents, sd1

from .stand_ins import text_coders, unet_coder

TINY = {"batch": 1, "sampling_steps": 2, "size": 16, "images": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "sld": {"preset": "weak", "warmup": 0},
    "esd": {**TINY, "steps": 2, "lr": 0.05, "eta": 3.0},
    "concept_ablation": {**TINY, "steps": 3, "lr": 0.1, "retain_scale": 0.0},
    "salun": {**TINY, "steps": 2, "lr": 0.02},
    "adv_unlearn": {**TINY, "steps": 2, "lr": 0.05, "eta": 3.0, "warmup": 1, "attack_steps": 1, "retain_batch": 1},
    "itd": {"k": 32, "factor": -8.0, "threshold_scale": 0.05},
    "conceptprune": {"size": 16, "images": 2, "sampling_steps": 4, "timesteps": 2, "ratio": 0.3},
    "ssd_diffusion": {"size": 16, "images": 2, "draws": 1, "sampling_steps": 2, "alpha": 2.0},
    "safety_dpo": {**TINY, "steps": 4, "lr": 0.2, "beta": 50.0, "warmup": 0},
    "gs_lora": {**TINY, "steps": 3, "lr": 0.05, "rank": 2},
    "minimalist": {**TINY, "accumulation": 1, "steps": 6, "lr": 1.5, "budget": 0.3, "clamp": "through"},
    "saeuron": {"sae": unet_coder(), "images": 1, "steps": 2, "percentile": 80.0, "factor": -20.0},
}
"""What a method needs to show in a run of four steps; SLD's other presets jump at a threshold, where float32 noise decides."""


def subject(name: str, family: str) -> Subject:
    files = {"sae": text_coders(family)} if name == "itd" else {}
    return Subject(methods.get(name), family, SETTINGS.get(name, {}) | files)


SUBJECTS = {
    f"{name}-{family}": subject(name, family) for name in methods.builtin for family in NAMES if family in methods.get(name).families
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", SUBJECTS)
def test_contract(case: str, check: str) -> None:
    CHECKS[check](SUBJECTS[case])


def test_every_family_has_a_tiny_pipeline_of_its_own() -> None:
    assert tuple(FAMILIES) == ("sd1", "sd2", "sdxl", "sd3", "flux", "wan")
    assert {name: family_of(build()).name for name, build in FAMILIES.items()} == {name: name for name in NAMES}


@pytest.mark.parametrize("family", NAMES)
def test_a_tiny_pipeline_is_built_in_under_a_second(family: str) -> None:
    import time

    FAMILIES[family]()  # imports
    best = min(_seconds(FAMILIES[family], time.perf_counter) for _ in range(3))
    assert best < 1


def _seconds(build: Any, clock: Any) -> float:
    start = clock()
    build()
    return float(clock() - start)


# pipelines that share the parts of an attached one, or take an image

IMAGE_TO_IMAGE = ("sd1", "sd2", "sdxl", "sd3", "flux")


def image_options(pipe: Any) -> dict[str, Any]:
    options = size_of_image(pipe)
    return {"image": torch.zeros(1, 3, 16, 16), "num_inference_steps": 4, "strength": 1.0, "output_type": "latent", **options}


def size_of_image(pipe: Any) -> dict[str, Any]:
    match family_of(pipe).name:
        case "flux":
            return {"height": 16, "width": 16, "max_sequence_length": 48, "true_cfg_scale": 4.0, "negative_prompt": ""}
        case "sd3":
            return {"height": 16, "width": 16, "max_sequence_length": 48}
    return {}


def image_to_image(pipe: Any, prompt: str, **options: Any) -> Tensor:
    return torch.as_tensor(pipe(prompt, generator=torch.Generator().manual_seed(0), **image_options(pipe) | options).images)


@pytest.mark.parametrize("name", methods.builtin)
@pytest.mark.parametrize("family", IMAGE_TO_IMAGE)
def test_image_to_image_pipelines_are_erased_too(name: str, family: str) -> None:
    if family not in methods.get(name).families:
        pytest.skip(f"{name} has no formula for {family}")
    pipe = AutoPipelineForImage2Image.from_pipe(FAMILIES[family]())
    pipe.set_progress_bar_config(disable=True)
    base = image_to_image(pipe, TARGET)
    with subject(name, family).fit(pipe).attach(pipe):
        assert change(image_to_image(pipe, TARGET), base) > VISIBLE / 4
    assert torch.equal(image_to_image(pipe, TARGET), base)


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("name", methods.builtin)
def test_an_image_to_image_pipeline_made_from_an_attached_one_is_edited_or_refused(name: str, guidance: float) -> None:
    pipe, options = sd1(), {"guidance_scale": guidance}
    base = image_to_image(AutoPipelineForImage2Image.from_pipe(sd1()), TARGET, **options)
    with subject(name, "sd1").fit(pipe).attach(pipe):
        other = AutoPipelineForImage2Image.from_pipe(pipe)
        back = AutoPipelineForText2Image.from_pipe(other)
        edited_or_raises(lambda: image_to_image(other, TARGET, **options), base, "image to image")
        latents(pipe, TARGET)  # the attached pipeline's own call must not open the door for the other
        edited_or_raises(lambda: image_to_image(other, TARGET, **options), base, "image to image, after a call")
        edited_or_raises(lambda: latents(back, TARGET), latents(sd1(), TARGET), "AutoPipeline and back")


# prompt seams

PROMPT_SEAM = [name for name, entry in methods.builtin.items() if entry.kind == "runtime" and name != "saeuron"]


@pytest.mark.parametrize("name", PROMPT_SEAM)
def test_embeddings_that_no_eraser_has_seen_are_refused_by_name(name: str) -> None:
    pipe = sd1()
    embeds, negative = pipe.encode_prompt(TARGET, "cpu", 1, True)
    with subject(name, "sd1").fit(pipe).attach(pipe):
        with pytest.raises(NotErased, match="prompt_embeds"):
            latents(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=negative)  # type: ignore[arg-type]
        with pytest.raises(NotErased, match="negative_prompt_embeds"):
            latents(pipe, TARGET, negative_prompt_embeds=negative)
        with pytest.raises(NotErased, match="before any prompt"):
            pipe.unet(torch.zeros(2, 4, 8, 8), 1, encoder_hidden_states=torch.cat([negative, embeds]))
        latents(pipe, "a cat")
        with pytest.raises(NotErased, match="before any prompt"):  # a finished run takes its embeddings with it
            pipe.unet(torch.zeros(2, 4, 8, 8), 1, encoder_hidden_states=torch.cat([negative, embeds]))
        pipe.encode_prompt("a cat", "cpu", 1, True)
        with pytest.raises(NotErased, match="did not pass"):
            pipe.unet(torch.zeros(2, 4, 8, 8), 1, encoder_hidden_states=torch.cat([negative, embeds]))
        with pytest.raises(NotErased, match="without encoder_hidden_states"):
            pipe.unet(torch.zeros(2, 4, 8, 8), 1, encoder_hidden_states=None)


def test_flux_knows_its_two_calls_apart_after_an_aborted_run() -> None:
    pipe = FAMILIES["flux"]()
    with subject("negative_prompt", "flux").fit(pipe).attach(pipe):
        expected = latents(pipe, TARGET)
        pipe.encode_prompt(TARGET, max_sequence_length=48)  # one encoding that no run follows
        assert torch.equal(latents(pipe, TARGET), expected)
        with pytest.raises(NotErased, match="true_cfg_scale > 1"):
            latents(pipe, TARGET, true_cfg_scale=1.0)
        with pytest.raises(NotErased, match="negative_prompt"):
            latents(pipe, TARGET, negative_prompt=None)
        assert torch.equal(latents(pipe, TARGET), expected)


@pytest.mark.parametrize("name", ["negative_prompt", "uce"])
def test_prompts_of_each_encoder_and_several_images_a_prompt(name: str) -> None:
    for family in ("sdxl", "sd3"):
        pipe = FAMILIES[family]()
        negatives = {"negative_prompt": "dog", "negative_prompt_2": "boat"}
        options: dict[str, Any] = {"prompt_2": "a big red cat", "num_images_per_prompt": 2, **negatives}
        base = latents(pipe, TARGET, **options)
        with subject(name, family).fit(pipe).attach(pipe):
            erased = latents(pipe, TARGET, **options)
        assert erased.shape == base.shape and len(base) == 2 and change(erased, base) > VISIBLE


# artefacts and schedulers


@pytest.mark.parametrize("name", methods.builtin)
def test_an_artefact_does_not_depend_on_the_users_scheduler(name: str, tmp_path: Path) -> None:
    pipe = sd1()
    artifact.save(subject(name, "sd1").fit(pipe), tmp_path / "out", pipe=pipe, base_id="tiny")
    for cls in (DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler):
        other = sd1()
        other.scheduler = scheduler = cls.from_config(other.scheduler.config)
        attributes = set(vars(other))
        report = erasure.verify(tmp_path / "out", other)
        assert report["canary"]["measured"] == pytest.approx(report["canary"]["recorded"], rel=1e-3)
        assert other.scheduler is scheduler and "_erasers" not in set(vars(other)) - attributes


@pytest.mark.parametrize("name", methods.builtin)
def test_verify_refuses_an_attached_pipeline_and_leaves_it_erased(name: str, tmp_path: Path) -> None:
    pipe = sd1()
    artifact.save(subject(name, "sd1").fit(pipe), tmp_path / "out", pipe=pipe, base_id="tiny")
    erasure.load(tmp_path / "out", base=pipe)
    erased = latents(pipe, TARGET)
    with pytest.raises(ErasureError, match="attached"):
        erasure.verify(tmp_path / "out", pipe)
    assert torch.equal(latents(pipe, TARGET), erased)


def test_a_weight_eraser_ships_as_an_ordinary_pipeline(tmp_path: Path) -> None:
    pipe = sd1()
    with UCE.fit(pipe).attach(pipe):
        erased = latents(pipe, TARGET)
        pipe.save_pretrained(tmp_path / "shipped")
    shipped = type(pipe).from_pretrained(tmp_path / "shipped", use_safetensors=True)
    shipped.set_progress_bar_config(disable=True)
    assert torch.allclose(latents(shipped, TARGET), erased, atol=1e-5)


# several erasers on one pipeline

NEGATIVE, UCE, SAFREE = (subject(name, "sd1") for name in ("negative_prompt", "uce", "safree"))


@pytest.mark.parametrize(
    ("inner", "outer"), [(NEGATIVE, UCE), (UCE, NEGATIVE), (UCE, SAFREE), (NEGATIVE, SAFREE), (SAFREE, NEGATIVE)], ids=str
)
def test_different_methods_stack(inner: Subject, outer: Subject) -> None:
    pipe = sd1()
    base, attributes = latents(pipe, TARGET), set(vars(pipe))
    first, second = inner.fit(pipe), outer.fit(pipe, Concept("cat", anchors=("boat",)))
    with first.attach(pipe):
        alone = latents(pipe, TARGET)
        with second.attach(pipe):
            both = latents(pipe, TARGET)
            with pytest.raises(NotErased if RuntimeEraser in (*type(first).__mro__, *type(second).__mro__) else ErasureError):
                latents(pipe, None, prompt_embeds=torch.zeros(1, 77, 32), negative_prompt_embeds=torch.zeros(1, 77, 32))  # type: ignore[arg-type]
        assert torch.equal(latents(pipe, TARGET), alone)
    assert (both - alone).norm() > 1e-3 * base.norm() and (alone - base).norm() > 0.05 * base.norm()
    assert torch.equal(latents(pipe, TARGET), base) and set(vars(pipe)) == attributes and hooks(pipe) == 0


def test_two_uce_erasers_conflict() -> None:
    pipe = sd1()
    before, other = state(pipe), UCE.fit(pipe, Concept("cat"))
    with UCE.fit(pipe).attach(pipe), pytest.raises(Conflict, match="one method on all concepts"), other.attach(pipe):
        pass
    assert same_state(state(pipe), before)


@pytest.mark.parametrize(
    ("first", "second"), [(NEGATIVE, NEGATIVE), (NEGATIVE, SAFREE), (SAFREE, NEGATIVE), (UCE, SAFREE), (SAFREE, UCE)], ids=str
)
def test_taking_off_the_lower_eraser_first_raises_and_leaves_the_upper_at_work(first: Subject, second: Subject) -> None:
    pipe = sd1()
    base, before, attributes = latents(pipe, TARGET), state(pipe), set(vars(pipe))
    upper_eraser = second.fit(pipe)
    with upper_eraser.attach(pipe):
        upper_alone = latents(pipe, TARGET)
    lower, upper = first.fit(pipe).attach(pipe), upper_eraser.attach(pipe)
    lower.__enter__()
    upper.__enter__()
    latents(pipe, TARGET)
    with pytest.raises(Conflict, match="attached after it"):
        lower.__exit__(None, None, None)
    assert torch.equal(latents(pipe, TARGET), upper_alone)
    if isinstance(upper_eraser, RuntimeEraser):
        with pytest.raises(NotErased):
            pipe.save_pretrained("nowhere")
    upper.__exit__(None, None, None)
    assert torch.equal(latents(pipe, TARGET), base)
    assert same_state(state(pipe), before) and set(vars(pipe)) == attributes and hooks(pipe) == 0


def test_weights_that_something_else_changed_meanwhile_are_restored_and_reported() -> None:
    pipe = sd1()
    before = state(pipe)
    eraser = UCE.fit(pipe)
    assert isinstance(eraser, WeightEraser)
    with pytest.raises(Conflict, match="something else"), eraser.attach(pipe), torch.no_grad():
        pipe.unet.get_parameter(next(iter(eraser.changed)).removeprefix("unet.")).add_(1)
    assert same_state(state(pipe), before)


def test_offloaded_weights_are_refused_rather_than_left_unedited() -> None:
    pipe = sd1()
    eraser = UCE.fit(pipe)
    pipe.unet = copy.deepcopy(pipe.unet).to("meta")
    with pytest.raises(NothingAttached, match="offload"), eraser.attach(pipe):
        pass


def test_detach_takes_off_every_eraser_even_where_one_complains() -> None:
    pipe = sd1()
    before, attributes = state(pipe), set(vars(pipe))
    erasure.erase(pipe, CONCEPT, "negative_prompt")
    eraser = erasure.erase(pipe, CONCEPT, "uce")
    assert isinstance(eraser, WeightEraser)
    with torch.no_grad():
        pipe.unet.get_parameter(next(iter(eraser.changed)).removeprefix("unet.")).add_(1)
    with pytest.raises(Conflict):
        erasure.detach(pipe)
    assert same_state(state(pipe), before) and set(vars(pipe)) == attributes and hooks(pipe) == 0


# compose


def test_compose_attaches_in_order_and_detaches_in_reverse() -> None:
    pipe = sd1()
    base = latents(pipe, TARGET)
    first, second, third = NEGATIVE.fit(pipe), UCE.fit(pipe, Concept("cat", anchors=("boat",))), SAFREE.fit(pipe)
    stack = compose(compose(first, second), third)
    assert stack.erasers == (first, second, third)
    with first.attach(pipe), second.attach(pipe), third.attach(pipe):
        nested = latents(pipe, TARGET)
    with stack.attach(pipe):
        assert torch.equal(latents(pipe, TARGET), nested) and pipe._erasers == [first, second, third]
    assert torch.equal(latents(pipe, TARGET), base) and hooks(pipe) == 0
    with pytest.raises(Conflict), compose(first, second, UCE.fit(pipe)).attach(pipe):
        pass
    assert torch.equal(latents(pipe, TARGET), base) and "_erasers" not in vars(pipe)
    with pytest.raises(ErasureError, match="no eraser"):
        compose()


def test_disjoint_weight_erasers_commute() -> None:
    pipe = sd1()
    whole = UCE.fit(pipe)
    assert isinstance(whole, WeightEraser)
    names = sorted(whole.changed)
    halves = [WeightEraser(whole.method, whole.concepts, {n: whole.changed[n] for n in part}) for part in (names[::2], names[1::2])]
    results = []
    for order in (halves, halves[::-1]):
        with compose(*order).attach(pipe):
            results.append(latents(pipe, TARGET))
    with whole.attach(pipe):
        assert (latents(pipe, TARGET) - results[0]).abs().max() < 1e-6
    assert (results[0] - results[1]).abs().max() < 1e-6


# methods of strangers


def test_check_method_runs_the_contract_and_names_every_check_that_fails() -> None:
    from erasure.methods.negative_prompt import NegativePrompt, NegativePromptEraser

    assert check_method(NegativePrompt, families=["sd1"]) == len(CHECKS)

    @dataclass(frozen=True)
    class Idle(NegativePromptEraser):
        def edits(self, pipe: Any, family: Any) -> Any:
            return []

    class Broken(NegativePrompt):
        name = "broken"

        def fit(self, pipe: Any, concepts: Any, *, run: Run = Run()) -> NegativePromptEraser:
            vars(pipe)["left_behind"] = True
            return Idle(self, tuple(concepts))

    with pytest.raises(AssertionError, match="attaching changes the target") as caught:
        check_method(Broken, families=["sd1"])
    assert f"of {len(CHECKS)} checks" in str(caught.value) and "fit leaves no trace" in str(caught.value)
    with pytest.raises(ErasureError, match="no family sd9"):
        check_method(NegativePrompt, families=["sd9"])


def test_several_artefacts_load_in_their_order_or_not_at_all(tmp_path: Path) -> None:
    pipe = sd1()
    base = latents(pipe, TARGET)
    erasers = [NEGATIVE.fit(pipe), UCE.fit(pipe, Concept("cat", anchors=("boat",)))]
    folders = [artifact.save(eraser, tmp_path / eraser.method.name, pipe=pipe, base_id="tiny") for eraser in erasers]
    with compose(*erasers).attach(pipe):
        expected = latents(pipe, TARGET)
    assert torch.equal(latents(erasure.load(folders, base=pipe), TARGET), expected)
    erasure.detach(pipe)
    assert torch.equal(latents(pipe, TARGET), base)
    with pytest.raises(Conflict):
        erasure.load([*folders, folders[1]], base=pipe)
    assert torch.equal(latents(pipe, TARGET), base) and "_erasers" not in vars(pipe)
