"""SalUn's mask against sorting, and that nothing outside it moves."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from erasure.denoising import Denoising
from erasure.errors import ErasureError
from erasure.families import family_of
from erasure.method import Run
from erasure.methods import salun
from erasure.methods.salun import SalUn
from erasure.testing.subject import CONCEPT
from erasure.testing.tiny import sd1
from erasure.trained import Session
from erasure.tuning import chosen, weights

QUICK: dict[str, Any] = {"steps": 2, "lr": 0.02, "batch": 2, "sampling_steps": 2, "size": 16, "images": 3}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_sorting(gradients: dict[str, Tensor], keep: float) -> dict[str, Tensor]:
    """The slow way: a stable sort of all sizes, the first int(keep n) of them."""
    flat = torch.cat([g.flatten() for g in gradients.values()]).double().abs()
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[torch.argsort(flat, descending=True, stable=True)[: int(keep * len(flat))]] = True
    parts = mask.split([g.numel() for g in gradients.values()])
    return {name: part.view(g.shape) for (name, g), part in zip(gradients.items(), parts, strict=True)}


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["normal", "tiny and huge", "ties", "zeros", "halves", "doubles"])
def test_the_mask_is_that_of_a_sort(kind: str, keep: float) -> None:
    gradients = {"a": rand(17, 31), "b": rand(400, seed=1), "c": rand(3, 5, 7, seed=2)}
    match kind:
        case "tiny and huge":
            gradients = {name: g * 10 ** (20 * rand(*g.shape, seed=3)).clamp(-44, 35) for name, g in gradients.items()}
        case "ties":
            gradients = {name: (2 * g).round() for name, g in gradients.items()}
        case "zeros":
            gradients = {name: g * (g > 1) for name, g in gradients.items()}
        case "halves":
            gradients = {name: g.bfloat16() for name, g in gradients.items()}
        case "doubles":  # which float32 would call equal, zero or infinite
            gradients = {name: (1 + 1e-12 * g.double()) * 10.0 ** (60 * (i - 1)) for i, (name, g) in enumerate(gradients.items())}
    ours, sorted_ = salun.saliency_mask(gradients, keep), by_sorting(gradients, keep)
    assert all(ours[name].dtype == torch.bool and torch.equal(ours[name], sorted_[name]) for name in gradients)


def test_the_plain_case_is_one_tensor_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    gradient = rand(50, 41)
    whole = salun.saliency_mask(gradient, 0.3)
    assert whole.shape == gradient.shape and int(whole.sum()) == 615
    assert [int(salun.saliency_mask(gradient.flatten()[:n], 0.5).sum()) for n in (1, 7, 8)] == [0, 3, 4], "as the released code counts"
    assert gradient.abs()[whole].min() >= gradient.abs()[~whole].max()
    monkeypatch.setattr(salun, "CHUNK", 64)
    assert torch.equal(salun.saliency_mask(gradient, 0.3), whole)


def test_bad_gradients_and_shares_are_errors() -> None:
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ErasureError, match="gradient of b is not finite"):
            salun.saliency_mask({"a": rand(3), "b": torch.tensor([1.0, wrong])}, 0.5)
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ErasureError, match="from 0 to 1"):
            salun.saliency_mask(rand(3), share)
    with pytest.raises(ErasureError, match="keep is 0"):
        SalUn.from_config({"keep": 0.0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_outside_the_mask_stay_bit_identical(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    masks: dict[str, Tensor] = {}
    inner = salun.saliency_mask

    def note(gradients: Any, keep: float) -> Any:
        masks.update(inner(gradients, keep))
        return masks

    monkeypatch.setattr(salun, "saliency_mask", note)
    pipe = sd1().to(dtype)
    changed = SalUn.from_config({**QUICK, "keep": 0.3}).fit(pipe, [CONCEPT], run=Run(progress=False)).tensors()
    assert changed.keys() == masks.keys() == set(chosen(pipe, family_of(pipe), "full"))
    moved = {name: p != pipe.unet.get_parameter(name.removeprefix("unet.")) for name, p in changed.items()}
    assert not any((moved[name] & ~masks[name]).any() for name in masks)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == int(0.3 * total)
    assert sum(int(m.sum()) for m in moved.values()) > 0.95 * 0.3 * total


def test_the_saliency_is_the_gradient_of_the_guided_denoising_loss() -> None:
    """Against a finite difference of the loss along the gradient, in float64."""
    pipe = sd1().to(torch.float64)
    family = family_of(pipe)
    method = SalUn.from_config({**QUICK, "batch": 2, "mask_guidance": 2.0})
    latents, words = rand(4, 4, 8, 8).double(), ["a dagger", "a knife"] * 2
    with ExitStack() as stack:
        tuned = stack.enter_context(weights(pipe, chosen(pipe, family, "kv")))
        of = Denoising(pipe, family, 16)
        found = method.saliency(Session(of, tuned, (CONCEPT,), Run(progress=False), stack), latents, words)

        def loss() -> float:
            draw, total = torch.Generator().manual_seed(0), 0.0
            for start in (0, 2):
                x0 = latents[start : start + 2]
                noise, t = torch.randn(x0.shape, generator=draw).double(), of.timesteps(2, draw)
                x_t = of.schedule.add_noise(x0, noise, t)
                with torch.no_grad():
                    text, null = of.predict(x_t, t, words[:2]).double(), of.predict(x_t, t, ["", ""]).double()
                total += float((noise - (text + 2.0 * (text - null))).square().mean())
            return total

        step, norm = 1e-3, sum(float(g.square().sum()) for g in found.values()) ** 0.5
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                for name, parameter in tuned.parameters.items():
                    parameter.copy_(tuned.originals[name] + sign * step * found[name] / norm)
            sides.append(loss())
    assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(norm, rel=0.01)


def test_the_concept_comes_to_mean_its_anchor_and_the_settings_reach_the_loss() -> None:
    pipe = sd1()

    def fit(**config: Any) -> Any:
        return SalUn.from_config({**QUICK, **config}).fit(pipe, [CONCEPT], run=Run(progress=False))

    of = Denoising(pipe, family_of(pipe), 16)
    x_t, t = of.states(["dagger"] * 2, [1, 2], steps=4, stop=2, guidance=4.0)
    with torch.no_grad():
        base, anchor = of.predict(x_t, t, ["dagger"] * 2), of.predict(x_t, t, ["cat"] * 2)
        with fit(steps=20, lr=3e-3, retain_scale=0.0).attach(pipe):
            near = (of.predict(x_t, t, ["dagger"] * 2) - of.predict(x_t, t, ["cat"] * 2)).norm()
    assert near < 0.6 * (base - anchor).norm()
    plain, *others = (
        torch.cat([p.flatten() for p in fit(**config).tensors().values()])
        for config in ({}, {"keep": 0.1}, {"mask_guidance": 0.0}, {"retain_scale": 2.0}, {"guidance": 1.0})
    )
    assert all((plain - other).abs().max() > 1e-4 for other in others)
