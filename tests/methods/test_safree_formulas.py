"""SAFREE's formulas against references written from the paper, in float64."""

from typing import Any

import numpy as np
import pytest
import torch

from erasure.methods import safree
from tests.methods.safree_reference import dense_projector, dense_reattend, naive_triggers, rand

# projector


@pytest.mark.parametrize("count", [1, 4, 17])
def test_projector_equals_the_papers_formula(count: int) -> None:
    phrases = rand(count, 24)
    ours = safree.projector(phrases)
    np.testing.assert_allclose(ours.numpy(), dense_projector(phrases), atol=1e-10)
    torch.testing.assert_close(ours, ours.T)
    torch.testing.assert_close(ours @ ours, ours)
    torch.testing.assert_close(phrases @ ours, phrases)
    assert ours.trace().item() == pytest.approx(count)


def test_projector_of_duplicates_is_that_of_the_distinct_phrases() -> None:
    phrases = rand(5, 24).float()
    twice = torch.cat([phrases, phrases, 3 * phrases[:2]])
    torch.testing.assert_close(safree.projector(twice), safree.projector(phrases), atol=1e-5, rtol=0)
    assert safree.projector(twice).trace().item() == pytest.approx(5, abs=1e-4)


def test_projector_of_near_parallel_phrases_is_exact() -> None:
    a, noise = rand(2, 24)
    a /= a.norm()
    side = noise - (noise @ a) * a
    side /= side.norm()
    b = 0.9999 * a + np.sqrt(1 - 0.9999**2) * side
    expected = torch.outer(a, a) + torch.outer(side, side)
    ours = safree.projector(torch.stack([a, b]).float())
    assert (ours - expected).abs().max() < 1e-4


def test_projector_of_nothing_and_of_everything() -> None:
    assert not safree.projector(rand(0, 8)).any()
    torch.testing.assert_close(safree.projector(rand(20, 8)), torch.eye(8, dtype=torch.float64))


# triggers


@pytest.mark.parametrize("n", [0, 1, 2, 3, 30])
@pytest.mark.parametrize("alpha", [-0.1, 0.0, 0.01, 0.2])
def test_trigger_mask_equals_the_loop(n: int, alpha: float) -> None:
    masked, toxic = rand(n, 16, seed=n), safree.projector(rand(3, 16, seed=99))
    assert safree.trigger_mask(masked, toxic, alpha).tolist() == naive_triggers(masked, toxic, alpha)


def test_the_token_whose_absence_leaves_the_concept_is_the_trigger() -> None:
    direction = torch.eye(8, dtype=torch.float64)[0]
    masked = torch.stack([5 * direction + 0.1 * rand(8, seed=i) for i in range(4)])
    masked[2] = rand(8, seed=7)
    assert safree.trigger_mask(masked, safree.projector(direction[None]), 0.01).nonzero().flatten().tolist() == [2]


def test_tokens_of_equal_distance_are_triggers_unless_alpha_lets_them_pass() -> None:
    for value in (0.1, 0.37, 1 / 3):
        for n in range(2, 40):
            masked, toxic = torch.full((n, 8), value), torch.zeros(8, 8)
            assert safree.trigger_mask(masked, toxic, 0.0).all() and not safree.trigger_mask(masked, toxic, 0.01).any()


def test_half_precision_is_compared_in_double() -> None:
    masked = torch.cat([(rand(1, 64, seed=i) + 0.1 * rand(12, 64, seed=50 + i)).bfloat16()[None] for i in range(40)])
    toxic = safree.projector(rand(3, 64, seed=99)).bfloat16()
    found = [safree.trigger_mask(each, toxic, 0.01).tolist() for each in masked]
    assert found == [naive_triggers(each.double(), toxic.double(), 0.01) for each in masked]


# projection of tokens


def test_project_equals_the_dense_formula_in_both_orders() -> None:
    tokens, inputs, toxic = rand(9, 20), dense_projector(rand(6, 20, seed=1)), dense_projector(rand(4, 20, seed=2))
    off, e = np.eye(20) - toxic, tokens.numpy()
    for order, expected in (("code", off @ inputs @ e.T), ("paper", inputs @ off @ e.T)):
        ours = safree.project(tokens, torch.tensor(inputs), torch.tensor(toxic), order)  # type: ignore[arg-type]
        np.testing.assert_allclose(ours.numpy(), expected.T, atol=1e-10)


def test_code_order_leaves_the_concept_and_paper_order_stays_in_the_input() -> None:
    tokens, inputs, toxic = rand(9, 20), safree.projector(rand(6, 20, seed=1)), safree.projector(rand(4, 20, seed=2))
    code, paper = (safree.project(tokens, inputs, toxic, order) for order in ("code", "paper"))  # type: ignore[arg-type]
    assert (code @ toxic).abs().max() < 1e-12
    assert (paper - paper @ inputs).abs().max() < 1e-12
    assert (code - code @ inputs).abs().max() > 1e-2
    assert (paper @ toxic).abs().max() > 1e-2
    with pytest.raises(ValueError, match="order"):
        safree.project(tokens, inputs, toxic, "other")  # type: ignore[arg-type]


# self-validating filter


@pytest.mark.parametrize(
    ("beta", "nudity", "artist", "paper"),
    [
        (0.0, 0, 0, 5),
        (0.3, 0, 0, 6),
        (0.45, 0, 0, 6),
        (0.5, 2, 0, 6),
        (0.533, 5, 2, 6),
        (0.55, 7, 5, 6),
        (0.6, 10, 10, 6),
        (1.0, 10, 10, 7),
    ],
)
def test_filter_steps_table(beta: float, nudity: int, artist: int, paper: int) -> None:
    assert safree.filter_steps(beta) == nudity
    assert safree.filter_steps(beta, "artist") == artist
    assert safree.filter_steps(beta, "nudity", "paper") == safree.filter_steps(beta, "artist", "paper") == paper


def test_filter_steps_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match="kind"):
        safree.filter_steps(0.5, "dog")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rule"):
        safree.filter_steps(0.5, rule="mine")  # type: ignore[arg-type]


# re-attention


@pytest.mark.parametrize("rule", ["paper", "code"])
@pytest.mark.parametrize(("height", "width", "radius"), [(8, 8, 1), (6, 10, 2), (5, 7, 1), (2, 2, 1)])
def test_reattend_equals_the_dense_transform(rule: Any, height: int, width: int, radius: int) -> None:
    safe, original = rand(2, 3, height, width).float(), rand(2, 3, height, width, seed=1).float()
    ours = safree.reattend(safe, original, 0.3, radius, rule)
    np.testing.assert_allclose(ours.numpy(), dense_reattend(safe, original, 0.3, radius, rule), atol=1e-5)
    exact = safree.reattend(safe.double(), original.double(), 0.3, radius, rule)
    np.testing.assert_allclose(exact.numpy(), dense_reattend(safe, original, 0.3, radius, rule), atol=1e-12)


def test_reattend_leaves_equal_features_and_other_frequencies_alone() -> None:
    safe, original = rand(2, 3, 8, 8).float(), rand(2, 3, 8, 8, seed=1).float()
    torch.testing.assert_close(safree.reattend(safe, safe, 0.2), safe, atol=1e-5, rtol=0)
    changed = torch.fft.fftshift(torch.fft.fft2(safree.reattend(safe, original, 0.2) - safe), dim=(-2, -1)).abs() > 1e-3
    # Taking the real part afterwards couples each frequency to its negative, so the window grows by one on the far side.
    assert changed[..., 3:6, 3:6].any()
    changed[..., 3:6, 3:6] = False
    assert not changed.any()


@pytest.mark.parametrize("rule", ["paper", "code"])
def test_reattend_where_the_original_exceeds_changes_nothing(rule: Any) -> None:
    safe = rand(1, 2, 8, 8).float()
    delta = torch.zeros_like(safe)
    delta[..., 0, 0] = 50.0  # an impulse raises the real part of every frequency alike
    torch.testing.assert_close(safree.reattend(safe, safe + delta, 0.2, rule=rule), safe, atol=1e-5, rtol=0)
    assert (safree.reattend(safe, safe - delta, 0.2, rule=rule) - safe).abs().max() > 1e-2
