"""Perp-Neg against a plain loop over samples, and inside every family's sampling loop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from erasure import artifact
from erasure.concept import Concept
from erasure.errors import ErasureError, NotErased
from erasure.method import Run
from erasure.methods import perp_neg
from erasure.methods.perp_neg import PerpNeg
from tests.tiny import FAMILIES, latents, sd1

from .guided import run, worst

CONCEPT = Concept("dagger", targets=("dagger", "knife"))
TARGET = "a photo of a dagger"
PROMPTS = [TARGET, "the night sky with a big red cat on a boat"]


def fitted(pipe: Any, **config: Any) -> Any:
    return PerpNeg.from_config(config).fit(pipe, [CONCEPT], run=Run(progress=False))


def by_hand(uncond: Tensor, text: Tensor, negatives: list[Tensor], weights: list[float], scale: float) -> Tensor:
    """Eq. of the paper, sample by sample, with the projection by least squares rather than by a quotient of dot products."""
    rows = []
    for i in range(len(text)):
        null, positive = uncond[i].double().flatten(), (text[i].double() - uncond[i].double()).flatten()
        total = positive.clone()
        for negative, weight in zip(negatives, weights, strict=True):
            direction = negative[i].double().flatten() - null
            along = torch.linalg.lstsq(positive[:, None], direction[:, None]).solution[0, 0] * positive
            total -= abs(weight) * (direction - along)
        rows.append((null + scale * total).reshape(text[i].shape))
    return torch.stack(rows)


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (2, 16, 64), (2, 16, 2, 4, 4)], ids=str)
def test_it_follows_the_paper(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    uncond, text, *negatives = torch.randn(5, *shape)
    weights = [1.5, -0.5, 2.0]
    expected = by_hand(uncond, text, negatives, weights, 7.5)
    for given in (negatives, torch.stack(negatives)):
        assert torch.allclose(perp_neg.guide(uncond, text, given, weights, 7.5).double(), expected, atol=1e-4)
    exact = perp_neg.guide(uncond.double(), text.double(), [x.double() for x in negatives], torch.tensor(weights), 7.5)
    assert torch.allclose(exact, expected, rtol=0, atol=1e-11)


def test_one_negative_may_come_without_a_list_and_one_weight_serves_all() -> None:
    uncond, text, one, two = torch.randn(4, 2, 4, 8, 8, dtype=torch.float64)
    assert torch.equal(perp_neg.guide(uncond, text, one, 1.5, 7.5), perp_neg.guide(uncond, text, [one], [-1.5], 7.5))
    assert torch.equal(perp_neg.guide(uncond, text, [one, two], 0.7, 3.0), perp_neg.guide(uncond, text, [one, two], [0.7, 0.7], 3.0))
    with pytest.raises(ValueError, match="3 weights for 2 negatives"):
        perp_neg.guide(uncond, text, [one, two], [1, 2, 3], 7.5)


def test_what_is_taken_away_is_at_right_angles_to_the_prompt_in_each_sample() -> None:
    uncond, text, negative = torch.randn(3, 5, 4, 8, 8, dtype=torch.float64)
    taken = perp_neg.guide(uncond, text, [negative], 2.0, 1.0) - text
    dots = (taken * (text - uncond)).flatten(1).sum(1)
    assert dots.abs().max() < 1e-10 and taken.flatten(1).norm(dim=1).min() > 1
    mixed = perp_neg.guide(uncond[[0, 0]], text[[0, 1]], [negative[[0, 0]]], 2.0, 1.0)
    alone = perp_neg.guide(uncond[:1], text[:1], [negative[:1]], 2.0, 1.0)
    assert torch.equal(mixed[:1], alone), "a sample does not see its neighbours"


def test_a_negative_parallel_to_the_prompt_takes_nothing_away() -> None:
    uncond, text = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    for share in (1.0, 3.0, -2.0):
        guided = perp_neg.guide(uncond, text, [uncond + share * (text - uncond)], 1.5, 7.5)
        assert torch.allclose(guided, uncond + 7.5 * (text - uncond), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_prompt_without_direction_of_its_own_is_no_division_by_zero(dtype: torch.dtype) -> None:
    uncond, negative = torch.randn(2, 2, 4, 8, 8).to(dtype)
    guided = perp_neg.guide(uncond, uncond.clone(), [negative], 1.0, 1.0)
    assert torch.allclose(guided, uncond - (negative - uncond), atol=1e-6), "all of the negative is at right angles to nothing"


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_the_squares_of_a_large_latent_add_up_to_more_than_half_precision_holds(dtype: torch.dtype, bound: float) -> None:
    uncond, text, negative = (2 * torch.randn(3, 1, 4, 128, 128, generator=torch.Generator().manual_seed(0))).to(dtype)
    guided = perp_neg.guide(uncond, text, [negative], 1.0, 1.0)
    exact = perp_neg.guide(uncond.double(), text.double(), [negative.double()], 1.0, 1.0)
    assert guided.dtype == dtype and float((guided.double() - exact).norm() / exact.norm()) < bound


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("negatives", "texts"), [("joined", ["dagger, knife"]), ("each", ["dagger", "knife"])])
def test_every_family_gets_the_papers_guidance_at_every_step(name: str, negatives: str, texts: list[str]) -> None:
    images = {"num_videos_per_prompt" if name == "wan" else "num_images_per_prompt": 2}
    pipe, recording = run(name, lambda pipe: fitted(pipe, negatives=negatives, weight=0.8), PROMPTS, seed=[1, 2, 3, 4], **images)
    rule = lambda uncond, text, extras, step: by_hand(uncond, text, extras, [0.8] * len(extras), 1.0)  # noqa: E731
    assert worst(pipe, recording, 4, texts, rule) < 1e-9
    unchanged = lambda uncond, text, extras, step: text  # noqa: E731
    assert worst(pipe, recording, 4, texts, unchanged) > 0.05


def test_a_prompt_that_is_the_negative_itself_stays_as_it_is() -> None:
    """The published formula's own limit: it keeps what was asked for."""
    pipe = sd1().to(torch.float64)
    base, other = latents(pipe, "dagger, knife"), latents(pipe, TARGET)
    with fitted(pipe).attach(pipe):
        assert (latents(pipe, "dagger, knife") - base).abs().max() < 1e-9
        assert (latents(pipe, TARGET) - other).abs().max() > 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_guidance_off_raises(name: str) -> None:
    pipe = FAMILIES[name]()
    off: dict[str, Any] = {"true_cfg_scale": 1.0} if name == "flux" else {"guidance_scale": 1.0}
    with fitted(pipe).attach(pipe), pytest.raises(NotErased, match="true_cfg_scale" if name == "flux" else "guidance_scale"):
        latents(pipe, TARGET, **off)


def test_phrases_that_do_not_fit_are_named_and_branches_of_their_own_have_room(caplog: pytest.LogCaptureFixture) -> None:
    pipe, many = sd1(), Concept("many", targets=tuple(colour + " knife" * n for colour in ("red", "big") for n in range(1, 9)))
    PerpNeg(negatives="each").fit(pipe, [many])
    assert not caplog.records
    PerpNeg().fit(pipe, [many])
    assert "cut off" in caplog.records[-1].getMessage()


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ErasureError, match=r"weight is -1\.5"):
        PerpNeg(weight=-1.5)


def test_an_artefact_of_one_phrase_is_checked_on_a_prompt_that_says_more(tmp_path: Path) -> None:
    pipe = sd1()
    artifact.save(PerpNeg().fit(pipe, [Concept("dagger")]), tmp_path / "out", pipe=pipe, base_id="tiny")
    assert artifact.verify(tmp_path / "out", sd1())["canary"]["measured"] > 1e-3
