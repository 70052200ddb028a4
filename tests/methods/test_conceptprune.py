"""ConceptPrune's masks against plain arithmetic, what is counted while it samples, and which weights a fit changes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from erasure.concept import Concept
from erasure.denoising import Denoising
from erasure.errors import ErasureError, NotErased, UnsupportedFamily
from erasure.families import family_of
from erasure.method import Run, WeightEraser
from erasure.methods import conceptprune
from erasure.methods.conceptprune import ConceptPrune
from erasure.methods.masking.sites import find
from erasure.testing import check_method
from erasure.testing.subject import CONCEPT
from erasure.testing.tiny import FAMILIES, sd1

QUICK: dict[str, Any] = {"size": 16, "images": 2, "sampling_steps": 4, "timesteps": 2, "ratio": 0.3}
SUPPORTED = sorted(ConceptPrune.families)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fit(pipe: Any, concept: Concept = CONCEPT, **config: Any) -> WeightEraser:
    return ConceptPrune.from_config({**QUICK, **config}).fit(pipe, [concept], run=Run(progress=False))


def skilled_in_python(target: Tensor, base: Tensor, ratio: float) -> list[list[bool]]:
    """Row by row with sorted lists: among the best int(ratio n) of the row, and better than without the concept."""
    found = []
    for row, other in zip(target.tolist(), base.tolist(), strict=True):
        best = set(sorted(range(len(row)), key=lambda j: -row[j])[: int(ratio * len(row))])
        found.append([j in best and row[j] > other[j] for j in range(len(row))])
    return found


def test_scores_of_a_layer_by_hand() -> None:
    weight, norms = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]]), torch.tensor([2.0, 0.5, 4.0])
    assert conceptprune.scores(weight, norms).tolist() == [[2.0, 1.0, 2.0], [0.0, 1.5, 4.0]]


def test_skilled_weights_of_a_layer_by_hand() -> None:
    target = torch.tensor([[5.0, 4.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    base = torch.tensor([[6.0, 3.0, 0.0, 0.0], [0.0, 0.0, 3.0, 3.9]])
    # Row 0: 0 and 1 are the top half, 0 serves the base more. Row 1: 2 and 3 are, 2 serves both alike.
    assert conceptprune.skilled(target, base, 0.5).tolist() == [[False, True, False, False], [False, False, False, True]]


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.02, 0.1, 0.29, 0.5, 1.0])
def test_skilled_weights_are_those_of_sorted_rows(ratio: float) -> None:
    weight, target, base = rand(13, 100), rand(100, seed=1).abs(), rand(100, seed=2).abs()
    mine, theirs = conceptprune.scores(weight, target), conceptprune.scores(weight, base)
    found = conceptprune.skilled(mine, theirs, ratio)
    assert found.dtype == torch.bool and found.tolist() == skilled_in_python(mine, theirs, ratio)


def test_wrong_shapes_and_shares_are_errors() -> None:
    with pytest.raises(ValueError, match="one layer"):
        conceptprune.skilled(rand(3, 4), rand(3, 5), 0.1)
    for ratio in (-0.1, 1.1, float("nan")):
        with pytest.raises(ErasureError, match="from 0 to 1"):
            conceptprune.skilled(rand(3, 4), rand(3, 4), ratio)
    for wrong in ({"ratio": 0.0}, {"agreement": 1.0}, {"timesteps": 51}, {"images": 0}, {"timesteps": 0}):
        with pytest.raises(ErasureError, match="conceptprune"):
            ConceptPrune.from_config(wrong)


@pytest.mark.parametrize("agreement", [0.0, 0.25, 0.5, 0.75])
def test_the_mask_unites_the_steps_or_asks_for_agreement(agreement: float) -> None:
    weight, target, base = rand(6, 20).float(), rand(4, 20, seed=1).abs(), rand(4, 20, seed=2).abs()
    method = ConceptPrune(ratio=0.3, timesteps=4, sampling_steps=4, agreement=agreement)
    each = [skilled_in_python(weight.abs() * t.float(), weight.abs() * b.float(), 0.3) for t, b in zip(target, base, strict=True)]
    count = torch.tensor(each).sum(0)
    assert torch.equal(method.mask(weight, target, base), count > agreement * 4)


# in a pipeline


@pytest.fixture(scope="module")
def pipe() -> Any:
    return sd1()


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("branches", ["text", "both"])
def test_norms_are_those_of_all_tokens_that_enter_the_layer(pipe: Any, branches: Any, normalise: bool) -> None:
    """Against activations that are all kept, and put together in float64, prompt by prompt."""
    method = ConceptPrune.from_config({**QUICK, "branches": branches, "normalise": normalise, "guidance": 3.0})
    family = family_of(pipe)
    of, sites = Denoising(pipe, family, 16), find(pipe, family, ("neurons",))
    prompts, seeds = ["a dagger", "a big red cat", "the night sky"], [3, 4, 5]

    class Bar:
        done = 0

        def update(self, n: int) -> None:
            self.done += n

    found = method.norms(of, sites, prompts, seeds, bar := Bar())
    assert bar.done == 3
    kept: dict[tuple[str, int], list[Tensor]] = {}
    for prompt, seed in zip(prompts, seeds, strict=True):
        states, t = of.paths([prompt], [seed], steps=4, guidance=3.0)
        for step in range(2):
            hooks = []
            for site in sites:
                layer, into = pipe.unet.get_submodule(site.layers[0].removeprefix("unet.")), kept.setdefault((site.key, step), [])
                hooks.append(layer.register_forward_pre_hook(lambda m, args, into=into: into.append(args[0][0].double())))
            with torch.no_grad():
                for text in [prompt] if branches == "text" else [prompt, ""]:
                    of.predict(states[:, step], t[step], [text])
            for hook in hooks:
                hook.remove()
    assert len(found) == len(sites) == 7
    for (key, step), rows in kept.items():
        x = torch.cat(rows)
        x = x / x.norm(dim=1, keepdim=True) if normalise else x
        torch.testing.assert_close(found[key][step], x.norm(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SUPPORTED)
def test_pruned_weights_are_zero_and_all_others_the_bases(name: str) -> None:
    pipe = FAMILIES[name]()
    sites = {f"{s.layers[0]}.weight": s for s in find(pipe, family_of(pipe), ("neurons",))}
    changed = fit(pipe, timesteps=1).changed
    assert changed and changed.keys() <= sites.keys()
    for key, new in changed.items():
        component, _, path = key.partition(".")
        old = getattr(pipe, component).get_parameter(path).detach()
        differs = new != old
        assert differs.any() and (new[differs] == 0).all()
        assert not differs[:, : sites[key].start].any(), "the heads' channels of a FLUX single block are no neurons"
        assert differs.sum(1).max() <= int(0.3 * sites[key].count), "one step prunes at most the ratio of a row"


def test_equal_prompts_serve_nobody_more_and_too_small_a_ratio_has_no_weight(pipe: Any) -> None:
    with pytest.raises(ErasureError, match="no skilled weight"):
        fit(pipe, Concept("dagger", anchors=("dagger",)), base="anchor")
    with pytest.raises(ErasureError, match="larger ratio"):
        fit(pipe, ratio=0.001)


def test_each_setting_reaches_the_masks(pipe: Any) -> None:
    def zeros(**config: Any) -> Tensor:
        changed = fit(pipe, **config).changed
        empty = torch.zeros(0)
        return torch.cat([(changed.get(f"{s.layers[0]}.weight", empty) == 0).flatten() for s in find(pipe, family_of(pipe), ("neurons",))])

    plain = zeros()
    others = ({"ratio": 0.1}, {"timesteps": 4}, {"agreement": 0.5}, {"base": "anchor"}, {"branches": "text"}, {"normalise": False})
    for config in (*others, {"images": 5}, {"guidance": 1.0}):
        other = zeros(**config)
        assert other.shape != plain.shape or not torch.equal(other, plain), f"{config} changes nothing"
    assert zeros(agreement=0.5).sum() < plain.sum() < zeros(timesteps=4).sum()


def test_concepts_are_pruned_together_as_the_union_of_each(pipe: Any) -> None:
    one, two = Concept("dagger", anchors=("cat",), retain=("boat",)), Concept("dog", anchors=("cat",), retain=("boat",))
    method = ConceptPrune.from_config(QUICK)
    both = method.fit(pipe, [one, two], run=Run(progress=False)).changed
    alone = method.fit(pipe, [one], run=Run(progress=False)).changed
    assert alone.keys() <= both.keys()
    assert all((both[name][alone[name] == 0] == 0).all() for name in alone)
    assert sum(int((t == 0).sum()) for t in both.values()) > sum(int((t == 0).sum()) for t in alone.values())


def test_prompts_with_and_without_the_concept() -> None:
    context, anchor = ConceptPrune(), ConceptPrune(base="anchor")
    assert context.pairs(CONCEPT) == [("dagger and boat", "boat"), ("knife and boat", "boat")]
    assert ("a picture of dagger", "a picture of cat") in anchor.pairs(CONCEPT)
    style = Concept("van gogh", kind="style", retain=("boat",))
    assert context.pairs(style) == [("boat in the style of van gogh", "boat")]
    assert ("a cat in the style of van gogh", "") in anchor.pairs(style)
    assert len(context.pairs(Concept("dagger"))) > 5, "without a retain list there are scenes of our own"


def test_an_erased_pipeline_and_other_families_are_refused(pipe: Any) -> None:
    with fit(pipe).attach(pipe), pytest.raises(NotErased, match="detach it first"):
        fit(pipe)
    with pytest.raises(UnsupportedFamily, match="wan"):
        fit(FAMILIES["wan"]())


def test_contract() -> None:
    assert check_method(ConceptPrune, families=["flux"], config=QUICK) > 10
