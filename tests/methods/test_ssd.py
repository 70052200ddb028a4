"""Dampening against plain arithmetic, the Fisher terms against one image at a time, and what a fit changes."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from erasure import tuning
from erasure.concept import Concept
from erasure.denoising import Denoising
from erasure.errors import ErasureError, NotErased, UnsupportedFamily
from erasure.families import family_of
from erasure.method import Run, WeightEraser
from erasure.methods import ssd
from erasure.methods.ssd import SSD
from erasure.testing import check_method
from erasure.testing.subject import CONCEPT, same_state, state
from erasure.testing.tiny import FAMILIES, sd1
from erasure.trained import Pool, Session

QUICK: dict[str, Any] = {"size": 16, "images": 2, "draws": 1, "sampling_steps": 2, "alpha": 2.0}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fit(pipe: Any, **config: Any) -> WeightEraser:
    return SSD.from_config({**QUICK, **config}).fit(pipe, [CONCEPT], run=Run(progress=False))


def in_python(theta: float, forget: float, everything: float, alpha: float, bound: float, dampening: float, exponent: float) -> float:
    return theta * min((dampening * everything / forget) ** exponent, bound) if forget > alpha * everything else theta


@pytest.mark.parametrize(
    ("alpha", "bound", "dampening", "exponent"),
    [(10.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0), (0.5, 1.0, 1.0, 1.0), (2.0, 0.1, 1.0, 1.0), (5.0, 1.0, 0.1, 1.0), (0.1, 1.0, 3.0, 2.0)],
)
def test_dampening_against_plain_arithmetic(alpha: float, bound: float, dampening: float, exponent: float) -> None:
    theta, forget, everything = rand(20, 30), rand(20, 30, seed=1).square(), rand(20, 30, seed=2).square()
    before = theta.clone()
    found = ssd.dampen(theta, forget, everything, alpha, bound, dampening, exponent)
    rows = zip(theta.flatten().tolist(), forget.flatten().tolist(), everything.flatten().tolist(), strict=True)
    wanted = [in_python(*row, alpha, bound, dampening, exponent) for row in rows]
    torch.testing.assert_close(found.flatten(), torch.tensor(wanted, dtype=torch.float64), atol=0, rtol=1e-14)
    assert torch.equal(theta, before) and 0 < int((found != theta).sum()) < theta.numel()
    assert bound > 1 or (found.abs() <= theta.abs()).all(), "nothing grows"


def test_weights_that_matter_for_nobody_or_for_the_concept_alone() -> None:
    theta, zero, some = torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([1e-30])
    assert ssd.dampen(theta, zero, zero, 10.0, 1.0) == 2.0
    assert ssd.dampen(theta, zero, some, 10.0, 1.0) == 2.0
    assert ssd.dampen(theta, some, zero, 10.0, 1.0) == 0.0
    assert ssd.dampen(theta, some, some, 1.0, 1.0) == 2.0, "α F_all itself is not above α F_all"


def test_a_weight_of_few_bits_is_rounded_once() -> None:
    theta, forget, everything = rand(40, 50).bfloat16(), rand(40, 50, seed=1).square().float(), rand(40, 50, seed=2).square().float()
    exact = ssd.dampen(theta.double(), forget.double(), everything.double(), 1.0, 1.0)
    found = ssd.dampen(theta, forget, everything, 1.0, 1.0)
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact.bfloat16())


def test_bad_fisher_terms_and_settings_are_errors() -> None:
    for wrong in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ErasureError, match="terms of all"):
            ssd.dampen(torch.ones(2), torch.ones(2), torch.tensor([1.0, wrong]), 1.0, 1.0)
    with pytest.raises(ValueError, match="terms of forget"):
        ssd.dampen(torch.ones(2), torch.ones(3), torch.ones(2), 1.0, 1.0)
    for config in ({"alpha": -1.0}, {"share": 0.0}, {"share": 1.5}, {"dampening": -0.1}, {"batch": 0}, {"draws": 0}):
        with pytest.raises(ErasureError, match="ssd_diffusion"):
            SSD.from_config(config)


@pytest.mark.parametrize("name", ["sd1", "sd2", "flux"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_fisher_terms_are_mean_squared_gradients_of_each_batch(name: str, batch: int) -> None:
    """For eps, v and flow: the loss written out here, its gradients taken one batch at a time."""
    pipe = FAMILIES[name]()
    family = family_of(pipe)
    method = SSD.from_config({**QUICK, "batch": batch, "draws": 2})
    of = Denoising(pipe, family, 16)
    clean, _ = of.paths(["a dagger", "cat", "boat"], [0, 1, 2], steps=2, guidance=1.0)
    pool = Pool(clean[:, -1:], torch.zeros(0), ["a dagger", "cat", "boat"], [0, 1, 2])
    with ExitStack() as stack:
        tuned = stack.enter_context(tuning.weights(pipe, tuning.chosen(pipe, family, "kv")))
        found = method.fisher(Session(of, tuned, (CONCEPT,), Run(seed=5, progress=False), stack), pool)
        assert all(p.grad is None for p in tuned.parameters.values())
        draw, sums, n = torch.Generator().manual_seed(5), {key: torch.zeros(p.shape) for key, p in tuned.parameters.items()}, 0
        for _ in range(2):
            for start in range(0, 3, batch):
                x0, words = clean[start : start + batch, -1], pool.prompts[start : start + batch]
                noise, t = torch.randn(x0.shape, generator=draw), of.timesteps(len(x0), draw)
                if name == "flux":
                    s = (t / 1000).reshape(-1, 1, 1)
                    x_t, wanted = (1 - s) * x0 + s * noise, noise - x0
                else:
                    kept = pipe.scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
                    x_t = kept.sqrt() * x0 + (1 - kept).sqrt() * noise
                    wanted = noise if name == "sd1" else kept.sqrt() * noise - (1 - kept).sqrt() * x0
                loss = (of.predict(x_t, t, words) - wanted).pow(2).mean()
                for key, gradient in zip(sums, torch.autograd.grad(loss, list(tuned.parameters.values())), strict=True):
                    sums[key] += gradient**2
                n += 1
    assert n == {1: 6, 2: 4, 3: 2}[batch]
    for key, total in sums.items():
        torch.testing.assert_close(found[key], total / n, rtol=1e-3, atol=1e-3 * float(total.max()) / n)


@pytest.mark.parametrize("name", sorted(SSD.families))
def test_a_fit_shrinks_some_weights_of_the_part_and_leaves_the_pipeline(name: str) -> None:
    pipe = FAMILIES[name]()
    before = state(pipe)
    eraser = fit(pipe, part="kv")
    assert same_state(state(pipe), before) and all(not p.requires_grad or p.grad is None for p in family_parameters(pipe))
    assert eraser.changed and eraser.changed.keys() <= set(tuning.chosen(pipe, family_of(pipe), "kv"))
    for key, new in eraser.changed.items():
        old = before[key]
        assert (new != old).any() and (new.abs() <= old.abs()).all() and (new * old >= 0).all()


def family_parameters(pipe: Any) -> list[Tensor]:
    return [p for _, part in family_of(pipe).parts(pipe) for p in part.parameters()]


def test_a_share_dampens_that_share_by_the_highest_ratios() -> None:
    forget, rest = {"a": rand(40, 50).square().float(), "b": rand(500, seed=3).square().float()}, {}
    rest = {name: rand(*f.shape, seed=7).square().float() for name, f in forget.items()}
    ratios = torch.cat([(forget[name] / rest[name]).flatten() for name in forget]).double()
    for share in (0.002, 0.01, 0.3):
        alpha = ssd._threshold(forget, rest, share)
        chosen = sum(int((forget[name] > alpha * rest[name]).sum()) for name in forget)
        assert chosen == int(share * 2500) == int((ratios > alpha).sum())
        assert alpha == pytest.approx(float(ratios.sort(descending=True).values[chosen - 1]), rel=1e-5)


def test_a_share_of_less_than_one_weight_and_weights_of_the_concept_alone() -> None:
    forget, rest = {"a": torch.tensor([8.0, 4.0, 2.0, 1.0])}, {"a": torch.tensor([0.0, 0.0, 1.0, 1.0])}
    assert ssd._threshold(forget, rest, 0.2) == float("inf"), "nothing is dampened, rather than everything"
    for share, left in ((0.5, [0.0, 0.0, 1.0, 1.0]), (0.75, [0.0, 0.0, 0.5, 1.0])):
        alpha = ssd._threshold(forget, rest, share)
        assert ssd.dampen(torch.ones(4), forget["a"], rest["a"], alpha, 1.0).tolist() == left


def test_settings_reach_the_weights() -> None:
    pipe = sd1()

    def flat(**config: Any) -> Tensor:
        changed = fit(pipe, part="kv", **config).changed
        return torch.cat([changed.get(n, pipe.unet.get_parameter(n[5:]).detach()).flatten() for n in names])

    names = tuning.chosen(pipe, family_of(pipe), "kv")
    plain = flat()
    for config in ({"alpha": 5.0}, {"share": 0.01}, {"dampening": 0.0}, {"batch": 2}, {"draws": 2}, {"images": 3}, {"guidance": 1.0}):
        assert not torch.equal(flat(**config), plain), f"{config} changes nothing"
    base = torch.cat([pipe.unet.get_parameter(n[5:]).detach().flatten() for n in names])
    assert int((flat(share=0.01, dampening=0.0) != base).sum()) == int(0.01 * len(base))
    assert (flat(dampening=0.0)[plain != base] == 0).all(), "without λ what is chosen is pruned"
    assert fit(pipe, layers=("mid_block",)).changed.keys() <= {f"unet.{n}" for n, _ in pipe.unet.named_parameters() if "mid_block" in n}


def test_the_rest_is_anchors_and_retained_phrases_or_neutral_ones() -> None:
    forget, rest = SSD().prompts([CONCEPT])
    assert {"dagger", "a knife"} <= set(forget) and not any("dagger" in text or "knife" in text for text in rest)
    assert rest[:2] == ["cat", "boat"] and "a picture of boat" in rest
    _, alone = SSD().prompts([Concept("dagger")])
    assert len(alone) > 5 and "" not in alone


def test_nothing_to_dampen_and_pipelines_that_do_not_fit_are_errors() -> None:
    pipe = sd1()
    with pytest.raises(ErasureError, match="smaller alpha"):
        fit(pipe, alpha=1e30, part="kv")
    with pytest.raises(ErasureError, match=r"\(larger\) share"):
        fit(pipe, share=1e-9, part="kv")
    with fit(pipe, part="kv").attach(pipe), pytest.raises(NotErased, match="detach it first"):
        fit(pipe)
    with pytest.raises(UnsupportedFamily, match="wan"):
        fit(FAMILIES["wan"]())


def test_contract() -> None:
    assert check_method(SSD, families=["flux"], config=QUICK) > 10
