"""Gates: the formula against float64 arithmetic, where they sit, and that folding them is what hooking them computes."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from erasure import artifact
from erasure.concept import Concept
from erasure.denoising import Denoising
from erasure.errors import Conflict, ErasureError, NothingAttached
from erasure.export.folding import folded
from erasure.families import family_of
from erasure.methods.masking import MaskEraser, Minimalist, closed, hard_concrete, shares
from erasure.methods.masking.chain import Chain
from erasure.methods.masking.formulas import binary, overspent, ranked, share_closed, stretched, through, within
from erasure.methods.masking.sites import Site, find, fold, hooked
from erasure.seams import weights
from tests import tiny

DAGGER = Concept("dagger", anchors=("cat",), retain=("dog",))
ALL = ("heads", "neurons", "norms")


def reference(logit: float, u: float, temperature: float, low: float, high: float) -> float:
    """The formula in Python's own float64."""
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + logit) / temperature))
    return min(1.0, max(0.0, s * (high - low) + low))


def random_masks(sites: list[Site], share: float = 0.3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {site.key: torch.rand(site.count, generator=draw) < share for site in sites}


def test_hard_concrete_against_plain_arithmetic() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(200, generator=draw, dtype=torch.float64)
    noise = torch.rand(200, generator=draw, dtype=torch.float64)
    for temperature, stretch in ((0.83, (-0.1, 1.1)), (0.5, (-0.3, 1.2))):
        wanted = [reference(x, u, temperature, *stretch) for x, u in zip(logits.tolist(), noise.tolist(), strict=True)]
        found = hard_concrete(logits, noise, temperature, stretch)
        assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-12)
        assert (found == 0).any() and (found == 1).any() and ((found > 0) & (found < 1)).any()


def test_gates_saturate_where_the_formula_says() -> None:
    """σ(x / 0.83) 1.2 - 0.1 reaches 1 at x = 0.83 log 11: 1.990 on either side of 0."""
    edge = 0.83 * math.log(11)
    half = torch.full((4,), 0.5)
    found = hard_concrete(torch.tensor([-edge - 1e-3, -edge + 1e-2, edge - 1e-2, edge + 1e-3]), half)
    assert found[0] == 0 and 0 < found[1] < found[2] < 1 and found[3] == 1
    assert closed(torch.tensor([-1.0, 0.0, 1e-6])).tolist() == [True, True, False]


def test_binary_gates_are_what_is_folded_with_the_gradient_of_what_is_not_clamped() -> None:
    """At u = 1/2 they open just where `closed` says, and at u a logit moves the threshold by log u - log(1 - u)."""
    logits = torch.tensor([-3.0, -1e-4, 1e-4, 0.9, 3.0], dtype=torch.float64, requires_grad=True)
    half = torch.full_like(logits, 0.5)
    found = binary(logits, half)
    assert found.tolist() == [0, 0, 1, 1, 1] == (~closed(logits)).double().tolist()
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    (wanted,) = torch.autograd.grad(stretched(logits, half).sum(), logits)
    assert torch.equal(gradient, wanted) and (gradient > 0).all()
    assert binary(logits, torch.full_like(logits, 0.25)).tolist() == [0, 0, 0, 0, 1]  # -log 3 takes 0.9 under


def test_ranked_gates_close_the_lowest_of_all_together_and_pass_every_gradient() -> None:
    logits = {"a": torch.tensor([0.5, -2.0, 3.0], requires_grad=True), "b": torch.tensor([-1.0, 0.5], requires_grad=True)}
    for count, wanted in ((0, [1, 1, 1, 1, 1]), (2, [1, 0, 1, 0, 1]), (3, [0, 0, 1, 0, 1]), (5, [0, 0, 0, 0, 0])):
        gates = ranked(logits, count)
        assert torch.cat([gates["a"], gates["b"]]).tolist() == wanted
    weights = torch.tensor([1.0, -2.0, 3.0])
    (gradient,) = torch.autograd.grad((ranked(logits, 2)["a"] * weights).sum(), logits["a"])
    assert torch.equal(gradient, weights)


def test_the_straight_through_gate_has_equal_values_and_a_gradient_where_the_other_has_none() -> None:
    values = torch.tensor([-4.0, 0.3, 4.0])
    half = torch.full((3,), 0.5)
    gradients: dict[str, Tensor] = {}
    for rule in (hard_concrete, through):
        logits = values.clone().requires_grad_()
        gates = rule(logits, half)
        assert torch.allclose(gates, hard_concrete(values, half))
        (gradients[rule.__name__],) = torch.autograd.grad(gates.sum(), logits)
    assert gradients["hard_concrete"].tolist()[::2] == [0, 0]
    assert (gradients["through"] > 0).all() and gradients["through"][1] == gradients["hard_concrete"][1]


def test_the_budget_counts_exactly_and_pushes_gates_open() -> None:
    logits = torch.tensor([-1.0, -0.1, 0.1, 3.0], requires_grad=True)
    share = share_closed(logits)
    assert share.item() == pytest.approx(0.5)
    assert overspent({"a": share}, 0.5).item() == pytest.approx(0, abs=1e-6)
    assert overspent({"a": share}, 0.75).item() == 0
    assert overspent({"a": share}, 0.8, exactly=True).item() == pytest.approx(0.375)
    over = overspent({"a": share}, 0.25)
    assert over.item() == pytest.approx(1)
    (gradient,) = torch.autograd.grad(over, logits)
    assert bool((gradient < 0).all()) and int(gradient.abs().argmax()) in (1, 2)


def test_within_keeps_the_lowest() -> None:
    found = within({"a": torch.tensor([-1.0, 2.0, -3.0]), "b": torch.tensor([-2.0, -0.5])}, 2)
    assert found["a"].tolist() == [False, False, True] and found["b"].tolist() == [True, False]
    assert not within({"a": torch.tensor([1.0, 2.0])}, 2)["a"].any()
    assert within({"a": torch.tensor([1.0, 2.0])}, 1, exactly=True)["a"].tolist() == [True, False]


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        ("sd1", {"heads": 14, "neurons": 7, "norms": 21}),
        ("sdxl", {"heads": 14, "neurons": 7, "norms": 21}),
        ("sd3", {"heads": 2, "neurons": 3, "norms": 4}),
        ("flux", {"heads": 2, "neurons": 3, "norms": 3}),
    ],
)
def test_folded_equals_hooked(family: str, counts: dict[str, int]) -> None:
    pipe = getattr(tiny, family)()
    sites = find(pipe, family_of(pipe), ALL)
    assert {kind: sum(site.kind == kind for site in sites) for kind in ALL} == counts
    chain = Chain(Denoising(pipe, family_of(pipe), 16), 2, 2.0)
    with torch.no_grad():
        noise = chain.start(["a cat"], [3])
        plain = chain.final(noise, ["a cat"])
        for kind in ALL:
            mine = [site for site in sites if site.kind == kind]
            masks = random_masks(mine)
            with hooked(pipe, mine, {key: (~mask).float() for key, mask in masks.items()}) as opened:
                by_hooks = chain.final(noise, ["a cat"])
            assert opened == sum(len(site.layers) for site in mine)
            with weights.swapped(pipe, fold(pipe, mine, masks)):
                by_weights = chain.final(noise, ["a cat"])
            assert float((by_hooks - by_weights).norm() / by_hooks.norm()) < 1e-6
            assert float((by_hooks - plain).norm() / plain.norm()) > 1e-3, kind
        assert torch.equal(chain.final(noise, ["a cat"]), plain)


def test_a_flux_single_block_has_heads_and_neurons_in_one_layer() -> None:
    pipe = tiny.flux()
    sites = {site.key: site for site in find(pipe, family_of(pipe), ALL)}
    block = pipe.transformer.single_transformer_blocks[0]
    name = "transformer.single_transformer_blocks.0.proj_out"
    heads, neurons = sites[f"{name}.heads"], sites[f"{name}.neurons"]
    assert heads.span == slice(0, block.attn.inner_dim) and neurons.span == slice(block.attn.inner_dim, block.proj_out.in_features)
    mask = torch.zeros(heads.count, dtype=torch.bool)
    mask[1] = True
    new = fold(pipe, [heads, neurons], {heads.key: mask, neurons.key: ~torch.zeros(neurons.count, dtype=torch.bool)})
    value, width = new[f"{name}.weight"], heads.width
    zero = value.abs().sum(0) == 0
    assert zero[width : 2 * width].all() and zero[heads.span.stop :].all() and not zero[:width].any()


def _eraser(pipe: Any, share: float = 0.3) -> MaskEraser:
    return MaskEraser(Minimalist(), (DAGGER,), random_masks(find(pipe, family_of(pipe), ALL), share))


def test_an_artefact_is_as_small_as_its_masks_and_says_what_is_off(tmp_path: Path) -> None:
    pipe = tiny.sd1()
    eraser = _eraser(pipe)
    artifact.save(eraser, tmp_path / "out", pipe=pipe, base_id="tiny")
    gates = sum(mask.numel() for mask in eraser.changed.values())
    assert (tmp_path / "out" / artifact.STATE).stat().st_size < gates + 10_000
    again, config = artifact.load_eraser(tmp_path / "out")
    assert isinstance(again, MaskEraser) and all(torch.equal(again.changed[key], mask) for key, mask in eraser.changed.items())
    differ = [name for name, value in eraser.values(pipe).items() if not torch.equal(value, weights.parameter(pipe, name))]
    assert artifact.verify(tmp_path / "out", pipe)["changed_tensors"] == len(differ) > 14
    off = sum(int(mask.sum()) for key, mask in eraser.changed.items() if key.endswith("neurons"))
    every = sum(len(mask) for key, mask in eraser.changed.items() if key.endswith("neurons"))
    assert config["details"]["Switched off: neurons"]["all"] == {"off": off, "all": every, "share": f"{off / every:.2%}"}
    assert f"| all | {off} | {every} | {off / every:.2%} |" in (tmp_path / "out" / artifact.CARD).read_text()
    assert shares(again) == shares(eraser)


def test_shares_add_up_by_block() -> None:
    pipe = tiny.flux()
    for kind, blocks in shares(_eraser(pipe)).items():
        for count in ("off", "all"):
            assert blocks[""][count] == sum(n[count] for name, n in blocks.items() if name), kind
    assert set(shares(_eraser(pipe))["heads"]) == {"", "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.0"}


def test_attaching_restores_bit_by_bit_and_a_folded_checkpoint_is_plain_diffusers(tmp_path: Path) -> None:
    pipe = tiny.sd1()
    before = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    eraser = _eraser(pipe)
    new = folded(eraser, pipe)

    def make(from_pipe: Any) -> Tensor:
        options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
        return torch.as_tensor(from_pipe("a dagger", **options).images)

    with eraser.attach(pipe):
        attached = make(pipe)
        assert all(torch.equal(weights.parameter(pipe, name).cpu(), value) for name, value in new.items())
    assert all(torch.equal(p, before[name]) for name, p in pipe.unet.named_parameters())
    eraser.bake(pipe)
    pipe.save_pretrained(tmp_path / "baked")
    plain = DiffusionPipeline.from_pretrained(tmp_path / "baked")
    plain.set_progress_bar_config(disable=True)
    assert float((make(plain) - attached).abs().max()) < 1e-6


def test_two_erasers_on_the_same_weights_conflict() -> None:
    pipe = tiny.sd1()
    with _eraser(pipe).attach(pipe), pytest.raises(Conflict, match="both write"), _eraser(pipe, 0.2).attach(pipe):
        pass


def test_masks_of_another_base_are_refused() -> None:
    flux, unet = tiny.flux(), tiny.sd1()
    with pytest.raises(NothingAttached, match="another base"), _eraser(flux).attach(unet):
        pass
    eraser = _eraser(unet)
    key = next(iter(eraser.changed))
    wrong: Mapping[str, Tensor] = {**eraser.changed, key: torch.ones(99, dtype=torch.bool)}
    with pytest.raises(NothingAttached, match="99"), MaskEraser(Minimalist(), (DAGGER,), wrong).attach(unet):
        pass
    with pytest.raises(ErasureError, match="no mask"):
        MaskEraser(Minimalist(), (DAGGER,), {key: torch.ones(3)})


@pytest.mark.parametrize("budget", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_budget_outside_0_to_1_is_refused(budget: float) -> None:
    with pytest.raises(ErasureError, match="budget is"):
        Minimalist(budget=budget)


def test_a_family_without_the_modules_is_named() -> None:
    pipe = tiny.sd1()
    with pytest.raises(NothingAttached, match=r"norm1_context.*none of transformer_blocks"):
        find(pipe, family_of(pipe), ALL, ("norm1_context",))
    wan = tiny.wan()
    with pytest.raises(NothingAttached, match="WanPipeline"):
        find(wan, family_of(wan), ALL)
    with pytest.raises(ErasureError, match="wan"):
        Minimalist().fit(wan, [DAGGER])
