"""ESD's target by hand, both conventions of η, and what a fit moves."""

from typing import Any

import pytest
import torch
from torch import Tensor

from erasure.adapter import AdapterEraser
from erasure.concept import Concept
from erasure.denoising import Denoising
from erasure.diffusion import Schedule
from erasure.errors import ErasureError
from erasure.families import family_of
from erasure.method import Run, WeightEraser
from erasure.methods import esd
from erasure.methods.esd import ESD
from erasure.testing import check_method
from erasure.testing.subject import CONCEPT, TARGET
from erasure.testing.tiny import FAMILIES, latents, sd1
from erasure.tuning import chosen

QUICK: dict[str, Any] = {"steps": 2, "lr": 0.05, "batch": 2, "sampling_steps": 2, "size": 16, "eta": 3.0, "images": 2}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NULL, CONCEPT_PRED, OTHER = rand(2, 4, 8, 8), rand(2, 4, 8, 8, seed=1), rand(2, 4, 8, 8, seed=2)


@pytest.mark.parametrize("eta", [0.0, 1.0, 2.5])
def test_the_target_is_null_minus_eta_times_the_concepts_direction(eta: float) -> None:
    by_hand = torch.empty_like(NULL)
    for place in range(NULL.numel()):
        n, c = float(NULL.flatten()[place]), float(CONCEPT_PRED.flatten()[place])
        by_hand.view(-1)[place] = n - eta * (c - n)
    torch.testing.assert_close(esd.target(NULL, CONCEPT_PRED, eta), by_hand, atol=1e-12, rtol=0)
    torch.testing.assert_close(esd.target(NULL, CONCEPT_PRED, eta, OTHER), by_hand - NULL + OTHER, atol=1e-12, rtol=0)


def test_the_newer_codes_eta_is_one_more_and_one_there_gives_null() -> None:
    for eta in (0.0, 1.0, 3.0):
        newer = esd.target(NULL, CONCEPT_PRED, eta + 1, start=CONCEPT_PRED)
        torch.testing.assert_close(newer, esd.target(NULL, CONCEPT_PRED, eta), atol=1e-12, rtol=0)
    torch.testing.assert_close(esd.target(NULL, CONCEPT_PRED, 1.0, start=CONCEPT_PRED), NULL, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["sd1", "sd2", "flux"])
def test_the_rule_on_predictions_is_the_rule_on_the_noise_they_stand_for(name: str) -> None:
    """Noise is linear in what eps, v and flow models predict at one state, with weights that add up."""
    schedule = Schedule.of(FAMILIES[name]().scheduler)
    x_t, t = rand(2, 4, 8, 8, seed=5), torch.tensor([200, 700])
    guided = esd.target(NULL, CONCEPT_PRED, 1.5)
    null, concept = (schedule.noise(each, x_t, t) for each in (NULL, CONCEPT_PRED))
    torch.testing.assert_close(schedule.noise(guided, x_t, t), esd.target(null, concept, 1.5), atol=1e-10, rtol=0)


def test_training_brings_the_prediction_to_the_target_and_away_from_the_base() -> None:
    """With one state and enough steps the model predicts what the formula asks for."""
    pipe = sd1()
    method = ESD.from_config({**QUICK, "part": "full", "steps": 40, "lr": 2e-3, "states": "base", "images": 1, "eta": 1.0})
    concept = Concept("dagger")
    of = Denoising(pipe, family_of(pipe), 16)
    seed = int(torch.randint(2**31, (1,), generator=torch.Generator().manual_seed(0)))
    path, timesteps = of.paths(["dagger"], [seed], steps=2, guidance=3.0)
    x_t, t = path[:, 1], timesteps[1:]
    with torch.no_grad():
        null, base = of.predict(x_t, t, [""]), of.predict(x_t, t, ["dagger"])
        wanted = esd.target(null, base, 1.0)
        with method.fit(pipe, [concept], run=Run(progress=False)).attach(pipe):
            edited = of.predict(x_t, t, ["dagger"])
    assert (edited - wanted).norm() < 0.5 * (base - wanted).norm()


@pytest.mark.parametrize("part", ["kv", "x", "u", "full", "selfattn"])
def test_a_fit_moves_its_part_and_nothing_else(part: Any) -> None:
    pipe = sd1()
    eraser = ESD.from_config({**QUICK, "part": part}).fit(pipe, [CONCEPT], run=Run(progress=False))
    assert isinstance(eraser, WeightEraser) and set(eraser.changed) == set(chosen(pipe, family_of(pipe), part))
    moved = {name for name, p in eraser.changed.items() if not torch.equal(p, pipe.unet.get_parameter(name.removeprefix("unet.")))}
    assert len(moved) > 0.9 * len(eraser.changed)


def test_settings_reach_the_loss() -> None:
    pipe = sd1()

    def fitted(concepts: Any = (CONCEPT,), **config: Any) -> Tensor:
        changed = ESD.from_config({**QUICK, **config}).fit(pipe, concepts, run=Run(progress=False)).tensors()
        return torch.cat([p.flatten() for p in changed.values()])

    plain = fitted()
    assert torch.equal(plain, fitted())
    several = (CONCEPT, Concept("night sky", anchors=("boat",)))
    others = [
        fitted(eta=1.0), fitted(start="concept"), fitted(start="anchor"), fitted(states="base"), fitted(retain_scale=1.0),
        fitted(expand=True), fitted(guidance=7.0), fitted(several), fitted(start="anchor", concepts=(Concept("dagger", anchors=("dog",)),)),
    ]  # fmt: skip
    for i, one in enumerate([plain, *others]):
        assert all((one - other).abs().max() > 1e-4 for other in others[i:] if other is not one)


def test_the_retain_term_holds_what_is_retained() -> None:
    pipe, change = sd1(), []
    of, concept = Denoising(pipe, family_of(pipe), 16), Concept("dagger", retain=("boat",))
    x_t, t = of.states(["boat"] * 4, [1, 2, 3, 4], steps=4, stop=2, guidance=3.0)
    with torch.no_grad():
        base = of.predict(x_t, t, ["boat"] * 4)
        for scale in (0.0, 10.0):
            method = ESD.from_config({**QUICK, "steps": 25, "lr": 3e-3, "sampling_steps": 4, "images": 4, "retain_scale": scale})
            with method.fit(pipe, [concept], run=Run(progress=False)).attach(pipe):
                change.append(float((of.predict(x_t, t, ["boat"] * 4) - base).norm()))
    assert change[1] < 0.5 * change[0]


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_the_contract_holds_for_its_lora(family: str) -> None:
    config = {**QUICK, "batch": 1, "steps": 4, "lr": 0.1, "rank": 4}
    assert check_method(ESD, families=[family], config=config) >= 19


def test_its_lora_is_a_file_that_plain_diffusers_loads(tmp_path: Any) -> None:
    pipe = sd1()
    eraser = ESD.from_config({**QUICK, "steps": 4, "lr": 0.1, "rank": 4}).fit(pipe, [CONCEPT], run=Run(progress=False))
    assert isinstance(eraser, AdapterEraser) and {len(t) for n, t in eraser.factors.items() if "lora_A" in n} == {4}
    with eraser.attach(pipe):
        erased = latents(pipe, TARGET)
    eraser.save(tmp_path / "out", pipe=pipe, base_id="tiny")
    other = sd1()
    other.load_lora_weights(tmp_path / "out")
    torch.testing.assert_close(latents(other, TARGET), erased, atol=1e-4, rtol=1e-3)
    assert (erased - latents(sd1(), TARGET)).norm() > 0.02 * erased.norm()


def test_from_erases_the_concept_out_of_its_anchor() -> None:
    """The authors' erase_from: at the anchor's prompt the model comes to predict anchor - η (concept - null)."""
    pipe, of = sd1(), Denoising(sd1(), family_of(sd1()), 16)
    method = ESD.from_config({**QUICK, "part": "full", "steps": 40, "lr": 2e-3, "states": "base", "images": 1, "eta": 1.0, "start": "from"})
    seed = int(torch.randint(2**31, (1,), generator=torch.Generator().manual_seed(0)))
    path, timesteps = of.paths(["cat"], [seed], steps=2, guidance=3.0)
    x_t, t = path[:, 1], timesteps[1:]
    with torch.no_grad():
        null, concept, anchor = (of.predict(x_t, t, [text]) for text in ("", "dagger", "cat"))
        wanted = esd.target(null, concept, 1.0, anchor)
        with method.fit(pipe, [Concept("dagger", anchors=("cat",))], run=Run(progress=False)).attach(pipe):
            edited = Denoising(pipe, family_of(pipe), 16).predict(x_t, t, ["cat"])
    assert (edited - wanted).norm() < 0.7 * (anchor - wanted).norm()
    with pytest.raises(ErasureError, match="anchor that is not empty"):
        method.fit(pipe, [Concept("dagger")], run=Run(progress=False))


def test_a_strong_eta_is_not_taken_for_divergence() -> None:
    assert ESD(eta=100.0).ceiling() == 1e4 * ESD().ceiling()
