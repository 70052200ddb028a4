"""The attack's step by hand, whole words under attack, gradients on the road to the denoiser, and text encoders that move house."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from torch import Tensor

import erasure
from erasure import artifact
from erasure.concept import Concept
from erasure.denoising import Denoising
from erasure.errors import ErasureError, NotErased, NothingAttached, WrongBase
from erasure.families import family_of
from erasure.method import Run
from erasure.methods.adv_unlearn import AdvUnlearn, attack_step, method
from erasure.methods.adv_unlearn.attack import Reader, placed
from erasure.methods.adv_unlearn.eraser import TextWeights
from erasure.seams.weights import swapped
from erasure.testing.subject import CONCEPT, TARGET, VISIBLE, change, given_embeds
from erasure.testing.tiny import FAMILIES, flux, latents, sd1

QUICK: dict[str, Any] = {
    "steps": 2, "lr": 0.05, "batch": 2, "sampling_steps": 2, "size": 16, "eta": 3.0, "images": 2, "warmup": 0, "attack_steps": 2,
    "attack_lr": 0.05, "retain_batch": 1, "neutral": False,
}  # fmt: skip
FAR: dict[str, Any] = {"attack_lr": 0.3, "radius": 3.0}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fit(pipe: Any, concepts: Any = (CONCEPT,), **config: Any) -> Any:
    return AdvUnlearn.from_config({**QUICK, **config}).fit(pipe, concepts, run=Run(progress=False))


@pytest.fixture
def reader() -> Reader:
    pipe = sd1()
    return Reader(Denoising(pipe, family_of(pipe), 16))


# the attack


@pytest.mark.parametrize("shape", [(7,), (3, 7), (4, 3, 7)])
@pytest.mark.parametrize("radius", [0.1, 1.5, 100.0])
def test_a_step_goes_against_the_signs_and_back_into_the_ball(shape: tuple[int, ...], radius: float) -> None:
    delta, gradient = rand(*shape), rand(*shape, seed=1)
    gradient.view(-1)[0] = 0.0
    found = attack_step(delta, gradient, 0.3, radius)
    prompts = (1, -1) if len(shape) < 3 else (shape[0], -1)
    for before, slope, after in zip(*(each.reshape(prompts).tolist() for each in (delta, gradient, found)), strict=True):
        moved = [d - 0.3 * ((g > 0) - (g < 0)) for d, g in zip(before, slope, strict=True)]
        length = sum(m * m for m in moved) ** 0.5
        assert after == pytest.approx([m * min(1.0, radius / length) for m in moved], abs=1e-12)
        assert sum(a * a for a in after) ** 0.5 <= radius * (1 + 1e-9)
    assert attack_step(torch.zeros(2, 3), torch.zeros(2, 3), 0.3, radius).equal(torch.zeros(2, 3))


def test_steps_lead_to_the_nearest_point_of_the_ball() -> None:
    wanted, delta = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
    for n in range(400):
        delta = attack_step(delta, 2 * (delta - wanted), 0.5 / (1 + n), 1.0)
    assert float((delta - wanted).norm()) == pytest.approx(4.0, abs=0.05) and float(delta.norm()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("strategy", "k", "ids", "where"),
    [
        ("prefix", 2, [None, None, 1, 8, 9, 2], [0, 1]),
        ("suffix", 1, [1, 8, 9, 2, None], [4]),
        ("replace", 1, [None, 8, 9, 2], [0]),
        ("replace", 3, [None, None, 8, 9, None], [0, 1, 4]),
        ("add", 5, [1, 8, 9, 2], [1, 2]),
    ],
)
def test_all_pieces_of_the_target_stay(strategy: Any, k: int, ids: list[int | None], where: list[int]) -> None:
    assert placed([1, 8, 9, 2], [8, 9], strategy, k) == (ids, where)


def test_a_word_of_many_pieces_is_whole_under_attack(reader: Reader) -> None:
    """ "xyz" is three tokens of the tiny tokenizer; the released code would keep one."""
    tokenizer = reader.pipe.tokenizer
    start, *pieces, end = tokenizer("xyz").input_ids
    assert len(pieces) == 3
    draw = torch.Generator().manual_seed(0)
    slots = reader.slots(["a photo with a xyz"], ["xyz"], "prefix", 2, draw)["text_encoder"]
    ids = slots.ids[0].tolist()
    assert ids[0] == start and ids[3:] == tokenizer("a photo with a xyz", padding="max_length").input_ids[1:-2]
    assert not {ids[1], ids[2]} & set(tokenizer.all_special_ids) and slots.mask[0, :, 0].nonzero().flatten().tolist() == [1, 2]
    assert pieces == ids[7:10] and ids[10] == end
    added = reader.slots(["a photo with a xyz"], ["xyz"], "add", 1, draw)["text_encoder"]
    assert added.mask[0, :, 0].nonzero().flatten().tolist() == [5, 6, 7]
    with pytest.raises(ErasureError, match="longer than the 77"):
        reader.slots(["xyz " * 24], ["xyz"], "prefix", 4, draw)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3", "flux"])
def test_prompts_are_read_as_the_pipeline_reads_them_with_gradients_to_every_clip(family: str) -> None:
    pipe = FAMILIES[family]()
    of = Denoising(pipe, family_of(pipe), 16)
    reader, words = Reader(of), [TARGET, "a big dog"]
    for ours, theirs in zip(reader.encode(words), of.encode(words), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    slots = reader.slots(words, ["dagger", "dog"], "prefix", 1, torch.Generator().manual_seed(0))
    delta = reader.start(slots)
    x_t, t = of.states(words, [1, 2], steps=4, stop=2, guidance=3.0)
    gradients = torch.autograd.grad(of.predict(x_t, t, reader.encode(words, (slots, delta))).square().sum(), list(delta.values()))
    assert list(delta) == ["text_encoder", "text_encoder_2"][: 2 if family in ("sdxl", "sd3") else 1]
    for gradient in gradients:
        per_token = gradient.flatten(0, 1).norm(dim=-1).reshape(2, -1)
        assert (per_token[:, 1] > 0).all() and not per_token[:, 2:].any() and not per_token[:, 0].any()


def test_the_attack_approaches_the_bases_prediction_and_its_last_state_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, errors, given, steps = sd1(), [], [], []
    inner, encode, predict = attack_step, Reader.encode, Denoising.predict

    def note_step(*args: Any) -> Tensor:
        steps.append(inner(*args))
        return steps[-1]

    def note(self: Reader, prompts: Any, perturbed: Any = None) -> Any:
        given.append(None if perturbed is None else {name: each.detach().clone() for name, each in perturbed[1].items()})
        return encode(self, prompts, perturbed)

    def note_prediction(self: Denoising, *args: Any) -> Tensor:
        errors.append(predict(self, *args))
        return errors[-1]

    monkeypatch.setattr(method, "attack_step", note_step)
    monkeypatch.setattr(Reader, "encode", note)
    monkeypatch.setattr(Denoising, "predict", note_prediction)
    fit(pipe, steps=1, attack_steps=12, attack_states="same", strategy="suffix", retain_scale=0.0, attack_lr=0.1, radius=2.0)
    attacks = [each["text_encoder"] for each in given if each is not None]
    assert len(attacks) == 13 and len(steps) == 12 and not attacks[0].any()
    for seen, made in zip(attacks[1:], steps, strict=True):
        assert torch.equal(seen, made), "every state is the step's result, and the outer loss sees the last"
    assert all(float(each.norm()) <= 2.0001 for each in attacks[-1])
    concept, *rest = errors[-14:]  # the base at the concept, twelve steps of the attack, the outer prediction
    away = [float((each - concept).detach().square().mean()) for each in rest]
    assert min(away[-3:]) < 0.7 * away[0]


# what a fit gives


def test_the_warm_up_is_clean_and_settings_reach_the_loss() -> None:
    pipe = sd1()

    def moved(concepts: Any = (CONCEPT,), **config: Any) -> Tensor:
        return torch.cat([p.flatten() for p in fit(pipe, concepts, **config).tensors().values()])

    plain = moved()
    assert torch.equal(plain, moved())
    assert torch.equal(moved(warmup=2), moved(warmup=2, **FAR)), "no attack while it warms up"
    several = (CONCEPT, Concept("night sky", anchors=("boat",)))
    others = [
        moved(warmup=1), moved(warmup=2), moved(attack_steps=1), moved(**FAR), moved(radius=0.01), moved(tokens=2),
        moved(strategy="suffix"), moved(strategy="add"), moved(attack_states="same"), moved(eta=1.0), moved(retain_scale=0.0),
    ]  # fmt: skip
    more = {"images": 8, "retain_batch": 8}
    wide = moved(**more)
    assert all((wide - other).abs().max() > 1e-4 for other in (moved(**more, neutral=True), moved(several, **more)))
    for i, one in enumerate([plain, *others]):
        assert all((one - other).abs().max() > 1e-4 for other in others[i:] if other is not one)


@pytest.mark.parametrize(("part", "inside"), [("text_attn", ".self_attn."), ("text_mlp", ".mlp."), ("kv", ".attn2.to_")])
def test_a_fit_moves_its_part_and_nothing_else(part: Any, inside: str) -> None:
    pipe = sd1()
    eraser = fit(pipe, part=part)
    assert eraser.changed and all(inside in name for name in eraser.changed)
    with eraser.attach(pipe):
        edited = latents(pipe, TARGET)
    assert change(edited, latents(pipe, TARGET)) > VISIBLE


def test_blocks_that_nothing_reads_are_left_out_and_a_layer_that_is_nowhere_raises() -> None:
    names = fit(FAMILIES["sdxl"](), batch=1).changed
    assert not any(name.startswith(("text_encoder.text_model.encoder.layers.1.", "text_encoder.text_model.final")) for name in names)
    assert any(name.startswith("text_encoder_2.text_model.encoder.layers.1.") for name in names)
    only = fit(sd1(), layers=("encoder.layers.0",)).changed
    assert only and all(".layers.0." in name for name in only)
    assert only.keys() == fit(sd1(), layers=("text_encoder.text_model.encoder.layers.0",)).changed.keys(), "as files name it"
    with pytest.raises(NothingAttached, match="no layer 'attn2'"):
        fit(sd1(), layers=("attn2",))
    for wrong in ({"radius": 0.0}, {"attack_steps": 0}, {"eta": 1e9}, {"tokens": 0}):
        with pytest.raises(ErasureError, match=next(iter(wrong))):
            AdvUnlearn.from_config(wrong)


def test_training_withstands_the_attack_that_undoes_a_clean_fit() -> None:
    """After a fit with attacks, a fresh attacker gets less far back towards the base than after a fit without."""
    pipe, left = sd1(), []
    settings: dict[str, Any] = {"steps": 60, "lr": 2e-3, "retain_scale": 0.0, "eta": 3.0, "sampling_steps": 4, "images": 4, "batch": 4}
    attack: dict[str, Any] = {"attack_lr": 0.05, "attack_steps": 4, "radius": 8.0, "attack_states": "same", "strategy": "add"}
    of = Denoising(pipe, family_of(pipe), 16)
    x_t, t = of.states(["dagger"] * 4, [5, 6, 7, 8], steps=4, stop=2, guidance=3.0)
    with torch.no_grad():
        null, base = of.predict(x_t, t, [""] * 4), of.predict(x_t, t, ["dagger"] * 4)
    reader = Reader(of)
    slots = reader.slots(["dagger"] * 4, ["dagger"] * 4, "add", 1, torch.Generator().manual_seed(3))
    for warmup in (60, 5):
        eraser = fit(pipe, [Concept("dagger")], warmup=warmup, **settings, **attack)
        with swapped(pipe, eraser.values(pipe)):
            delta = reader.start(slots)
            for _ in range(8):
                error = _error(of, reader, x_t, t, slots, delta, base).sum()
                (gradient,) = torch.autograd.grad(error, list(delta.values()))
                delta = {"text_encoder": attack_step(delta["text_encoder"].detach(), gradient, 0.05, 8.0).requires_grad_()}
            left.append(float(_error(of, reader, x_t, t, slots, delta, base).detach().mean()))
    assert left[1] > 1.3 * left[0], (left, float((null - base).square().mean()))


def _error(of: Denoising, reader: Reader, x_t: Tensor, t: Tensor, slots: Any, delta: Any, base: Tensor) -> Tensor:
    predicted = of.predict(x_t, t, reader.encode(["dagger"] * 4, (slots, delta)))
    return (predicted - base).square().flatten(1).mean(1)


# the text encoder alone is the artefact


def test_it_plugs_into_image_to_image() -> None:
    pipe = sd1()
    eraser = fit(pipe)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)

    def run() -> Tensor:
        options = {"image": torch.zeros(1, 3, 16, 16), "strength": 1.0, "num_inference_steps": 4, "output_type": "latent"}
        return other(TARGET, generator=torch.Generator().manual_seed(0), **options).images

    base = run()
    with eraser.attach(other):
        assert change(run(), base) > VISIBLE
    assert torch.equal(run(), base)


def test_its_tensors_plug_into_a_flux_with_the_same_clip(tmp_path: Path) -> None:
    pipe, other = sd1(), flux()
    other.text_encoder = copy.deepcopy(pipe.text_encoder)
    eraser = fit(pipe)
    base = latents(other, TARGET)
    with eraser.attach(other):
        edited = latents(other, TARGET)
    assert change(edited, base) > VISIBLE and torch.equal(latents(other, TARGET), base)
    eraser.save(tmp_path / "out", pipe=pipe, base_id="tiny")
    with pytest.raises(WrongBase, match="family sd1"):
        erasure.load(tmp_path / "out", base=other)
    erasure.load(tmp_path / "out", base=other, component="text_encoder")
    assert torch.equal(latents(other, TARGET), edited)
    erasure.detach(other)
    with pytest.raises(WrongBase, match="text_encoder differ"):
        erasure.load(tmp_path / "out", base=_other_clip(flux()), component="text_encoder")
    with pytest.raises(ErasureError, match="changes text_encoder"):
        erasure.load(tmp_path / "out", base=other, component="text_encoder_2")


def _other_clip(pipe: Any) -> Any:
    with torch.no_grad():
        for parameter in pipe.text_encoder.parameters():
            parameter.mul_(1.1)
    return pipe


@pytest.mark.parametrize(("kind", "same", "other"), [("style", "anchor", "null"), ("object", "null", "anchor")])
def test_a_start_by_kind_is_the_anchor_for_styles_and_null_for_objects(kind: Any, same: str, other: str) -> None:
    concept = Concept("ink", kind=kind, targets=("ink",), anchors=("oil",))
    by_kind, alike, unlike = (fit(sd1(), (concept,), start=start).changed for start in ("kind", same, other))
    assert all(torch.equal(tensor, alike[name]) for name, tensor in by_kind.items())
    assert any(not torch.equal(tensor, unlike[name]) for name, tensor in by_kind.items())


def test_its_names_are_those_of_files_and_embeddings_from_before_do_not_pass(tmp_path: Path) -> None:
    pipe = sd1()
    eraser = fit(pipe)
    assert all(name.startswith("text_encoder.text_model.") for name in eraser.changed) and len(eraser.changed) == 34
    given = given_embeds(pipe, TARGET)
    with eraser.attach(pipe), pytest.raises(NotErased, match="prompt_embeds"):
        latents(pipe, None, **given)  # type: ignore[arg-type]
    folder = artifact.save(eraser, tmp_path / "out", pipe=pipe, base_id="tiny")
    again, _ = artifact.load_eraser(folder)
    assert type(again) is TextWeights
    assert all(torch.equal(t, again.tensors()[name]) for name, t in eraser.changed.items())
