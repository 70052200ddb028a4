"""Masks trained through the sampler: exact gradients, a run that obeys its budget, and how it fails."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from erasure.checkpoint import Checkpoint
from erasure.concept import Concept
from erasure.denoising import Denoising
from erasure.errors import ErasureError
from erasure.families import family_of
from erasure.method import Run
from erasure.methods.masking import MaskEraser, Minimalist, shares
from erasure.methods.masking.chain import Chain
from erasure.methods.masking.samples import Samples, from_base, from_file, phrases
from erasure.methods.masking.sites import find, hooked
from erasure.training import CHECKPOINT, Diverged
from tests import tiny

DAGGER = Concept("dagger", anchors=("cat",), retain=("dog",))
ALL = ("heads", "neurons", "norms")
SIZE = 16
"""Pixels a side: latents of 8 x 8."""
QUIET = Run(progress=False)
QUICK: dict[str, Any] = {
    "steps": 6,
    "lr": 1.0,
    "batch": 1,
    "accumulation": 1,
    "images": 2,
    "sampling_steps": 2,
    "budget": 0.1,
    "clamp": "through",
}


def _double(name: str) -> Any:
    pipe = getattr(tiny, name)()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.double()
    return pipe


@pytest.mark.parametrize(("name", "guidance"), [("sd1", 1.0), ("sd1", 3.0), ("flux", 1.0), ("flux", 2.0)])
def test_the_chain_is_the_pipelines_own_sampler(name: str, guidance: float) -> None:
    pipe = getattr(tiny, name)()
    denoising = Denoising(pipe, family_of(pipe), SIZE)
    prompts, seeds = ["a cat", "a dog"], [1, 2]
    wanted = denoising.paths(prompts, seeds, steps=3, guidance=guidance)[0][:, -1]
    chain = Chain(denoising, 3, guidance)
    with torch.no_grad():
        found = chain.final(chain.start(prompts, seeds), prompts)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize(("name", "guidance"), [("sd1", 3.0), ("flux", 1.0)])
def test_recomputed_gradients_are_those_of_full_backpropagation(name: str, guidance: float) -> None:
    """In float64, and against a central difference along the gradient: 3 steps of the sampler under one draw of noise."""
    pipe = _double(name)
    sites = find(pipe, family_of(pipe), ALL)
    gates: dict[str, Tensor] = {}
    method = Minimalist(spread=1.0, clamp="hard")  # the gate whose gradient is the true one
    for parameter in pipe.components["unet" if name == "sd1" else "transformer"].parameters():
        parameter.requires_grad_(False)
    noise = torch.zeros(())
    start = {site.key: torch.ones(site.count, dtype=torch.float64) for site in sites}

    def value(logits: dict[str, Tensor], recompute: bool) -> Tensor:
        chain.recompute = recompute
        gates.clear()
        gates.update(method.gates(logits, seed=0, step=4))
        return chain.final(noise, ["a dagger"]).square().mean()

    with hooked(pipe, sites, gates):
        chain = Chain(Denoising(pipe, family_of(pipe), SIZE), 3, guidance)
        noise = chain.start(["a dagger"], [5])
        found = []
        for recompute in (False, True):
            logits = {key: each.clone().requires_grad_() for key, each in start.items()}
            value(logits, recompute).backward()
            found.append(torch.cat([each.grad for each in logits.values() if each.grad is not None]))
        full, stepwise = found
        assert full.dtype == torch.float64 and float(full.norm()) > 0
        assert float((full - stepwise).norm() / full.norm()) < 1e-5
        step, along = 1e-4, (stepwise / stepwise.norm()).split([len(each) for each in start.values()])
        with torch.no_grad():
            there, back = ({key: each + by * d for (key, each), d in zip(start.items(), along, strict=True)} for by in (step, -step))
            ends = value(there, True), value(back, True)
        assert float((ends[0] - ends[1]) / (2 * step)) == pytest.approx(float(stepwise.norm()), rel=1e-3)


def test_noise_is_drawn_once_a_step() -> None:
    method = Minimalist(spread=0.5, clamp="through")
    logits = {"a": torch.zeros(50), "b": torch.zeros(50)}
    first, again, later = (method.gates(logits, 7, step) for step in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) and not torch.equal(first[key], later[key]) for key in logits)
    assert not torch.equal(first["a"], first["b"])
    # u in (.25, .75) is ±log 3 of noise: gates of logit 0 lie in 0.148..0.852
    assert all(0.148 < float(x) < 0.852 for x in first["a"])


def test_training_moves_outputs_towards_the_target_within_the_budget() -> None:
    pipe = tiny.sd1()
    before = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    method = Minimalist(**QUICK | {"steps": 25, "lr": 0.4})
    eraser = method.fit(pipe, [DAGGER], run=QUIET)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in pipe.unet.named_parameters())
    total = 0
    for blocks in shares(eraser).values():
        assert blocks[""]["off"] <= 0.1 * blocks[""]["all"]
        total += blocks[""]["off"]
    assert total > 0
    chain = Chain(Denoising(pipe, family_of(pipe), SIZE), 2)
    samples = from_base(chain, [("dagger", "cat")], 2, 0, False)

    def distance(of: Samples) -> float:
        with torch.no_grad():
            return float((chain.final(of.noise, of.prompts) - of.wanted).square().mean())

    plain = distance(samples)
    with eraser.attach(pipe):
        assert distance(samples) < 0.97 * plain


def test_ranked_gates_use_the_budget_and_come_nearer_than_as_many_by_chance() -> None:
    pipe = tiny.sd1()
    method = Minimalist(**QUICK | {"steps": 40, "clamp": "ranked"})
    eraser = method.fit(pipe, [DAGGER], run=QUIET)
    counts = {kind: blocks[""] for kind, blocks in shares(eraser).items()}
    assert all(each["off"] <= 0.1 * each["all"] for each in counts.values())
    assert sum(each["off"] for each in counts.values()) == sum(math.floor(0.1 * each["all"]) for each in counts.values()) > 0
    chain = Chain(Denoising(pipe, family_of(pipe), SIZE), 2)
    samples = from_base(chain, [("dagger", "cat")], 2, 0, False)
    draw = torch.Generator().manual_seed(0)

    def distance(of: MaskEraser) -> float:
        with torch.no_grad(), of.attach(pipe):
            return float((chain.final(samples.noise, samples.prompts) - samples.wanted).square().mean())

    def shuffled() -> MaskEraser:
        return method.eraser((DAGGER,), {key: mask[torch.randperm(len(mask), generator=draw)] for key, mask in eraser.changed.items()})

    chance = sorted(distance(shuffled()) for _ in range(9))
    assert distance(eraser) < 0.7 * chance[0]


def test_the_budget_of_ranked_gates_opens_over_the_first_fifth_of_the_steps() -> None:
    method, logits = Minimalist(steps=50, budget=0.5, clamp="ranked"), {"x.neurons": torch.arange(20.0)}
    off = [20 - int(method.gates(logits, 0, step)["x.neurons"].sum()) for step in (0, 1, 5, 10, 49)]
    assert off == [0, 1, 5, 10, 10]


def test_equal_seeds_give_equal_masks() -> None:
    pipe = tiny.sd1()
    first, again = (Minimalist(**QUICK).fit(pipe, [DAGGER], run=Run(seed=3, progress=False)) for _ in range(2))
    assert all(torch.equal(first.changed[key], mask) for key, mask in again.changed.items())


def test_preserve_reaches_its_budget_and_chooses_better_than_chance() -> None:
    pipe = tiny.sd1()
    method = Minimalist(
        objective="preserve", **QUICK | {"steps": 20, "lr": 0.1, "budget": 0.2, "units": ("neurons",), "budget_scale": 0.01}
    )
    eraser = method.fit(pipe, [DAGGER], run=QUIET)
    counts = shares(eraser)["neurons"][""]
    assert counts["off"] == math.floor(0.2 * counts["all"])
    chain = Chain(Denoising(pipe, family_of(pipe), SIZE), 2)
    samples = from_base(chain, [("dog", "dog"), ("dagger", "dagger")], 4, 9, False)

    def distance(masks: MaskEraser) -> float:
        with torch.no_grad(), masks.attach(pipe):
            return float((chain.final(samples.noise, samples.prompts) - samples.wanted).square().mean())

    draw = torch.Generator().manual_seed(0)
    shuffled = {key: mask[torch.randperm(len(mask), generator=draw)] for key, mask in eraser.changed.items()}
    assert distance(eraser) < distance(MaskEraser(method, (DAGGER,), shuffled))


def test_targets_keep_company_and_what_stands_beside_them_stays() -> None:
    concept = Concept("dagger", targets=("dagger", "dirk"), anchors=("cat",), retain=("dog", "boat"))
    alone, found = (phrases(concept, False, company, seed=3) for company in (False, True))
    assert alone == [("dagger", "cat"), ("dirk", "cat")]
    assert found[:2] == alone and len(found) == 2 + 2 * 2 * 2
    assert set(found[2:]) >= {("a dirk and a boat", "a cat and a boat"), ("a dog with a dagger", "a dog with a cat")}
    assert ("a dagger and a dog", "a dog") in phrases(Concept("dagger", retain=("dog",)), False, True, seed=3)
    assert phrases(Concept("ink", kind="style", retain=("dog",)), True, True, seed=3) == phrases(
        Concept("ink", kind="style", retain=("dog",)), True, False, seed=3
    )


def test_more_phrases_than_images_leave_no_concept_out() -> None:
    pipe = tiny.sd1()
    chain = Chain(Denoising(pipe, family_of(pipe), SIZE), 2)
    concepts = [Concept(name, anchors=("dog",), retain=("boat",)) for name in ("dagger", "cat")]
    erase, _ = Minimalist(**QUICK | {"images": 4, "expand": True}).samples(chain, concepts, QUIET)
    assert erase is not None and len(set(erase.prompts)) == 4
    assert {name for name in ("dagger", "cat") for prompt in erase.prompts if name in prompt} == {"dagger", "cat"}


def test_a_users_pairs_are_the_targets(tmp_path: Path) -> None:
    pipe = tiny.flux()
    chain = Chain(Denoising(pipe, family_of(pipe), SIZE), 2)
    side = SIZE
    Image.new("RGB", (side, side), "red").save(tmp_path / "red.png")
    row = {"prompt": "a dagger", "seed": 4, "image": "red.png"}
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(row) + "\n")
    samples = from_file(chain, file)
    assert torch.equal(samples.noise, chain.start(["a dagger"], [4])) and samples.prompts == ["a dagger"]
    latents = pipe._unpack_latents(samples.wanted, side, side, pipe.vae_scale_factor)
    with torch.no_grad():
        pixels = pipe.image_processor.preprocess(Image.open(tmp_path / "red.png"))
        wanted = (pipe.vae.encode(pixels).latent_dist.mode() - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor
    assert torch.allclose(latents, wanted, atol=1e-6)
    Image.new("RGB", (2 * side, side)).save(tmp_path / "wide.png")
    for wrong, what in (({"seed": None}, "line 2"), ({"image": "no.png"}, "line 2"), ({"image": "wide.png"}, "scale the image")):
        file.write_text(json.dumps(row) + "\n" + json.dumps(row | wrong) + "\n")
        with pytest.raises(ErasureError, match=what):
            from_file(chain, file)


def test_gates_that_all_close_or_all_stay_open_are_an_error() -> None:
    pipe = tiny.sd1()
    method = Minimalist(regulariser="none", **QUICK)
    sites = find(pipe, family_of(pipe), ALL)
    logits = {site.key: torch.full((site.count,), -1.0 if site.kind == "norms" else 1.0) for site in sites}
    with pytest.raises(ErasureError, match=r"closed all .* norms"):
        method.masks(sites, logits)
    with pytest.raises(ErasureError, match="closed no gate"):
        method.masks(sites, {key: each.abs() for key, each in logits.items()})


def test_a_loss_that_is_no_number_stops_the_fit_and_keeps_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.sd1()
    monkeypatch.setattr("erasure.methods.masking.minimalist.SAVE_EVERY", 2)
    plain, calls = Samples.loss, []

    def failing(self: Samples, *args: Any) -> Tensor:
        calls.append(1)
        return plain(self, *args) * (math.nan if len(calls) > 2 * 3 else 1)  # two losses a step: from the fourth step on

    monkeypatch.setattr(Samples, "loss", failing)
    saved: list[int] = []
    save = Checkpoint.save

    def recorded(self: Checkpoint) -> None:
        save(self)
        saved.append(self.run.step)

    monkeypatch.setattr(Checkpoint, "save", recorded)
    with pytest.raises(Diverged, match=r"step 4 of 6.*last good state, of step 2"):
        Minimalist(**QUICK).fit(pipe, [DAGGER], run=Run(progress=False, checkpoint=tmp_path))
    assert saved == [2] and (tmp_path / CHECKPOINT).exists()
    monkeypatch.setattr(Samples, "loss", plain)
    resumed = Minimalist(**QUICK).fit(pipe, [DAGGER], run=Run(progress=False, checkpoint=tmp_path))
    whole = Minimalist(**QUICK).fit(pipe, [DAGGER], run=QUIET)
    assert all(torch.equal(resumed.changed[key], mask) for key, mask in whole.changed.items())
