"""Concept Ablation's loss by hand, its two targets, and what its prior holds."""

from typing import Any

import pytest
import torch
from torch import Tensor

from erasure.concept import Concept
from erasure.denoising import Denoising
from erasure.families import family_of
from erasure.method import Run, WeightEraser
from erasure.methods import concept_ablation
from erasure.methods.concept_ablation import ConceptAblation
from erasure.testing.subject import CONCEPT
from erasure.testing.tiny import sd1
from erasure.tuning import chosen

QUICK: dict[str, Any] = {"steps": 3, "lr": 0.02, "batch": 2, "sampling_steps": 2, "size": 16, "images": 3, "retain_scale": 0.0}


def test_the_loss_is_the_mean_square_and_moves_only_the_concepts_side() -> None:
    draw = torch.Generator().manual_seed(0)
    pred, anchor = (torch.randn(2, 4, 3, 3, generator=draw, dtype=torch.float64, requires_grad=True) for _ in range(2))
    value = concept_ablation.loss(pred, anchor)
    by_hand = sum((a - b) ** 2 for a, b in zip(pred.flatten().tolist(), anchor.flatten().tolist(), strict=True)) / pred.numel()
    assert value.item() == pytest.approx(by_hand, abs=1e-12)
    value.backward()
    assert anchor.grad is None and pred.grad is not None
    torch.testing.assert_close(pred.grad, 2 * (pred - anchor).detach() / pred.numel())


def fit(pipe: Any, concept: Concept = CONCEPT, **config: Any) -> WeightEraser:
    eraser = ConceptAblation.from_config({**QUICK, **config}).fit(pipe, [concept], run=Run(progress=False))
    assert isinstance(eraser, WeightEraser)
    return eraser


def test_it_trains_keys_and_values_of_the_text() -> None:
    pipe = sd1()
    assert set(fit(pipe).changed) == set(chosen(pipe, family_of(pipe), "kv"))
    assert ConceptAblation().optimiser() == {"weight_decay": 1e-2, "clip": 1.0}


def distance(pipe: Any, one: str, other: str) -> Tensor:
    """How far the predictions for two prompts are apart, on images of the second."""
    of = Denoising(pipe, family_of(pipe), 16)
    x_t, t = of.states([other] * 4, [1, 2, 3, 4], steps=4, stop=2, guidance=4.0)
    with torch.no_grad():
        return (of.predict(x_t, t, [one] * 4) - of.predict(x_t, t, [other] * 4)).norm()


@pytest.mark.parametrize(("anchors", "part", "lr"), [("base", "full", 0.005), ("current", "kv", 0.01)])
def test_the_concept_comes_to_mean_its_anchor(anchors: str, part: str, lr: float) -> None:
    pipe = sd1()
    before, concept = distance(pipe, "dagger", "cat"), Concept("dagger", anchors=("cat",))
    with fit(pipe, concept, steps=40, batch=4, anchor_model=anchors, part=part, lr=lr, expand=False).attach(pipe):
        assert distance(pipe, "dagger", "cat") < 0.6 * before


def test_an_anchor_that_is_predicted_by_the_base_stays_where_it_was() -> None:
    """The authors' rule pulls target and anchor together; with the base's predictions the anchor does not come to meet the target."""
    pipe, moved = sd1(), []
    of = Denoising(pipe, family_of(pipe), 16)
    x_t, t = of.states(["cat"] * 4, [1, 2, 3, 4], steps=4, stop=2, guidance=4.0)
    for anchors in ("base", "current"):
        with torch.no_grad():
            base = of.predict(x_t, t, ["cat"] * 4)
            with fit(pipe, Concept("dagger", anchors=("cat",)), steps=25, anchor_model=anchors, expand=False).attach(pipe):
                moved.append(float((of.predict(x_t, t, ["cat"] * 4) - base).norm()))
    assert moved[0] < 0.7 * moved[1]


def test_each_target_goes_to_its_own_anchor() -> None:
    pipe = sd1()
    pairs = Concept("blade", targets=("dagger", "knife"), anchors=("cat", "boat"))
    before = [float(distance(pipe, a, b)) for a, b in (("dagger", "cat"), ("knife", "boat"))]
    with fit(pipe, pairs, steps=40, images=4, expand=False).attach(pipe):
        after = [float(distance(pipe, a, b)) for a, b in (("dagger", "cat"), ("knife", "boat"))]
        crossed = float(distance(pipe, "dagger", "boat"))
    assert after[0] < 0.6 * before[0] and after[1] < 0.6 * before[1] and crossed > after[0]


def test_settings_reach_the_loss() -> None:
    pipe = sd1()

    def weights(**config: Any) -> Tensor:
        return torch.cat([p.flatten() for p in fit(pipe, **config).changed.values()])

    plain = weights()
    assert torch.equal(plain, weights())
    retained = Concept("dagger", targets=("dagger", "knife"), anchors=("cat",), retain=("night sky",))
    others = [
        weights(variant="noise"), weights(anchor_model="base"), weights(retain_scale=1.0), weights(retain_scale=1.0, concept=retained),
        weights(expand=False), weights(guidance=1.0),
    ]  # fmt: skip
    for i, one in enumerate([plain, *others]):
        assert all((one - other).abs().max() > 1e-5 for other in others[i:] if other is not one)


def test_several_concepts_each_in_their_templates() -> None:
    method = ConceptAblation(expand=True)
    style = Concept("van gogh", kind="style", anchors=("painting",))
    pairs = method.phrases([style, Concept("cat of ours", anchors=("cat",)), Concept("dog")])
    assert ("a cat in the style of van gogh", "a cat in the style of painting") in pairs and ("a cat of ours", "a cat") in pairs
    assert len(pairs) == 15 and {anchor for word, anchor in pairs if "dog" in word} == {""}
    assert ConceptAblation(expand=False).phrases([style]) == [("van gogh", "painting")]


def test_the_loss_is_float32_where_half_precision_would_overflow() -> None:
    far = torch.full((1, 4, 2, 2), 300.0, dtype=torch.float16)
    assert concept_ablation.loss(far, torch.zeros_like(far)).item() == 90000.0


@pytest.mark.parametrize("rank", [None, 2])
def test_the_start_token_may_be_left_without_gradient(rank: int | None) -> None:
    pipe = sd1()

    def trained(cut: bool) -> dict[str, Tensor]:
        eraser = ConceptAblation.from_config({**QUICK, "cut_start": cut, "rank": rank}).fit(pipe, [CONCEPT], run=Run(progress=False))
        return dict(eraser.changed if isinstance(eraser, WeightEraser) else eraser.factors)

    cut, whole = trained(True), trained(False)
    assert cut.keys() == whole.keys() and any((cut[name] - whole[name]).abs().max() > 1e-4 for name in cut)


def test_what_is_cut_is_the_start_tokens_gradient_and_nothing_else() -> None:
    """By hand: with keys and values of the first token taken as given, the same gradients; the values of the layer stay."""
    layer, context = torch.nn.Linear(4, 3, bias=False).double(), torch.randn(2, 5, 4, dtype=torch.float64)
    given, pull = torch.randn(2, 5, 3, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    for row in range(2):
        for token in range(1, 5):
            pull += torch.outer(given[row, token], context[row, token])
    with layer.register_forward_hook(concept_ablation._without_start):
        output = layer(context)
        (output * given).sum().backward()
    assert torch.equal(output, layer(context))
    torch.testing.assert_close(layer.weight.grad, pull)


def test_the_papers_preset_has_no_prior_and_cuts_the_start_token() -> None:
    paper, ours = ConceptAblation(), ConceptAblation(preset="canvas")
    assert (paper.retain_scale, paper.cut_start, paper.lr, paper.batch) == (0.0, True, 1.6e-5, 8)
    assert (ours.retain_scale, ours.cut_start) == (2.0, False)
