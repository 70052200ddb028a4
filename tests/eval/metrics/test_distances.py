import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from erasure.errors import ErasureError
from erasure.eval.metrics import cmmd, frechet, kid
from erasure.eval.metrics.distances import CMMD, FID, KID
from erasure.eval.metrics.extraction import extractor
from erasure.eval.metrics.reference import feature_table, save_features

Rows = Callable[..., list[Any]]
Noise = Callable[..., Tensor]


def scipy_distance(x: Any, y: Any) -> float:
    """The textbook: sample means and covariances, the root of their product by scipy."""
    mu1, mu2, c1, c2 = x.mean(0), y.mean(0), np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return float(((mu1 - mu2) ** 2).sum() + np.trace(c1 + c2 - 2 * np.real(sqrtm(c1 @ c2))))


def features_of(net: nn.Module, images: Tensor) -> Any:
    with torch.inference_mode():
        return net(images.float() / 255).double().numpy()


def write_images(folder: Path, images: Tensor) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")
    return folder


@pytest.mark.parametrize("d", [1, 3, 40])
def test_the_distance_is_scipys(d: int) -> None:
    rng = np.random.default_rng(d)
    x, y = rng.normal(size=(300, d)) @ rng.normal(size=(d, d)), rng.normal(0.5, 2, size=(200, d))
    ours = frechet.distance(x.mean(0), np.cov(x, rowvar=False).reshape(d, d), y.mean(0), np.cov(y, rowvar=False).reshape(d, d))
    assert ours == pytest.approx(
        scipy_distance(x, y) if d > 1 else (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2, rel=1e-9
    )


def test_the_distance_holds_where_covariances_are_singular() -> None:
    """Two flat Gaussians on crossing lines: the root of the product is worked out by hand."""
    along, across = np.diag([4.0, 0.0]), np.array([[1.0, 1.0], [1.0, 1.0]])
    assert frechet.distance([0, 0], along, [3, 4], across) == pytest.approx(25 + 4 + 2 - 2 * np.sqrt(4 * 1), abs=1e-9)
    assert frechet.distance([0, 0], along, [0, 0], along) == pytest.approx(0, abs=1e-9)


def test_equal_sets_are_at_zero_even_when_smaller_than_the_features() -> None:
    x = np.random.default_rng(0).normal(size=(16, 400))
    mu, cov = x.mean(0), np.cov(x, rowvar=False)
    assert frechet.distance(mu, cov, mu, cov) == pytest.approx(0, abs=1e-9)
    assert min(frechet.distance(mu, scale * cov, mu, scale * cov) for scale in range(1, 11)) >= 0, "rounding makes it no less than 0"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([0.0], [[1.0, 0.0], [0.0, 1.0]], [0.0], [[1.0]]), "covariance \\[d, d\\]"),
        (([0.0], [[1.0]], [0.0, 0.0], np.eye(2)), "one dimension"),
        (([float("nan")], [[1.0]], [0.0], [[1.0]]), "NaN"),
        (([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]], [0.0, 0.0], np.eye(2)), "symmetric"),
    ],
)
def test_the_distance_refuses_what_is_no_gaussian(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        frechet.distance(*arguments)


def test_fid_by_a_custom_module_is_scipys_and_torchmetrics(pooled: nn.Module, rows: Rows, noise: Noise) -> None:
    own, base = noise(50, 1, bright=0.5), noise(50, 2, bright=0.3)
    fid = FID(features=pooled)
    fid.update(own, rows(50), base=base)
    expected = scipy_distance(features_of(pooled, own), features_of(pooled, base))
    assert expected > 0.1
    assert fid.compute().item() == pytest.approx(expected, rel=1e-6)
    theirs = FrechetInceptionDistance(feature=pooled, normalize=True)
    theirs.update(base.float() / 255, real=True)
    theirs.update(own.float() / 255, real=False)
    assert fid.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-5)


def test_fid_does_not_depend_on_batches_or_on_merging(pooled: nn.Module, rows: Rows, noise: Noise) -> None:
    own, base = noise(40, 1), noise(40, 2, bright=0.2)
    whole, parts, first, second = (FID(features=pooled) for _ in range(4))
    whole.update(own, rows(40), base=base)
    for at in range(0, 40, 7):
        part = slice(at, at + 7)
        parts.update(own[part], rows(40)[part], base=base[part])
    first.update(own[:13], rows(13), base=base[:13])
    second.update(own[13:], rows(27, 13), base=base[13:])
    first.merge_state(second)
    assert parts.compute().item() == pytest.approx(whole.compute().item(), rel=1e-6)
    assert first.compute().item() == pytest.approx(whole.compute().item(), rel=1e-6)
    whole.reset()
    with pytest.raises(ErasureError, match="no images"):
        whole.result()
    whole.update(own, rows(40), base=base)
    assert parts.compute().item() == pytest.approx(whole.compute().item(), rel=1e-6)


def test_floats_score_as_the_files_that_they_become(pooled: nn.Module, rows: Rows, noise: Noise) -> None:
    own, base = noise(20, 1), noise(20, 2)
    jitter = (own.float() / 255 + 0.4 / 255 * (2 * torch.rand(own.shape) - 1)).clamp(0, 1)
    values = []
    for images in (own, jitter):
        fid = FID(features=pooled)
        fid.update(images, rows(20), base=base)
        values.append(fid.compute().item())
    assert values[0] == values[1]


def test_fid_at_small_n_says_so(pooled: nn.Module, rows: Rows, noise: Noise, caplog: pytest.LogCaptureFixture) -> None:
    fid = FID(features=pooled)
    fid.update(noise(6, 1), rows(6), base=noise(6, 2))
    with caplog.at_level(logging.WARNING, "erasure"):
        record = fid.result()
    assert [w.split(":")[0] for w in record["warnings"]] == ["n = 6 < 10000", "n = 6 <= 6 features"]
    assert "biased upwards" in caplog.text and record["n"] == record["n_reference"] == 6
    assert frechet.small_sample(9_999, 2048) and not frechet.small_sample(10_000, 2048)
    assert len(frechet.small_sample(2048, 2048)) == 2 and len(frechet.small_sample(2049, 2048)) == 1


def test_fid_is_biased_upwards_at_small_n(pooled: nn.Module, rows: Rows, noise: Noise) -> None:
    """What the warning claims: two samples of one distribution are further apart the smaller they are."""
    means = []
    for n in (8, 64):
        values = []
        for seed in range(10):
            fid = FID(features=pooled)
            fid.update(noise(n, 2 * seed), rows(n), base=noise(n, 2 * seed + 1))
            values.append(fid.compute().item())
        means.append(np.mean(values))
    assert means[0] > 3 * means[1] > 0


def test_fid_to_a_folder_and_to_its_saved_statistics(pooled: nn.Module, rows: Rows, noise: Noise, tmp_path: Path) -> None:
    own, real = noise(30, 1), noise(30, 2, bright=0.3)
    folder = write_images(tmp_path / "real", real)
    against_base, against_folder = FID(features=pooled), FID(folder, features=pooled)
    against_base.update(own, rows(30), base=real)
    against_folder.update(own, rows(30))
    assert against_folder.needs == frozenset()
    assert against_folder.compute().item() == pytest.approx(against_base.compute().item(), rel=1e-6)
    against_folder.statistics("ref").save(tmp_path / "real.npz")
    against_file = FID(tmp_path / "real.npz", features=pooled)
    against_file.update(own, rows(30))
    record = against_file.result()
    assert record["value"] == against_folder.compute().item() and record["n_reference"] == 30
    assert record["identity"]["features"]["sha256"] == extractor(pooled).identity()["sha256"]


def test_statistics_of_another_network_are_refused(pooled: nn.Module, rows: Rows, noise: Noise, tmp_path: Path) -> None:
    fid = FID(features=pooled)
    fid.update(noise(9, 1), rows(9), base=noise(9, 2))
    fid.statistics().save(tmp_path / "s.npz")
    pooled.mix.weight.data += 1  # type: ignore[union-attr, operator]
    changed = FID(tmp_path / "s.npz", features=pooled)
    changed.update(noise(9, 1), rows(9))
    with pytest.raises(ErasureError, match=r"another extractor.*sha256"):
        changed.compute()


def test_statistics_of_other_tools_are_refused(pooled: nn.Module, tmp_path: Path) -> None:
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(6), sigma=np.eye(6))
    with pytest.raises(ErasureError, match="no statistics of ours"):
        FID(tmp_path / "theirs.npz", features=pooled).statistics("ref")
    with pytest.raises(ErasureError, match="no reference at"):
        FID(tmp_path / "nowhere", features=pooled).statistics("ref")


def test_a_truncated_reference_image_is_named(pooled: nn.Module, noise: Noise, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "real", noise(3))
    broken = folder / "001.png"
    broken.write_bytes(broken.read_bytes()[:-200])
    with pytest.raises(ErasureError, match=r"001\.png is no readable image"):
        FID(folder, features=pooled).statistics("ref")


def test_reference_images_of_mixed_sizes_each_count_once(pooled: nn.Module, noise: Noise, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "real", noise(4))
    Image.fromarray(noise(1, 5, side=24)[0].permute(1, 2, 0).numpy()).save(folder / "001b.png")
    assert FID(folder, features=pooled).statistics("ref").n == 5


def test_kid_of_one_full_subset_is_the_closed_form_exactly(pooled: nn.Module, rows: Rows, noise: Noise, tmp_path: Path) -> None:
    own, real = noise(24, 1), noise(24, 2, bright=0.3)
    folder = write_images(tmp_path / "real", real)
    x, y = (feature_of(pooled, images) for images in (own, real))
    for options in ({"subset_size": None}, {"subset_size": 24, "subsets": 1}):
        unpaired, paired = KID(folder, features=pooled, **options), KID(features=pooled, **options)
        unpaired.update(own, rows(24))
        paired.update(own, rows(24), base=real)
        assert unpaired.compute().item() == kid.polynomial_mmd(x, y) != 0
        assert paired.compute().item() == kid.polynomial_mmd(x, y, paired=True)
        assert (unpaired.identity()["paired"], paired.identity()["paired"]) == (False, True)


def feature_of(net: nn.Module, images: Tensor) -> Any:
    with torch.inference_mode():
        return net(images.float() / 255).numpy()


def test_kid_over_subsets_is_seeded_and_near_the_closed_form(pooled: nn.Module, rows: Rows, noise: Noise) -> None:
    own, base = noise(60, 1), noise(60, 2, bright=0.3)
    records = []
    for seed in (0, 0, 1):
        metric = KID(features=pooled, subsets=50, subset_size=30, seed=seed)
        metric.update(own[:25], rows(25), base=base[:25])
        metric.update(own[25:], rows(35, 25), base=base[25:])
        records.append(metric.result())
    closed = kid.polynomial_mmd(feature_of(pooled, own), feature_of(pooled, base), paired=True)
    assert records[0] == records[1] and records[0]["value"] != records[2]["value"]
    assert records[0]["value"] == pytest.approx(closed, abs=4 * records[0]["std"] / np.sqrt(50))
    assert records[0]["lo"] is None and records[0]["n"] == 60


def test_kid_wants_enough_images_for_its_subsets(pooled: nn.Module, rows: Rows, noise: Noise) -> None:
    metric = KID(features=pooled)
    metric.update(noise(5, 1), rows(5), base=noise(5, 2))
    with pytest.raises(ErasureError, match="subsets of 1000 was given 5 images"):
        metric.compute()
    with pytest.raises(ErasureError, match="two images or more"):
        KID(features=pooled, subset_size=1)


def test_saved_features_serve_as_reference(pooled: nn.Module, rows: Rows, noise: Noise, tmp_path: Path) -> None:
    folder, made_by = write_images(tmp_path / "real", noise(12, 2)), extractor(pooled)
    save_features(tmp_path / "f.npz", feature_table(folder, made_by), made_by)
    values = []
    for source in (folder, tmp_path / "f.npz"):
        metric = KID(source, features=pooled, subset_size=None)
        metric.update(noise(12, 1), rows(12))
        values.append(metric.compute().item())
    assert values[0] == values[1]


def dense_cmmd(x: Tensor, y: Tensor, unbiased: bool) -> float:
    """The definition, one pair at a time, in float64."""

    def mean(a: Tensor, b: Tensor, same: bool) -> float:
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and unbiased and i == j)]
        return sum(float(torch.exp(-((a[i] - b[j]) ** 2).sum() / 200)) for i, j in pairs) / len(pairs)

    x, y = x.double(), y.double()
    return 1000 * (mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False))


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_cmmd_is_the_dense_formula(estimator: cmmd.Estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 5, generator=generator), torch.randn(7, 5, generator=generator) + 1
    expected = dense_cmmd(x, y, estimator == "unbiased")
    assert expected > 1
    for block in (1024, 4):
        monkeypatch.setattr(cmmd, "ROWS", block)
        assert cmmd.mmd(x, y, estimator=estimator) == pytest.approx(expected, rel=1e-9)


def test_cmmd_of_equal_sets_is_zero_when_biased_and_less_when_not() -> None:
    x = torch.nn.functional.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    assert cmmd.mmd(x, x) == pytest.approx(0, abs=1e-9)
    assert cmmd.mmd(x, x, estimator="unbiased") < -0.1


def test_cmmd_metric_normalises_and_names_the_estimator(pooled: nn.Module, rows: Rows, noise: Noise, tmp_path: Path) -> None:
    own, base = noise(10, 1), noise(10, 2, bright=0.2)
    x, y = (torch.nn.functional.normalize(torch.from_numpy(feature_of(pooled, images)), dim=1) for images in (own, base))
    metric = CMMD(features=pooled, estimator="unbiased")
    metric.update(own[:4], rows(4), base=base[:4])
    metric.update(own[4:], rows(6, 4), base=base[4:])
    assert metric.compute().item() == pytest.approx(dense_cmmd(x, y, True), rel=1e-5)
    assert (metric.identity()["estimator"], metric.identity()["sigma"]) == ("unbiased", 10)
    on_disk = CMMD(write_images(tmp_path / "real", base), features=pooled, estimator="unbiased")
    on_disk.update(own, rows(10))
    assert on_disk.compute().item() == pytest.approx(metric.compute().item(), rel=1e-5)


def test_cmmd_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(ValueError, match="n, m >= 2"):
        cmmd.mmd(torch.zeros(1, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="NaN"):
        cmmd.mmd(torch.full((2, 3), torch.nan), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="no estimator"):
        cmmd.mmd(torch.zeros(2, 3), torch.zeros(4, 3), estimator="plain")  # type: ignore[arg-type]


def test_features_that_are_not_numbers_stop_the_metric(rows: Rows, noise: Noise) -> None:
    class Broken(nn.Module):
        num_features = 2

        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3))[:, :2] / 0

    with pytest.raises(ErasureError, match="NaN or infinity"):
        FID(features=Broken()).update(noise(2), rows(2), base=noise(2))
