"""UCE's closed form against least squares, and which weights a fit changes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from erasure.concept import Concept
from erasure.errors import ErasureError, NothingAttached
from erasure.families import family_of
from erasure.method import Run, WeightEraser
from erasure.methods import uce
from erasure.methods.uce import UCE
from erasure.text import encode
from tests.tiny import FAMILIES, TOKENS, latents, sd1

INPUTS, OUTPUTS = 12, 7


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT, TARGETS, ANCHORS, RETAIN = rand(OUTPUTS, INPUTS), rand(3, INPUTS, seed=1), rand(3, INPUTS, seed=2), rand(4, INPUTS, seed=3)


def least_squares(w: Tensor, c: Tensor, a: Tensor, r: Tensor, erase: float, keep: float, ridge: float) -> np.ndarray[Any, Any]:
    """argmin_V  η_e Σ |V c - W a|² + η_p Σ |V r - W r|² + λ |V - W|², as one stacked system that lstsq solves."""
    rows = np.vstack([np.sqrt(erase) * c, np.sqrt(keep) * r, np.sqrt(ridge) * np.eye(w.shape[1])])
    wanted = np.vstack([np.sqrt(erase) * a @ w.T, np.sqrt(keep) * r @ w.T, np.sqrt(ridge) * w.T])
    return np.asarray(np.linalg.lstsq(rows, wanted, rcond=None)[0].T)


@pytest.mark.parametrize(("erase", "keep", "ridge"), [(1.0, 1.0, 0.5), (3.0, 0.1, 0.1), (0.2, 10.0, 2.0)])
@pytest.mark.parametrize("retain", [RETAIN, RETAIN[:0]])
def test_solve_is_the_least_squares_solution(retain: Tensor, erase: float, keep: float, ridge: float) -> None:
    ours = uce.solve(WEIGHT, TARGETS, ANCHORS, retain, erase, keep, ridge)
    np.testing.assert_allclose(ours.numpy(), least_squares(WEIGHT, TARGETS, ANCHORS, retain, erase, keep, ridge), atol=1e-9)


def test_solve_is_accurate_in_float32_where_targets_nearly_coincide() -> None:
    c = torch.cat([TARGETS, TARGETS + 1e-4 * rand(3, INPUTS, seed=9)]) * 20
    a = torch.cat([ANCHORS, ANCHORS]) * 20
    ours = uce.solve(WEIGHT.float(), c.float(), a.float(), RETAIN.float(), 1.0, 1.0, 0.5)
    assert ours.dtype == torch.float32
    exact = least_squares(WEIGHT.float().double(), c.float().double(), a.float().double(), RETAIN.float().double(), 1.0, 1.0, 0.5)
    np.testing.assert_allclose(ours.numpy(), exact, atol=1e-5)


def test_no_targets_or_anchors_equal_to_targets_change_nothing() -> None:
    none = TARGETS[:0]
    torch.testing.assert_close(uce.solve(WEIGHT, none, none, RETAIN), WEIGHT, atol=1e-10, rtol=0)
    torch.testing.assert_close(uce.solve(WEIGHT, TARGETS, TARGETS, RETAIN), WEIGHT, atol=1e-10, rtol=0)
    torch.testing.assert_close(uce.solve(WEIGHT, TARGETS, ANCHORS, RETAIN, erase_scale=0.0), WEIGHT, atol=1e-10, rtol=0)


def test_a_large_ridge_changes_nothing_and_a_small_one_maps_targets_to_anchors() -> None:
    assert (uce.solve(WEIGHT, TARGETS, ANCHORS, RETAIN, ridge=1e9) - WEIGHT).abs().max() < 1e-6
    moved = uce.solve(WEIGHT, TARGETS, ANCHORS, RETAIN[:0], ridge=1e-8)
    torch.testing.assert_close(TARGETS @ moved.T, ANCHORS @ WEIGHT.T, atol=1e-6, rtol=0)


def test_retained_directions_are_kept_better_as_their_scale_grows() -> None:
    errors = []
    for scale in (0.0, 0.1, 1.0, 10.0, 1e3, 1e6):
        moved = uce.solve(WEIGHT, TARGETS, ANCHORS, RETAIN, retain_scale=scale)
        errors.append(float((RETAIN @ (moved - WEIGHT).T).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 * errors[0]


def test_solve_refuses_unpaired_anchors() -> None:
    with pytest.raises(ValueError, match="one anchor"):
        uce.solve(WEIGHT, TARGETS, ANCHORS[:2], RETAIN)


# in a pipeline

CONCEPT = Concept("dagger", targets=("dagger", "knife"), anchors=("cat",), retain=("boat",))


@pytest.fixture(scope="module")
def pipe() -> Any:
    return sd1()


def cross_attention(pipe: Any) -> set[str]:
    return {f"unet.{n}" for n, _ in pipe.unet.named_parameters() if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}


def fit(pipe: Any, concept: Concept = CONCEPT, **config: Any) -> WeightEraser:
    eraser = UCE(**config).fit(pipe, [concept])
    assert isinstance(eraser, WeightEraser)
    return eraser


def test_fit_changes_every_key_and_value_of_cross_attention_and_nothing_else(pipe: Any) -> None:
    before = {f"unet.{name}": p.clone() for name, p in pipe.unet.named_parameters()}
    eraser = fit(pipe)
    assert all(torch.equal(before[f"unet.{name}"], p) for name, p in pipe.unet.named_parameters()), "fit leaves the pipeline as it was"
    assert set(eraser.changed) == cross_attention(pipe) and len(eraser.changed) == 14
    with eraser.attach(pipe):
        differ = {f"unet.{name}" for name, p in pipe.unet.named_parameters() if not torch.equal(before[f"unet.{name}"], p)}
    assert differ == cross_attention(pipe)


@torch.no_grad()
def rows(pipe: Any, phrase: str, tokens: str) -> Tensor:
    batch = pipe.tokenizer(phrase, padding="max_length", max_length=TOKENS, return_tensors="pt")
    states = pipe.text_encoder(batch.input_ids).last_hidden_state[0].double()
    last = max(len(pipe.tokenizer(phrase).input_ids) - 2, 0)
    return torch.as_tensor(states[last : last + 1] if tokens == "last" else states[last:])


@pytest.mark.parametrize("tokens", ["last", "tail"])
@pytest.mark.parametrize("anchor", ["cat", "", "a big red cat"])
def test_fit_solves_the_papers_problem_for_the_rows_it_names(pipe: Any, tokens: Any, anchor: str) -> None:
    concept = Concept("dagger", anchors=(anchor,), retain=("boat", "the night sky"))
    eraser = fit(pipe, concept, tokens=tokens, expand=False, erase_scale=2.0, retain_scale=0.3, ridge=0.7)
    c, a = rows(pipe, "dagger", tokens), rows(pipe, anchor, tokens)
    n = min(len(c), len(a))
    empty = [rows(pipe, "", "tail")] if tokens == "tail" else []  # the paper's code always retains the empty prompt
    r = torch.cat([*(rows(pipe, phrase, tokens) for phrase in concept.retain), *empty])
    for name, changed in eraser.changed.items():
        old = pipe.unet.get_parameter(name.removeprefix("unet.")).detach().double()
        np.testing.assert_allclose(changed.double().numpy(), least_squares(old, c[:n], a[:n], r, 2.0, 0.3, 0.7), atol=2e-4)


def test_the_erased_word_draws_its_anchor() -> None:
    pipe = sd1(tokens=8)  # so that the rows of all phrases are fewer than the text's channels, and can all be mapped
    target, anchor = latents(pipe, "dagger"), latents(pipe, "cat")
    with fit(pipe, Concept("dagger", anchors=("cat",), retain=("",)), expand=False, ridge=1e-4).attach(pipe):
        erased = latents(pipe, "dagger")
    assert (erased - anchor).norm() < 0.2 * (target - anchor).norm()


def test_retain_lists_keep_their_words(pipe: Any) -> None:
    base = latents(pipe, "a photo of a boat")
    drift = []
    for retain in ((), ("boat",)):
        with fit(pipe, Concept("dagger", anchors=("cat",), retain=retain), retain_scale=20.0).attach(pipe):
            drift.append(float((latents(pipe, "a photo of a boat") - base).norm()))
    assert drift[1] < 0.6 * drift[0]


def test_templates_of_a_kind_are_used_unless_switched_off(pipe: Any) -> None:
    plain, expanded = fit(pipe, expand=False), fit(pipe)
    style = fit(pipe, Concept("dagger", kind="style", targets=("dagger", "knife"), anchors=("cat",), retain=("boat",)))
    name = next(iter(plain.changed))
    assert not torch.allclose(plain.changed[name], expanded.changed[name], atol=1e-4)
    assert not torch.allclose(style.changed[name], expanded.changed[name], atol=1e-4)


def test_another_text_width_is_an_error() -> None:
    narrow = sd1()
    for module in narrow.unet.modules():
        if hasattr(module, "to_k") and module.to_k.in_features == 32:
            module.to_k, module.to_v = torch.nn.Linear(8, 32), torch.nn.Linear(8, 32)
    with pytest.raises(NothingAttached, match="cross-attention"):
        fit(narrow)


def test_no_concepts_is_an_error(pipe: Any) -> None:
    with pytest.raises(ErasureError, match="concept"):
        UCE().fit(pipe, [])


def test_many_concepts_in_batches_solve_the_same_problem_as_one_dense_system(pipe: Any) -> None:
    words = [a + b for a in "abcdefgh" for b in "klmnop"]
    concepts = [Concept(word, anchors=("cat" if i % 2 else "dog",), retain=("boat", "red")) for i, word in enumerate(words)]
    eraser = UCE(tokens="last", expand=False, ridge=0.3).fit(pipe, concepts, run=Run(progress=False))
    c, a = (
        torch.cat([rows(pipe, text, "last") for text in side]) for side in zip(*(pair for x in concepts for pair in x.pairs()), strict=True)
    )
    r = torch.cat([rows(pipe, "boat", "last"), rows(pipe, "red", "last")])
    for name, changed in eraser.tensors().items():
        old = pipe.unet.get_parameter(name.removeprefix("unet.")).detach().double()
        np.testing.assert_allclose(changed.double().numpy(), least_squares(old, c, a, r, 1.0, 1.0, 0.3), atol=5e-4)


def test_what_one_concept_erases_another_does_not_retain(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    both = [Concept("dagger", anchors=("cat",), retain=("Knife", "boat")), Concept("knife", anchors=("cat",))]
    eraser = UCE(expand=False).fit(pipe, both, run=Run(progress=False))
    assert "Knife" in caplog.text and "boat" not in caplog.text
    without = [Concept("dagger", anchors=("cat",), retain=("boat",)), both[1]]
    expected = UCE(expand=False).fit(pipe, without, run=Run(progress=False)).tensors()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in eraser.tensors().items())


@pytest.mark.parametrize("config", [{"ridge": 0.0}, {"ridge": float("nan")}, {"erase_scale": -1.0}])
def test_settings_without_one_solution_are_errors(config: dict[str, float]) -> None:
    with pytest.raises(ErasureError, match="ridge above 0"):
        UCE(**config)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "wan"])
def test_other_families_are_solved_for_the_layers_that_read_the_prompt(family: str) -> None:
    """FLUX's biases stay: v* is W c_anchor, where the authors' code has module(c_anchor), bias included."""
    pipe = FAMILIES[family]()
    concept = Concept("dagger", anchors=("cat",), retain=("boat",))
    eraser = UCE(tokens="last", expand=False).fit(pipe, [concept], run=Run(progress=False))
    row = family_of(pipe)
    texts = ["dagger", "cat", "boat"]
    encoded = next(encode(pipe, row, texts))
    starts = {"sdxl": {0: 0}, "sd3": {0: 0, 2: 77}, "flux": {1: 0}, "wan": {0: 0}}[family]  # encoder -> its first row
    last = [[start + int(encoded.lengths[k][i]) - 2 for k, start in starts.items()] for i in range(3)]
    context = [encoded.context[i, last[i]].double() for i in range(3)]
    layers = list(row.text_linears(pipe))
    assert set(eraser.tensors()) == {f"{name}.weight" for name, _, _ in layers}
    for name, layer, reads in layers:
        c, a, r = context if reads == "context" else [encoded.pooled[i : i + 1].double() for i in range(3)]  # type: ignore[index]
        expected = least_squares(layer.weight.detach().double(), c, a, r, 1.0, 1.0, 0.5)  # type: ignore[operator, union-attr]
        np.testing.assert_allclose(eraser.tensors()[f"{name}.weight"].double().numpy(), expected, atol=2e-4)


def test_bake_writes_for_good() -> None:
    pipe = sd1()
    eraser = fit(pipe)
    with eraser.attach(pipe):
        attached = latents(pipe, "a dagger")
    eraser.bake(pipe)
    assert torch.equal(latents(pipe, "a dagger"), attached)
