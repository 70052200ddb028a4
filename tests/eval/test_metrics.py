import sys
from typing import Any

import numpy as np
import pytest
import torch

from erasure.eval.metrics import features, kid


def dense_mmd(x: Any, y: Any, paired: bool = False) -> float:
    """The definition, one pair at a time."""

    def k(a: Any, b: Any) -> float:
        return (float(np.dot(a, b)) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    cross = [k(x[i], y[j]) for i in range(n) for j in range(m) if not (paired and i == j)]
    return xx + yy - 2 * sum(cross) / len(cross)


@pytest.mark.parametrize("paired", [False, True])
def test_kid_is_the_dense_formula(paired: bool) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 5)), rng.normal(0.3, 1, size=(9 if paired else 7, 5))
    assert kid.polynomial_mmd(x, y, paired=paired) == pytest.approx(dense_mmd(x, y, paired), rel=1e-12)


def test_kid_is_computed_in_double_precision() -> None:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) * 30
    y = x.flip(0) + 1e-3
    assert kid.polynomial_mmd(x, y) == pytest.approx(dense_mmd(x.double().numpy(), y.double().numpy()), rel=1e-6)


def test_matched_images_that_did_not_move_have_no_distance_only_when_paired() -> None:
    x = np.random.default_rng(1).normal(size=(30, 8))
    assert kid.polynomial_mmd(x, x, paired=True) == 0
    assert kid.polynomial_mmd(x, x) < -0.05


def test_the_paired_estimate_is_unbiased_for_correlated_sides() -> None:
    rng, draws, truth = np.random.default_rng(2), [], []
    for _ in range(300):
        x = rng.normal(size=(20, 4))
        draws.append(kid.polynomial_mmd(x + 0.5, x + 0.1 * rng.normal(size=x.shape), paired=True))
        truth.append(kid.polynomial_mmd(rng.normal(size=(20, 4)) + 0.5, rng.normal(size=(20, 4)) * np.sqrt(1.01)))
    error = np.hypot(np.std(draws), np.std(truth)) / np.sqrt(300)
    assert np.mean(draws) == pytest.approx(np.mean(truth), abs=4 * error)


def test_half_samples_are_seeded_and_spread_around_the_value() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(60, 6)), rng.normal(0.8, 1, size=(60, 6))
    first = kid.half_samples(x, y, paired=True)
    assert first == kid.half_samples(x, y, paired=True) and first.lo < first.value < first.hi
    assert (first.n, first.size) == (60, 30) and first != kid.half_samples(x, y, paired=True, seed=1)


@pytest.mark.parametrize(("x", "y"), [((1, 4), (5, 4)), ((5, 4), (5, 3)), ((0, 4), (0, 4))])
def test_kid_refuses_what_it_cannot_compare(x: Any, y: Any) -> None:
    with pytest.raises(ValueError, match="n, m >= 2"):
        kid.polynomial_mmd(np.zeros(x), np.zeros(y))


def test_kid_refuses_nan() -> None:
    with pytest.raises(ValueError, match="NaN"):
        kid.polynomial_mmd(np.full((3, 2), np.nan), np.zeros((3, 2)))


def test_features_refuse_no_images_and_unknown_names() -> None:
    with pytest.raises(ValueError, match="n >= 1"):
        features.extract(torch.zeros(0, 3, 64, 64))
    with pytest.raises(ValueError, match="efficientnet-lite0"):
        features.extract(torch.zeros(1, 3, 64, 64), "inception")


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match=r"erasure-suite\[eval\]"):
        features._load_net()


def test_another_weight_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    monkeypatch.setattr(features, "EFFICIENTNET_LITE0_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="SHA-256"):
        features._load_net()


def test_efficientnet_knows_a_uniform_and_features_do_not_depend_on_the_batch() -> None:
    """The photograph that matplotlib ships shows an officer: ImageNet's class 652, military uniform."""
    pytest.importorskip("efficientnet_lite_pytorch")
    from matplotlib.cbook import get_sample_data
    from PIL import Image

    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as picture:
        pixels = np.array(picture.convert("RGB"))
    photo = torch.from_numpy(pixels).permute(2, 0, 1)[None, :, : pixels.shape[1]] / 255
    small = torch.nn.functional.interpolate(photo, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    pooled = features.extract(torch.cat([small, torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))]))
    assert pooled.shape == (3, 1280)
    assert features._load_net()._fc(pooled)[0].argmax() == 652
    assert torch.allclose(features.extract(small), pooled[:1], atol=1e-4)
