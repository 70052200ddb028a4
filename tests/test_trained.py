"""What trained methods share: predictions outside the loop, partial states, what is trained, the base at hand, bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, EulerDiscreteScheduler
from torch import Tensor

from erasure import lora, tuning
from erasure.cli.bench import parse_methods
from erasure.cli.main import main
from erasure.concept import Concept
from erasure.denoising import Denoising
from erasure.errors import ErasureError, NotErased, NothingAttached
from erasure.families import family_of
from erasure.method import Run
from erasure.methods.esd import ESD
from erasure.methods.uce import UCE
from erasure.testing.subject import CONCEPT, same_state, state, trace
from erasure.testing.tiny import FAMILIES, sd1, size_of
from erasure.trained import Session

TRAINED = ("sd1", "sd2", "sdxl", "sd3", "flux")
WORDS = ["a big red dagger", "the night sky"]
QUICK: dict[str, Any] = {"steps": 2, "lr": 0.05, "batch": 1, "sampling_steps": 2, "size": 16, "eta": 3.0, "images": 2}


def calls(pipe: Any, **options: Any) -> list[tuple[dict[str, Any], Tensor]]:
    """Inputs and predictions of every call of the denoiser in an unguided run."""
    family, found = family_of(pipe), []
    ((_, denoiser),) = family.parts(pipe)

    def note(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        found.append((dict(zip(family.inputs, args, strict=False)) | kwargs, output[0] if isinstance(output, tuple) else output.sample))

    with denoiser.register_forward_hook(note, with_kwargs=True):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        pipe(WORDS, num_inference_steps=4, generator=generators, output_type="latent", **options)
    return found


# predictions and states


@pytest.mark.parametrize("name", TRAINED)
def test_states_and_predictions_are_those_of_the_pipelines_own_loop(name: str) -> None:
    pipe = FAMILIES[name]()
    family = family_of(pipe)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    size = {key: value for key, value in size_of(pipe, WORDS).items() if "cfg" not in key and "negative" not in key}
    own = calls(pipe, **{family.scale: 1.0}, **size)
    of = Denoising(pipe, family, 16)
    for stop in (0, 2):
        x_t, t = of.states(WORDS, [1, 2], steps=4, stop=stop, guidance=1.0)
        inputs, prediction = own[stop]
        torch.testing.assert_close(x_t, inputs[family.inputs[0]], atol=1e-6, rtol=1e-5)
        timestep = torch.as_tensor(inputs["timestep"]).flatten()[0]
        assert float(t) * (1e-3 if name == "flux" else 1.0) == pytest.approx(float(timestep))
        with torch.no_grad():
            torch.testing.assert_close(of.predict(x_t, t, WORDS), prediction, atol=1e-5, rtol=1e-4)
            both = of.predict(x_t, t.expand(2), of.encode(WORDS))
            torch.testing.assert_close(both, prediction, atol=1e-5, rtol=1e-4)
            alone = torch.cat([of.predict(x_t[i : i + 1], t, [WORDS[i]]) for i in range(2)])
            torch.testing.assert_close(alone, prediction, atol=1e-4, rtol=1e-3)
        assert (prediction[0] - prediction[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", TRAINED)
def test_states_are_a_mix_of_image_and_noise_by_the_schedule(name: str) -> None:
    """At the last step of an unguided run the clean sample that the prediction stands for is what the run ends with."""
    pipe = FAMILIES[name]()
    of = Denoising(pipe, family_of(pipe), 16)
    x_t, t = of.states(WORDS, [1, 2], steps=4, stop=3, guidance=1.0)
    with torch.no_grad():
        clean = of.schedule.x0(of.predict(x_t, t, WORDS), x_t, t)
    path, timesteps = of.paths(WORDS, [1, 2], steps=4, guidance=1.0)
    assert (clean - path[:, -1]).norm() < 0.03 * clean.norm()  # DDIM's last alpha is that of timestep 0, not 1
    assert path.shape == (2, 5, *x_t.shape[1:]) and len(timesteps) == 4
    for stop in (0, 1, 3):
        x_t, t = of.states(WORDS, [1, 2], steps=4, stop=stop, guidance=1.0)
        assert torch.equal(path[:, stop], x_t) and float(t) == float(timesteps[stop])


def test_a_users_sampler_that_scales_its_latents_does_not_reach_the_states() -> None:
    pipe = sd1()
    plain = Denoising(pipe, family_of(pipe)).states(WORDS, [1, 2], steps=4, stop=2, guidance=3.0)
    pipe.scheduler = scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    x_t, t = Denoising(pipe, family_of(pipe)).states(WORDS, [1, 2], steps=4, stop=2, guidance=3.0)
    assert torch.equal(x_t, plain[0]) and t == plain[1] and pipe.scheduler is scheduler


def test_the_empty_prompt_of_sdxl_is_what_its_guidance_uses() -> None:
    pipe = FAMILIES["sdxl"]()
    context, pooled = Denoising(pipe, family_of(pipe)).encode(["", "a cat"])
    assert pooled is not None and not context[0].any() and not pooled[0].any() and context[1].any() and pooled[1].any()
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert Denoising(pipe, family_of(pipe)).encode([""])[0].any()


def test_timesteps_cover_the_schedule() -> None:
    for name, whole in (("sd1", True), ("flux", False)):
        pipe = FAMILIES[name]()
        t = Denoising(pipe, family_of(pipe), 16).timesteps(4000, torch.Generator().manual_seed(0))
        assert 0 <= t.min() < 5 and 995 < t.max() < 1000 and abs(float(t.double().mean()) - 500) < 15
        assert bool((t == t.long()).all()) is whole


# what is trained


def test_the_parts_of_a_unet_are_disjoint_where_they_should_be_and_cover_it() -> None:
    pipe = sd1()
    family = family_of(pipe)
    kv, x, u, full, attention = (set(tuning.chosen(pipe, family, part)) for part in ("kv", "x", "u", "full", "selfattn"))  # type: ignore[arg-type]
    assert kv < x and not x & u and attention < u and x | u < full
    assert {name.split(".")[1] for name in full - x - u} == {"time_embedding", "conv_norm_out", "conv_out"}
    assert all(".attn2.to_k." in name or ".attn2.to_v." in name for name in kv) and all(".attn1." in name for name in attention)
    assert full == {f"unet.{name}" for name, _ in pipe.unet.named_parameters()}


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_parts_of_a_joint_transformer(name: str) -> None:
    pipe = FAMILIES[name]()
    family = family_of(pipe)
    kv, x, u, attention = (set(tuning.chosen(pipe, family, part)) for part in ("kv", "x", "u", "selfattn"))  # type: ignore[arg-type]
    assert kv < x and not x & u and attention < u
    assert all("add_k_proj" in n or "add_v_proj" in n for n in kv) and not any("add_" in n for n in u)
    assert any(n.startswith("transformer.single_transformer_blocks.0.proj_out") for n in u) is (name == "flux")
    assert not any(n.startswith("transformer.proj_out") for n in u)


def test_named_layers_take_the_place_of_a_part_and_unknown_ones_are_named() -> None:
    pipe = sd1()
    family = family_of(pipe)
    assert tuning.chosen(pipe, family, "full", ["conv_in"]) == ["unet.conv_in.weight", "unet.conv_in.bias"]
    assert set(tuning.chosen(pipe, family, "x", ["unet.mid_block", "attn1.to_q"])) > set(tuning.chosen(pipe, family, "x", ["mid_block"]))
    with pytest.raises(ErasureError, match=r"no layer 'attn2\.to_kk' in its denoiser; did you mean attn2\.to_k\?"):
        tuning.chosen(pipe, family, "x", ["attn1", "attn2.to_kk"])
    with pytest.raises(ErasureError, match=r"no layer 'attn3'"):
        ESD(**QUICK, layers=("attn3",), rank=2).fit(pipe, [CONCEPT])


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("name", ["sd1", "flux"])
def test_the_reference_is_the_base_and_all_is_put_back(name: str, rank: int | None) -> None:
    pipe = FAMILIES[name]()
    family = family_of(pipe)
    of = Denoising(pipe, family, 16)
    x_t, t = of.states(WORDS, [1, 2], steps=4, stop=2, guidance=1.0)
    flags = {n: p.requires_grad for n, p in family.parts(pipe).__next__()[1].named_parameters()}
    with torch.no_grad():
        base = of.predict(x_t, t, WORDS)
    before, traces = state(pipe), trace(pipe)
    names = tuning.chosen(pipe, family, "x")
    with tuning.weights(pipe, names) if rank is None else tuning.lora(pipe, names, rank, 0) as tuned:
        wanted = {id(p) for p in tuned.parameters.values()}
        grads = [p for _, part in family.parts(pipe) for p in part.parameters() if p.requires_grad]
        assert {id(p) for p in grads} == wanted and not any(p.requires_grad for p in pipe.text_encoder.parameters())
        torch.testing.assert_close(of.predict(x_t, t, WORDS).detach(), base, atol=1e-6, rtol=1e-5)  # B is zero
        with torch.no_grad():
            for parameter in tuned.parameters.values():
                parameter.add_(0.1)
        moved = of.predict(x_t, t, WORDS)
        with tuned.reference():
            torch.testing.assert_close(of.predict(x_t, t, WORDS), base, atol=1e-6, rtol=1e-5)
        assert torch.equal(of.predict(x_t, t, WORDS), moved) and (moved - base).norm() > 0.01 * base.norm()
        moved.square().mean().backward()  # the reference leaves the graph that was there alone
        assert all(p.grad is not None and p.grad.shape == p.shape for p in tuned.parameters.values())
        assert set(tuned.tensors()) == set(tuned.parameters)
    assert same_state(state(pipe), before) and trace(pipe) == traces
    after = dict(family.parts(pipe).__next__()[1].named_parameters())
    assert {n: p.requires_grad for n, p in after.items()} == flags and all(p.grad is None for p in after.values())


def test_autocast_keeps_no_cast_of_the_other_weights() -> None:
    layer = torch.nn.Linear(4, 4, bias=False)
    tuned = tuning.Tuned({"w": layer.weight}, {"w": layer.weight.detach().clone()})
    x = torch.ones(1, 4)
    with torch.no_grad():
        layer.weight.add_(1)
    with torch.autocast("cpu", torch.bfloat16):
        first = layer(x).detach().clone()
        with tuned.reference():
            base = layer(x).clone()
        last = layer(x).detach()
    assert torch.equal(first, last) and (first - base).min() > 3.5


def test_lora_factors_do_not_depend_on_the_global_generator_and_have_their_shapes() -> None:
    pipe = sd1()
    names = tuning.chosen(pipe, family_of(pipe), "kv")
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(torch.seed() % 1000)
        rng = torch.random.get_rng_state()
        with tuning.lora(pipe, names, 3, seed) as tuned:
            found.append({name: p.detach().clone() for name, p in tuned.parameters.items()})
        assert torch.equal(torch.random.get_rng_state(), rng)
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0]) and len(found[0]) == 2 * len(names)
    assert any(not torch.equal(found[0][n], found[2][n]) for n in found[0])
    assert lora.by_component(found[0])["unet"].keys() == {name.removeprefix("unet.").removesuffix(".weight") for name in names}
    with pytest.raises(ErasureError, match="rank 99 does not fit"), tuning.lora(pipe, names, 99, 0):
        pass
    with pytest.raises(NothingAttached, match="linear layers"), tuning.lora(pipe, ["unet.conv_norm_out.weight"], 2, 0):
        pass


# fits


def test_presets_fill_what_is_not_given_and_the_configuration_says_all() -> None:
    paper, canvas = ESD(), ESD.from_config({"preset": "canvas", "lr": 0.5})
    assert (paper.lr, paper.steps, paper.eta, paper.guidance, paper.sampling_steps) == (1e-5, 1000, 1.0, 3.0, 50)
    assert canvas.lr == 0.5 and canvas.steps == ESD.PRESETS["canvas"]["steps"] and canvas.config()["steps"] == canvas.steps
    assert ESD.from_config(canvas.config()) == canvas and None not in {canvas.config()[key] for key in ESD.PRESETS["canvas"]}
    with pytest.raises(ErasureError, match="preset"):
        ESD.from_config({"preset": "quick"})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"lr": -1.0}, "lr is -1"),
        ({"rank": 0}, "rank is 0"),
        ({"size": 0}, "size is 0"),
        ({"eta": 1e9}, "eta is"),
    ],
)
def test_senseless_settings_are_named(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ErasureError, match=said):
        ESD.from_config(config)


def test_a_retained_phrase_that_another_concept_erases_is_an_error() -> None:
    concepts = [Concept("dagger", retain=("Big  Cat",)), Concept("animal", targets=("big cat", "dog"))]
    with pytest.raises(ErasureError, match=r"concept 'dagger' retains 'Big  Cat', which 'animal' erases"):
        ESD(**QUICK).fit(sd1(), concepts)


def test_a_retained_phrase_that_a_template_erases_is_an_error() -> None:
    concept = Concept("dagger", retain=("A  dagger",))
    with pytest.raises(ErasureError, match="the prompt 'a dagger' is erased and retained"):
        ESD(**{**QUICK, "expand": True}).fit(sd1(), [concept])


def test_a_pipeline_with_an_eraser_attached_is_no_base() -> None:
    pipe = sd1()
    with ESD(**QUICK).fit(pipe, [CONCEPT], run=Run(progress=False)).attach(pipe), pytest.raises(NotErased, match="detach it first"):
        ESD(**QUICK).fit(pipe, [CONCEPT])


def test_a_fit_on_an_image_to_image_pipeline_is_that_on_its_text_to_image_one() -> None:
    pipe = sd1()
    first = ESD(**QUICK).fit(pipe, [CONCEPT], run=Run(progress=False)).tensors()
    second = ESD(**QUICK).fit(AutoPipelineForImage2Image.from_pipe(pipe), [CONCEPT], run=Run(progress=False)).tensors()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradient_checkpointing_gives_the_same_weights_and_is_off_afterwards() -> None:
    pipe = sd1()
    plain, saving = (
        ESD(**QUICK, gradient_checkpointing=wanted).fit(pipe, [CONCEPT], run=Run(progress=False)).tensors() for wanted in (False, True)
    )
    assert not pipe.unet.is_gradient_checkpointing
    for name in plain:
        torch.testing.assert_close(saving[name], plain[name], atol=1e-5, rtol=1e-4)


def test_a_killed_fit_goes_on_and_gives_the_same_eraser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, pipe = ESD.from_config({**QUICK, "steps": 4, "rank": 2}), sd1()
    whole = method.fit(pipe, [CONCEPT], run=Run(progress=False)).tensors()
    objective = ESD.objective

    def failing(self: ESD, session: Session) -> Any:
        inner = objective(self, session)

        def loss(step: int, generator: torch.Generator) -> Tensor:
            if step == 3:
                raise KeyboardInterrupt
            return inner(step, generator)

        return loss

    before = state(pipe)
    monkeypatch.setattr("erasure.trained.SAVE_EVERY", 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ESD, "objective", failing)
        method.fit(pipe, [CONCEPT], run=Run(progress=False, checkpoint=tmp_path))
    assert same_state(state(pipe), before) and list(tmp_path.iterdir())
    again = method.fit(pipe, [CONCEPT], run=Run(progress=False, checkpoint=tmp_path)).tensors()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    with pytest.raises(ErasureError, match=r"method\.esd\.eta was 3\.0, is 2\.0"):
        ESD.from_config({**method.config(), "eta": 2.0}).fit(pipe, [CONCEPT], run=Run(progress=False, checkpoint=tmp_path))
    with pytest.raises(ErasureError, match="concepts was"):
        method.fit(pipe, [Concept("cat")], run=Run(progress=False, checkpoint=tmp_path))
    with pytest.raises(ErasureError, match="base"):
        method.fit(sd1(seed=1), [CONCEPT], run=Run(progress=False, checkpoint=tmp_path))


# the command line


def test_a_preset_of_the_command_line_reaches_the_methods_that_have_it() -> None:
    chosen = parse_methods("esd,uce", "canvas")
    assert chosen == [ESD(preset="canvas"), UCE()] and parse_methods("esd") == [ESD()]
    with pytest.raises(ErasureError, match=r"--preset canvas: none of these methods has it \(presets: none\)"):
        parse_methods("uce", "canvas")
    with pytest.raises(ErasureError, match=r"presets: canvas, paper"):
        parse_methods("esd", "papr")


def test_erase_trains_saves_and_leaves_no_state_of_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--steps", "2", "--images", "1", "--sampling-steps", "2", "--batch", "1", "--lr", "0.01", "--rank", "2"]
    command = ["erase", "esd", "--model", "canvas", "--concept", "dagger", "--preset", "canvas", *few, "--out", str(tmp_path / "out"), "-q"]
    assert main(command) == 0 and [p.name for p in tmp_path.iterdir()] == ["out"]
    config = json.loads((tmp_path / "out" / "erasure_config.json").read_text())
    assert config["kind"] == "adapter" and config["method_config"]["eta"] == 1.0 and config["method_config"]["states"] == "base"
    assert main([*command[:5], "dagger", *command[6:], "--layers", "attn9"]) == 2
    assert "no layer 'attn9'" in capsys.readouterr().err
